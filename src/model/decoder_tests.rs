//! Which weights a rank maps, and which it has to copy.

use std::sync::Arc;

use super::*;
use crate::comm::{HostTensorComm, LocalComm};
use crate::model::attention::OutputProjection;
use crate::model::checkpoint::Format;
use crate::model::names::Qkv;
use crate::model::preflight::tests::goldens;
use crate::model::{Activations, Checkpoint};

/// Bytes that this rank owns of matrices that are cut by columns, and of all others.
fn owned(decoder: &Decoder) -> [u64; 2] {
    let mut by_columns = 0;
    for layer in &decoder.layers {
        if let OutputProjection::Split(o_proj) = &layer.attention.o_proj {
            by_columns += o_proj.weight().owned_bytes();
        }
        if let FeedForward::Dense(mlp) = &layer.mlp {
            by_columns += mlp.down_proj.weight().owned_bytes();
        }
    }
    let all: u64 = decoder.weights().map(Weight::owned_bytes).sum();
    [by_columns, all - by_columns]
}

#[test]
fn weights_as_they_are_stored_stay_mapped_but_for_cuts_in_columns() {
    for model in goldens() {
        let checkpoint = Checkpoint::open(&model).unwrap();
        let files = checkpoint.files();
        if files.format == Format::Meta && files.weights.len() > 1 {
            // Each of its matrices lies in several files.
            continue;
        }
        for size in [1, 2, 4].into_iter().filter(|n| checkpoint.config().can_split(*n)) {
            let shares = LocalComm::run(size, |comm| {
                let comm = Arc::new(HostTensorComm::new(comm));
                let source = Checkpoint::open(&model).unwrap();
                let (dtype, activations) = (None, Activations::F32);
                let loader = Loader { source: &source, comm, dtype, activations, adapters: &[] };
                owned(&Decoder::load(&loader).unwrap())
            });
            let names = checkpoint.config().names;
            let kv_heads = checkpoint.config().num_key_value_heads;
            for [by_columns, others] in shares {
                let name = model.display();
                assert!(size > 1 || by_columns == 0, "{name}: {by_columns}");
                // Ranks that share a KV head have some of its queries, which others lie behind.
                if !(matches!(names.qkv, Qkv::Grouped(_)) && size > kv_heads) {
                    assert_eq!(others, 0, "{name} over {size}");
                }
            }
        }
    }
}
