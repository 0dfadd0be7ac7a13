//! Damaged model files: whatever is in them, farm answers with a model or an error, without
//! a panic and within bounded memory.
//!
//! Every kind of file that farm reads is taken from the golden models, damaged at random
//! (cut, bytes and words overwritten, parts doubled or removed) and loaded as a run would
//! load it. `FARM_FUZZ_SECONDS=300 cargo test --test fuzz` goes on for five minutes a kind,
//! `FARM_FUZZ_SEED=N` repeats one damage.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm::ErrorKind;
use farm::comm::NoTensorComm;
use farm::kernels::quant::QuantType;
use farm::model::StepBatch;
use farm::model::checkpoint::QuantizedFile;
use farm::model::tokenizer::Tokenizer;
use farm::model::{
    Activations, BatchSequence, Checkpoint, LoadOptions, LogitsWanted, ModelRunner, Preflight,
    Runner,
};

/// Refuses what no small file can need: an unchecked count shows as an abort.
struct Bounded;

const MAX_ALLOCATION: usize = 512 << 20;

// SAFETY: the system's allocator, with some requests refused as if memory had run out.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > MAX_ALLOCATION {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// A model of the golden cases, and the file of it that is damaged.
const KINDS: [(&str, &str); 13] = [
    ("llama_tied", "model.safetensors"),
    (QUANTIZED, "model.safetensors"),
    ("llama_tied", "config.json"),
    ("llama_tied", "tokenizer.json"),
    ("llama_gqa", "model.safetensors.index.json"),
    ("qwen3_moe", "config.json"),
    ("llama_bin", "pytorch_model-00001-of-00002.bin"),
    ("meta_mp2", "consolidated.01.pth"),
    ("meta_mp2", "params.json"),
    ("gguf", "llama_spm.gguf"),
    ("gguf", "gemma3.gguf"),
    ("gguf", "llama_quantized_q4_k.gguf"),
    ("gguf", "llama_split-00002-of-00003.gguf"),
];

/// `llama_tied` as it is staged with `--quantize`.
const QUANTIZED: &str = "llama_tied quantized";

#[test]
fn damaged_files_are_models_or_errors() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (case, file) in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let source = case.split(' ').next().unwrap();
        let model = copy_case(&golden.join(source), dir.path(), file);
        if case == QUANTIZED {
            let made = QuantizedFile::open(&golden.join(source), QuantType::Q8_0).unwrap().unwrap();
            let mut bytes = vec![0; made.bytes() as usize];
            made.read_at(0, &mut bytes).unwrap();
            std::fs::write(model.join(file), bytes).unwrap();
        }
        load(&model).unwrap_or_else(|e| panic!("{case} undamaged: {}", e.message));
        let whole = std::fs::read(dir.path().join(file)).unwrap();
        for seed in seeds() {
            std::fs::write(dir.path().join(file), damaged(&whole, seed)).unwrap();
            let Err(error) = load(&model) else { continue };
            let named = error.message.len() > 10;
            assert!(
                error.kind == ErrorKind::Input && named,
                "{case}/{file} FARM_FUZZ_SEED={seed}: {error:?}"
            );
        }
    }
}

/// The seeds of this run: some, one, or as many as fit into the time.
fn seeds() -> impl Iterator<Item = u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let (one, seconds) = (number("FARM_FUZZ_SEED"), number("FARM_FUZZ_SECONDS"));
    let end = seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let first = one.unwrap_or(0);
    (first..).enumerate().map_while(move |(i, seed)| {
        let goes_on = match (one, end) {
            (Some(_), _) => i == 0,
            (None, Some(end)) => Instant::now() < end,
            (None, None) => i < 60,
        };
        goes_on.then_some(seed)
    })
}

/// Copies a case; of the GGUF files, the one (or the set of parts) that is meant.
fn copy_case(case: &Path, to: &Path, file: &str) -> PathBuf {
    let stem = file.split("-0000").next().unwrap();
    let gguf = file.ends_with(".gguf");
    for entry in std::fs::read_dir(case).unwrap() {
        let from = entry.unwrap().path();
        let name = from.file_name().unwrap().to_str().unwrap();
        if !gguf || (name.starts_with(stem) && name.ends_with(".gguf")) {
            std::fs::copy(&from, to.join(name)).unwrap();
        }
    }
    if let Ok(source) = std::fs::read_to_string(case.join("golden_from")) {
        let tokenizer = case.with_file_name(source.trim()).join("tokenizer.json");
        std::fs::copy(tokenizer, to.join("tokenizer.json")).unwrap();
    }
    if gguf { to.join(file) } else { to.to_owned() }
}

/// What a run does with a model, up to one step.
fn load(model: &Path) -> farm::Result<()> {
    let checkpoint = Checkpoint::open(model)?;
    let tokenizer = Tokenizer::open(model, None, checkpoint.metadata())?;
    let config = checkpoint.config();
    // As the engine bounds it by memory.
    let num_blocks = 4;
    if config.kv_block_bytes(config.num_key_value_heads, 16) > 8 << 20 {
        return Ok(());
    }
    let options = LoadOptions {
        dtype: None,
        activations: Activations::default(),
        max_seq_len: 64,
        num_blocks,
        device: None,
    };
    let problem = Preflight::new(config, checkpoint.tensors())?.problem();
    let runner = ModelRunner::load(&checkpoint, &options, Arc::new(NoTensorComm));
    assert_eq!(problem.is_some(), runner.is_err(), "found before the load: {problem:?}");
    let mut runner = runner?;
    let mut token_ids = tokenizer.encode("The cat — 東京", true)?;
    token_ids.retain(|&id| (id as usize) < runner.vocab_size());
    token_ids.truncate(40);
    if !token_ids.is_empty() {
        let sequence = BatchSequence {
            start_position: 0,
            num_tokens: token_ids.len(),
            block_table: (0..num_blocks as u32).collect(),
            logits: LogitsWanted::Last,
            prompt_len: token_ids.len(),
            adapter: None,
        };
        runner.forward(&StepBatch { token_ids, sequences: vec![sequence] })?;
    }
    tokenizer.decode(&[0, 5, u32::MAX], true).map(drop)
}

/// A few random damages, at places that headers prefer: the beginning and the end.
fn damaged(whole: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03);
    let mut bytes = whole.to_vec();
    for _ in 0..1 + random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.place(bytes.len());
        let end = (at + 1 + random.below(64)).min(bytes.len());
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 => {
                let value = [0, 1, u64::MAX, 1 << 31, 1 << 40, random.next()][random.below(6)];
                for (byte, new) in bytes[at..].iter_mut().zip(value.to_le_bytes()) {
                    *byte = new;
                }
            }
            4 => drop(bytes.drain(at..end)),
            5 => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            // A digit of a JSON file.
            _ => {
                if let Some(digit) = bytes[at..].iter_mut().find(|b| b.is_ascii_digit()) {
                    *digit = b'0' + random.below(10) as u8;
                }
            }
        }
    }
    bytes
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn place(&mut self, len: usize) -> usize {
        match self.below(4) {
            0 => self.below(len),
            1 => len - 1 - self.below(len.min(2048)),
            _ => self.below(len.min(4096)),
        }
    }
}
