use std::path::Path;

use super::*;
use crate::comm::{HostTensorComm, LocalComm, TensorComm};
use crate::device::collectives::HostStaged;
use crate::kernels::tests::random;
use crate::model::layers::Loader;
use crate::model::{Activations, Checkpoint, WeightDtype};
use crate::train::lora::{LoraConfig, TargetModules};
use crate::train::model::TrainedModel;

#[derive(Clone)]
struct Setting {
    model: &'static str,
    lora: LoraConfig,
    /// On a device, and in what; `None` is the host.
    dtype: Option<Dtype>,
    quantize: Option<WeightDtype>,
    recompute: Recompute,
    ranks: usize,
}

fn setting(model: &'static str) -> Setting {
    let lora = LoraConfig {
        r: 3,
        lora_alpha: 6.0,
        lora_dropout: 0.2,
        target_modules: TargetModules::AllLinear,
        use_rslora: false,
        use_dora: false,
        layers_to_transform: None,
        modules_to_save: Vec::new(),
    };
    Setting { model, lora, dtype: None, quantize: None, recompute: Recompute::None, ranks: 1 }
}

/// Losses in training and in validation, and the whole gradients.
#[derive(Clone, Debug, PartialEq)]
struct Passed {
    losses: [f64; 2],
    gradients: Vec<f32>,
}

fn batch() -> MicroBatch {
    let mut batch = MicroBatch::default();
    for (i, len) in [35u32, 1, 7].into_iter().enumerate() {
        let ids: Vec<u32> = (0..len).map(|j| 3 + (i as u32 * 11 + j * 7) % 50).collect();
        let is_target: Vec<bool> = (0..len).map(|j| j % 3 != 1).collect();
        batch.push(&ids, &is_target, (i as u64) << 40);
    }
    batch
}

fn run(setting: &Setting) -> Passed {
    let passed = LocalComm::run(setting.ranks, |comm| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(setting.model);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let comm: Arc<dyn TensorComm> = Arc::new(HostTensorComm::new(comm));
        let place = setting.dtype.map(|dtype| Place {
            device: Device::emulated(),
            dtype,
            comm: Arc::new(HostStaged::new(comm.clone())),
        });
        let loader = Loader {
            source: &checkpoint,
            comm,
            dtype: setting.quantize,
            activations: Activations::F32,
            adapters: &[],
        };
        let Setting { lora, recompute, .. } = setting;
        let mut model = TrainedModel::load(&loader, lora, 1, *recompute, place.as_ref()).unwrap();
        // B is zero at first, and would hide what goes through it.
        let value = |tensor: &crate::train::parameters::Parameter| {
            let seed = tensor.name().bytes().map(u64::from).sum();
            Ok(random(tensor.len(), seed).into_iter().map(|x| 0.1 * x).collect())
        };
        if lora.modules_to_save.is_empty() && !lora.use_dora {
            model.parameters.set(value).unwrap();
        }
        model.refresh().unwrap();
        let evaluated = model.evaluate(&batch()).unwrap();
        let first = model.train(&batch(), 0.25).unwrap();
        let second = model.train(&batch(), 0.25).unwrap();
        assert_eq!(first, second);
        model.collect_gradients().unwrap();
        // What is collected is gone from the device.
        model.collect_gradients().unwrap();
        let group = model.group().clone();
        model.parameters.sum_partial_gradients(&*group);
        let gradients = model.parameters.gathered(&model.parameters.gradients, &*group);
        Passed { losses: [first, evaluated], gradients }
    });
    passed[0].clone()
}

/// |a − b| / |b|.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

#[track_caller]
fn assert_close(what: &str, got: &Passed, want: &Passed, of_loss: f64, of_gradients: f64) {
    for (got, want) in got.losses.iter().zip(want.losses) {
        assert!((got - want).abs() <= of_loss * want.abs(), "{what}: loss {got} for {want}");
    }
    let distance = distance(&got.gradients, &want.gradients);
    assert!(distance <= of_gradients, "{what}: gradients are {distance} away");
}

const MODELS: [&str; 11] = [
    "llama_gqa",
    "llama_bias",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "falcon_7b",
    "falcon_40b",
    "falcon_rw",
];

#[test]
fn a_device_gives_the_hosts_losses_and_gradients_for_every_family() {
    for model in MODELS {
        let device = Setting { dtype: Some(Dtype::F32), ..setting(model) };
        assert_close(model, &run(&device), &run(&setting(model)), 1e-5, 1e-4);
    }
}

#[test]
fn narrow_types_differ_by_their_rounding_and_recomputation_by_nothing() {
    for model in ["llama_gqa", "qwen3", "gemma2", "falcon_7b"] {
        let host = run(&setting(model));
        for (dtype, of_loss, of_gradients) in [(Dtype::Bf16, 1e-2, 5e-2), (Dtype::F16, 2e-3, 1e-2)]
        {
            let device = Setting { dtype: Some(dtype), ..setting(model) };
            let kept = run(&device);
            assert_close(model, &kept, &host, of_loss, of_gradients);
            let recompute = Recompute::Full;
            assert_eq!(run(&Setting { recompute, ..device }), kept, "{model} {dtype:?}");
        }
    }
}

#[test]
fn two_ranks_with_devices_give_what_one_gives() {
    for model in ["llama_gqa", "gemma2", "falcon_7b", "phi3"] {
        let alone = Setting { dtype: Some(Dtype::F32), ..setting(model) };
        let two = Setting { ranks: 2, ..alone.clone() };
        assert_close(model, &run(&two), &run(&alone), 1e-5, 1e-4);
    }
}

#[test]
fn quantized_weights_magnitudes_and_whole_modules_train_on_a_device() {
    let base = setting("llama_gqa");
    let lora = |change: &dyn Fn(&mut LoraConfig)| {
        let mut lora = base.lora.clone();
        change(&mut lora);
        Setting { lora, ..base.clone() }
    };
    let settings = [
        Setting {
            quantize: Some(WeightDtype::Quant(crate::kernels::quant::QuantType::Q8_0)),
            ..base.clone()
        },
        lora(&|lora| lora.use_dora = true),
        lora(&|lora| lora.modules_to_save = vec!["lm_head".into()]),
        lora(&|lora| lora.modules_to_save = vec!["embed_tokens".into()]),
        lora(&|lora| lora.layers_to_transform = Some([1].into())),
        lora(&|lora| lora.target_modules = TargetModules::Names(vec!["lm_head".into()])),
    ];
    for (i, setting) in settings.into_iter().enumerate() {
        let host = run(&setting);
        for ranks in [1, 2] {
            let on_device = Setting { dtype: Some(Dtype::F32), ranks, ..setting.clone() };
            assert_close(&format!("{i} {ranks}"), &run(&on_device), &host, 1e-5, 1e-4);
        }
        let recompute = Recompute::Full;
        let narrow = Setting { dtype: Some(Dtype::Bf16), recompute, ..setting };
        assert_close(&format!("{i} bf16"), &run(&narrow), &host, 1e-2, 5e-2);
    }
}
