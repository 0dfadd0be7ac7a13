//! The modules of a model that an adapter can change, by the names of its form, and whether
//! an adapter's tensors fit them.

use std::collections::BTreeMap;

use super::{LowRankTensors, Module};
use crate::model::checkpoint::{StoredDtype, TensorTable};
use crate::model::config::ModelConfig;
use crate::model::names::{ExpertNames, GateUp, Names, at, at_expert};
use crate::{Error, Result};

/// What a module's matrix is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    /// Rows; of all matrices of a stack.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Matrices that lie one after another (experts in GGUF); else 1.
    pub stack: usize,
    /// What stands for it as a whole may be in an adapter: the embedding and the way out.
    pub role: Role,
}

/// What a module is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// A linear layer inside.
    #[default]
    Linear,
    /// The embedding `[vocab, hidden]`.
    Embedding,
    /// The output projection `[vocab, hidden]`.
    Output,
}

/// All modules of the model that `names` name.
pub fn modules(config: &ModelConfig, names: &Names) -> BTreeMap<String, Shape> {
    let mut all = BTreeMap::new();
    let hidden = config.hidden_size;
    let mut add = |name: String, rows: usize, cols: usize| {
        all.insert(name, Shape { rows, cols, stack: 1, role: Role::Linear });
    };
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let d = config.head_dim;
    for layer in 0..config.num_hidden_layers {
        for place in names.qkv.places(layer, [heads, kv_heads, d], 0..heads, 0..kv_heads) {
            add(place.name, place.stored_rows, hidden);
        }
        add(at(names.o_proj, layer), hidden, heads * d);
        let is_dense = config.experts.as_ref().is_none_or(|e| e.dense_layers.contains(&layer));
        if !is_dense {
            continue;
        }
        let inner = config.intermediate_size;
        match names.gate_up {
            GateUp::Split(both) => {
                both.iter().for_each(|name| add(at(name, layer), inner, hidden));
            }
            GateUp::Concatenated(both) => add(at(both, layer), 2 * inner, hidden),
            GateUp::Up(up) => add(at(up, layer), inner, hidden),
        }
        add(at(names.down_proj, layer), hidden, inner);
    }
    add_experts(config, names, &mut all);
    let vocabulary = |role| Shape { rows: config.vocab_size, cols: hidden, stack: 1, role };
    all.insert(names.embed_tokens.to_owned(), vocabulary(Role::Embedding));
    all.insert(names.lm_head.to_owned(), vocabulary(Role::Output));
    all
}

fn add_experts(config: &ModelConfig, names: &Names, all: &mut BTreeMap<String, Shape>) {
    let Some(experts) = &config.experts else { return };
    let (n, hidden, inner) =
        (experts.num_experts, config.hidden_size, experts.moe_intermediate_size);
    let shapes = [(inner, hidden), (inner, hidden), (hidden, inner)];
    let shape = |rows, cols, stack| Shape { rows: stack * rows, cols, stack, role: Role::Linear };
    let layers = 0..config.num_hidden_layers;
    for layer in layers.filter(|layer| !experts.dense_layers.contains(layer)) {
        all.insert(at(names.router, layer), shape(n, hidden, 1));
        match names.experts {
            ExpertNames::Each(parts) => {
                for (expert, (part, (rows, cols))) in
                    (0..n).flat_map(|e| parts.iter().zip(shapes).map(move |part| (e, part)))
                {
                    all.insert(at_expert(part, layer, expert), shape(rows, cols, 1));
                }
            }
            ExpertNames::Stacked(parts) => {
                for (part, (rows, cols)) in parts.iter().zip(shapes) {
                    all.insert(at(part, layer), shape(rows, cols, n));
                }
            }
        }
    }
}

/// The tensors of an adapter that belong to one module, by full names.
#[derive(Debug, Default)]
pub struct Parts {
    /// The module as the file names it, to match patterns against.
    pub stored_name: String,
    /// `[r, in]`.
    pub a: Option<String>,
    /// `[out, r]`.
    pub b: Option<String>,
    /// A and B are those of an embedding.
    pub of_embedding: bool,
    /// DoRA's magnitudes, `[out]`.
    pub magnitude: Option<String>,
    /// The module's own matrix.
    pub replaced: Option<String>,
}

/// Checks each module of an adapter against the model's, and gives it its scale: `scale`
/// maps a module's stored name and its rank to the factor of B A.
///
/// # Errors
/// A module that the model does not have; a tensor that is missing or has another shape.
pub(super) fn fit(
    table: &TensorTable,
    parts: BTreeMap<String, Parts>,
    model: &BTreeMap<String, Shape>,
    a_by_token: bool,
    scale: impl Fn(&str, usize) -> Result<f32>,
) -> Result<BTreeMap<String, Module>> {
    if parts.is_empty() {
        return Err(Error::input("it has no tensors"));
    }
    let fitted = parts.into_iter().map(|(name, parts)| {
        let Some(shape) = model.get(&name).copied() else {
            let tensors = [&parts.a, &parts.b, &parts.magnitude, &parts.replaced];
            let tensor = tensors.into_iter().flatten().next().map_or("", String::as_str);
            return Err(Error::input(format!(
                "tensor {tensor} belongs to no module of this model that farm adapts; was the \
                 adapter made for another model?"
            )));
        };
        let a_by_token = a_by_token && shape.role == Role::Embedding;
        let low_rank = low_rank(table, &parts, shape, a_by_token, &scale)?;
        if let Some(replaced) = &parts.replaced {
            if shape.role == Role::Linear {
                return Err(Error::input(format!(
                    "tensor {replaced} replaces a module as a whole (modules_to_save); farm \
                     replaces only the embedding and the output projection"
                )));
            }
            check_vocabulary(table, replaced, 0, shape)?;
            check_shape(table, replaced, 1, [shape.rows, shape.cols], "the model")?;
        }
        Ok((name, Module { low_rank, replaced: parts.replaced, shape }))
    });
    fitted.collect()
}

fn low_rank(
    table: &TensorTable,
    parts: &Parts,
    shape: Shape,
    a_by_token: bool,
    scale: impl Fn(&str, usize) -> Result<f32>,
) -> Result<Option<LowRankTensors>> {
    let (a, b) = match (&parts.a, &parts.b) {
        (Some(a), Some(b)) => (a.clone(), b.clone()),
        (None, None) => match &parts.magnitude {
            None => return Ok(None),
            Some(alone) => return Err(incomplete(alone, "neither A nor B is")),
        },
        (Some(a), None) => return Err(incomplete(a, "B is not")),
        (None, Some(b)) => return Err(incomplete(b, "A is not")),
    };
    if parts.of_embedding != (shape.role == Role::Embedding) {
        return Err(Error::input(format!(
            "tensor {a} is of an embedding where the model has a linear layer, or the other way \
             round; was the adapter made for another model?"
        )));
    }
    // An embedding is A's columns by token, and B its output.
    let (outputs, inputs) = match shape.role {
        Role::Embedding => (shape.cols, shape.rows),
        _ => (shape.rows, shape.cols),
    };
    let [_, cols_of_b] = matrix_of(table, &b, shape.stack)?;
    let rank = cols_of_b;
    if rank == 0 {
        return Err(Error::input(format!("tensor {b} is empty: its rank is 0")));
    }
    let factor =
        scale(&parts.stored_name, rank).map_err(|e| e.context(format_args!("tensor {b}")))?;
    let wanted_a = match a_by_token {
        true => [inputs, rank],
        false => [shape.stack * rank, inputs],
    };
    match shape.role {
        Role::Linear => {}
        Role::Embedding => check_vocabulary(table, &a, usize::from(!a_by_token), shape)?,
        Role::Output => check_vocabulary(table, &b, 0, shape)?,
    }
    let by = format!("the model with a rank of {rank}");
    check_shape(table, &a, shape.stack, wanted_a, &by)?;
    check_shape(table, &b, shape.stack, [outputs, rank], &by)?;
    if let Some(magnitude) = &parts.magnitude {
        if shape.role == Role::Embedding {
            return Err(Error::input(format!(
                "tensor {magnitude}: DoRA on an embedding is not supported"
            )));
        }
        check_shape(table, magnitude, 1, [1, shape.rows], "the model")?;
    }
    let magnitude = parts.magnitude.clone();
    Ok(Some(LowRankTensors { a, b, rank, scale: factor, magnitude, a_by_token }))
}

fn incomplete(there: &str, missing: &str) -> Error {
    Error::input(format!("tensor {there} is there, but {missing}: damaged, or saved in parts?"))
}

fn check_shape(
    table: &TensorTable,
    name: &str,
    stack: usize,
    wanted: [usize; 2],
    whose: &str,
) -> Result<()> {
    check_dtype(table, name)?;
    if matrix_of(table, name, stack)? == wanted {
        return Ok(());
    }
    Err(Error::input(format!(
        "tensor {name} has shape {:?}, but {whose} asks for {wanted:?}; was the adapter made for \
         another model?",
        table.shape(name).unwrap_or_default()
    )))
}

/// That a tensor whose dimension `axis` is the vocabulary has the model's.
fn check_vocabulary(table: &TensorTable, name: &str, axis: usize, shape: Shape) -> Result<()> {
    let tokens = table.shape(name).and_then(|shape| shape.get(axis).copied());
    match tokens {
        Some(tokens) if tokens != shape.rows => Err(Error::input(format!(
            "tensor {name} is for a vocabulary of {tokens} tokens, the model has {}: the adapter \
             was trained after resize_token_embeddings, or for another model. farm runs adapters \
             of the model's own vocabulary; merge this one into its resized model (PEFT's \
             merge_and_unload) and run the result",
            shape.rows
        ))),
        _ => Ok(()),
    }
}

fn check_dtype(table: &TensorTable, name: &str) -> Result<()> {
    match table.dtype(name) {
        Some(StoredDtype::Other(dtype)) => Err(Error::input(format!(
            "tensor {name} has type {dtype}, which is not supported; save it as f32"
        ))),
        _ => Ok(()),
    }
}

/// The tensor's shape as a matrix; `stack` matrices lie one after another.
fn matrix_of(table: &TensorTable, name: &str, stack: usize) -> Result<[usize; 2]> {
    let shape = table.shape(name).unwrap_or_default();
    match shape.as_slice() {
        [n] if stack == 1 => Ok([1, *n]),
        [rows, cols] if stack == 1 => Ok([*rows, *cols]),
        [n, rows, cols] if *n == stack => Ok([n.saturating_mul(*rows), *cols]),
        _ => Err(Error::input(format!(
            "tensor {name} has shape {shape:?}; {stack} matrices are wanted"
        ))),
    }
}
