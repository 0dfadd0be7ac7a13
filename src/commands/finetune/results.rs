//! What a training leaves: checkpoints, metrics, the adapter. All is written by rank 0.
//!
//! ```text
//! adapter_config.json, adapter_model.safetensors     the adapter, as PEFT writes it
//! adapter.gguf                                       with --format gguf
//! finetune.json                                      what decides the adapter
//! checkpoints/checkpoint-N/                          the adapter and the optimiser after step N
//! metrics.jsonl, metrics.csv, events.out.tfevents.*, loss.svg
//! bad_records.jsonl                                  records that were left out
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::plan::{Plan, lora_config};
use super::training::State;
use crate::cli::{AdapterFormat, FinetuneArgs};
use crate::comm::{Communicator, Topology, agree, broadcast_vec};
use crate::model::adapter::modules::modules;
use crate::model::adapter::write::{AdapterFile, WrittenModule, WrittenSettings, write_peft};
use crate::model::adapter::write_gguf::write_gguf;
use crate::model::config::ModelConfig;
use crate::train::checkpoint::{self, Checkpoint, Keep, NamedTensor};
use crate::train::lora::{LoraConfig, layer_of};
use crate::train::metrics::MetricsLog;
use crate::train::model::TrainedModel;
use crate::train::parameters::{Parameter, Parameters, Part};
use crate::train::trainer::{Progress, Trainer};
use crate::{Error, Result};

/// What a finished training is known by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Optimiser steps.
    pub steps: u64,
    /// Those that were skipped.
    pub skipped: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The last step's loss; of rank 0 alone.
    pub loss: Option<f64>,
    /// Step and loss of the best validation.
    pub best: Option<(u64, f64)>,
}

/// The writer, on rank 0.
pub struct Results {
    dir: PathBuf,
    settings: WrittenSettings,
    format: AdapterFormat,
    keep: usize,
    wants_best: bool,
    model: ModelConfig,
    /// The metrics.
    pub log: MetricsLog,
}

/// The vectors of a checkpoint: values and moments of whole tensors.
const VECTORS: [&str; 3] = ["values", "m", "v"];

impl Results {
    /// Opens the metrics for a training that is as far as `progress`.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn open(
        args: &FinetuneArgs,
        plan: &Plan,
        model: &ModelConfig,
        trained: &TrainedModel,
        progress: Progress,
    ) -> Result<Self> {
        let resumed = (progress.step > 0).then_some(progress.step);
        let base = std::path::absolute(&args.model.model).unwrap_or(args.model.model.clone());
        Ok(Self {
            dir: plan.dir.clone(),
            settings: settings(&lora_config(args), &trained.parameters, &base, model),
            format: args.output.format,
            keep: args.output.keep_checkpoints,
            wants_best: args.output.early_stopping_patience.is_some(),
            model: model.clone(),
            log: MetricsLog::open(&plan.dir, resumed)?,
        })
    }

    fn adapter(&self, parameters: &Parameters, whole: &[f32]) -> AdapterFile {
        let mut modules: Vec<WrittenModule> = Vec::new();
        let mut saved = Vec::new();
        let mut rest = whole;
        for tensor in parameters.tensors() {
            let (values, after) = rest.split_at(tensor.len());
            rest = after;
            if tensor.part == Part::Whole {
                saved.push((tensor.module.clone(), tensor.shape, values.to_vec()));
                continue;
            }
            put(&mut modules, tensor, values.to_vec());
        }
        AdapterFile { settings: self.settings.clone(), modules, saved }
    }

    /// Writes the adapter: that of the last step, or of the best validation where training
    /// may stop early.
    ///
    /// # Errors
    /// A fault that names the file.
    pub fn finish(&self, trainer: &Trainer, whole: &[f32], state: &State) -> Result<()> {
        let parameters = &trainer.model.parameters;
        let best = state.early_stopping.best().filter(|_| self.wants_best);
        let best = best.filter(|best| best.step != state.progress.step);
        let mut adapter = self.adapter(parameters, whole);
        if let Some(best) = best {
            let loaded =
                checkpoint::load(&self.folder().join(format!("checkpoint-{}", best.step)))?;
            adapter = self.adapter(parameters, &whole_of(&loaded, "values")?);
            tracing::info!("the adapter is that of step {}, the best validation", best.step);
        }
        write_peft(&self.dir, &adapter)?;
        if self.format == AdapterFormat::Gguf {
            write_gguf(&self.dir.join("adapter.gguf"), &adapter, &self.model)?;
        }
        self.log.plot()
    }

    fn folder(&self) -> PathBuf {
        self.dir.join("checkpoints")
    }
}

/// Adds a tensor to its module's, which begin with A.
fn put(modules: &mut Vec<WrittenModule>, tensor: &Parameter, values: Vec<f32>) {
    let [rows, cols] = tensor.shape;
    if tensor.part == Part::A {
        modules.push(WrittenModule {
            name: tensor.module.clone(),
            inputs: cols,
            outputs: 0,
            rank: rows,
            a: values,
            b: Vec::new(),
            magnitude: None,
        });
        return;
    }
    let Some(module) = modules.last_mut() else { return };
    match tensor.part {
        Part::B => (module.outputs, module.b) = (rows, values),
        _ => module.magnitude = Some(values),
    }
}

fn settings(
    config: &LoraConfig,
    parameters: &Parameters,
    base: &Path,
    model: &ModelConfig,
) -> WrittenSettings {
    let names = |whole: bool| -> BTreeSet<String> {
        let tensors = parameters.tensors().iter();
        let tensors = tensors.filter(|tensor| (tensor.part == Part::Whole) == whole);
        tensors.map(|tensor| tensor.module.clone()).collect()
    };
    let layers = config.layers_to_transform.as_ref();
    let (target_modules, all) = targets_as_peft_names_them(&names(false), model, layers);
    WrittenSettings {
        r: config.r,
        lora_alpha: config.lora_alpha,
        lora_dropout: config.lora_dropout.to_string().parse().unwrap_or(0.0),
        target_modules,
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        layers_to_transform: layers.filter(|_| all).map(|l| l.iter().copied().collect()),
        modules_to_save: names(true).iter().map(|name| last_part(name).to_owned()).collect(),
        base_model_name_or_path: base.display().to_string(),
    }
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The last parts of the modules' names, where these and `layers` mean no other module; else
/// whole names. Whether it is the former.
fn targets_as_peft_names_them(
    trained: &BTreeSet<String>,
    model: &ModelConfig,
    layers: Option<&BTreeSet<usize>>,
) -> (Vec<String>, bool) {
    let short: BTreeSet<&str> = trained.iter().map(|name| last_part(name)).collect();
    let modules = modules(model, &model.hf_names);
    let meant = modules.keys().filter(|name| {
        let in_layers = match (layers, layer_of(name)) {
            (Some(layers), Some(layer)) => layers.contains(&layer),
            (Some(_), None) => false,
            (None, _) => true,
        };
        in_layers && short.contains(last_part(name))
    });
    match meant.eq(trained.iter()) {
        true => (short.into_iter().map(str::to_owned).collect(), true),
        false => (trained.iter().cloned().collect(), false),
    }
}

/// Saves the training as it is; rank 0 (with `results`) writes. Collective; may fail on rank 0
/// alone.
///
/// # Errors
/// A fault that names the file.
pub fn save(
    topology: &Topology,
    trainer: &Trainer,
    state: &State,
    results: Option<&Results>,
) -> Result<()> {
    let parameters = &trainer.model.parameters;
    // Only the group of rank 0 has a reader, but gathering costs the others no time of theirs.
    let group = trainer.model.group();
    let vectors = [&parameters.values, &parameters.m, &parameters.v];
    let [values, m, v] = vectors.map(|local| parameters.gathered(local, &**group));
    let Some(results) = results.filter(|_| topology.world.rank() == 0) else { return Ok(()) };
    let shape = [values.len()];
    let tensor = |name, values| NamedTensor { name, shape: &shape, values };
    let tensors = [
        tensor(VECTORS[0], values.as_slice()),
        tensor(VECTORS[1], m.as_slice()),
        tensor(VECTORS[2], v.as_slice()),
    ];
    let state_value = serde_json::to_value(state).map_err(Error::fault)?;
    let step = state.progress.step;
    let also = state.early_stopping.best().map(|best| best.step);
    let keep = Keep { last: results.keep, also };
    let checkpoint = Checkpoint { step, tensors: &tensors, state: &state_value };
    let adapter = results.adapter(parameters, &values);
    checkpoint::save(&results.folder(), &checkpoint, |dir| write_peft(dir, &adapter), keep)?;
    results.log.plot()
}

fn whole_of(loaded: &checkpoint::Loaded, name: &str) -> Result<Vec<f32>> {
    let tensor = loaded.tensors.get(name);
    let tensor =
        tensor.ok_or_else(|| Error::input(format!("{}: no {name}", loaded.dir.display())))?;
    Ok(tensor.values.clone())
}

/// Goes on from the newest whole checkpoint below `dir`: rank 0 reads it for all. Collective.
///
/// # Errors
/// Input errors: a checkpoint of another model.
pub fn load(world: &dyn Communicator, dir: &Path, trainer: &mut Trainer) -> Result<Option<State>> {
    let read = || -> Result<Option<(State, Vec<Vec<f32>>)>> {
        let Some(loaded) = checkpoint::latest(&dir.join("checkpoints"))? else { return Ok(None) };
        let state = serde_json::from_value(loaded.state.clone())
            .map_err(|e| Error::input(format!("{}: {e}", loaded.dir.display())))?;
        let vectors = VECTORS.iter().map(|name| whole_of(&loaded, name)).collect::<Result<_>>()?;
        Ok(Some((state, vectors)))
    };
    let found = agree(world, if world.rank() == 0 { read() } else { Ok(None) })?;
    let (state, vectors) = found.unzip();
    let state = serde_json::to_vec(&state).map_err(Error::fault)?;
    let state: Option<State> =
        serde_json::from_slice(&broadcast_vec(world, 0, state)).map_err(Error::fault)?;
    let Some(state) = state else { return Ok(None) };
    let mut vectors = vectors.unwrap_or_default().into_iter();
    let parameters = &mut trainer.model.parameters;
    let mut locals = Vec::new();
    for _ in VECTORS {
        let bytes =
            vectors.next().unwrap_or_default().iter().flat_map(|x| x.to_le_bytes()).collect();
        let bytes = broadcast_vec(world, 0, bytes);
        let whole: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if whole.len() != parameters.whole_len() {
            return Err(Error::input(format!(
                "{}: a checkpoint of {} values, and this training has {}",
                dir.display(),
                whole.len(),
                parameters.whole_len()
            )));
        }
        locals.push(parameters.scattered(&whole));
    }
    let [values, m, v] = <[Vec<f32>; 3]>::try_from(locals).unwrap_or_default();
    (parameters.values, parameters.m, parameters.v) = (values, m, v);
    agree(world, trainer.model.refresh())?;
    Ok(Some(state))
}
