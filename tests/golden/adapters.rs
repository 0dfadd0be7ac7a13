//! Adapters: parity with PEFT (tests/golden/adapters.py made them and the answers) and with
//! llama.cpp; on every form of a model; many in one batch.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farm::Result;
use farm::engine::SamplingParams;
use farm::engine::{Engine, EngineConfig, EngineOutput, EngineRequest, Generated, Mode};
use farm::kernels::quant::QuantType;
use farm::model::checkpoint::{Format, TensorTable, gguf};
use farm::model::{Activations, WeightDtype};
use farm::model::{
    AdapterSource, Checkpoint, Logits, LogitsWanted, ModelRunner, Runner, StepBatch,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::json;
use tempfile::TempDir;

use super::{
    Golden, NoText, check, golden, greedy, step, tensor_parallel_sizes, with_adapted, with_loaded,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn source(path: &Path) -> AdapterSource {
    AdapterSource::parse(path.as_os_str()).unwrap()
}

/// The adapters of a base, in order of name.
fn adapters_of(base: &str) -> Vec<PathBuf> {
    let dirs = std::fs::read_dir(root().join("adapters")).unwrap().map(|e| e.unwrap().path());
    let mut dirs: Vec<PathBuf> =
        dirs.filter(|dir| dir.join("golden.json").is_file() && base_of(dir) == base).collect();
    dirs.sort();
    dirs
}

fn base_of(adapter: &Path) -> String {
    if let Ok(same) = std::fs::read_to_string(adapter.join("golden_from")) {
        return base_of(&adapter.with_file_name(same.trim()));
    }
    #[derive(Deserialize)]
    struct Base {
        base: String,
    }
    let text = std::fs::read_to_string(adapter.join("golden.json")).unwrap();
    serde_json::from_str::<Base>(&text).unwrap().base
}

/// The model with an adapter for all sequences, or (`Own`) with each one's own.
struct Seen<'a>(&'a mut ModelRunner, Given);

enum Given {
    Own,
    Same(Option<u32>),
}

impl<'a> Seen<'a> {
    fn all(runner: &'a mut ModelRunner) -> Self {
        Self(runner, Given::Own)
    }

    fn with(runner: &'a mut ModelRunner, adapter: Option<u32>) -> Self {
        Self(runner, Given::Same(adapter))
    }
}

impl Runner for Seen<'_> {
    fn num_blocks(&self) -> usize {
        self.0.num_blocks()
    }
    fn block_size(&self) -> usize {
        self.0.block_size()
    }
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }
    fn max_seq_len(&self) -> usize {
        self.0.max_seq_len()
    }
    fn forward(&mut self, batch: &StepBatch) -> Result<Logits> {
        let mut batch = batch.clone();
        if let Given::Same(adapter) = self.1 {
            batch.sequences.iter_mut().for_each(|s| s.adapter = adapter);
        }
        self.0.forward(&batch)
    }
}

#[test]
fn adapters_give_pefts_logits_and_text() {
    let dirs = std::fs::read_dir(root().join("adapters")).unwrap().map(|e| e.unwrap().path());
    let dirs: Vec<PathBuf> = dirs.collect();
    assert!(dirs.len() >= 11, "adapters are missing");
    for adapter in dirs {
        let base = root().join(base_of(&adapter));
        for size in tensor_parallel_sizes(&base) {
            let what = format!("{} TP {size}", adapter.display());
            let (adapted, alone): (Golden, Golden) = (golden(&adapter), golden(&base));
            with_adapted(&base, &[source(&adapter)], size, |runner| {
                for (adapted, alone) in adapted.prompts.iter().zip(&alone.prompts) {
                    check(&mut Seen::with(runner, Some(0)), adapted, &what);
                    check(&mut Seen::with(runner, None), alone, &what);
                }
            });
        }
    }
}

/// The logits of all rows of each prompt.
fn all_logits(
    model: &Path,
    adapter: &Path,
    size: usize,
    prompts: &[Vec<u32>],
) -> Vec<Vec<Vec<f32>>> {
    with_adapted(model, &[source(adapter)], size, |runner| {
        let logits = |ids: &Vec<u32>| {
            step(&mut Seen::with(runner, Some(0)), 0, ids, ids.len(), LogitsWanted::All)
        };
        prompts.iter().map(logits).collect()
    })
}

fn assert_same_logits(a: &[Vec<Vec<f32>>], b: &[Vec<Vec<f32>>], tolerance: f32, what: &str) {
    let values = |x: &[Vec<Vec<f32>>]| x.iter().flatten().flatten().copied().collect::<Vec<f32>>();
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: logits differ by {worst}");
}

fn prompts_of(case: &str) -> Vec<Vec<u32>> {
    golden(&root().join(case)).prompts.into_iter().map(|p| p.prompt_token_ids).collect()
}

/// Meta's form keeps the rows of queries and keys in another order.
#[test]
fn an_adapter_gives_the_same_on_metas_form_of_a_model() {
    let prompts = prompts_of("llama_bf16");
    for adapter in adapters_of("llama_gqa") {
        let hf = all_logits(&root().join("llama_bf16"), &adapter, 1, &prompts);
        for size in [1, 2] {
            let meta = all_logits(&root().join("meta_mp2"), &adapter, size, &prompts);
            assert_same_logits(&meta, &hf, 1e-3, &format!("{} TP {size}", adapter.display()));
        }
    }
}

#[derive(Deserialize)]
struct LlamaCpp {
    prompts: Vec<LlamaCppPrompt>,
}

#[derive(Deserialize)]
struct LlamaCppPrompt {
    prompt_token_ids: Vec<u32>,
    last_logits: Vec<f32>,
    greedy: Vec<u32>,
}

fn llama_cpp() -> LlamaCpp {
    let text = std::fs::read_to_string(root().join("gguf/llama_lora.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_gguf_adapter_gives_llama_cpps_logits_and_text() {
    let folder = root().join("gguf");
    let (model, adapter) = (folder.join("llama_f32.gguf"), folder.join("llama_lora.gguf"));
    for size in tensor_parallel_sizes(&model) {
        with_adapted(&model, &[source(&adapter)], size, |runner| {
            let mut seen = Seen::with(runner, Some(0));
            for prompt in llama_cpp().prompts {
                let ids = &prompt.prompt_token_ids;
                let last = step(&mut seen, 0, ids, ids.len(), LogitsWanted::Last).remove(0);
                let cosine = super::gguf::cosine(&last, &prompt.last_logits);
                assert!(cosine >= 0.999, "TP {size}: cosine {cosine}");
                assert_eq!(greedy(&mut seen, ids, prompt.greedy.len()), prompt.greedy);
            }
        });
    }
}

/// Tensors of f32 by name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn write_safetensors(path: &Path, tensors: &Tensors) {
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, (shape, _))| {
        (name, TensorView::new(Dtype::F32, shape.clone(), &bytes[name]).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A tensor's values, all of them.
fn values(table: &TensorTable, name: &str) -> (Vec<usize>, Vec<f32>) {
    let shape = table.shape(name).unwrap();
    let cols = *shape.last().unwrap();
    let rows = shape.iter().product::<usize>() / cols;
    let all = std::slice::from_ref(&(0..rows)).to_vec();
    (shape, table.part(name, [rows, cols], &all, 0..cols).unwrap().to_f32())
}

/// The tensors of a GGUF file of arch llama in Hugging Face's form: names, the order of rows
/// of queries and keys, an expert a tensor.
fn hf_tensors(table: &TensorTable, [heads, kv_heads]: [usize; 2]) -> Tensors {
    let mut tensors = Tensors::new();
    for (name, _) in table.iter() {
        let (shape, values) = values(table, name);
        let hf = hf_name(name);
        if hf.contains("{e}") {
            let (n, len) = (shape[0], values.len() / shape[0]);
            for (e, values) in (0..n).zip(values.chunks(len)) {
                let name = hf.replace("{e}", &e.to_string());
                tensors.insert(name, (shape[1..].to_vec(), values.to_vec()));
            }
            continue;
        }
        let reordered = |heads| in_hf_order(&values, &shape, heads);
        let values = match name {
            name if name.ends_with("lora_a") => values,
            name if name.contains("attn_q.") => reordered(heads),
            name if name.contains("attn_k.") => reordered(kv_heads),
            _ => values,
        };
        tensors.insert(hf, (shape, values));
    }
    tensors
}

fn hf_name(name: &str) -> String {
    let parts = [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("ffn_gate_inp", "block_sparse_moe.gate"),
        ("ffn_gate_exps", "block_sparse_moe.experts.{e}.w1"),
        ("ffn_down_exps", "block_sparse_moe.experts.{e}.w2"),
        ("ffn_up_exps", "block_sparse_moe.experts.{e}.w3"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("output", "lm_head"),
    ];
    let (from, to) = parts.iter().find(|(from, _)| name.contains(from)).unwrap();
    let name = name.replacen(from, to, 1).replacen("blk.", "model.layers.", 1);
    match name.strip_suffix(".weight.lora_a") {
        Some(module) => format!("base_model.model.{module}.lora_A.weight"),
        None => match name.strip_suffix(".weight.lora_b") {
            Some(module) => format!("base_model.model.{module}.lora_B.weight"),
            None => name,
        },
    }
}

/// Row 2i + j of a head to row i + j · d / 2: convert_hf_to_gguf.py's permute, undone.
fn in_hf_order(values: &[f32], shape: &[usize], heads: usize) -> Vec<f32> {
    let (rows, cols) = (shape[0], shape[1]);
    let d = rows / heads;
    let mut out = vec![0.0; values.len()];
    for row in 0..rows {
        let (head, at) = (row / d, row % d);
        let to = head * d + at / 2 + at % 2 * (d / 2);
        out[to * cols..][..cols].copy_from_slice(&values[row * cols..][..cols]);
    }
    out
}

/// The model of a GGUF file in Hugging Face's form, in `dir`.
fn write_hf_twin(model: &Path, dir: &Path) {
    let checkpoint = Checkpoint::open(model).unwrap();
    let (metadata, table) = (checkpoint.metadata().unwrap(), checkpoint.tensors());
    let config = gguf::hf_config(metadata, |name| table.shape(name)).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    write_safetensors(&dir.join("model.safetensors"), &hf_tensors(table, heads_of(model)));
}

fn heads_of(model: &Path) -> [usize; 2] {
    let checkpoint = Checkpoint::open(model).unwrap();
    let config = checkpoint.config();
    [config.num_attention_heads, config.num_key_value_heads]
}

fn write_peft(dir: &Path, config: serde_json::Value, tensors: &Tensors) {
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    write_safetensors(&dir.join("adapter_model.safetensors"), tensors);
}

/// A GGUF adapter and the same in PEFT's form, on a GGUF model and the same in Hugging
/// Face's form: rows of queries and keys are reordered both ways.
#[test]
fn both_forms_of_an_adapter_give_the_same_on_both_forms_of_a_model() {
    let folder = root().join("gguf");
    let (model, adapter) = (folder.join("llama_f32.gguf"), folder.join("llama_lora.gguf"));
    let (hf_model, peft) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_twin(&model, hf_model.path());
    let (table, metadata) = TensorTable::of_file(&adapter, Format::Gguf).unwrap();
    let alpha = metadata.float("adapter.lora.alpha").unwrap();
    let config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "bias": "none"});
    write_peft(peft.path(), config, &hf_tensors(&table, heads_of(&model)));

    let prompts: Vec<Vec<u32>> =
        llama_cpp().prompts.into_iter().map(|prompt| prompt.prompt_token_ids).collect();
    let gguf = all_logits(&model, &adapter, 1, &prompts);
    for (model, adapter) in [
        (model.as_path(), peft.path()),
        (hf_model.path(), adapter.as_path()),
        (hf_model.path(), peft.path()),
    ] {
        for size in [1, 2] {
            let what = format!("{} on {} TP {size}", adapter.display(), model.display());
            assert_same_logits(&all_logits(model, adapter, size, &prompts), &gguf, 1e-3, &what);
        }
    }
}

/// Small values that only the name and the place decide.
fn noise(name: &str, len: usize) -> Vec<f32> {
    let mut state =
        name.bytes().fold(1u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.6
    };
    (0..len).map(|_| next()).collect()
}

/// Factors of rank 2 for every linear layer in `tensors`, and the model with them merged;
/// `dora` gives each row a length of its own.
fn adapt_all(tensors: &Tensors, scale: f32, dora: bool) -> (Tensors, Tensors) {
    let (mut factors, mut merged) = (Tensors::new(), tensors.clone());
    for (name, (shape, _)) in tensors {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let [rows, cols] = shape[..] else { continue };
        if module.contains("embed") {
            continue;
        }
        let (a, b) = (noise(&format!("{name} a"), 2 * cols), noise(&format!("{name} b"), 2 * rows));
        let lengths: Vec<f32> = noise(&format!("{name} m"), rows).iter().map(|m| 2.0 + m).collect();
        let weight = &mut merged.get_mut(name).unwrap().1;
        for (row, weight) in weight.chunks_exact_mut(cols).enumerate() {
            for (col, w) in weight.iter_mut().enumerate() {
                *w += scale * (b[2 * row] * a[col] + b[2 * row + 1] * a[cols + col]);
            }
            if dora {
                let length = weight.iter().map(|w| w * w).sum::<f32>().sqrt();
                weight.iter_mut().for_each(|w| *w *= lengths[row] / length);
            }
        }
        let key = |part: &str| format!("base_model.model.{module}.{part}");
        factors.insert(key("lora_A.weight"), (vec![2, cols], a));
        factors.insert(key("lora_B.weight"), (vec![rows, 2], b));
        if dora {
            factors.insert(key("lora_magnitude_vector"), (vec![rows], lengths));
        }
    }
    (factors, merged)
}

/// Adapts all of the model in `hf`: the adapter, and the logits of the merged model.
fn adapted_and_merged(
    hf: &Path,
    dora: bool,
    prompts: &[Vec<u32>],
) -> (TempDir, Vec<Vec<Vec<f32>>>) {
    let [merged_dir, peft] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let weights = "model.safetensors";
    let (table, _) = TensorTable::of_file(&hf.join(weights), Format::Safetensors).unwrap();
    let tensors: Tensors =
        table.iter().map(|(name, _)| (name.to_owned(), values(&table, name))).collect();
    let (factors, merged) = adapt_all(&tensors, 1.5, dora);
    let config = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": dora});
    write_peft(peft.path(), config, &factors);
    std::fs::copy(hf.join("config.json"), merged_dir.path().join("config.json")).unwrap();
    write_safetensors(&merged_dir.path().join(weights), &merged);
    let logits = with_adapted(merged_dir.path(), &[], 1, |runner| {
        let logits = |ids: &Vec<u32>| step(runner, 0, ids, ids.len(), LogitsWanted::All);
        prompts.iter().map(logits).collect()
    });
    (peft, logits)
}

/// DoRA where layers have biases, which it does not scale, whatever the split.
#[test]
fn dora_leaves_biases_alone() {
    for case in ["llama_bias", "qwen2", "falcon_rw"] {
        let (model, prompts) = (root().join(case), prompts_of(case));
        let (peft, want) = adapted_and_merged(&model, true, &prompts);
        for size in tensor_parallel_sizes(&model) {
            let got = all_logits(&model, peft.path(), size, &prompts);
            assert_same_logits(&got, &want, 2e-4, &format!("{case} TP {size}"));
        }
    }
}

/// DoRA's norms are those of the weights as they are used, all columns of them.
#[test]
fn dora_on_quantized_weights_is_the_same_on_any_number_of_ranks() {
    let (model, prompts) = (root().join("llama_gqa"), prompts_of("llama_gqa"));
    let sources = [source(&root().join("adapters/dora"))];
    let quantized = |size| {
        let dtype = Some(WeightDtype::Quant(QuantType::Q8_0));
        with_loaded(&model, &sources, size, dtype, Activations::F32, |runner| {
            let mut seen = Seen::with(runner, Some(0));
            let logits = |ids: &Vec<u32>| step(&mut seen, 0, ids, ids.len(), LogitsWanted::All);
            prompts.iter().map(logits).collect::<Vec<_>>()
        })
    };
    let alone = quantized(1);
    for size in [2, 4] {
        assert_same_logits(&quantized(size), &alone, 1e-3, &format!("TP {size}"));
    }
}

/// Every linear layer of a mixture of experts, router and experts among them, adapted: as
/// if the factors were merged; and the same on the GGUF file, which stacks the experts.
#[test]
fn experts_are_adapted_as_if_the_factors_were_merged() {
    let model = root().join("gguf/mixtral.gguf");
    let (hf, prompts) = (tempfile::tempdir().unwrap(), prompts_of("mixtral"));
    write_hf_twin(&model, hf.path());
    let (peft, want) = adapted_and_merged(hf.path(), false, &prompts);
    for model in [hf.path(), &model] {
        for size in [1, 2, 4] {
            let what = format!("{} TP {size}", model.display());
            assert_same_logits(&all_logits(model, peft.path(), size, &prompts), &want, 2e-4, &what);
        }
    }
}

/// Runs the requests in an engine that has too few blocks for all of them at once.
fn run(runner: &mut ModelRunner, requests: &[EngineRequest]) -> Vec<EngineOutput> {
    let config = EngineConfig { max_batch_size: 24, max_batched_tokens: 40, ..Default::default() };
    let mut engine = Engine::new(Seen::all(runner), Arc::new(NoText), config).unwrap();
    requests.iter().for_each(|request| engine.add(request.clone()));
    let mut outputs = Vec::new();
    while engine.has_work() {
        outputs.extend(engine.step().unwrap().finished);
    }
    let preempted = engine.counters().preemptions > 0;
    assert_eq!(preempted, requests.len() > 8, "too many for the cache, or few");
    outputs.sort_by_key(|output| output.key);
    outputs
}

/// A record's text and log-probabilities have the same bits whatever adapters the others in
/// its batch have, through preemptions and whatever the split of the model.
#[test]
fn adapters_in_one_batch_give_each_the_bits_that_it_gives_alone() {
    let adapters = adapters_of("llama_gqa");
    let sources: Vec<AdapterSource> = adapters.iter().map(|path| source(path)).collect();
    assert!(sources.len() >= 4);
    let prompts = prompts_of("llama_gqa");
    let base = root().join("llama_gqa");
    let choices = (0..sources.len() as u32).map(Some).chain([None]);
    let pairs = prompts.iter().flat_map(|ids| choices.clone().map(move |c| (ids, c)));
    let requests: Vec<EngineRequest> = (0..)
        .zip(pairs)
        .map(|(key, (ids, adapter))| EngineRequest {
            key,
            record_index: key,
            completion: 0,
            prompt_token_ids: ids.clone(),
            adapter,
            generated: Generated::default(),
            params: SamplingParams {
                max_new_tokens: 40,
                temperature: if key % 2 == 0 { 0.0 } else { 0.8 },
                ignore_eos: true,
                logprobs: Some(3),
                ..SamplingParams::default()
            },
            mode: Mode::Generate,
        })
        .collect();
    for size in [1, 2] {
        let together = with_adapted(&base, &sources, size, |runner| run(runner, &requests));
        let alone = with_adapted(&base, &sources, size, |runner| {
            requests.iter().flat_map(|r| run(runner, std::slice::from_ref(r))).collect::<Vec<_>>()
        });
        assert_eq!(together, alone, "TP {size}");
        assert_eq!(bits(&together), bits(&alone), "TP {size}");
        let texts: std::collections::BTreeSet<_> = together.iter().map(|o| &o.token_ids).collect();
        assert_eq!(texts.len(), requests.len(), "each adapter has its own texts");
        // Also in a run that has loaded no other adapter.
        for (i, one) in sources.iter().enumerate() {
            let mine: Vec<EngineRequest> = requests
                .iter()
                .filter(|r| r.adapter == Some(i as u32))
                .map(|r| EngineRequest { adapter: Some(0), ..r.clone() })
                .collect();
            let of_one =
                with_adapted(&base, std::slice::from_ref(one), size, |runner| run(runner, &mine));
            let same: Vec<_> = together
                .iter()
                .filter(|output| mine.iter().any(|r| r.key == output.key))
                .cloned()
                .collect();
            assert_eq!(bits(&of_one), bits(&same), "{} TP {size}", one.name);
            assert_eq!(of_one, same, "{} TP {size}", one.name);
        }
    }
}

fn bits(outputs: &[EngineOutput]) -> Vec<u32> {
    let entries = outputs.iter().flat_map(|output| output.logprobs.iter().flatten());
    entries.flat_map(|e| e.top.iter().map(|t| t.1).chain([e.logprob])).map(f32::to_bits).collect()
}
