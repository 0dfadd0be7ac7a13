//! That the formula counts what it says, and that the documented table is what it gives.

use super::*;
use crate::train::lora::TargetModules;

fn llama(hidden: usize, inner: usize, layers: usize, heads: usize, kv_heads: usize) -> ModelConfig {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    });
    ModelConfig::from_json(config).unwrap()
}

fn lora() -> LoraConfig {
    LoraConfig {
        r: 16,
        lora_alpha: 32.0,
        lora_dropout: 0.0,
        target_modules: TargetModules::AllLinear,
        use_rslora: false,
        use_dora: false,
        layers_to_transform: None,
        modules_to_save: Vec::new(),
    }
}

fn of(model: &ModelConfig, lora: &LoraConfig, change: impl Fn(&mut Setting)) -> Estimate {
    let mut setting = Setting {
        model,
        lora,
        tensor_parallel: 1,
        tokens: 2048,
        recompute: Recompute::None,
        bytes_a_weight: 2.0,
        device: None,
    };
    change(&mut setting);
    estimate(&setting).unwrap()
}

#[test]
fn terms_are_those_counted_by_hand() {
    let (model, lora) = (llama(64, 160, 3, 4, 2), lora());
    let whole = of(&model, &lora, |s| s.tokens = 10);
    // q, k, v, o, gate, up, down of a layer; the embedding and the output projection.
    let layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 160 * 64;
    assert_eq!(whole.weights, 2 * (3 * layer + 2 * 32000 * 64));
    let trained = 16 * ((128 + 2 * 96 + 128) + 3 * 224);
    assert_eq!(whole.trained, 16 * 3 * trained);
    // x, middle, q, out, k, v, log-sum-exp, gate, up, seven h.
    let row = 2 * 64 + 2 * 64 + 2 * 32 + 4 + 2 * 160 + 7 * 16;
    assert_eq!(whole.kept, 4 * 10 * 3 * row);
    assert_eq!(whole.live, 4 * 10 * (6 * 64 + 3 * 160));
    assert_eq!(whole.logits, 4 * 10 * (32000 + 3 * 64));

    let again = of(&model, &lora, |s| (s.tokens, s.recompute) = (10, Recompute::Full));
    assert_eq!(again.kept, 4 * 10 * 3 * 64);
    assert_eq!(again.live, whole.live + 4 * 10 * (row - 64));
    let some = of(&model, &lora, |s| (s.tokens, s.recompute) = (10, Recompute::Layers(2)));
    assert_eq!(some.kept, 4 * 10 * (2 * 64 + row));

    let above = LoraConfig { layers_to_transform: Some([2].into()), ..lora };
    let above = of(&model, &above, |s| s.tokens = 10);
    assert_eq!((above.kept, above.trained), (4 * 10 * row, 16 * trained), "nothing goes below");
}

#[test]
fn a_device_keeps_operands_in_their_own_type() {
    let (model, lora) = (llama(64, 160, 3, 4, 2), lora());
    let on = |dtype| of(&model, &lora, |s| (s.tokens, s.device) = (10, Some(dtype)));
    let [wide, narrow] = [Dtype::F32, Dtype::Bf16].map(on);
    let trained = 3 * 16 * ((128 + 2 * 96 + 128) + 3 * 224);
    assert_eq!((wide.trained, narrow.trained), (8 * trained, 10 * trained));
    // x, middle and log-sum-exp; q, out, k, v, gate, up, seven h.
    let (floats, operands) = (2 * 64 + 4, 2 * 64 + 2 * 32 + 2 * 160 + 7 * 16);
    assert_eq!(wide.kept, 4 * 10 * 3 * (floats + operands));
    assert_eq!(narrow.kept, 10 * 3 * (4 * floats + 2 * operands));
    // Two gradients in f32 and a copy; the input, inner features, gate and up.
    assert_eq!(narrow.live, 10 * (2 * 4 * 64 + 2 * 64 + 2 * (64 + 160 + 320)));
    assert_eq!(narrow.logits, 10 * (32000 * (4 + 2) + (4 + 4 + 2) * 64));
}

#[test]
fn a_split_shares_weights_and_wide_activations() {
    let model = llama(64, 160, 3, 4, 2);
    let saved = LoraConfig { modules_to_save: vec!["lm_head".into()], use_dora: true, ..lora() };
    let [one, two] = [1, 2].map(|size| of(&model, &saved, |s| s.tensor_parallel = size));
    assert_eq!(two.weights * 2, one.weights);
    assert!(two.trained > one.trained / 2 && two.trained < one.trained);
    assert!(two.kept > one.kept / 2 && two.kept < one.kept);
    assert_eq!(two.saving, one.saving, "rank 0 gathers all of it");
    assert!(one.trained > 16 * 32000 * 64, "a whole matrix is trained");
}

#[test]
fn the_documented_table_is_what_the_formula_gives() {
    let models = [
        ("7B", llama(4096, 11008, 32, 32, 32)),
        ("13B", llama(5120, 13824, 40, 40, 40)),
        ("70B", llama(8192, 28672, 80, 64, 8)),
    ];
    let lora = lora();
    let gib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 30));
    let mut table = String::new();
    for (name, model) in &models {
        for size in [1, 2, 4, 8] {
            let [half, quarter] = [2.0, 4.5 / 8.0].map(|bytes| {
                of(model, &lora, |s| (s.tensor_parallel, s.bytes_a_weight) = (size, bytes))
            });
            table += &format!(
                "| {name} | {size} | {} | {} | {} |",
                gib(half.weights),
                gib(quarter.weights),
                gib(half.trained)
            );
            for tokens in [2048, 8192] {
                for recompute in [Recompute::None, Recompute::Full] {
                    let pass = of(model, &lora, |s| {
                        (s.tensor_parallel, s.tokens, s.recompute) = (size, tokens, recompute);
                    });
                    table += &format!(" {} |", gib(pass.pass()));
                }
            }
            table.push('\n');
        }
    }
    let document = include_str!("../../docs/FINETUNE.md");
    assert!(document.contains(&table), "docs/FINETUNE.md should have:\n{table}");
}
