//! Training as PEFT and torch do it: tests/golden/finetune.py trained each case for twenty
//! steps and wrote down every loss, norm and learning rate, and the adapter before and after.
//! farm begins with the same adapter and takes the same steps, on several layouts of ranks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farm::comm::{HostTensorComm, LocalComm, Topology};
use farm::model::layers::Loader;
use farm::model::{Activations, Checkpoint};
use farm::train::adamw::AdamW;
use farm::train::batch::MicroBatch;
use farm::train::data::share;
use farm::train::device::Place;
use farm::train::lora::{LoraConfig, TargetModules};
use farm::train::model::{Recompute, TrainedModel};
use farm::train::schedule::{Schedule, ScheduleKind};
use farm::train::trainer::{Optimisation, Trainer};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Case {
    model: String,
    lora: BTreeMap<String, Value>,
    training: Training,
    examples: Vec<Example>,
    steps: Vec<Vec<Vec<u32>>>,
    expected: Expected,
}

#[derive(Deserialize)]
struct Training {
    learning_rate: f64,
    schedule: ScheduleKind,
    warmup_steps: u64,
    weight_decay: f64,
    max_grad_norm: f64,
    micro_batch_size: Option<usize>,
    loraplus_lr_ratio: Option<f64>,
}

#[derive(Deserialize)]
struct Example {
    token_ids: Vec<u32>,
    is_target: Vec<u8>,
}

#[derive(Deserialize)]
struct Expected {
    loss: Vec<f64>,
    grad_norm: Vec<f64>,
    learning_rate: Vec<f64>,
}

type Adapter = BTreeMap<String, Vec<f32>>;

/// What a run gave.
#[derive(Clone, Default)]
struct Trained {
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    learning_rates: Vec<f64>,
    adapter: Adapter,
}

/// Ranks, and how many of them share a model.
#[derive(Clone, Copy, Debug)]
struct Layout {
    ranks: usize,
    tensor_parallel: usize,
    recompute: Recompute,
    /// On emulated devices.
    on_devices: bool,
}

const ALONE: Layout =
    Layout { ranks: 1, tensor_parallel: 1, recompute: Recompute::None, on_devices: false };

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(root().join("finetune")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("case.json").is_file())
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(names.len() >= 20, "cases are missing");
    names
}

fn case(name: &str) -> Case {
    let path = root().join("finetune").join(name).join("case.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn config(case: &Case) -> LoraConfig {
    let lora = &case.lora;
    let flag = |name: &str| lora.get(name).and_then(Value::as_bool).unwrap_or(false);
    let strings = |value: &Value| -> Vec<String> {
        value.as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
    };
    let layers = lora.get("layers_to_transform").and_then(Value::as_array);
    LoraConfig {
        r: lora["r"].as_u64().unwrap() as usize,
        lora_alpha: lora["lora_alpha"].as_f64().unwrap(),
        lora_dropout: 0.0,
        target_modules: match &lora["target_modules"] {
            Value::String(text) => TargetModules::parse(text).unwrap(),
            names => TargetModules::Names(strings(names)),
        },
        use_rslora: flag("use_rslora"),
        use_dora: flag("use_dora"),
        layers_to_transform: layers
            .map(|layers| layers.iter().map(|l| l.as_u64().unwrap() as usize).collect()),
        modules_to_save: lora.get("modules_to_save").map(strings).unwrap_or_default(),
    }
}

/// An adapter's tensors, without PEFT's prefix.
fn adapter(dir: &Path) -> Adapter {
    let bytes = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let named = tensors.iter().map(|(name, tensor)| {
        let values = tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let name = name.strip_prefix("base_model.model.").unwrap();
        (
            name.trim_end_matches("_vector.weight").to_owned()
                + if name.ends_with("_vector.weight") { "_vector" } else { "" },
            values,
        )
    });
    named.collect()
}

/// A device in f32.
#[cfg(feature = "emulator")]
fn place(comm: Arc<HostTensorComm>) -> Place {
    let comm = Arc::new(farm::device::collectives::HostStaged::new(comm));
    Place { device: farm::device::Device::emulated(), dtype: farm::device::Dtype::F32, comm }
}

#[cfg(not(feature = "emulator"))]
fn place(_: Arc<HostTensorComm>) -> Place {
    unreachable!("without emulated devices nothing is trained on them")
}

fn train(name: &str, case: &Case, layout: Layout) -> Trained {
    let runs = LocalComm::run(layout.ranks, |world| {
        let topology = Topology::new(world, layout.tensor_parallel).unwrap();
        let checkpoint = Checkpoint::open(&root().join(&case.model)).unwrap();
        let comm = Arc::new(HostTensorComm::new(topology.tensor_parallel.clone()));
        let place = layout.on_devices.then(|| place(comm.clone()));
        let loader = Loader {
            source: &checkpoint,
            comm,
            dtype: None,
            activations: Activations::F32,
            adapters: &[],
        };
        let (config, recompute) = (config(case), layout.recompute);
        let mut model = TrainedModel::load(&loader, &config, 1, recompute, place.as_ref()).unwrap();
        let start = adapter(&root().join("finetune").join(name).join("start"));
        model.parameters.set(|tensor| Ok(start[&tensor.name()].clone())).unwrap();
        model.refresh().unwrap();
        assert_eq!(model.parameters.tensors().len(), start.len(), "{name}: tensors");
        let training = &case.training;
        let optimisation = Optimisation {
            adamw: AdamW { weight_decay: training.weight_decay, ..AdamW::default() },
            schedule: Schedule {
                kind: training.schedule,
                peak: training.learning_rate,
                warmup_steps: training.warmup_steps,
                total_steps: case.steps.len() as u64,
            },
            max_grad_norm: training.max_grad_norm,
            loraplus_ratio: training.loraplus_lr_ratio.unwrap_or(1.0),
        };
        let replicas = topology.data_parallel.clone();
        let mut trainer =
            Trainer::new(model, optimisation, topology.world.clone(), replicas.clone());
        let mut trained = Trained::default();
        for sequences in &case.steps {
            let (micro_batches, targets) =
                micro_batches(case, sequences, replicas.rank(), replicas.size());
            let outcome = trainer.step(&micro_batches, targets).unwrap();
            assert!(!outcome.skipped);
            trained.losses.push(outcome.loss);
            trained.grad_norms.push(outcome.grad_norm);
            trained.learning_rates.push(outcome.learning_rate);
        }
        let parameters = &trainer.model.parameters;
        let whole = parameters.gathered(&parameters.values, &**trainer.model.group());
        let mut rest = whole.as_slice();
        for tensor in parameters.tensors() {
            let (values, after) = rest.split_at(tensor.len());
            trained.adapter.insert(tensor.name(), values.to_vec());
            rest = after;
        }
        trained
    });
    for other in &runs[1..] {
        assert_eq!(other.losses, runs[0].losses, "{name}: ranks disagree");
        assert_eq!(other.adapter, runs[0].adapter, "{name}: ranks disagree");
    }
    runs[0].clone()
}

fn micro_batches(
    case: &Case,
    sequences: &[Vec<u32>],
    group: usize,
    groups: usize,
) -> (Vec<MicroBatch>, u64) {
    let lengths: Vec<usize> = case.examples.iter().map(|e| e.token_ids.len()).collect();
    let size = case.training.micro_batch_size.unwrap_or(sequences.len());
    let shares = share(sequences, &lengths, groups, size);
    let batches = shares[group].iter().map(|members| {
        let mut batch = MicroBatch::default();
        for example in members.iter().flat_map(|i| &sequences[*i]) {
            let example = &case.examples[*example as usize];
            let is_target: Vec<bool> = example.is_target.iter().map(|t| *t == 1).collect();
            batch.push(&example.token_ids, &is_target, 0);
        }
        batch
    });
    let all = sequences.iter().flatten().flat_map(|e| &case.examples[*e as usize].is_target);
    (batches.collect(), all.map(|t| u64::from(*t)).sum())
}

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs().max(1e-12)
}

/// |a − b| / |b| of a tensor.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b))).max(1e-12)
}

fn assert_close(what: &str, a: &Trained, b: &Trained, loss_tolerance: f64, tolerance: f64) {
    for (step, (a, b)) in a.losses.iter().zip(&b.losses).enumerate() {
        assert!(relative(*a, *b) <= loss_tolerance, "{what}: loss of step {step}: {a} {b}");
    }
    for (step, (a, b)) in a.grad_norms.iter().zip(&b.grad_norms).enumerate() {
        assert!(relative(*a, *b) <= 10.0 * tolerance, "{what}: norm of step {step}: {a} {b}");
    }
    assert_eq!(a.adapter.keys().collect::<Vec<_>>(), b.adapter.keys().collect::<Vec<_>>());
    for (name, values) in &a.adapter {
        let distance = distance(values, &b.adapter[name]);
        assert!(distance <= tolerance, "{what}: {name} is {distance} away");
    }
}

fn expected(name: &str, case: &Case) -> Trained {
    Trained {
        losses: case.expected.loss.clone(),
        grad_norms: case.expected.grad_norm.clone(),
        learning_rates: case.expected.learning_rate.clone(),
        adapter: adapter(&root().join("finetune").join(name).join("end")),
    }
}

#[test]
fn twenty_steps_of_every_case_are_those_of_peft_and_torch() {
    for name in names() {
        let case = case(&name);
        let trained = train(&name, &case, ALONE);
        let expected = expected(&name, &case);
        for (a, b) in trained.learning_rates.iter().zip(&expected.learning_rates) {
            assert!((a - b).abs() <= 1e-12, "{name}: learning rate {a} {b}");
        }
        assert_close(&name, &trained, &expected, 1e-4, 1e-3);
    }
}

/// On the emulator, which takes its time: a case of each kind; every family is held against
/// the host in src/train/device/tests.rs.
#[cfg(feature = "emulator")]
#[test]
fn twenty_steps_on_a_device_are_those_of_peft_and_torch() {
    let device = Layout { on_devices: true, ..ALONE };
    for (name, layout) in [
        ("lora_all", Layout { recompute: Recompute::Layers(1), ..device }),
        ("packing_accumulation", device),
        ("masking", Layout { ranks: 2, tensor_parallel: 2, ..device }),
        ("rslora", device),
        ("layers", Layout { ranks: 2, ..device }),
        ("dora_random_b", device),
        ("saved_embedding", device),
        ("qwen3", device),
        ("gemma2", device),
        ("falcon_7b", device),
        ("quantized", device),
    ] {
        let case = case(name);
        let trained = train(name, &case, layout);
        assert_close(name, &trained, &expected(name, &case), 1e-4, 1e-3);
    }
}

/// Splits and recomputation change sums by rounding only.
#[test]
fn layouts_of_ranks_and_recomputation_train_alike() {
    let of = |ranks, tensor_parallel| Layout { ranks, tensor_parallel, ..ALONE };
    for (name, layouts) in [
        ("accumulation", vec![of(2, 1), of(4, 1), of(2, 2), of(4, 2)]),
        ("packing", vec![of(2, 1), of(2, 2), of(4, 2)]),
        ("dora_random_b", vec![of(2, 2), of(4, 2)]),
        ("saved_lm_head", vec![of(2, 2)]),
        ("saved_embedding", vec![of(2, 2)]),
        ("lm_head", vec![of(2, 2)]),
        ("phi3", vec![of(2, 2)]),
        ("falcon_7b", vec![of(2, 2)]),
        ("falcon_40b", vec![of(2, 2)]),
        ("gemma2", vec![of(2, 2)]),
        ("quantized", vec![of(2, 2)]),
    ] {
        let case = case(name);
        let alone = train(name, &case, ALONE);
        for layout in layouts {
            let split = train(name, &case, layout);
            assert_close(&format!("{name} {layout:?}"), &split, &alone, 1e-5, 1e-4);
        }
        for recompute in [Recompute::Full, Recompute::Layers(1)] {
            let again = train(name, &case, Layout { recompute, ..ALONE });
            assert_eq!(again.losses, alone.losses, "{name} {recompute:?}");
            assert_eq!(again.adapter, alone.adapter, "{name} {recompute:?}");
        }
    }
}
