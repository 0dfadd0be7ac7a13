//! The same parity on a device: the tests' emulator, or with FARM_TEST_DEVICE=cuda the first
//! GPU.

use super::*;
use farm::device::collectives::HostStaged;
use farm::device::{Device, Dtype};
use farm::model::device::DeviceOptions;

/// Products on a GPU are added up in another order than those of transformers.
const F32_TOLERANCE: f32 = 2e-4;
/// Of logits in half precision, relative to the largest one; the weights are rounded, too.
const HALF_TOLERANCE: f32 = 4e-2;

fn device() -> Device {
    match std::env::var("FARM_TEST_DEVICE").as_deref() {
        #[cfg(feature = "cuda")]
        Ok("cuda") => farm::device::nvidia::open(0).unwrap(),
        #[cfg(feature = "emulator")]
        _ => Device::emulated(),
        #[cfg(not(feature = "emulator"))]
        _ => panic!("these tests run on the emulator (feature emulator) or FARM_TEST_DEVICE=cuda"),
    }
}

fn options(
    comm: Arc<dyn TensorComm>,
    dtype: Dtype,
    quantized: Option<WeightDtype>,
    uses_graphs: bool,
) -> LoadOptions {
    let comm = Arc::new(HostStaged::new(comm));
    let device = DeviceOptions {
        device: device(),
        comm,
        dtype,
        max_rows: 256,
        max_logits_rows: 16,
        uses_graphs,
    };
    LoadOptions {
        dtype: quantized,
        activations: Activations::F32,
        max_seq_len: 512,
        num_blocks: 64,
        device: Some(device),
    }
}

fn on_device<T: Send>(
    dir: &Path,
    size: usize,
    dtype: Dtype,
    body: impl Fn(&mut ModelRunner) -> T + Sync,
) -> T {
    with_options(dir, &[], size, |comm| options(comm, dtype, None, true), body)
}

/// Enough to write to the cache in decode and read it again; the emulator is slow.
const NEW_TOKENS: usize = 3;
const PROMPTS: usize = 2;

#[test]
fn f32_logits_and_greedy_ids_equal_transformers() {
    for dir in cases() {
        for size in tensor_parallel_sizes(&dir).into_iter().filter(|size| *size <= 2) {
            on_device(&dir, size, Dtype::F32, |runner| {
                for prompt in golden(&dir).prompts.into_iter().take(PROMPTS) {
                    let what = format!("{} TP {size} {:?}", dir.display(), prompt.text);
                    let ids = &prompt.prompt_token_ids;
                    let rows = step(runner, 0, ids, ids.len(), LogitsWanted::All);
                    let off = worst(rows.last().unwrap(), &prompt.last_logits);
                    assert!(off <= F32_TOLERANCE, "{what}: logits differ by {off}");
                    let want = prompt.greedy_use_cache.as_ref().unwrap_or(&prompt.greedy);
                    let n = NEW_TOKENS.min(want.len());
                    assert_eq!(greedy(runner, ids, n), want[..n], "{what}: greedy ids");
                }
            });
        }
    }
}

/// Tensor-core kernels for chunks of prompts, rows for what follows them.
#[test]
fn half_precision_logits_are_near_those_in_f32() {
    for dir in cases() {
        let prompt = golden(&dir).prompts.into_iter().max_by_key(|p| p.prompt_token_ids.len());
        let ids = prompt.unwrap().prompt_token_ids;
        let of = |runner: &mut ModelRunner| {
            let (head, tail) = ids.split_at(ids.len() - 1);
            step(runner, 0, head, ids.len(), LogitsWanted::Last);
            step(runner, head.len(), tail, ids.len(), LogitsWanted::Last).remove(0)
        };
        let want = with_model(&dir, 1, of);
        let largest = want.iter().fold(1.0f32, |most, x| most.max(x.abs()));
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let off = worst(&on_device(&dir, 1, dtype, of), &want) / largest;
            assert!(off <= HALF_TOLERANCE, "{} {dtype:?}: differ by {off}", dir.display());
        }
    }
}

/// What is recorded once and replayed gives the same bits, for batches of any size and length.
#[test]
fn recorded_steps_equal_launched_ones() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama_gqa");
    let run = |uses_graphs: bool| {
        let options = |comm| options(comm, Dtype::F32, None, uses_graphs);
        with_options(&dir, &[], 1, options, |runner| {
            let mut all = Vec::new();
            for batch_size in [1usize, 3, 2, 3, 9] {
                for position in 0..20usize {
                    let sequences = (0..batch_size).map(|i| BatchSequence {
                        start_position: position,
                        num_tokens: 1,
                        block_table: (0..=position as u32 / 16)
                            .map(|b| b * 10 + i as u32)
                            .collect(),
                        logits: LogitsWanted::Last,
                        prompt_len: 1,
                        adapter: None,
                    });
                    let sequences = sequences.collect();
                    let ids = (0..batch_size).map(|i| (7 * i + position) as u32 % 50);
                    let batch = StepBatch { token_ids: ids.collect(), sequences };
                    all.push(runner.forward(&batch).unwrap().data);
                }
            }
            all
        })
    };
    assert_eq!(run(true), run(false));
}
