//! Every golden model passes; one that lacks any of its tensors, or has it in another shape or
//! type, does not.

use std::path::{Path, PathBuf};

use super::*;
use crate::model::checkpoint::{Contents, StoredDtype};

/// All golden models: directories with weights and GGUF files, but for the adapter and all parts
/// of a split file but the first.
pub fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let entries = |dir: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let is_model =
        |path: &PathBuf| ["golden.json", "golden_from"].iter().any(|f| path.join(f).is_file());
    let is_gguf = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        let is_part = name.contains("-of-") && !name.contains("-00001-");
        name.ends_with(".gguf") && name != "llama_lora.gguf" && !is_part
    };
    let mut models: Vec<PathBuf> = entries(&root).into_iter().filter(is_model).collect();
    models.extend(entries(&root.join("gguf")).into_iter().filter(is_gguf));
    models.sort();
    assert!(models.len() > 60, "{}", models.len());
    models
}

fn problem(config: &ModelConfig, contents: &Contents) -> Option<String> {
    Preflight::new(config, &contents.tensors).unwrap().problem()
}

#[test]
fn each_tensor_of_each_golden_model_is_wanted_as_it_is() {
    for model in goldens() {
        let name = model.display();
        let mut contents = Contents::open(&model).unwrap();
        let config = contents.config().unwrap();
        let preflight = Preflight::new(&config, &contents.tensors).unwrap();
        assert_eq!((preflight.problem(), preflight.unused()), (None, &[][..]), "{name}");
        let lm_head = format!("{}.weight", config.names.lm_head);
        let tensors: Vec<String> = contents.tensors.iter().map(|(name, _)| name.into()).collect();
        for tensor in tensors.iter().filter(|tensor| !is_derived(tensor)) {
            let whole = contents.tensors.by_name().remove(tensor).unwrap();
            if !(config.tie_word_embeddings && *tensor == lm_head) {
                let missing = problem(&config, &contents).unwrap();
                let wanted = format!("tensor {tensor} is missing. Did all files download");
                assert!(missing.starts_with(&wanted), "{name}: {missing}");
            }
            let mut other = whole.clone();
            other.shape[0] += 1;
            let shape = format!("tensor {tensor} has shape {:?}, but the ", other.shape);
            contents.tensors.by_name().insert(tensor.clone(), other);
            let reshaped = problem(&config, &contents).unwrap();
            assert!(reshaped.starts_with(&shape), "{name}: {reshaped}");
            let [.., rows, cols] = [&[1, 1][..], &whole.shape].concat()[..] else { unreachable!() };
            let wanted = match whole.shape.len() {
                3 => format!("asks for {} rows of {cols} in all.", whole.shape[0] * rows),
                _ => format!("asks for {:?}.", whole.shape),
            };
            assert!(reshaped.contains(&wanted), "{name}: {reshaped}");
            let mut other = whole.clone();
            other.dtype = StoredDtype::Other("I64".into());
            contents.tensors.by_name().insert(tensor.clone(), other);
            let typed = problem(&config, &contents).unwrap();
            let wanted = format!("tensor {tensor} has type I64, which is not supported.");
            assert!(typed.starts_with(&wanted), "{name}: {typed}");
            contents.tensors.by_name().insert(tensor.clone(), whole);
        }
    }
}

/// GGUF's and Meta's configurations follow from what tensors there are, too.
#[test]
fn a_configuration_made_of_what_is_left_hides_no_missing_tensor() {
    for model in goldens() {
        let mut contents = Contents::open(&model).unwrap();
        let lm_head = format!("{}.weight", contents.config().unwrap().names.lm_head);
        let tensors: Vec<String> = contents.tensors.iter().map(|(name, _)| name.into()).collect();
        for tensor in tensors.iter().filter(|name| !is_derived(name) && **name != lm_head) {
            let whole = contents.tensors.by_name().remove(tensor).unwrap();
            if let Ok(config) = contents.config() {
                let preflight = Preflight::new(&config, &contents.tensors).unwrap();
                // A first layer with one norm makes a model that has one in each.
                let is_said = preflight.problem().is_some() || !preflight.unused().is_empty();
                assert!(is_said, "{}: {tensor}", model.display());
            }
            contents.tensors.by_name().insert(tensor.clone(), whole);
        }
    }
}

#[test]
fn problems_are_told_together_with_what_is_like_them() {
    let mut contents = Contents::open(&goldens()[0].with_file_name("llama_gqa")).unwrap();
    let config = contents.config().unwrap();
    let names: Vec<String> = contents.tensors.iter().map(|(name, _)| name.into()).collect();
    // Another program's names.
    for name in &names {
        let tensor = contents.tensors.by_name().remove(name).unwrap();
        let other = name.replace("model.", "transformer.").replace("mlp.", "ffn.");
        contents.tensors.by_name().insert(other, tensor);
    }
    let preflight = Preflight::new(&config, &contents.tensors).unwrap();
    let text = preflight.problem().unwrap();
    let (first, rest) = text.split_once("; ").unwrap();
    assert_eq!(
        first,
        "tensor model.embed_tokens.weight is missing (there is transformer.embed_tokens.weight)"
    );
    // All but the output projection.
    assert!(rest.contains(&format!("; and {} more. Did all", names.len() - 1 - NAMED)), "{rest}");
    assert_eq!(preflight.unused().len(), names.len() - 1);
}
