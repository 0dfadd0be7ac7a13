//! Writes llama.cpp's adapter files (see `gguf.rs`, which reads them): the factors under the
//! names and in the row order of a GGUF model, the scale as an alpha.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::Reorder;
use super::gguf::architecture;
use super::slots::slots;
use super::write::{AdapterFile, WrittenModule};
use crate::files::{replace_file, sync_folder};
use crate::model::checkpoint::{StoredDtype, gguf, gguf_model};
use crate::model::config::ModelConfig;
use crate::model::names::{GGUF, Names, Place};
use crate::{Error, Result};

/// Writes the adapter of the model `base` into the file `path`, in f32. It is replaced as a
/// whole and lies on the disk when this returns.
///
/// # Errors
/// Input errors for what the format cannot say: DoRA, matrices that replace the model's,
/// modules of which a GGUF file keeps several in one tensor, an output projection that it
/// does not have. A fault: the file system's, or tensors that do not fit together.
pub fn write_gguf(path: &Path, adapter: &AdapterFile, base: &ModelConfig) -> Result<()> {
    adapter.check()?;
    refuse_unsupported(adapter, base)?;
    let architecture = architecture(&base.model_type);
    let factors = factors(adapter, base, architecture == "llama")?;
    let settings = &adapter.settings;
    let mut header = gguf::GgufHeader::default();
    header.str("general.type", "adapter");
    header.str("general.architecture", architecture);
    header.str("adapter.type", "lora");
    // Readers divide by the rank.
    header.float("adapter.lora.alpha", (settings.scale() * settings.r as f64) as f32);
    let kind = gguf::type_id(&StoredDtype::F32).unwrap_or_default();
    for (name, shape, values) in &factors {
        header.tensor(name, kind, shape, size_of_val(values.as_slice()) as u64);
    }
    let mut bytes = Vec::new();
    header.write(&mut bytes).map_err(Error::fault)?;
    for (_, _, values) in &factors {
        bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        header.fill_up(size_of_val(values.as_slice()) as u64, &mut bytes).map_err(Error::fault)?;
    }
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
    }
    replace_file(path, &bytes)?;
    sync_folder(path);
    Ok(())
}

fn refuse_unsupported(adapter: &AdapterFile, base: &ModelConfig) -> Result<()> {
    let refused = |what: String| {
        Err(Error::input(format!("{what}: write the adapter in PEFT's form, or farm merge it")))
    };
    if adapter.settings.use_dora {
        return refused("a GGUF adapter has no place for DoRA's magnitudes".into());
    }
    if let Some((name, ..)) = adapter.saved.first() {
        return refused(format!("a GGUF adapter has no place for {name} as a whole"));
    }
    let head = base.hf_names.lm_head;
    if base.tie_word_embeddings && adapter.modules.iter().any(|m| m.name == head) {
        return refused(format!("the model's GGUF form has no tensor of its own for {head}"));
    }
    Ok(())
}

/// A tensor: name, shape, values.
type Factor = (String, [usize; 2], Vec<f32>);

/// The tensors in the order of their names; `interleaved` where the file has the rows of
/// queries and keys in llama.cpp's order.
fn factors(adapter: &AdapterFile, base: &ModelConfig, interleaved: bool) -> Result<Vec<Factor>> {
    let modules: HashMap<&str, &WrittenModule> =
        adapter.modules.iter().map(|module| (module.name.as_str(), module)).collect();
    let targets = targets(&modules, base, interleaved)?;
    let mapped = |name: &str| targets.values().any(|target| target.module.name == name);
    if let Some(name) = modules.keys().find(|name| !mapped(name)) {
        return Err(Error::input(format!(
            "{name} is no linear layer that a GGUF adapter can name"
        )));
    }
    let factors = targets.into_iter().flat_map(|(name, target)| {
        let WrittenModule { rank, inputs, a, b, .. } = target.module;
        let rows = target.rows.iter().flat_map(|row| &b[row * rank..][..*rank]);
        let (b, outputs) = (rows.copied().collect(), target.rows.len());
        [
            (format!("{name}.weight.lora_a"), [*rank, *inputs], a.clone()),
            (format!("{name}.weight.lora_b"), [outputs, *rank], b),
        ]
    });
    Ok(factors.collect())
}

/// What a tensor of the GGUF form gets: rows of a module.
struct Target<'a> {
    module: &'a WrittenModule,
    /// The module's row for each of the tensor's.
    rows: Vec<usize>,
}

fn targets<'a>(
    modules: &HashMap<&str, &'a WrittenModule>,
    base: &ModelConfig,
    interleaved: bool,
) -> Result<BTreeMap<String, Target<'a>>> {
    let names = gguf_names(base);
    // None: a row that no module adapts.
    let mut rows_of: BTreeMap<String, Vec<Option<(&'a WrittenModule, usize)>>> = BTreeMap::new();
    for (place, from, head_dim) in pairs_of_places(base, &names) {
        let Some(module) = modules.get(from.name.as_str()).copied() else { continue };
        if from.stored_rows != module.outputs {
            return Err(Error::fault(format!(
                "{}: {} rows, but the model has {}",
                module.name, module.outputs, from.stored_rows
            )));
        }
        let mut from: Vec<usize> = from.rows.into_iter().flatten().collect();
        if let (true, Some(d)) = (interleaved, head_dim) {
            from = Reorder::Interleave.apply(&from, d);
        }
        let rows = rows_of.entry(place.name).or_insert_with(|| vec![None; place.stored_rows]);
        for (to, from) in place.rows.into_iter().flatten().zip(from) {
            rows[to] = Some((module, from));
        }
    }
    let of_one = |(name, rows): (String, Vec<Option<(&'a WrittenModule, usize)>>)| {
        let module = rows.iter().flatten().next().map(|(module, _)| *module);
        let own = |row: &Option<(&'a WrittenModule, usize)>| {
            row.filter(|(of, _)| module.is_some_and(|m| m.name == of.name)).map(|(_, row)| row)
        };
        match (module, rows.iter().map(own).collect()) {
            (Some(module), Some(rows)) => Ok((name, Target { module, rows })),
            _ => Err(Error::input(format!(
                "{name} of the model's GGUF form is of several modules, which have a low-rank \
                 product each: write the adapter in PEFT's form, or farm merge it"
            ))),
        }
    };
    rows_of.into_iter().map(of_one).collect()
}

/// Where the GGUF form has each matrix, where HF's form has it, and the width of its heads.
fn pairs_of_places(
    base: &ModelConfig,
    names: &Names,
) -> impl Iterator<Item = (Place, Place, Option<usize>)> {
    let head =
        |names: &Names| Place::new(names.lm_head.to_owned(), base.vocab_size, 0..base.vocab_size);
    let layers = slots(base, names).into_iter().zip(slots(base, &base.hf_names));
    let layers = layers.map(|(to, from)| (to.place, from.place, to.head_dim));
    layers.chain([(head(names), head(&base.hf_names), None)])
}

/// The names of the model's GGUF form: its own if it is one, else those of llama.cpp's
/// converter.
fn gguf_names(base: &ModelConfig) -> Names {
    match base.names.embed_tokens == GGUF.embed_tokens {
        true => base.names,
        false => gguf_model::names(base, false),
    }
}

#[cfg(test)]
mod tests {
    use super::super::write::testing::{golden, read_golden, zeros};
    use super::super::{Adapter, AdapterSource};
    use super::*;
    use crate::ErrorKind;
    use crate::model::checkpoint::{Checkpoint, Format, TensorTable};

    fn config_of(model: &str) -> ModelConfig {
        Checkpoint::open(&golden(model)).unwrap().config().clone()
    }

    fn written(adapter: &AdapterFile, base: &ModelConfig) -> (tempfile::TempDir, TensorTable) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/a.gguf");
        write_gguf(&path, adapter, base).unwrap();
        Adapter::open(&AdapterSource { name: "a".into(), path: path.clone() }, base).unwrap();
        let (table, _) = TensorTable::of_file(&path, Format::Gguf).unwrap();
        (dir, table)
    }

    fn values(table: &TensorTable, name: &str) -> ([usize; 2], Vec<f32>) {
        let shape: [usize; 2] = table.shape(name).unwrap().try_into().unwrap();
        let rows = 0..shape[0];
        let part = table.part(name, shape, std::slice::from_ref(&rows), 0..shape[1]).unwrap();
        (shape, part.to_f32())
    }

    /// A head's halves in turn.
    #[test]
    fn llama_s_queries_take_llama_cpp_s_order() {
        let adapter = read_golden("lora_qv");
        let base = config_of("llama_gqa");
        let (_dir, table) = written(&adapter, &base);
        let find = |end: &str| adapter.modules.iter().find(|m| m.name.ends_with(end)).unwrap();
        let q = find("layers.1.self_attn.q_proj");
        let (shape, b) = values(&table, "blk.1.attn_q.weight.lora_b");
        assert_eq!(shape, [q.outputs, q.rank]);
        let row = |values: &[f32], row: usize| values[row * q.rank..][..q.rank].to_vec();
        let (d, half) = (base.head_dim, base.head_dim / 2);
        for first in (0..q.outputs).step_by(d) {
            for i in 0..half {
                assert_eq!(row(&b, first + 2 * i), row(&q.b, first + i));
                assert_eq!(row(&b, first + 2 * i + 1), row(&q.b, first + half + i));
            }
        }
        assert_eq!(values(&table, "blk.1.attn_q.weight.lora_a").1, q.a);
        let v = find("layers.1.self_attn.v_proj");
        assert_eq!(values(&table, "blk.1.attn_v.weight.lora_b").1, v.b);
    }

    #[test]
    fn the_alpha_holds_the_whole_scale() {
        let mut adapter = zeros(4, &[("model.layers.0.mlp.up_proj", [96, 64])]);
        adapter.settings.lora_alpha = 6.0;
        adapter.settings.use_rslora = true;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        write_gguf(&path, &adapter, &config_of("llama_gqa")).unwrap();
        let (_, metadata) = TensorTable::of_file(&path, Format::Gguf).unwrap();
        assert_eq!(metadata.float("adapter.lora.alpha"), Some(12.0));
        assert_eq!(metadata.str("general.architecture"), Some("llama"));
    }

    /// Falcon's one tensor has another order of rows; Phi-3's the same.
    #[test]
    fn fused_modules_are_found_in_the_other_form() {
        let adapter = read_golden("falcon_qkv");
        let base = config_of("falcon_40b");
        let (_dir, table) = written(&adapter, &base);
        let qkv = adapter
            .modules
            .iter()
            .find(|m| m.name.contains("h.0.self_attention.query_key_value"))
            .unwrap();
        let (_, b) = values(&table, "blk.0.attn_qkv.weight.lora_b");
        // The last row of all is the last value in both; the first key follows all queries.
        let rank = qkv.rank;
        let (heads, kv, d) = (base.num_attention_heads, base.num_key_value_heads, base.head_dim);
        let first_key = heads / kv * d;
        assert_eq!(b[heads * d * rank..][..rank], qkv.b[first_key * rank..][..rank]);
        assert_eq!(b[b.len() - rank..], qkv.b[b.len() - rank..]);

        let adapter = read_golden("phi3_fused");
        let (_dir, table) = written(&adapter, &config_of("phi3"));
        let qkv = adapter.modules.iter().find(|m| m.name.ends_with("1.self_attn.qkv_proj"));
        assert_eq!(values(&table, "blk.1.attn_qkv.weight.lora_b").1, qkv.unwrap().b);
    }

    #[test]
    fn what_the_format_cannot_say_is_refused() {
        let refused = |adapter: &AdapterFile, model: &str, word: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.gguf");
            let error = write_gguf(&path, adapter, &config_of(model)).unwrap_err();
            assert!(error.kind == ErrorKind::Input && error.message.contains(word), "{error}");
            assert!(!path.exists());
        };
        refused(&read_golden("dora"), "llama_gqa", "DoRA");
        refused(&read_golden("saved_lm_head"), "llama_gqa", "lm_head as a whole");
        let head = zeros(2, &[("lm_head", [272, 64])]);
        refused(&head, "llama_tied", "lm_head");
        let expert = zeros(2, &[("model.layers.0.block_sparse_moe.experts.1.w1", [96, 64])]);
        let [inner, hidden] = {
            let config = config_of("mixtral");
            [config.experts.unwrap().moe_intermediate_size, config.hidden_size]
        };
        let name = &expert.modules[0].name;
        refused(&zeros(2, &[(name, [inner, hidden])]), "mixtral", "several modules");
        refused(&zeros(2, &[("model.norm", [64, 64])]), "llama_gqa", "model.norm");
    }
}
