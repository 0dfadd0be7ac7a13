//! A quantized file against the same checkpoint quantized while it is loaded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::*;
use crate::comm::{HostTensorComm, LocalComm};
use crate::kernels::tests::random;
use crate::model::decoder::Decoder;
use crate::model::layers::Loader;
use crate::model::weights::{Activations, Weight};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Models of all forms and of rows of all widths; the first has whole blocks of 256.
fn models() -> Vec<PathBuf> {
    let goldens = ["llama_bf16", "llama_gqa", "llama_bin", "llama_tied", "falcon_7b", "phi3"];
    let more = ["mixtral", "qwen3_moe_mixed", "gemma3", "falcon_40b", "meta_mp2"];
    let goldens =
        goldens.into_iter().chain(more).map(|name| root().join("tests/golden").join(name));
    [root().join("models/tiny")].into_iter().chain(goldens).collect()
}

fn whole(file: &QuantizedFile) -> Vec<u8> {
    let mut bytes = vec![0; file.bytes() as usize];
    file.read_at(0, &mut bytes).unwrap();
    bytes
}

/// A directory with the file and what describes the model.
fn written(model: &Path, file: &QuantizedFile) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "params.json"] {
        if model.join(name).exists() {
            std::fs::copy(model.join(name), dir.path().join(name)).unwrap();
        }
    }
    std::fs::write(dir.path().join("model.safetensors"), whole(file)).unwrap();
    dir
}

/// Type, bytes and whether they are mapped, of every matrix of every rank.
fn loaded(model: &Path, quant: QuantType, size: usize) -> Vec<Vec<(WeightDtype, Vec<u8>, bool)>> {
    let checkpoint = Checkpoint::open(model).unwrap();
    LocalComm::run(size, |comm| {
        let comm = Arc::new(HostTensorComm::new(comm));
        let dtype = Some(WeightDtype::Quant(quant));
        let activations = Activations::F32;
        let loader = Loader { source: &checkpoint, comm, dtype, activations, adapters: &[] };
        let decoder = Decoder::load(&loader).unwrap();
        let described = |weight: &Weight| {
            (weight.dtype(), weight.stored_bytes().to_vec(), weight.owned_bytes() == 0)
        };
        decoder.weights().map(described).collect()
    })
}

#[test]
fn the_file_holds_the_bytes_that_a_load_makes_at_any_tensor_parallel_size() {
    for model in models() {
        for quant in [QuantType::Q8_0, QuantType::Q4_K, QuantType::Q6_K] {
            let what = format!("{} {}", model.display(), quant.name());
            let file = QuantizedFile::open(&model, quant).unwrap().expect("something to quantize");
            let copy = written(&model, &file);
            for size in [1, 2] {
                let [expected, got] = [&model, copy.path()].map(|path| loaded(path, quant, size));
                for (expected, got) in expected.iter().flatten().zip(got.iter().flatten()) {
                    assert_eq!(expected.0, got.0, "{what}");
                    assert!(expected.1 == got.1, "{what} at {size}: bytes differ");
                    // But for rows from several places, and columns.
                    let is_cut = size > 1 || model.ends_with("falcon_40b");
                    assert!(got.2 || is_cut, "{what}: not mapped");
                }
                assert_eq!(expected.concat().len(), got.concat().len());
            }
            // It is quantized as far as it can be.
            assert!(QuantizedFile::open(copy.path(), quant).unwrap().is_none(), "{what}");
        }
    }
}

#[test]
fn any_cut_is_a_part_of_the_whole() {
    for (model, seed) in models().into_iter().zip(1..).step_by(3) {
        let file = QuantizedFile::open(&model, QuantType::Q4_K).unwrap().unwrap();
        let (all, again) = (whole(&file), QuantizedFile::open(&model, QuantType::Q4_K).unwrap());
        let again = again.unwrap();
        for (pair, len) in random(40, seed).chunks_exact(2).zip([1, 7, 143, 1000].iter().cycle()) {
            let start = (pair[0].abs().fract() * (all.len() - len) as f32) as usize;
            let mut cut = vec![0; *len];
            again.read_at(start as u64, &mut cut).unwrap();
            assert!(cut == all[start..start + len], "{len} bytes at {start}");
        }
        assert!(again.read_at(all.len() as u64, &mut [0]).is_err());
        assert!(file.bytes_read() > 0);
    }
}

#[test]
fn blocks_that_do_not_fit_their_tensor_are_an_error() {
    let file = QuantizedFile::open(&models()[0], QuantType::Q8_0).unwrap().unwrap();
    let text = String::from_utf8(file.header[8..].to_vec()).unwrap();
    let read = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(bytes.len() + (file.bytes() as usize - file.header.len()), 0);
        super::super::safetensors::read(&bytes)
    };
    let quantized = |tensors: Vec<super::super::StoredTensor>| {
        tensors.iter().filter(|t| t.dtype == StoredDtype::Quant(QuantType::Q8_0)).count()
    };
    assert!(quantized(read(&text).unwrap()) > 10);
    let norm = "\\\"model.norm.weight\\\":\\\"q8_0\\\",";
    for (from, to, why) in [
        ("\\\"q8_0\\\"", "\\\"q9_9\\\"", "unknown type \"q9_9\""),
        ("\\\"q8_0\\\"", "\\\"q6_k\\\"", "is no q6_k"),
        ("{\\\"", &format!("{{{norm}\\\""), "tensor model.norm.weight of BF16"),
        ("\"{\\\"", "\"[\\\"", "ggml_types"),
    ] {
        assert!(text.contains(from), "{from}");
        let error = read(&text.replacen(from, to, 1)).unwrap_err();
        assert!(error.message.contains(why), "{error}");
    }
}
