//! Writes PEFT's directories: `adapter_config.json` and `adapter_model.safetensors`, with the
//! names, shapes and layout that peft itself writes (`utils/save_and_load.py`).
//!
//! The settings are those that all versions of peft know: an unknown key makes older ones
//! fail, so rarer ones are written only where they are set.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::{Dtype, View};
use serde_json::{Value, json};

use crate::files::{replace_file, sync_folder};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// An adapter to be written: what training has made.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFile {
    /// How it was made and is scaled.
    pub settings: WrittenSettings,
    /// The low-rank products.
    pub modules: Vec<WrittenModule>,
    /// Matrices that replace the model's: module (as in [`WrittenModule::name`]), shape
    /// `[rows, cols]`, values by rows.
    pub saved: Vec<(String, [usize; 2], Vec<f32>)>,
}

/// What `adapter_config.json` says, by peft's names.
#[derive(Debug, Clone, PartialEq)]
pub struct WrittenSettings {
    /// Rank of all modules.
    pub r: usize,
    /// B A is scaled by `lora_alpha / r`, or `lora_alpha / √r`.
    pub lora_alpha: f64,
    /// Dropout of the training.
    pub lora_dropout: f64,
    /// Modules that are adapted, by the ends of their names.
    pub target_modules: Vec<String>,
    /// The scale's divisor is `√r` (rsLoRA).
    pub use_rslora: bool,
    /// Modules have magnitudes (DoRA).
    pub use_dora: bool,
    /// The adapted layers where they are not all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules that were trained as a whole.
    pub modules_to_save: Vec<String>,
    /// The model.
    pub base_model_name_or_path: String,
}

impl WrittenSettings {
    /// The factor of B A.
    pub fn scale(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    fn to_json(&self) -> Value {
        let some = |list: &[String]| (!list.is_empty()).then(|| json!(list));
        let mut fields = BTreeMap::from([
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(false)),
            ("inference_mode", json!(true)),
            ("init_lora_weights", json!(true)),
            ("layers_pattern", Value::Null),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", number(self.lora_dropout)),
            ("modules_to_save", some(&self.modules_to_save).unwrap_or(Value::Null)),
            ("peft_type", json!("LORA")),
            ("r", json!(self.r)),
            ("revision", Value::Null),
            ("target_modules", json!(self.target_modules)),
            ("task_type", json!("CAUSAL_LM")),
        ]);
        let variants = [("use_rslora", self.use_rslora), ("use_dora", self.use_dora)];
        fields.extend(variants.into_iter().filter(|(_, on)| *on).map(|(key, on)| (key, json!(on))));
        json!(fields)
    }
}

/// Whole numbers without a point: some readers want an integer for alpha.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// `s · B A` beside a linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct WrittenModule {
    /// Full name in the model's Hugging Face form: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns of the layer's matrix.
    pub inputs: usize,
    /// Rows of the layer's matrix.
    pub outputs: usize,
    /// Columns of B, rows of A.
    pub rank: usize,
    /// `[rank, inputs]`.
    pub a: Vec<f32>,
    /// `[outputs, rank]`.
    pub b: Vec<f32>,
    /// DoRA's magnitudes, `[outputs]`.
    pub magnitude: Option<Vec<f32>>,
}

impl AdapterFile {
    /// Refuses what no reader would take.
    ///
    /// # Errors
    /// A fault that names the module: lengths that do not fit, another rank than the
    /// settings', magnitudes where there should be none or none where there should be some.
    pub(super) fn check(&self) -> Result<()> {
        let WrittenSettings { r, use_dora, .. } = self.settings;
        for m in &self.modules {
            let magnitudes = m.magnitude.as_ref().map(Vec::len);
            if m.rank != r
                || m.a.len() != m.rank * m.inputs
                || m.b.len() != m.outputs * m.rank
                || magnitudes != use_dora.then_some(m.outputs)
            {
                return Err(Error::fault(format!(
                    "adapter of {}: {} values of A, {} of B and {magnitudes:?} magnitudes for \
                     {} rows and {} columns of rank {}, where r is {r}",
                    m.name,
                    m.a.len(),
                    m.b.len(),
                    m.outputs,
                    m.inputs,
                    m.rank
                )));
            }
        }
        match self.saved.iter().find(|(_, [rows, cols], values)| values.len() != rows * cols) {
            None => Ok(()),
            Some((name, shape, values)) => Err(Error::fault(format!(
                "{name}: {} values for the shape {shape:?}",
                values.len()
            ))),
        }
    }
}

/// Writes the adapter into the directory `dir`, which is created where missing. Each file
/// is replaced as a whole and lies on the disk when this returns; the settings come last,
/// so that a new directory is an adapter once it is complete.
///
/// # Errors
/// A fault: the file system's, or tensors that do not fit together.
pub fn write_peft(dir: &Path, adapter: &AdapterFile) -> Result<()> {
    adapter.check()?;
    std::fs::create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(tensors(adapter), Some(metadata)).map_err(Error::fault)?;
    replace_file(&dir.join(WEIGHTS), &bytes)?;
    let config = serde_json::to_string_pretty(&adapter.settings.to_json()).map_err(Error::fault)?;
    replace_file(&dir.join(CONFIG), config.as_bytes())?;
    sync_folder(&dir.join(CONFIG));
    Ok(())
}

/// The tensors by their names in the file.
fn tensors(adapter: &AdapterFile) -> Vec<(String, F32s<'_>)> {
    let mut all = Vec::new();
    let mut add = |module: &str, part: &str, shape: Vec<usize>, values| {
        all.push((format!("base_model.model.{module}.{part}"), F32s { shape, values }));
    };
    for m in &adapter.modules {
        add(&m.name, "lora_A.weight", vec![m.rank, m.inputs], &m.a);
        add(&m.name, "lora_B.weight", vec![m.outputs, m.rank], &m.b);
        if let Some(magnitude) = &m.magnitude {
            add(&m.name, "lora_magnitude_vector", vec![m.outputs], magnitude);
        }
    }
    for (name, shape, values) in &adapter.saved {
        add(name, "weight", shape.to_vec(), values);
    }
    all
}

/// A tensor of floats, whose bytes are made when they are written.
struct F32s<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl View for F32s<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>().into()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

#[cfg(test)]
pub(super) mod testing {
    //! Adapters for tests.

    use super::*;
    use crate::model::checkpoint::{Format, TensorTable};

    /// A path of tests/golden.
    pub fn golden(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    /// What peft has written to the golden adapter `name`, as training would hold it.
    pub fn read_golden(name: &str) -> AdapterFile {
        let dir = golden("adapters").join(name);
        let config: Value =
            serde_json::from_slice(&std::fs::read(dir.join(CONFIG)).unwrap()).unwrap();
        let texts = |key: &str| {
            let list = config[key].as_array().cloned().unwrap_or_default();
            list.iter().map(|text| text.as_str().unwrap().to_owned()).collect()
        };
        let settings = WrittenSettings {
            r: config["r"].as_u64().unwrap() as usize,
            lora_alpha: config["lora_alpha"].as_f64().unwrap(),
            lora_dropout: config["lora_dropout"].as_f64().unwrap(),
            target_modules: texts("target_modules"),
            use_rslora: config["use_rslora"] == true,
            use_dora: config["use_dora"] == true,
            layers_to_transform: None,
            modules_to_save: texts("modules_to_save"),
            base_model_name_or_path: "/models/llama".into(),
        };
        let (table, _) = TensorTable::of_file(&dir.join(WEIGHTS), Format::Safetensors).unwrap();
        let read = |name: &str| {
            let shape = table.shape(name)?;
            let rows = if shape.len() == 1 { 1 } else { shape[0] };
            let cols = *shape.last().unwrap();
            let all = 0..rows;
            let matrix = table.part(name, [rows, cols], std::slice::from_ref(&all), 0..cols);
            Some(([rows, cols], matrix.unwrap().to_f32()))
        };
        let mut file = AdapterFile { settings, modules: Vec::new(), saved: Vec::new() };
        for (name, _) in table.iter() {
            let module = name.strip_prefix("base_model.model.").unwrap();
            if let Some(module) = module.strip_suffix(".lora_A.weight") {
                let of = |part: &str| read(&format!("base_model.model.{module}.{part}"));
                let ([rank, inputs], a) = read(name).unwrap();
                let ([outputs, _], b) = of("lora_B.weight").unwrap();
                let magnitude = of("lora_magnitude_vector").map(|(_, values)| values);
                let name = module.to_owned();
                file.modules.push(WrittenModule { name, inputs, outputs, rank, a, b, magnitude });
            } else if !module.contains("lora_") {
                let (shape, values) = read(name).unwrap();
                let module = module.strip_suffix(".weight").unwrap();
                file.saved.push((module.to_owned(), shape, values));
            }
        }
        file
    }

    /// An adapter of these modules (name, rows, columns) whose factors are zero.
    pub fn zeros(r: usize, modules: &[(&str, [usize; 2])]) -> AdapterFile {
        let settings = WrittenSettings {
            r,
            lora_alpha: 2.0 * r as f64,
            lora_dropout: 0.0,
            target_modules: modules.iter().map(|(name, _)| (*name).to_owned()).collect(),
            use_rslora: false,
            use_dora: false,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            base_model_name_or_path: "/models/llama".into(),
        };
        let module = |(name, [outputs, inputs]): &(&str, [usize; 2])| WrittenModule {
            name: (*name).to_owned(),
            inputs: *inputs,
            outputs: *outputs,
            rank: r,
            a: vec![0.0; r * inputs],
            b: vec![0.0; outputs * r],
            magnitude: None,
        };
        AdapterFile { settings, modules: modules.iter().map(module).collect(), saved: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Adapter, AdapterSource};
    use super::testing::{golden, read_golden};
    use super::*;
    use crate::model::Checkpoint;

    #[test]
    fn the_weights_are_peft_s_byte_for_byte() {
        for name in ["dora", "lora_qv"] {
            let dir = tempfile::tempdir().unwrap();
            write_peft(dir.path(), &read_golden(name)).unwrap();
            let [ours, theirs] = [dir.path(), &golden("adapters").join(name)]
                .map(|dir| std::fs::read(dir.join(WEIGHTS)).unwrap());
            assert!(ours == theirs, "{name}");
        }
    }

    #[test]
    fn what_is_written_can_be_opened_and_is_written_again_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/adapter");
        let base = Checkpoint::open(&golden("llama_gqa")).unwrap();
        let source = AdapterSource { name: "mine".into(), path: path.clone() };
        for name in ["lora_qv", "dora", "saved_lm_head"] {
            write_peft(&path, &read_golden(name)).unwrap();
            Adapter::open(&source, base.config()).unwrap();
            assert_eq!(std::fs::read_dir(&path).unwrap().count(), 2, "no partial file is left");
        }
    }

    /// Older versions of peft fail on keys that they do not know.
    #[test]
    fn the_settings_are_the_ones_that_all_versions_know() {
        let settings = WrittenSettings {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.05,
            target_modules: vec!["q_proj".into(), "v_proj".into()],
            use_rslora: false,
            use_dora: false,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            base_model_name_or_path: "/models/llama".into(),
        };
        let expected = r#"{
  "base_model_name_or_path": "/models/llama",
  "bias": "none",
  "fan_in_fan_out": false,
  "inference_mode": true,
  "init_lora_weights": true,
  "layers_pattern": null,
  "layers_to_transform": null,
  "lora_alpha": 16,
  "lora_dropout": 0.05,
  "modules_to_save": null,
  "peft_type": "LORA",
  "r": 8,
  "revision": null,
  "target_modules": [
    "q_proj",
    "v_proj"
  ],
  "task_type": "CAUSAL_LM"
}"#;
        assert_eq!(serde_json::to_string_pretty(&settings.to_json()).unwrap(), expected);
        let rarer = WrittenSettings { use_dora: true, use_rslora: true, ..settings };
        let rarer =
            WrittenSettings { layers_to_transform: Some(vec![1]), lora_alpha: 2.5, ..rarer };
        let written = rarer.to_json();
        assert_eq!(written["use_dora"], json!(true));
        assert_eq!(written["layers_to_transform"], json!([1]));
        assert_eq!(written["lora_alpha"], json!(2.5));
        assert_eq!(rarer.scale(), 2.5 / 8f64.sqrt());
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused_by_name() {
        let good = read_golden("dora");
        let changes: [fn(&mut AdapterFile); 5] = [
            |file| file.modules[1].a.truncate(5),
            |file| file.modules[1].b.push(0.0),
            |file| file.modules[1].magnitude = None,
            |file| file.modules[1].rank = 3,
            |file| file.saved.push(("lm_head".into(), [2, 2], vec![0.0; 3])),
        ];
        for change in changes {
            let mut file = good.clone();
            change(&mut file);
            let dir = tempfile::tempdir().unwrap();
            let error = write_peft(dir.path(), &file).unwrap_err();
            let name = file.saved.last().map_or(&file.modules[1].name, |(name, ..)| name);
            assert!(error.message.contains(name.as_str()), "{error}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }
}
