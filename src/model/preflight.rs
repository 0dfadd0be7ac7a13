//! A load that reads no values: everything that the decoder asks of a checkpoint, against the
//! headers of its files. What is wrong is found before minutes of staging.
//!
//! The decoder itself says what it wants: it is loaded from a [`Source`] that looks each
//! tensor up, notes what is wrong, and hands out matrices without columns and empty vectors:
//! no memory, whatever a hostile configuration says.
//!
//! Left out: the values (a NaN shows in the logits), and adapters, which are checked where
//! they are opened.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use super::checkpoint::{Source, TensorTable};
use super::config::ModelConfig;
use super::decoder::Decoder;
use super::layers::Loader;
use super::names::Place;
use super::weights::{Activations, Weight, WeightDtype};
use crate::comm::NoTensorComm;
use crate::{Error, Result};

/// Problems that a message spells out.
const NAMED: usize = 5;

/// Problems after which no more are looked for: the configuration is another model's, or hostile.
const MAX_PROBLEMS: usize = 500;

/// How a checkpoint's tensors differ from those that the model wants.
#[derive(Debug, Default)]
pub struct Preflight {
    /// Why it cannot be loaded, in the order of the load; empty if it can.
    problems: Vec<Problem>,
    /// Tensors that the load does not ask for, by name.
    unused: Vec<String>,
}

#[derive(Debug)]
struct Problem {
    tensor: String,
    is_missing: bool,
    what: String,
}

impl Preflight {
    /// Looks up all that a model of shape `config` loads from `tensors`.
    ///
    /// # Errors
    /// A fault: none is expected.
    pub fn new(config: &ModelConfig, tensors: &TensorTable) -> Result<Self> {
        let headers = Headers { config, tensors, asked: RefCell::default() };
        let comm = Arc::new(NoTensorComm);
        let activations = Activations::F32;
        let loader = Loader { source: &headers, comm, dtype: None, activations, adapters: &[] };
        let loaded = Decoder::load(&loader);
        let Asked { names, problems } = headers.asked.into_inner();
        if problems.is_empty() {
            loaded?;
        }
        let is_unused = |name: &&str| !names.contains(*name) && !is_derived(name);
        let mut unused: Vec<String> =
            tensors.iter().map(|(name, _)| name).filter(is_unused).map(str::to_owned).collect();
        unused.sort_unstable();
        Ok(Self { problems, unused })
    }

    /// Tensors that no load reads, by name: another part of a multimodal model, say. What
    /// files hold besides weights (rotary frequencies, masks) is not among them.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// What is wrong in a sentence: the first problems, and how many more there are; `None` if
    /// nothing is.
    pub fn problem(&self) -> Option<String> {
        let first = self.problems.first()?;
        let named = self.problems.iter().take(NAMED).map(|problem| self.described(problem));
        let mut text = named.collect::<Vec<_>>().join("; ");
        match self.problems.len().saturating_sub(NAMED) {
            0 => {}
            more if self.problems.len() >= MAX_PROBLEMS => {
                text.push_str(&format!("; and {more} more at least"));
            }
            more => text.push_str(&format!("; and {more} more")),
        }
        let advice = match first.is_missing {
            true => ". Did all files download, and is the configuration this model's own?",
            false => ". Is the configuration this model's own?",
        };
        Some(text + advice)
    }

    fn described(&self, problem: &Problem) -> String {
        let alike = problem.is_missing.then(|| nearest(&problem.tensor, &self.unused)).flatten();
        match alike {
            Some(alike) => format!("{} (there is {alike})", problem.what),
            None => problem.what.clone(),
        }
    }
}

/// The checkpoint's headers as a source of tensors.
struct Headers<'a> {
    config: &'a ModelConfig,
    tensors: &'a TensorTable,
    asked: RefCell<Asked>,
}

/// What was asked for, and what was wrong with it.
#[derive(Default)]
struct Asked {
    names: HashSet<String>,
    problems: Vec<Problem>,
}

impl Headers<'_> {
    /// Notes what is wrong with a tensor.
    fn look_up(&self, name: &str, shape: [usize; 2]) -> Result<()> {
        let Asked { names, problems } = &mut *self.asked.borrow_mut();
        if !names.insert(name.to_owned()) {
            return Ok(());
        }
        if let Some(what) = self.tensors.problem(name, shape) {
            let is_missing = !self.tensors.contains(name);
            problems.push(Problem { tensor: name.to_owned(), is_missing, what });
        }
        match problems.len() < MAX_PROBLEMS {
            true => Ok(()),
            false => Err(Error::input("too many problems")),
        }
    }
}

impl Source for Headers<'_> {
    fn config(&self) -> &ModelConfig {
        self.config
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains(name)
    }

    fn matrix(
        &self,
        place: &Place,
        width: usize,
        _cols: Range<usize>,
        _dtype: Option<WeightDtype>,
    ) -> Result<Weight> {
        self.look_up(&format!("{}.weight", place.name), [place.stored_rows, width])?;
        Ok(Weight::from_f32(place.len(), 0, Vec::new()))
    }

    fn vector(&self, name: &str, len: usize, _parts: &[Range<usize>]) -> Result<Vec<f32>> {
        self.look_up(name, [1, len])?;
        Ok(Vec::new())
    }
}

/// Whether a tensor follows from the configuration (or is read with it): no weight.
fn is_derived(name: &str) -> bool {
    const SUFFIXES: [&str; 5] = [
        "inv_freq",
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "rope_factors_short.weight",
        ".masked_bias",
    ];
    SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// The one of `names` that is most like `name`, if one is: the same tensor of the same layer
/// under another name.
fn nearest<'a>(name: &str, names: &'a [String]) -> Option<&'a str> {
    let of_layer = numbers(name);
    let candidates = names.iter().filter(|other| numbers(other) == of_layer);
    let distances = candidates.map(|other| (distance(name, other), other));
    let (distance, other) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= name.len() / 2).then_some(other)
}

fn numbers(name: &str) -> Vec<usize> {
    name.split('.').filter_map(|part| part.parse().ok()).collect()
}

/// Bytes to insert, delete or replace to make one name the other (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[path = "preflight_tests.rs"]
pub(in crate::model) mod tests;
