//! Tokens and scores from rows of logits that lie on the device: one small copy to it and
//! one back a step. A row gives what `engine::choose` gives on the host, whatever shares
//! the batch (see `kernels/sampling.cu`).
//!
//! Token counts for penalties lie on the device, too: a sequence's tokens are sent once,
//! when it comes or comes back; each chosen token is counted where it is chosen.

use std::collections::HashMap;

use super::{Arg, Array, Device, Dtype, blocks};
use crate::Result;
use crate::model::{
    LogitsError, Logprobs, MAX_TOP_LOGPROBS, Penalties, RowChoice, RowChoices, RowSampling,
    TokenSampling,
};

/// Tokens a block of the first kernels; `CHUNK` in `kernels/sampling.cu`, as what follows.
const CHUNK: usize = 4096;
const CHUNK_THREADS: u32 = 256;
const BINS: usize = 2048;
/// Words of a `Row`, a `Partial`, an `Outcome`.
const ROW_WORDS: usize = 20;
const PARTIAL_WORDS: usize = 8;
const OUTCOME_WORDS: usize = 6;
/// A weight of 1.
const UNIT: f64 = (1u64 << 44) as f64;
/// So many weights sum without overflow.
const MAX_VOCAB_SIZE: usize = 1 << 20;

const CHOOSE: u32 = 1;
const GREEDY: u32 = 2;
const SUPPRESS_EOS: u32 = 4;
const NORMALISER: u32 = 8;
const FILTER: u32 = 16;
const TOP_P: u32 = 32;
const SCORE: u32 = 64;

const OK: u32 = 0;
const NO_CANDIDATE: u32 = 2;

/// Chooses tokens on a device. Keeps its arrays from step to step; they grow where a step
/// needs more.
pub struct RowChooser {
    device: Device,
    vocab_size: usize,
    /// What is wanted of each row, on the host and on the device.
    words: Vec<u32>,
    rows: Array,
    partials: Array,
    histograms: Array,
    outcomes: Array,
    next: Array,
    /// The best tokens, where a row has asked for them.
    top: Array,
    allowed: Array,
    eos: Array,
    eos_token_ids: Vec<u32>,
    counts: TokenCounts,
    generation: u64,
}

impl RowChooser {
    /// For rows of `vocab_size` logits.
    ///
    /// # Errors
    /// A fault of the driver.
    ///
    /// # Panics
    /// Beyond 2²⁰ tokens.
    pub fn new(device: &Device, vocab_size: usize) -> Result<Self> {
        assert!(vocab_size <= MAX_VOCAB_SIZE, "a vocabulary of {vocab_size}");
        let none = |dtype| device.uninitialised(dtype, 0);
        Ok(Self {
            device: device.clone(),
            vocab_size,
            words: Vec::new(),
            rows: none(Dtype::U32)?,
            partials: none(Dtype::U32)?,
            histograms: none(Dtype::U32)?,
            outcomes: none(Dtype::U32)?,
            next: none(Dtype::I32)?,
            top: none(Dtype::U32)?,
            allowed: none(Dtype::U32)?,
            eos: none(Dtype::U32)?,
            eos_token_ids: Vec::new(),
            counts: TokenCounts::new(device, vocab_size)?,
            generation: 0,
        })
    }

    /// Does with the rows of `logits`, f32 and `stride` apart, what `rows` say.
    ///
    /// # Errors
    /// A fault of the driver; no memory for what a larger step needs.
    pub fn choose(
        &mut self,
        logits: &Array,
        stride: usize,
        rows: &[RowSampling],
        eos_token_ids: &[u32],
    ) -> Result<RowChoices> {
        self.prepare(rows, eos_token_ids)?;
        self.launch(logits, stride, rows.len())?;
        self.results(logits, stride, rows)
    }

    /// Sends what is wanted of each row.
    ///
    /// # Errors
    /// See [`RowChooser::choose`].
    pub fn prepare(&mut self, rows: &[RowSampling], eos_token_ids: &[u32]) -> Result<()> {
        self.reserve(rows)?;
        if self.eos_token_ids != eos_token_ids {
            self.eos_token_ids = eos_token_ids.to_vec();
            self.eos = self.device.upload(eos_token_ids)?;
            self.generation += 1;
        }
        self.counts.begin_step(rows)?;
        self.words.clear();
        let (mut num_histograms, mut allowed) = (0, Vec::new());
        for row in rows {
            let mut words = RowWords::of(row, self.vocab_size);
            if let RowSampling::Token(wanted) = row {
                if let Some(penalties) = &wanted.penalties {
                    words.slot = self.counts.slot_of(penalties)? as i32;
                }
                if let Some(bitmap) = wanted.allowed {
                    words.allowed = (allowed.len() / self.bitmap_words()) as i32;
                    push_bitmap(bitmap, self.bitmap_words(), &mut allowed);
                }
                words.histogram = num_histograms;
                num_histograms += u32::from(words.flags & FILTER != 0);
            }
            words.push_to(&mut self.words);
        }
        self.device.write(&self.allowed, &allowed)?;
        self.device.write(&self.rows, &self.words)
    }

    /// Queues the kernels for the first `num_rows` rows that were prepared; nothing else, so
    /// it may be recorded, and what is recorded holds while [`RowChooser::generation`] stays.
    ///
    /// # Errors
    /// A fault of the driver.
    ///
    /// # Panics
    /// If there are fewer rows.
    pub fn launch(&self, logits: &Array, stride: usize, num_rows: usize) -> Result<()> {
        assert_eq!(logits.dtype(), Dtype::F32);
        assert!(num_rows <= self.next.len() && stride >= self.vocab_size);
        assert!(num_rows == 0 || logits.len() >= (num_rows - 1) * stride + self.vocab_size);
        let chunks = blocks(self.vocab_size, CHUNK);
        let shared: [Arg; 10] = [
            logits.into(),
            stride.into(),
            self.vocab_size.into(),
            (&self.rows).into(),
            self.counts.table.as_ref().into(),
            (&self.allowed).into(),
            (&self.eos).into(),
            self.eos.len().into(),
            (&self.partials).into(),
            (&self.histograms).into(),
        ];
        let (grid, block) = ([chunks, num_rows as u32, 1], [CHUNK_THREADS, 1, 1]);
        self.device.launch("sampling_maxima", grid, block, 0, &shared)?;
        self.device.launch("sampling_masses", grid, block, 0, &shared)?;
        let [first @ .., _, _] = &shared;
        let mut decide = first.to_vec();
        let own: [&Array; 4] = [&self.partials, &self.histograms, &self.outcomes, &self.next];
        decide.extend(own.map(Arg::from));
        self.device.launch("sampling_decide", [num_rows as u32, 1, 1], self.block(), 0, &decide)
    }

    /// What became of the rows, when the kernels have run.
    ///
    /// # Errors
    /// A fault of the driver.
    pub fn results(
        &mut self,
        logits: &Array,
        stride: usize,
        rows: &[RowSampling],
    ) -> Result<RowChoices> {
        let top = self.best_tokens(logits, stride, rows)?;
        let words = self.device.read::<u32>(&self.outcomes.first(rows.len() * OUTCOME_WORDS))?;
        let mut choices = Vec::with_capacity(rows.len());
        for (i, (row, words)) in rows.iter().zip(words.chunks_exact(OUTCOME_WORDS)).enumerate() {
            let outcome = Outcome::from_words(words);
            let choice = match (row, outcome.checked()) {
                (RowSampling::Logits, _) => {
                    let row = logits.slice(i * stride..i * stride + self.vocab_size);
                    Ok(RowChoice::Logits(self.device.read(&row)?))
                }
                (_, Err(error)) => Err(error),
                (RowSampling::Score { .. }, Ok(())) => Ok(RowChoice::Score(outcome.logprob())),
                (RowSampling::Token(wanted), Ok(())) => {
                    let report = |num_top| Logprobs {
                        chosen: outcome.logprob() as f32,
                        top: outcome.top(&top[i * 2 * MAX_TOP_LOGPROBS..], num_top),
                    };
                    let num_top = |n: usize| n.min(MAX_TOP_LOGPROBS).min(self.vocab_size);
                    let logprobs = wanted.logprobs.map(num_top).map(report);
                    Ok(RowChoice::Token(outcome.token, logprobs))
                }
            };
            if let (RowSampling::Token(wanted), Ok(RowChoice::Token(token, _))) = (row, &choice) {
                self.counts.note(wanted.penalties.as_ref(), *token);
            }
            choices.push(choice);
        }
        Ok(choices)
    }

    /// The tokens of the last step, an i32 a row, 0 where none was chosen: the input of
    /// the next one.
    pub fn next_token_ids(&self) -> &Array {
        &self.next
    }

    /// Changes when an array has moved.
    pub fn generation(&self) -> u64 {
        self.generation + self.counts.generation
    }

    /// Device memory that `num_rows` rows need; `num_counted` of them have penalties.
    pub fn bytes_for(vocab_size: usize, num_rows: usize, num_counted: usize) -> usize {
        let chunks = vocab_size.div_ceil(CHUNK);
        let words = ROW_WORDS + chunks * PARTIAL_WORDS + 3 * BINS + OUTCOME_WORDS + 1;
        let extra = 2 * MAX_TOP_LOGPROBS + vocab_size.div_ceil(32);
        4 * (num_rows * (words + extra) + num_counted.next_power_of_two() * vocab_size)
    }

    /// The best tokens of each row, pairs of id and logit, where any row asks for them.
    fn best_tokens(&self, logits: &Array, stride: usize, rows: &[RowSampling]) -> Result<Vec<u32>> {
        if !rows.iter().any(|row| num_top(row) > 0) {
            return Ok(vec![0; rows.len() * 2 * MAX_TOP_LOGPROBS]);
        }
        let arguments: [Arg; 5] = [
            logits.into(),
            stride.into(),
            self.vocab_size.into(),
            (&self.rows).into(),
            (&self.top).into(),
        ];
        let grid = [rows.len() as u32, 1, 1];
        self.device.launch("sampling_top", grid, self.block(), 0, &arguments)?;
        self.device.read(&self.top.first(rows.len() * 2 * MAX_TOP_LOGPROBS))
    }

    /// Threads where a block has a row: for few tokens few, that they do not wait for each
    /// other in vain.
    fn block(&self) -> [u32; 3] {
        [if self.vocab_size <= CHUNK { 128 } else { 1024 }, 1, 1]
    }

    fn bitmap_words(&self) -> usize {
        self.vocab_size.div_ceil(32)
    }

    /// Makes room for these rows.
    fn reserve(&mut self, rows: &[RowSampling]) -> Result<()> {
        let count = |is: &dyn Fn(&RowSampling) -> bool| rows.iter().filter(|row| is(row)).count();
        let filtered = count(&|row| RowWords::of(row, self.vocab_size).flags & FILTER != 0);
        let guided = count(&|row| matches!(row, RowSampling::Token(t) if t.allowed.is_some()));
        let with_top = if rows.iter().any(|row| num_top(row) > 0) { rows.len() } else { 0 };
        let chunks = self.vocab_size.div_ceil(CHUNK);
        let bitmap_words = self.bitmap_words();
        for (array, items, words) in [
            (&mut self.rows, rows.len(), ROW_WORDS),
            (&mut self.partials, rows.len(), chunks * PARTIAL_WORDS),
            (&mut self.outcomes, rows.len(), OUTCOME_WORDS),
            (&mut self.next, rows.len(), 1),
            (&mut self.histograms, filtered, 3 * BINS),
            (&mut self.allowed, guided, bitmap_words),
            (&mut self.top, with_top, 2 * MAX_TOP_LOGPROBS),
        ] {
            if items * words > array.len() {
                *array = self.device.array(array.dtype(), items.next_power_of_two() * words)?;
                self.generation += 1;
            }
        }
        Ok(())
    }
}

fn num_top(row: &RowSampling) -> usize {
    match row {
        RowSampling::Token(wanted) => wanted.logprobs.unwrap_or(0),
        _ => 0,
    }
}

/// A guide's bitmap, in `words` words: what is beyond its end is not allowed.
fn push_bitmap(bitmap: &[u32], words: usize, to: &mut Vec<u32>) {
    let end = to.len() + words;
    to.extend_from_slice(&bitmap[..bitmap.len().min(words)]);
    to.resize(end, 0);
}

/// `Row` of the kernels.
#[derive(Default)]
struct RowWords {
    flags: u32,
    top_k: u32,
    temperature: f32,
    min_p: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    target: u32,
    /// Times 2⁶⁴.
    top_p: u64,
    seed: u64,
    record_index: u64,
    completion: u32,
    step: u32,
    /// −1: none; as `allowed`.
    slot: i32,
    allowed: i32,
    num_top: u32,
    histogram: u32,
}

impl RowWords {
    /// All but the places of its counts, bitmap and histogram.
    fn of(row: &RowSampling, vocab_size: usize) -> Self {
        let none = Self { slot: -1, allowed: -1, ..Self::default() };
        match row {
            RowSampling::Logits => none,
            RowSampling::Score { target } => {
                Self { flags: SCORE | NORMALISER, target: *target, ..none }
            }
            RowSampling::Token(wanted) => Self::of_token(wanted, vocab_size, none),
        }
    }

    fn of_token(wanted: &TokenSampling, vocab_size: usize, none: Self) -> Self {
        let has_top_k = wanted.top_k > 0 && wanted.top_k < vocab_size;
        let has_top_p = wanted.top_p < 1.0;
        let mut flags = CHOOSE;
        for (is_set, flag) in [
            (wanted.temperature <= 0.0 || wanted.temperature.is_nan(), GREEDY),
            (wanted.suppress_eos, SUPPRESS_EOS),
            (wanted.logprobs.is_some(), NORMALISER),
            (has_top_k || has_top_p, FILTER),
            (has_top_p, TOP_P),
        ] {
            flags |= if is_set { flag } else { 0 };
        }
        let penalties = wanted.penalties.as_ref();
        Self {
            flags,
            top_k: if has_top_k { wanted.top_k as u32 } else { 0 },
            temperature: wanted.temperature,
            min_p: wanted.min_p,
            repetition: penalties.map_or(1.0, |p| p.repetition),
            presence: penalties.map_or(0.0, |p| p.presence),
            frequency: penalties.map_or(0.0, |p| p.frequency),
            // Exact, and what is negative or too large stays at the end of the range.
            top_p: (f64::from(wanted.top_p) * 2f64.powi(64)) as u64,
            seed: wanted.draw.seed,
            record_index: wanted.draw.record_index,
            completion: wanted.draw.completion,
            step: wanted.draw.step,
            num_top: wanted.logprobs.unwrap_or(0) as u32,
            ..none
        }
    }

    fn push_to(&self, words: &mut Vec<u32>) {
        let halves = |x: u64| [x as u32, (x >> 32) as u32];
        words.extend([self.flags, self.top_k, self.temperature.to_bits(), self.min_p.to_bits()]);
        words.extend([self.repetition, self.presence, self.frequency].map(f32::to_bits));
        words.push(self.target);
        words.extend([self.top_p, self.seed, self.record_index].map(halves).concat());
        words.extend([self.completion, self.step, self.slot as u32, self.allowed as u32]);
        words.extend([self.num_top, self.histogram]);
    }
}

/// `Outcome` of the kernels.
struct Outcome {
    token: u32,
    status: u32,
    logit: f32,
    /// `ln Σ e^logit` of the row.
    normaliser: f64,
}

impl Outcome {
    fn from_words(words: &[u32]) -> Self {
        let total = u64::from(words[5]) << 32 | u64::from(words[4]);
        let normaliser = f64::from(f32::from_bits(words[3])) + (total as f64 / UNIT).ln();
        let (token, status, logit) = (words[0], words[1], f32::from_bits(words[2]));
        Self { token, status, logit, normaliser }
    }

    fn checked(&self) -> std::result::Result<(), LogitsError> {
        match self.status {
            OK => Ok(()),
            NO_CANDIDATE => Err(LogitsError::NoCandidate),
            _ => Err(LogitsError::NotFinite),
        }
    }

    fn logprob(&self) -> f64 {
        f64::from(self.logit) - self.normaliser
    }

    fn top(&self, pairs: &[u32], count: usize) -> Vec<(u32, f32)> {
        let logprob = |bits| (f64::from(f32::from_bits(bits)) - self.normaliser) as f32;
        pairs.chunks_exact(2).take(count).map(|pair| (pair[0], logprob(pair[1]))).collect()
    }
}

/// How often the tokens of sequences occur: a table of slots on the device, and whose
/// counts each holds.
struct TokenCounts {
    device: Device,
    vocab_size: usize,
    /// u32 `[slots][vocab]`; none until a sequence needs it.
    table: Option<Array>,
    /// A history on its way into a slot.
    history: Array,
    slots: Vec<Slot>,
    /// Places in `slots` by sequence.
    places: HashMap<u64, usize>,
    step: u64,
    generation: u64,
}

/// A slot's content. It is trusted only if sequence, length and last token are those of the
/// history: a sequence's tokens are never taken back but to begin anew.
#[derive(Clone, Copy, Default)]
struct Slot {
    sequence: Option<u64>,
    /// Tokens counted; 0: not known.
    counted: usize,
    last: Option<u32>,
    /// The last step that used it.
    step: u64,
}

impl TokenCounts {
    fn new(device: &Device, vocab_size: usize) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            vocab_size,
            table: None,
            history: device.uninitialised(Dtype::U32, 0)?,
            slots: Vec::new(),
            places: HashMap::new(),
            step: 0,
            generation: 0,
        })
    }

    /// Makes room for the rows' sequences, and keeps what is there of them.
    fn begin_step(&mut self, rows: &[RowSampling]) -> Result<()> {
        self.step += 1;
        let mut needed = 0;
        for row in rows {
            let RowSampling::Token(TokenSampling { penalties: Some(penalties), .. }) = row else {
                continue;
            };
            needed += 1;
            if let Some(&place) = self.places.get(&penalties.sequence) {
                self.slots[place].step = self.step;
            }
        }
        if needed > self.slots.len() {
            let slots = needed.next_power_of_two();
            // The old one goes first: the counts are counted again.
            self.table = None;
            self.places.clear();
            self.slots = vec![Slot::default(); slots];
            self.table = Some(self.device.uninitialised(Dtype::U32, slots * self.vocab_size)?);
            self.generation += 1;
        }
        Ok(())
    }

    /// The slot that holds the history's counts. They will not be known until
    /// [`TokenCounts::note`] says which token the step has added.
    fn slot_of(&mut self, penalties: &Penalties) -> Result<usize> {
        let Penalties { sequence, history, .. } = *penalties;
        let place = match self.places.get(&sequence) {
            Some(&place) => place,
            None => self.oldest(),
        };
        let slot = self.slots[place];
        let is_known = slot.sequence == Some(sequence)
            && slot.counted == history.len()
            && slot.last.as_ref() == history.last();
        if !is_known {
            if let Some(other) = slot.sequence {
                self.places.remove(&other);
            }
            self.count(place, history)?;
        }
        self.places.insert(sequence, place);
        self.slots[place] =
            Slot { sequence: Some(sequence), counted: 0, last: None, step: self.step };
        Ok(place)
    }

    /// The slot that was not used for the longest time; this step needs none of those.
    fn oldest(&self) -> usize {
        let places = 0..self.slots.len();
        places.min_by_key(|&place| self.slots[place].step).unwrap_or(0)
    }

    fn count(&mut self, place: usize, history: &[u32]) -> Result<()> {
        const THREADS: u32 = 256;
        const MAX_BLOCKS: u32 = 64;
        let Some(table) = &self.table else { return Ok(()) };
        let slot = table.slice(place * self.vocab_size..(place + 1) * self.vocab_size);
        self.device.fill_zero(&slot)?;
        if history.len() > self.history.len() {
            let len = history.len().next_power_of_two();
            self.history = self.device.uninitialised(Dtype::U32, len)?;
        }
        self.device.write(&self.history, history)?;
        let grid = [blocks(history.len(), THREADS as usize).min(MAX_BLOCKS), 1, 1];
        let arguments: [Arg; 3] = [(&self.history).into(), history.len().into(), (&slot).into()];
        self.device.launch("sampling_count", grid, [THREADS, 1, 1], 0, &arguments)
    }

    /// Notes that the step has added `token` to the counts.
    fn note(&mut self, penalties: Option<&Penalties>, token: u32) {
        let Some(penalties) = penalties else { return };
        if let Some(&place) = self.places.get(&penalties.sequence) {
            let slot = &mut self.slots[place];
            (slot.counted, slot.last) = (penalties.history.len() + 1, Some(token));
        }
    }
}

#[cfg(all(test, feature = "emulator"))]
#[path = "sampling_tests.rs"]
mod tests;
