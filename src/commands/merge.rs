//! `farm merge`: a model with an adapter written into its weights.
//!
//! A matrix is read, changed and written some rows at a time, so that memory does not grow
//! with the model. The result has its name once it is whole and on the disk.
//!
//! Left out: turning Hugging Face's form into GGUF (llama.cpp's convert_hf_to_gguf.py does, of
//! a merged model too) or the other way round, and Meta's form.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use crate::cli::{Dtype, MergeArgs};
use crate::commands::load;
use crate::error::say;
use crate::files::{sync_folder, with_suffix};
use crate::kernels::quant::quantize_rows;
use crate::model::Adapter;
use crate::model::adapter::merge::Merge;
use crate::model::checkpoint::{Format, StoredDtype};
use crate::stage::sources::resolved;
use crate::{Error, Result};

mod directory;
mod gguf;

/// Values that are in memory at a time.
const VALUES_AT_ONCE: usize = 8 << 20;

/// Merges and says what came of it.
///
/// # Errors
/// Input errors: a model or an adapter that cannot be read or do not belong together, an
/// output that exists or whose form is another than the model's. A fault of the file system.
pub fn run(args: &MergeArgs) -> Result<()> {
    let base = load::whole(&resolved(&args.model)?)?;
    let adapter = Adapter::open(&args.adapter, base.config())?;
    let merge = Merge::new(&adapter, &base)?;
    check_output(&args.output, base.files().format)?;
    let dtype = match args.dtype {
        Dtype::Auto => None,
        Dtype::F32 => Some(StoredDtype::F32),
        Dtype::Bf16 => Some(StoredDtype::Bf16),
        Dtype::F16 => Some(StoredDtype::F16),
    };
    let partial = Partial::beside(&args.output)?;
    let remarks = match base.files().format {
        Format::Gguf => gguf::write(&partial.path, &base, &merge, dtype)?,
        _ => directory::write(&partial.path, &base, &merge, dtype)?,
    };
    partial.rename(&args.output)?;
    for remark in remarks {
        say(format_args!("farm: {remark}"));
    }
    say(format_args!(
        "farm: adapter {} ({}) is in {}: {} matrices changed",
        adapter.name(),
        adapter.summary(),
        args.output.display(),
        merge.modules().count()
    ));
    Ok(())
}

/// Refuses what is there already, and a form that the model does not have.
fn check_output(output: &Path, model: Format) -> Result<()> {
    let refused = |why: &str| Err(Error::input(format!("--output {}: {why}", output.display())));
    if output.symlink_metadata().is_ok() {
        return refused("it exists already; name another, or remove it");
    }
    let is_gguf = output.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    match (model, is_gguf) {
        (Format::Meta, _) => refused(
            "a model in Meta's form cannot be merged; convert it to Hugging Face's form first",
        ),
        (Format::Gguf, false) => refused("a GGUF model becomes a file; give a name with .gguf"),
        (Format::Safetensors | Format::Torch, true) => refused(
            "a model directory becomes a directory; merge it, then llama.cpp's \
             convert_hf_to_gguf.py makes the GGUF file",
        ),
        _ => Ok(()),
    }
}

/// A file or directory that is not whole yet; goes when it is dropped.
struct Partial {
    path: PathBuf,
}

impl Partial {
    /// For `output`, whose folder is made where missing.
    fn beside(output: &Path) -> Result<Self> {
        if let Some(folder) = output.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        }
        Ok(Self { path: with_suffix(output, &format!("{}.partial", std::process::id())) })
    }

    fn rename(self, output: &Path) -> Result<()> {
        if output.symlink_metadata().is_ok() {
            let output = output.display();
            return Err(Error::input(format!("--output {output}: another process made it")));
        }
        std::fs::rename(&self.path, output).map_err(|error| Error::io(output, error))?;
        sync_folder(output);
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Whichever it is, and nothing if it was renamed.
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A file that is written once from its beginning.
struct Output {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Output {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create_new(&path).map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.with(|file| file.write_all(bytes))
    }

    fn with(
        &mut self,
        write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
    ) -> Result<()> {
        write(&mut self.file).map_err(|error| Error::io(&self.path, error))
    }

    /// Writes the matrix of `shape` as `dtype`; `read` gives rows of it.
    fn rows(
        &mut self,
        [rows, cols]: [usize; 2],
        dtype: &StoredDtype,
        read: impl Fn(Range<usize>, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let at_once = (VALUES_AT_ONCE / cols.max(1)).max(1);
        let (mut wide, mut bytes) = (Vec::new(), Vec::new());
        for first in (0..rows).step_by(at_once) {
            let rows = first..rows.min(first + at_once);
            wide.resize(rows.len() * cols, 0.0);
            read(rows, &mut wide)?;
            bytes.clear();
            encode(&wide, cols, dtype, &mut bytes)?;
            self.bytes(&bytes)?;
        }
        Ok(())
    }

    /// Returns once all of it lies on the disk.
    fn finish(mut self) -> Result<()> {
        self.with(|file| file.flush())?;
        self.file.get_ref().sync_all().map_err(|error| Error::io(&self.path, error))
    }
}

/// Appends rows of `cols` values as `dtype`.
fn encode(values: &[f32], cols: usize, dtype: &StoredDtype, out: &mut Vec<u8>) -> Result<()> {
    let too_large = |x: &f32| x.is_finite() && f16::from_f32(*x).is_infinite();
    match dtype {
        StoredDtype::F32 => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
        StoredDtype::Bf16 => {
            out.extend(values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()));
        }
        StoredDtype::F16 => match values.iter().find(|x| too_large(x)) {
            None => out.extend(values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes())),
            Some(x) => {
                return Err(Error::input(format!("{x} is too large for f16: take --dtype bf16")));
            }
        },
        StoredDtype::Quant(quant) => quantize_rows(*quant, values, cols, out)?,
        StoredDtype::Other(name) => {
            return Err(Error::input(format!("matrices of type {name} cannot be written")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
