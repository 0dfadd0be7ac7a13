//! The matrices of a model as its layers see them, in one order whatever the names: two
//! forms of a model are held against each other slot by slot.

use crate::model::config::ModelConfig;
use crate::model::names::{ExpertNames, GateUp, Names, Place, at, at_expert};

/// A matrix, and where a form of the model has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    /// Its rows in a stored tensor.
    pub place: Place,
    /// Its columns.
    pub width: usize,
    /// Width of the heads, where the rows are queries or keys.
    pub head_dim: Option<usize>,
}

/// All matrices of the layers, where `names` has them; the embedding and the output
/// projection are not among them.
pub fn slots(config: &ModelConfig, names: &Names) -> Vec<Slot> {
    (0..config.num_hidden_layers).flat_map(|layer| of_layer(config, names, layer)).collect()
}

fn of_layer(config: &ModelConfig, names: &Names, layer: usize) -> Vec<Slot> {
    let (heads, kv_heads, d) =
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
    let hidden = config.hidden_size;
    let slot = |place, width| Slot { place, width, head_dim: None };
    let [q, k, v] = names.qkv.places(layer, [heads, kv_heads, d], 0..heads, 0..kv_heads);
    let mut slots = vec![
        Slot { head_dim: Some(d), ..slot(q, hidden) },
        Slot { head_dim: Some(d), ..slot(k, hidden) },
        slot(v, hidden),
        slot(Place::new(at(names.o_proj, layer), hidden, 0..hidden), heads * d),
    ];
    match &config.experts {
        Some(experts) if !experts.dense_layers.contains(&layer) => {
            let (n, inner) = (experts.num_experts, experts.moe_intermediate_size);
            slots.push(slot(Place::new(at(names.router, layer), n, 0..n), hidden));
            for expert in 0..n {
                for (part, [rows, width]) in
                    [[inner, hidden], [inner, hidden], [hidden, inner]].into_iter().enumerate()
                {
                    let place = match names.experts {
                        ExpertNames::Each(parts) => {
                            Place::new(at_expert(parts[part], layer, expert), rows, 0..rows)
                        }
                        ExpertNames::Stacked(parts) => {
                            let first = expert * rows;
                            Place::new(at(parts[part], layer), n * rows, first..first + rows)
                        }
                    };
                    slots.push(slot(place, width));
                }
            }
        }
        _ => {
            let inner = config.intermediate_size;
            let whole = |name: &str| Place::new(at(name, layer), inner, 0..inner);
            match names.gate_up {
                GateUp::Split(both) => {
                    slots.extend(both.map(|name| slot(whole(name), hidden)));
                }
                GateUp::Concatenated(both) => {
                    let part = |i: usize| i * inner..(i + 1) * inner;
                    let place = |i| Place::new(at(both, layer), 2 * inner, part(i));
                    slots.extend([0, 1].map(|i| slot(place(i), hidden)));
                }
                GateUp::Up(up) => slots.push(slot(whole(up), hidden)),
            }
            let down = Place::new(at(names.down_proj, layer), hidden, 0..hidden);
            slots.push(slot(down, inner));
        }
    }
    slots
}
