//! Several trainings in one job: every combination of the settings that `--sweep` names, the
//! ranks shared out over them, one frozen model on each node.

use std::ops::RangeInclusive;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use super::Outcome;
use super::plan::Plan;
use super::results::Summary;
use crate::cli::FinetuneArgs;
use crate::comm::Communicator;
use crate::files::replace_file;
use crate::train::lora::TargetModules;
use crate::{Error, Result};

/// Most combinations: more are a mistake in the flag.
const TRIALS_MAX: usize = 1000;

/// One combination.
pub struct Trial {
    /// What is set, as `r=8,lr=0.0001`; empty without a sweep.
    pub name: String,
    /// The flags, with the combination's settings and folder.
    pub args: FinetuneArgs,
}

/// The combinations that the flags ask for, in order: the last setting changes fastest.
///
/// # Errors
/// A usage error that names the setting.
pub fn trials(args: &FinetuneArgs) -> Result<Vec<Trial>> {
    let Some(sweep) = &args.training.sweep else {
        return Ok(vec![Trial { name: String::new(), args: args.clone() }]);
    };
    let wrong = |why: String| Error::usage(format!("--sweep {sweep}: {why}"));
    let mut trials = vec![Trial { name: String::new(), args: args.clone() }];
    for setting in sweep.split_whitespace() {
        let (name, values) = setting
            .split_once('=')
            .ok_or_else(|| wrong(format!("{setting} is not NAME=VALUE,VALUE")))?;
        let values: Vec<&str> = values.split(',').collect();
        if trials[0].name.split(',').any(|set| set.split('=').next() == Some(name)) {
            return Err(wrong(format!("{name} comes twice")));
        }
        if trials.len() * values.len() > TRIALS_MAX {
            return Err(wrong(format!("more than {TRIALS_MAX} combinations")));
        }
        let mut next = Vec::new();
        for trial in &trials {
            for value in &values {
                let mut args = trial.args.clone();
                set(&mut args, name, value).map_err(wrong)?;
                let comma = if trial.name.is_empty() { "" } else { "," };
                next.push(Trial { name: format!("{}{comma}{name}={value}", trial.name), args });
            }
        }
        trials = next;
    }
    if trials.len() == 1 && trials[0].name.is_empty() {
        return Err(wrong("names nothing".into()));
    }
    for trial in &mut trials {
        let folder = trial.name.replace(['/', '\\'], "_");
        trial.args.output.adapter_out = args.output.adapter_out.join(folder);
    }
    for (i, trial) in trials.iter().enumerate() {
        if trials[..i].iter().any(|earlier| earlier.name == trial.name) {
            return Err(wrong(format!("{} comes twice", trial.name)));
        }
    }
    Ok(trials)
}

fn set(args: &mut FinetuneArgs, name: &str, value: &str) -> Result<(), String> {
    /// Within the limits of the flag; NaN is in no range.
    fn number<T: FromStr + PartialOrd>(text: &str, range: RangeInclusive<T>) -> Result<T, String> {
        let number = text.parse().ok().filter(|number| range.contains(number));
        number.ok_or_else(|| format!("{text} is no value for it"))
    }
    let (lora, training) = (&mut args.lora, &mut args.training);
    let set = match name {
        "r" => number(value, 1..=1 << 14).map(|r| lora.lora_r = r),
        "alpha" => number(value, f32::MIN_POSITIVE..=f32::MAX).map(|x| lora.lora_alpha = x),
        "dropout" => number(value, 0.0..=0.999_999).map(|p| lora.lora_dropout = p),
        "lr" => number(value, f64::MIN_POSITIVE..=1e6).map(|rate| training.learning_rate = rate),
        "batch" => number(value, 1..=1 << 20).map(|size| training.batch_size = size),
        "epochs" => number(value, 1..=1 << 20).map(|epochs| training.epochs = epochs),
        "seed" => number(value, 0..=u64::MAX).map(|seed| training.seed = seed),
        // A comma stands between combinations here, so names are joined by +.
        "targets" => {
            TargetModules::parse(&value.replace('+', ",")).map(|t| lora.target_modules = t)
        }
        other => {
            Err(format!("{other} is none of r, alpha, dropout, lr, batch, epochs, seed, targets"))
        }
    };
    set.map_err(|why| format!("{name}: {why}"))
}

/// How the ranks fall into groups that train apart.
pub struct Groups {
    /// The ranks that train with this one.
    own: Arc<dyn Communicator>,
    index: usize,
    count: usize,
}

impl Groups {
    /// As many groups as there are trainings, or as the ranks allow. Collective.
    ///
    /// # Errors
    /// A usage error: the tensor-parallel size does not divide the ranks.
    pub fn new(
        world: &Arc<dyn Communicator>,
        tensor_parallel: usize,
        trials: usize,
    ) -> Result<Self> {
        crate::comm::GroupLayout::new(world.size(), tensor_parallel)?;
        let models = world.size() / tensor_parallel.max(1);
        let count = trials.clamp(1, models.max(1));
        // Whole models, as evenly as they go.
        let index = world.rank() / tensor_parallel.max(1) * count / models.max(1);
        let own = if count == 1 { world.clone() } else { world.split(index, world.rank()) };
        Ok(Self { own, index, count })
    }
}

/// Trains this rank's share of `trials`, one after another; after a stop the rest is left.
/// Returns their places and outcomes.
///
/// # Errors
/// What a training says.
pub fn run(
    groups: &Groups,
    trials: &[Trial],
    plans: &[Plan],
    train: impl Fn(&Trial, &Plan, Arc<dyn Communicator>) -> Result<Outcome>,
) -> Result<Vec<(usize, Outcome)>> {
    let mut outcomes = Vec::new();
    for (i, (trial, plan)) in trials.iter().zip(plans).enumerate() {
        if i % groups.count != groups.index {
            continue;
        }
        if !trial.name.is_empty() && groups.own.rank() == 0 {
            tracing::info!("training {}", trial.name);
        }
        let outcome = train(trial, plan, groups.own.clone())?;
        outcomes.push((i, outcome));
        if outcome == Outcome::Stopped {
            break;
        }
    }
    Ok(outcomes)
}

/// The outcomes of all groups, in the trials' order, on every rank. Collective.
///
/// # Errors
/// A fault: a message that does not decode.
pub fn gathered(
    world: &dyn Communicator,
    groups: &Groups,
    own: Vec<(usize, Outcome)>,
) -> Result<Vec<(usize, Outcome)>> {
    let own = if groups.own.rank() == 0 { own } else { Vec::new() };
    let bytes = serde_json::to_vec(&own).map_err(Error::fault)?;
    let mut all = Vec::new();
    for bytes in world.all_gather(&bytes) {
        let part: Vec<(usize, Outcome)> = serde_json::from_slice(&bytes).map_err(Error::fault)?;
        all.extend(part);
    }
    all.sort_by_key(|(i, _)| *i);
    Ok(all)
}

/// Says how the trainings ended; of a sweep as a table, also in sweep.csv.
///
/// # Errors
/// A fault that names the file.
pub fn report(args: &FinetuneArgs, trials: &[Trial], outcomes: &[(usize, Outcome)]) -> Result<()> {
    let complete: Vec<(&Trial, Summary)> = outcomes
        .iter()
        .filter_map(|(i, outcome)| match outcome {
            Outcome::Complete(summary) => Some((&trials[*i], *summary)),
            Outcome::Stopped => None,
        })
        .collect();
    for (trial, summary) in &complete {
        let dir = trial.args.output.adapter_out.display();
        let Summary { steps, skipped, tokens, .. } = summary;
        let skipped = if *skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
        crate::error::say(format_args!(
            "farm finetune: {dir}: {steps} steps{skipped}, {tokens} tokens, loss {}{}",
            shown(summary.loss),
            summary.best.map_or(String::new(), |(step, loss)| format!(
                ", best validation loss {loss:.4} at step {step}"
            ))
        ));
    }
    if args.training.sweep.is_none() {
        return Ok(());
    }
    write_table(&args.output.adapter_out, &complete)
}

fn shown(loss: Option<f64>) -> String {
    loss.map_or("unknown".into(), |loss| format!("{loss:.4}"))
}

fn write_table(dir: &Path, complete: &[(&Trial, Summary)]) -> Result<()> {
    let mut table = String::from("name,steps,tokens,loss,best_step,best_loss\n");
    for (trial, summary) in complete {
        let (step, loss) = summary.best.unzip();
        let cell = |x: Option<String>| x.unwrap_or_default();
        table += &format!(
            "\"{}\",{},{},{},{},{}\n",
            trial.name.replace('"', "\"\""),
            summary.steps,
            summary.tokens,
            cell(summary.loss.map(|loss| loss.to_string())),
            cell(step.map(|step| step.to_string())),
            cell(loss.map(|loss| loss.to_string()))
        );
    }
    replace_file(&dir.join("sweep.csv"), table.as_bytes())
}
