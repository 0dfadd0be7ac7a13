//! Between records and the engine's sequences: a record with `n` completions is `n`
//! sequences, and its line is written when all have ended. At a drain, what its
//! sequences have generated is saved, and a later launch starts it from there.

use std::collections::HashMap;
use std::sync::Arc;

use crate::engine::{self, EngineOutput, EngineRequest, Generated, Mode, Unfinished};
use crate::ledger::record::{self, Completion, RunInfo, Score, TokenLogprob, TopLogprob};
use crate::ledger::{Finished, SavedRecord, saved, token_cost};
use crate::model::tokenizer::Tokenizer;
use crate::prompts::{ErrorCode, Prepared, Preparer, RawRecord, RecordError};

/// A finished record, with what the counters want to know.
#[derive(Debug)]
pub struct Done {
    /// For the part file and rank 0.
    pub finished: Finished,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that this launch generated, all completions together.
    pub new_tokens: usize,
}

/// The records that this rank works on.
pub struct Records {
    mode: Mode,
    run: RunInfo,
    preparer: Preparer,
    open: HashMap<u64, Open>,
}

struct Open {
    raw: RawRecord,
    prepared: Prepared,
    outputs: Vec<Option<EngineOutput>>,
    /// Tokens that earlier launches generated.
    continued_tokens: usize,
}

/// The engine's key of a completion: the record's index and the completion's number,
/// of which there are at most 16.
fn key(index: u64, completion: u32) -> u64 {
    index * 16 + u64::from(completion)
}

impl Records {
    /// None yet.
    pub fn new(mode: Mode, run: RunInfo, preparer: Preparer) -> Self {
        Self { mode, run, preparer, open: HashMap::new() }
    }

    /// Prepares a record: its sequences for the engine, or at once its error line.
    /// `saved` are the bytes that [`Records::unfinished`] gave for it in an earlier
    /// launch; of no use, they are passed over and the record begins anew.
    pub fn start(
        &mut self,
        raw: RawRecord,
        saved: Option<&[u8]>,
    ) -> Result<Vec<EngineRequest>, Box<Done>> {
        let prepared = match self.preparer.prepare(&raw) {
            Ok(prepared) => prepared,
            Err(error) => return Err(Box::new(self.failed(raw.index, &error, 0, 0))),
        };
        let n = if self.mode == Mode::Score { 1 } else { prepared.request.params.n };
        let mut generated = saved
            .and_then(|bytes| saved::decode(bytes, &prepared.prompt_token_ids))
            .unwrap_or_default()
            .into_iter();
        let request = |completion: u32| EngineRequest {
            key: key(raw.index, completion),
            record_index: raw.index,
            completion,
            prompt_token_ids: prepared.prompt_token_ids.clone(),
            adapter: prepared.request.adapter.as_ref().map(|adapter| adapter.number),
            generated: generated.next().unwrap_or_default(),
            params: prepared.request.params.clone(),
            mode: self.mode,
        };
        let requests: Vec<EngineRequest> = (0..n as u32).map(request).collect();
        let continued_tokens = requests.iter().map(|r| r.generated.token_ids.len()).sum();
        let outputs = vec![None; n];
        self.open.insert(raw.index, Open { raw, prepared, outputs, continued_tokens });
        Ok(requests)
    }

    /// Takes a sequence's end; the record's line if it was the last.
    pub fn end(&mut self, output: EngineOutput) -> Option<Done> {
        let (index, completion) = (output.key / 16, output.key % 16);
        let open = self.open.get_mut(&index)?;
        open.outputs[completion as usize] = Some(output);
        if open.outputs.iter().any(Option::is_none) {
            return None;
        }
        let Open { raw, prepared, outputs, continued_tokens } = self.open.remove(&index)?;
        let outputs: Vec<EngineOutput> = outputs.into_iter().flatten().collect();
        let prompt_tokens = prepared.prompt_token_ids.len();
        let tokens: usize = outputs.iter().map(|o| o.token_ids.len()).sum();
        let new_tokens = tokens.saturating_sub(continued_tokens);
        let error = outputs.iter().find_map(|output| match &output.finish_reason {
            engine::FinishReason::Error(message) => Some(RecordError {
                code: ErrorCode::GenerationFailed,
                message: message.clone(),
                file: self.preparer.defaults.file.clone(),
                line: raw.line,
                index,
                id: Some(prepared.request.id.clone()),
                openai: prepared.request.openai.is_some(),
            }),
            _ => None,
        });
        if let Some(error) = error {
            return Some(self.failed(index, &error, prompt_tokens, new_tokens));
        }
        let line = match self.mode {
            Mode::Score => record::score_line(&self.run, &prepared, &score(&outputs)),
            Mode::Generate => {
                let tokenizer = &self.preparer.tokenizer;
                let completions: Vec<Completion> =
                    outputs.into_iter().map(|output| completion_of(output, tokenizer)).collect();
                record::completion_line(&self.run, &prepared, &completions)
            }
        };
        Some(Done {
            finished: Finished {
                index,
                line,
                is_error: false,
                cost: token_cost(prompt_tokens as u64, new_tokens as u64),
                new_tokens: new_tokens as u64,
            },
            prompt_tokens,
            new_tokens,
        })
    }

    /// Ends the work on all records: the bytes of those of which something has been
    /// generated, by index. `unfinished` is what the engine gave back.
    pub fn unfinished(&mut self, unfinished: Vec<Unfinished>) -> Vec<SavedRecord> {
        let mut running: HashMap<u64, Generated> =
            unfinished.into_iter().map(|sequence| (sequence.key, sequence.generated)).collect();
        let mut records = Vec::new();
        for (index, Open { prepared, outputs, .. }) in self.open.drain() {
            let completions: Vec<Generated> = (0..)
                .zip(outputs)
                .map(|(completion, output)| match output {
                    // Replayed, its tokens end where they did.
                    Some(output) => output.into(),
                    None => running.remove(&key(index, completion)).unwrap_or_default(),
                })
                .collect();
            if completions.iter().any(|generated| !generated.token_ids.is_empty()) {
                let bytes = saved::encode(&prepared.prompt_token_ids, &completions);
                records.push(SavedRecord { index, bytes });
            }
        }
        records.sort_unstable_by_key(|record| record.index);
        records
    }

    fn failed(
        &self,
        index: u64,
        error: &RecordError,
        prompt_tokens: usize,
        new_tokens: usize,
    ) -> Done {
        let finished = Finished {
            index,
            line: record::error_line(&self.run, error),
            is_error: true,
            cost: token_cost(prompt_tokens as u64, new_tokens as u64),
            new_tokens: new_tokens as u64,
        };
        Done { finished, prompt_tokens, new_tokens }
    }
}

fn score(outputs: &[EngineOutput]) -> Score {
    let logprobs: Vec<f32> = outputs
        .iter()
        .filter_map(|output| output.score.as_ref())
        .flat_map(|score| score.token_logprobs.iter().map(|logprob| *logprob as f32))
        .collect();
    Score::new(&logprobs)
}

fn completion_of(output: EngineOutput, tokenizer: &Arc<Tokenizer>) -> Completion {
    let text = |id: u32| tokenizer.decode(&[id], false).unwrap_or_default();
    let logprobs = output.logprobs.map(|tokens| {
        let token = |t: engine::TokenLogprob| TokenLogprob {
            token: text(t.token),
            token_id: t.token,
            logprob: t.logprob,
            top: t
                .top
                .into_iter()
                .map(|(id, logprob)| TopLogprob { token: text(id), token_id: id, logprob })
                .collect(),
        };
        tokens.into_iter().map(token).collect()
    });
    Completion {
        text: output.text,
        token_ids: output.token_ids,
        finish_reason: match output.finish_reason {
            engine::FinishReason::Length => record::FinishReason::Length,
            _ => record::FinishReason::Stop,
        },
        logprobs,
    }
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
