//! What a model's files hold, whatever farm can do with it: the table of their tensors, and
//! what describes them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::table::MappedFile;
use super::{
    Format, ModelFiles, StoredTensor, Tensor, TensorTable, gguf, gguf_model, meta, safetensors,
    torch,
};
use crate::model::config::ModelConfig;
use crate::model::names::META;
use crate::model::small_file;
use crate::{Error, Result};

/// The headers of a model's files.
pub struct Contents {
    /// The files.
    pub files: ModelFiles,
    /// The tensors.
    pub tensors: TensorTable,
    /// The metadata of a GGUF file.
    pub metadata: Option<gguf::Metadata>,
    /// Meta's `params.json`.
    params: Option<Value>,
}

impl Contents {
    /// Reads the headers of the model at `model`, a directory or a GGUF file.
    ///
    /// # Errors
    /// Input errors that name the file: no weights, a shard missing, a damaged header, a
    /// file shorter than its header says.
    pub fn open(model: &Path) -> Result<Self> {
        let files = ModelFiles::find(model)?;
        let mapped = MappedFile::open_all(&files.weights)?;
        match files.format {
            Format::Safetensors => Self::of_tables(files, mapped, safetensors::read),
            Format::Torch => Self::of_tables(files, mapped, torch::read),
            Format::Meta => Self::of_meta(files, mapped),
            Format::Gguf => Self::of_gguf(files, mapped),
        }
    }

    /// HF's form: tensors in files, the configuration beside them.
    fn of_tables(
        files: ModelFiles,
        mapped: Vec<MappedFile>,
        read: impl Fn(&[u8]) -> Result<Vec<StoredTensor>>,
    ) -> Result<Self> {
        let mut tensors = HashMap::new();
        for (i, file) in mapped.iter().enumerate() {
            let table = file.read(&read)?.into_iter();
            tensors.extend(table.map(|t| (language_model_name(&t.name), Tensor::whole(i, t))));
        }
        let tensors = TensorTable::new(mapped, tensors);
        // A quantized copy of Meta's form keeps its names and its configuration.
        let is_meta =
            tensors.contains("tok_embeddings.weight") && !files.dir.join("config.json").exists();
        let params = is_meta.then(|| read_params(&files));
        Ok(Self { files, tensors, metadata: None, params: params.transpose()? })
    }

    /// Meta's form: each matrix is cut over the files.
    fn of_meta(files: ModelFiles, mapped: Vec<MappedFile>) -> Result<Self> {
        let params = read_params(&files)?;
        let tables = mapped.iter().map(|file| file.read(torch::read)).collect::<Result<_>>()?;
        let merged = meta::merge(tables, &params).map_err(|e| e.context(files.dir.display()))?;
        let tensors = merged
            .into_iter()
            .map(|m| (m.name, Tensor { dtype: m.dtype, shape: m.shape, pieces: m.pieces }))
            .collect();
        let tensors = TensorTable::new(mapped, tensors);
        Ok(Self { files, tensors, metadata: None, params: Some(params) })
    }

    /// GGUF: everything is in the file, or in the parts of a split one.
    fn of_gguf(files: ModelFiles, mapped: Vec<MappedFile>) -> Result<Self> {
        let parts = mapped.iter().map(|file| file.read(gguf::read)).collect::<Result<_>>()?;
        let gguf::Merged { metadata, tensors } =
            gguf::merge(parts).map_err(|e| e.context(first(&files)))?;
        let tensors = tensors.into_iter().map(|(i, t)| (t.name.clone(), Tensor::whole(i, t)));
        let tensors = TensorTable::new(mapped, tensors.collect());
        Ok(Self { files, tensors, metadata: Some(metadata), params: None })
    }

    /// The model's shape.
    ///
    /// # Errors
    /// Input errors that name the file: a family or a setting that is not supported.
    pub fn config(&self) -> Result<ModelConfig> {
        if let Some(metadata) = &self.metadata {
            let config = gguf_model::config(metadata, &self.tensors);
            return config.map_err(|e| e.context(first(&self.files)));
        }
        let Some(params) = &self.params else { return ModelConfig::from_dir(&self.files.dir) };
        let config = meta::hf_config(params, |name| self.tensors.shape(name))
            .and_then(ModelConfig::from_json)
            .map_err(|e| e.context(meta_params(&self.files).display()))?;
        Ok(ModelConfig { names: META, ..config.with_interleaved_pairs() })
    }
}

impl TensorTable {
    /// The tensors of one file, and the metadata of a GGUF file.
    ///
    /// # Errors
    /// An input error that names the file: it cannot be read, or is damaged.
    pub fn of_file(path: &Path, format: Format) -> Result<(Self, gguf::Metadata)> {
        let mapped = MappedFile::open_all(&[path.to_owned()])?;
        let mut metadata = gguf::Metadata::default();
        let mut stored = Vec::new();
        for file in &mapped {
            match format {
                Format::Safetensors => stored = file.read(safetensors::read)?,
                Format::Torch | Format::Meta => stored = file.read(torch::read)?,
                Format::Gguf => {
                    let header = file.read(gguf::read)?;
                    (metadata, stored) = (header.metadata, header.tensors);
                }
            }
        }
        let tensors = stored.into_iter().map(|t| (t.name.clone(), Tensor::whole(0, t)));
        Ok((Self::new(mapped, tensors.collect()), metadata))
    }
}

fn meta_params(files: &ModelFiles) -> PathBuf {
    files.dir.join("params.json")
}

fn read_params(files: &ModelFiles) -> Result<Value> {
    let path = meta_params(files);
    let bad = |e: &dyn std::fmt::Display| Error::input(format!("{}: {e}", path.display()));
    let text = small_file::read(&path).map_err(|e| bad(&e))?;
    serde_json::from_slice(&text).map_err(|e| bad(&e))
}

fn first(files: &ModelFiles) -> String {
    files.weights.first().map(|path| path.display().to_string()).unwrap_or_default()
}

/// Multimodal models keep the language model under a prefix.
pub(crate) fn language_model_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("language_model.") {
        return rest.to_owned();
    }
    match name.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}"),
        None => name.to_owned(),
    }
}
