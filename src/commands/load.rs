//! From a staged directory to a rank that can work: the model with its KV cache, and
//! what turns a record into token ids.

pub mod on_device;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::Result;
use crate::comm::{Communicator, HostTensorComm, TensorComm, Topology, agree};
use crate::commands::device::Devices;
use crate::commands::footprint;
use crate::commands::generate::Job;
use crate::commands::launch::Rank;
use crate::commands::plan::RunPlan;
use crate::engine::{Guides, Mode, TokenDecoder};
use crate::kernels::attention::BLOCK_SIZE;
use crate::model::checkpoint::Contents;
use crate::model::tokenizer::Tokenizer;
use crate::model::{Adapter, Checkpoint, LoadOptions, ModelRunner, Preflight, Runner, WeightDtype};
use crate::prompts::{AdapterNames, ChatTemplate, Defaults, Preparer};
use crate::slurm::memory_for_rank;
use crate::stage::sources::ModelPaths;
use crate::stats::format;
use crate::{Error, kernels, stage};

/// Share of the free memory that the KV cache may take, where the flags do not say.
const KV_CACHE_SHARE: f64 = 0.8;

/// A rank that is ready to work.
pub struct Loaded {
    /// The model and its cache.
    pub runner: ModelRunner,
    /// Records to token ids.
    pub preparer: Preparer,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// Loads this rank's share of the model. Collective; fails alike on all ranks.
///
/// # Errors
/// Input errors that name the file; a cache that does not fit one sequence.
pub fn load(
    job: &Job,
    rank: &Rank,
    topology: &Topology,
    devices: &Devices,
    plan: &RunPlan,
    staged: &stage::Staged,
) -> Result<Loaded> {
    let world = &*topology.world;
    let opened = agree(world, open(staged, job, plan))?;
    let group = &topology.tensor_parallel;
    let comm: Arc<dyn TensorComm> = Arc::new(HostTensorComm::new(group.clone()));
    let device = on_device::options(job, devices, topology, &opened.checkpoint, &comm)?;
    let num_blocks = match device {
        // When the weights are there.
        Some(_) => Ok(0),
        None => {
            let sequences = devices.batch_limits(&job.model).sequences;
            num_blocks(job, rank, topology, plan, &opened, staged, sequences)
        }
    };
    let Opened { checkpoint, tokenizer, template, adapters } = opened;
    let num_blocks = least(&**group, agree(world, num_blocks)?);
    let (dtype, max_seq_len) = (job.dtype(), plan.max_seq_len);
    if let Some(quant @ WeightDtype::Quant(_)) = dtype
        && staged.report.quantized.is_none()
        && world.rank() == 0
        && footprint::is_quantized(quant, checkpoint.config(), checkpoint.tensors())
    {
        tracing::warn!("--quantize {} changes nothing: the weights are quantized", quant.name());
    }
    let options =
        LoadOptions { dtype, activations: job.activations(), max_seq_len, num_blocks, device };
    let started = Instant::now();
    let runner = ModelRunner::load_adapted(&checkpoint, &adapters, &options, comm);
    let mut runner = agree(world, runner)?;
    let load_seconds = started.elapsed().as_secs_f64();
    let num_blocks = on_device::num_blocks(job, devices, &runner, max_seq_len);
    if let Some(num_blocks) = agree(world, num_blocks)? {
        let num_blocks = least(&**group, num_blocks);
        agree(world, runner.reserve_cache(num_blocks))?;
        if world.rank() == 0 {
            tracing::info!("the KV cache has room for {} tokens", num_blocks * BLOCK_SIZE);
        }
    }
    if world.rank() == 0 {
        if !devices.on_device() {
            let tier = kernels::tier().name();
            tracing::info!(
                "computing on the CPU ({tier} kernels, {} threads a rank)",
                rank.threads
            );
        }
        tracing::info!(
            "weights loaded in {}: {} of the checkpoint read or mapped, {}",
            format::seconds(load_seconds),
            format::bytes(runner.bytes_read()),
            where_to(&runner, load_seconds),
        );
        adapters.iter().for_each(|a| tracing::info!("adapter {}: {}", a.name(), a.summary()));
    }
    let eos_token_ids = tokenizer.eos_token_ids().to_vec();
    let guides = Arc::new(guides(&tokenizer, runner.vocab_size(), &eos_token_ids));
    let preparer = Preparer {
        tokenizer,
        guides,
        template,
        defaults: Defaults {
            params: plan.params.clone(),
            chat: job.input.chat,
            adapters: AdapterNames::new(adapters.iter().map(Adapter::name)),
            file: plan.prompts_name.clone(),
        },
        max_seq_len: plan.max_seq_len,
        reserved_tokens: if job.mode == Mode::Score { 0 } else { 1 },
        vocab_size: runner.vocab_size(),
    };
    Ok(Loaded { runner, preparer, eos_token_ids })
}

/// What became of the weights.
fn where_to(runner: &ModelRunner, load_seconds: f64) -> String {
    match runner.on_device() {
        None => format!("{} of this rank's own", format::bytes(runner.owned_weight_bytes())),
        Some(_) => {
            let rate = runner.weight_bytes() as f64 / load_seconds.max(1e-9) / 1e9;
            format!("{} to the device at {rate:.2} GB/s", format::bytes(runner.weight_bytes()))
        }
    }
}

/// What guides texts: the bytes of the model's tokens, those of special ones left out.
fn guides(tokenizer: &Arc<Tokenizer>, vocab_size: usize, eos_token_ids: &[u32]) -> Guides {
    let tokenizer = tokenizer.clone();
    let word = move |id: u32| match tokenizer.is_special(id) {
        true => Vec::new(),
        false => tokenizer.token_bytes(id),
    };
    Guides::new(move || (0..vocab_size as u32).map(&word).collect(), eos_token_ids)
}

struct Opened {
    checkpoint: Checkpoint,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    adapters: Vec<Adapter>,
}

/// What can be wrong before any weight is read.
fn open(staged: &stage::Staged, job: &Job, plan: &RunPlan) -> Result<Opened> {
    let checkpoint = Checkpoint::open(&staged.model_path)?;
    let given = staged.tokenizer_path.as_deref();
    let contents = checkpoint.contents();
    let template = chat_template(contents, given, plan.started_unix_seconds)?;
    let tokenizer = Arc::new(tokenizer(contents, given)?);
    let adapters = Adapter::open_all(&job.model.adapter, checkpoint.config())?;
    Ok(Opened { checkpoint, tokenizer, template, adapters })
}

/// A model of which a load finds everything, and a tokenizer that belongs to it. Headers are all
/// that is read, so that what is wrong shows before the model is staged.
///
/// # Errors
/// Input errors that name the file, tensor or tokenizer.
pub fn usable(paths: &ModelPaths) -> Result<Checkpoint> {
    let checkpoint = whole(&paths.model)?;
    let tokenizer = tokenizer(checkpoint.contents(), paths.tokenizer.as_deref())?;
    tokenizer.check_fits(checkpoint.config().vocab_size)?;
    Ok(checkpoint)
}

/// A model that has every tensor that its configuration asks for.
///
/// # Errors
/// Input errors that name the file, and the first tensors that are missing or another model's.
pub fn whole(model: &Path) -> Result<Checkpoint> {
    let checkpoint = Checkpoint::open(model)?;
    let preflight = Preflight::new(checkpoint.config(), checkpoint.tensors())?;
    if let Some(problem) = preflight.problem() {
        return Err(Error::input(format!("--model {}: {problem}", model.display())));
    }
    if !preflight.unused().is_empty() {
        log_unused(preflight.unused());
    }
    Ok(checkpoint)
}

/// Of the decoder's layers it is a warning: without them the model may be another one than
/// was trained.
fn log_unused(names: &[String]) {
    const LAYERS: [&str; 4] = ["model.layers.", "transformer.h.", "layers.", "blk."];
    let some = names.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ");
    let more = if names.len() > 3 { ", …" } else { "" };
    let what = format!("{} tensors of the model are not used: {some}{more}", names.len());
    let is_in_layer = |name: &String| LAYERS.iter().any(|layers| name.starts_with(layers));
    match names.iter().any(is_in_layer) {
        true => tracing::warn!("{what}; does its configuration belong to it?"),
        false => tracing::info!("{what}"),
    }
}

/// The tokenizer at `given`, else the model's own.
///
/// # Errors
/// See [`Tokenizer::open`].
pub fn tokenizer(model: &Contents, given: Option<&Path>) -> Result<Tokenizer> {
    Tokenizer::open(first_file(model), given, model.metadata.as_ref())
}

/// The chat template that comes with the tokenizer at `given`, else the one in the GGUF file,
/// else that of the model's directory; `None` if there is none.
///
/// # Errors
/// See [`ChatTemplate::open`].
pub fn chat_template(
    model: &Contents,
    given: Option<&Path>,
    now_unix_seconds: u64,
) -> Result<Option<ChatTemplate>> {
    let beside = |path: &Path| match path.parent() {
        Some(dir) if !path.is_dir() => dir.to_owned(),
        _ => path.to_owned(),
    };
    if let Some(dir) = given.map(beside)
        && let found @ Some(_) = ChatTemplate::from_dir(&dir, now_unix_seconds)?
    {
        return Ok(found);
    }
    // In the name of the file: what lies beside it in a folder of many models may be another's.
    let own = ChatTemplate::open(first_file(model), model.metadata.as_ref(), now_unix_seconds)?;
    match own {
        Some(own) => Ok(Some(own)),
        None => ChatTemplate::from_dir(&model.files.dir, now_unix_seconds),
    }
}

/// The model's first file: messages name it, and it has its directory around it.
fn first_file(model: &Contents) -> &Path {
    model.files.weights.first().map_or(&model.files.dir, PathBuf::as_path)
}

/// The least `count` of the group: its ranks keep the same blocks.
fn least(group: &dyn Communicator, count: usize) -> usize {
    let all = group.all_gather(&(count as u64).to_le_bytes());
    let counts = all.iter().filter_map(|b| Some(u64::from_le_bytes(b.as_slice().try_into().ok()?)));
    counts.min().map_or(count, |least| least as usize)
}

/// Blocks of the KV cache: enough for the whole batch at its longest, within the memory
/// that the flag or the node allows.
///
/// # Errors
/// Not even one sequence fits at its longest. (Shorter ones would, but then a record's
/// text would depend on the memory of the node that it came to.)
fn num_blocks(
    job: &Job,
    rank: &Rank,
    topology: &Topology,
    plan: &RunPlan,
    opened: &Opened,
    staged: &stage::Staged,
    sequences: usize,
) -> Result<usize> {
    let Opened { checkpoint, adapters, .. } = opened;
    let (config, size) = (checkpoint.config(), topology.tensor_parallel.size());
    let block_bytes = config.kv_block_bytes(config.local_kv_heads(size), BLOCK_SIZE).max(1);
    let budget = memory_for_rank(&rank.job, topology.node.size(), staged.report.model_bytes);
    if let Some(budget) = &budget {
        tracing::debug!("{} bytes free for this rank ({})", budget.bytes, budget.limited_by);
    }
    // Not there yet, but on their way: weights that are converted or cut, and adapters.
    let owned = footprint::weights(config, checkpoint.tensors(), job.dtype(), size).owned;
    let adapters: u64 = adapters.iter().map(Adapter::memory_bytes).sum();
    let free = budget.map(|budget| budget.bytes.saturating_sub(owned + adapters));
    let allowed = match (job.model.kv_cache_memory, free) {
        // More than there is would end the process, not this run with a message.
        (Some(flag), free) => Some(free.map_or(flag, |free| flag.min(free))),
        (None, free) => free.map(|free| (free as f64 * KV_CACHE_SHARE) as u64),
    };
    blocks_within(allowed, block_bytes, plan.max_seq_len, sequences)
}

fn blocks_within(
    allowed_bytes: Option<u64>,
    block_bytes: usize,
    max_seq_len: usize,
    max_batch_size: usize,
) -> Result<usize> {
    let longest = max_seq_len.div_ceil(BLOCK_SIZE);
    let wanted = longest.saturating_mul(max_batch_size);
    let fits = allowed_bytes.map_or(wanted, |bytes| wanted.min(bytes as usize / block_bytes));
    if fits < longest {
        let needed = format::memory(longest as u64 * block_bytes as u64);
        let allowed = format::memory(allowed_bytes.unwrap_or(0));
        let room = match fits * BLOCK_SIZE {
            0 => String::new(),
            tokens => format!("set --max-seq-len {tokens} or less, "),
        };
        return Err(Error::input(format!(
            "the KV cache of one sequence of {max_seq_len} tokens takes {needed}, and {allowed} are \
             left for it: {room}ask for more memory, start fewer ranks a node, or set \
             --kv-cache-memory"
        )));
    }
    Ok(fits)
}

/// The engine's view of the tokenizer.
pub struct Decoder(pub Arc<Tokenizer>);

impl TokenDecoder for Decoder {
    fn decode(&self, ids: &[u32]) -> String {
        // A token without text (an id beyond the tokenizer's vocabulary) shows as nothing.
        self.0.decode(ids, true).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (allowed, longest sequence, batch, blocks): a block is 100 bytes here.
    #[test]
    fn the_cache_holds_at_least_one_longest_sequence_or_says_what_would_fit() {
        let (two, huge) = (2 * BLOCK_SIZE, usize::MAX);
        for (allowed, max_seq_len, batch, blocks) in [
            (None, two, 4, 8),
            (Some(100_000), two, 4, 8),
            (Some(599), two, 4, 5),
            (Some(200), two, 4, 2),
            (Some(1000), two, huge, 10),
        ] {
            assert_eq!(blocks_within(allowed, 100, max_seq_len, batch).unwrap(), blocks);
        }
        let error = blocks_within(Some(199), 100, two, 4).unwrap_err();
        let fix = format!("--max-seq-len {BLOCK_SIZE} or less");
        assert!(error.message.contains(&fix), "{error}");
        assert!(
            !blocks_within(Some(9), 100, two, 4).unwrap_err().message.contains("--max-seq-len")
        );
    }
}
