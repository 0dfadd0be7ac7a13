//! From a staged directory to a rank that can work: the model with its KV cache, and
//! what turns a record into token ids.

use std::path::Path;
use std::sync::Arc;

use crate::Result;
use crate::comm::{HostTensorComm, TensorComm, Topology};
use crate::commands::generate::Job;
use crate::commands::launch::Rank;
use crate::commands::plan::RunPlan;
use crate::engine::{Mode, TokenDecoder};
use crate::kernels::attention::BLOCK_SIZE;
use crate::model::tokenizer::Tokenizer;
use crate::model::{LoadOptions, ModelConfig, ModelRunner, Runner};
use crate::prompts::{ChatTemplate, Defaults, Preparer};
use crate::slurm::memory_for_rank;
use crate::{Error, stage};

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

/// Loads this rank's share of the model.
///
/// # Errors
/// Input errors that name the file; a cache that does not fit one sequence.
pub fn load(
    job: &Job,
    rank: &Rank,
    topology: &Topology,
    plan: &RunPlan,
    staged: &stage::Staged,
) -> Result<Loaded> {
    let dir: &Path = &staged.model_path;
    let config = ModelConfig::from_dir(dir)?;
    let tokenizer = Arc::new(Tokenizer::from_dir(dir)?);
    let template = ChatTemplate::from_dir(dir, plan.started_unix_seconds)?;
    let num_blocks = num_blocks(job, rank, topology, plan, &config, staged)?;
    let comm: Arc<dyn TensorComm> = Arc::new(HostTensorComm::new(topology.tensor_parallel.clone()));
    let options = LoadOptions { dtype: job.dtype(), max_seq_len: plan.max_seq_len, num_blocks };
    let runner = ModelRunner::load(dir, &config, &options, comm)?;
    let mut eos_token_ids = tokenizer.eos_token_ids().to_vec();
    eos_token_ids.extend(&config.eos_token_ids);
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    let preparer = Preparer {
        tokenizer,
        template,
        defaults: Defaults {
            params: plan.params.clone(),
            chat: job.input.chat,
            file: plan.prompts_name.clone(),
        },
        // Fewer blocks than the longest sequence needs bound the sequences instead.
        max_seq_len: plan.max_seq_len.min(num_blocks * BLOCK_SIZE),
        reserved_tokens: if job.mode == Mode::Score { 0 } else { 1 },
        vocab_size: runner.vocab_size(),
    };
    Ok(Loaded { runner, preparer, eos_token_ids })
}

/// Blocks of the KV cache: enough for the whole batch at its longest, within the memory
/// that the flag or the node allows; the same on all ranks of a tensor-parallel group.
fn num_blocks(
    job: &Job,
    rank: &Rank,
    topology: &Topology,
    plan: &RunPlan,
    config: &ModelConfig,
    staged: &stage::Staged,
) -> Result<usize> {
    let group = &topology.tensor_parallel;
    let kv_heads = (config.num_key_value_heads / group.size()).max(1);
    let block_bytes = config.kv_block_bytes(kv_heads, BLOCK_SIZE);
    let wanted = job.model.max_batch_size * plan.max_seq_len.div_ceil(BLOCK_SIZE);
    let free = || {
        let staged_bytes = staged.report.model_bytes;
        let budget = memory_for_rank(&rank.job, topology.node.size(), staged_bytes)?;
        tracing::debug!("{} bytes free for this rank ({})", budget.bytes, budget.limited_by);
        Some((budget.bytes as f64 * KV_CACHE_SHARE) as u64)
    };
    let allowed = job.model.kv_cache_memory.or_else(free);
    let fits = allowed.map_or(wanted, |bytes| wanted.min(bytes as usize / block_bytes));
    let all = group.all_gather(&(fits as u64).to_le_bytes());
    let least = all.iter().filter_map(|b| Some(u64::from_le_bytes(b.as_slice().try_into().ok()?)));
    match least.min().unwrap_or(0) as usize {
        0 => Err(Error::input(format!(
            "no memory for the KV cache: one block of {BLOCK_SIZE} tokens takes {block_bytes} \
             bytes; ask for more memory, or set --kv-cache-memory"
        ))),
        blocks => Ok(blocks),
    }
}

/// The engine's view of the tokenizer.
pub struct Decoder(pub Arc<Tokenizer>);

impl TokenDecoder for Decoder {
    fn decode(&self, ids: &[u32]) -> String {
        // A token without text (an id beyond the tokenizer's vocabulary) shows as nothing.
        self.0.decode(ids, true).unwrap_or_default()
    }
}
