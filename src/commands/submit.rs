//! `farm submit`: batch jobs that work on one run together, one a Slurm partition.
//!
//! What can be wrong with the run is found here, on the login node, by the code that the
//! jobs run too. All jobs get the same arguments and the same run directory. Left out:
//! whether the account may use a partition (sbatch says so), and waiting for the jobs.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use clap::CommandFactory;

use crate::cli::{Cli, GivenFlag, JobArgs, RunCommand, ScoreArgs, SubmitArgs, flag_word};
use crate::commands::generate::Job;
use crate::commands::{logging, plan, print};
use crate::error::say;
use crate::ledger::RunFile;
use crate::slurm::partitions::{self, Partition};
use crate::slurm::{launcher_rank, sbatch};
use crate::{Error, Result};

/// Checks the run, writes a script a partition and hands them to sbatch (`--dry-run`: prints
/// them). `given` are the flags of this command line.
///
/// # Errors
/// Usage and input errors as those of the run itself; an input error where a partition is
/// unknown or Slurm or the templates are missing; a fault where no partition took its job.
pub fn run(args: &SubmitArgs, given: &[GivenFlag]) -> Result<()> {
    if launcher_rank(|name| std::env::var(name).ok()).is_some_and(|rank| rank > 0) {
        // Started by srun or mpirun with several tasks: the first one submits.
        return Ok(());
    }
    let log = &args.run.log;
    logging::init(log.log_format, log.quiet, None)?;
    refuse_what_jobs_cannot_share(args)?;
    let job = job(args, given)?;
    let checked = plan::check(&job)?;
    if let Some(run) = RunFile::read(&checked.run_dir)? {
        run.check_same(&checked.run_dir, &checked.identity)?;
    }
    let run_dir = absolute(&checked.run_dir)?;
    let batch = Batch {
        jobs: &args.jobs,
        arguments: arguments(&job, &run_dir)?,
        job_name: job_name(&job),
        logs: run_dir.join("logs"),
        root: installation()?,
    };

    let partitions = choose_partitions(&args.jobs.partitions)?;
    let jobs = partitions.iter().map(|partition| batch.job(partition));
    let jobs: Vec<BatchJob> = jobs.collect::<Result<_>>()?;
    if args.jobs.dry_run {
        let scripts: Vec<&str> = jobs.iter().map(|job| job.script.as_str()).collect();
        return print(&scripts.join("\n"));
    }
    // Slurm does not create it, and a job without a place for its log fails.
    std::fs::create_dir_all(&batch.logs).map_err(|error| Error::io(&batch.logs, error))?;
    submit_all(&jobs)?;
    print(&format!("farm status {}\n", sbatch::shell_word(run_dir.as_os_str())))
}

/// What works for one process, and not for jobs that begin at different times.
fn refuse_what_jobs_cannot_share(args: &SubmitArgs) -> Result<()> {
    let refused = |why: &str| Err(Error::usage(why));
    let run = &args.run;
    if run.input.prompts_file == Path::new("-") {
        return refused(
            "--prompts-file -: the jobs start later and cannot read this standard input; \
             give a file that all nodes see",
        );
    }
    if run.parallelism.local_ranks.is_some() {
        return refused(
            "--local-ranks is for a start without Slurm; give --ntasks-per-node, the ranks on \
             each node",
        );
    }
    if run.output.force_new {
        return refused(
            "--force-new: every job that starts would set aside what the others have done; give \
             another --run-dir, or move the old one away",
        );
    }
    Ok(())
}

fn job(args: &SubmitArgs, given: &[GivenFlag]) -> Result<Job> {
    let run = args.run.clone();
    Ok(match args.jobs.command {
        RunCommand::Generate => Job::generate(&run, &flags_of_the_run("generate", given)?),
        RunCommand::Score => {
            let score = ScoreArgs {
                input: run.input,
                model: run.model,
                parallelism: run.parallelism,
                staging: run.staging,
                output: run.output,
                run: run.run,
                log: run.log,
            };
            Job::score(&score, &flags_of_the_run("score", given)?)
        }
    })
}

/// The given flags that farm `command` has. One of another command is an error on the command
/// line; in the environment it may be a site's default.
fn flags_of_the_run(command: &str, given: &[GivenFlag]) -> Result<Vec<GivenFlag>> {
    let cli = Cli::command();
    let has = |command: &str, flag: &GivenFlag| {
        let mut args = cli.find_subcommand(command).into_iter().flat_map(|c| c.get_arguments());
        args.any(|arg| arg.get_long() == Some(&flag.name))
    };
    let foreign =
        |flag: &&GivenFlag| flag.on_command_line && has("generate", flag) && !has(command, flag);
    if let Some(flag) = given.iter().find(foreign) {
        return Err(Error::usage(format!("--{}: farm {command} has no such flag", flag.name)));
    }
    Ok(given.iter().filter(|flag| has(command, flag)).cloned().collect())
}

/// farm's arguments, the same for all jobs: paths absolute, output and run directory named.
fn arguments(job: &Job, run_dir: &Path) -> Result<Vec<OsString>> {
    let mut words: Vec<OsString> = vec![job.command.into()];
    words.extend(job.arguments()?);
    if job.output.output.is_none() {
        words.push(flag_word("output", Some(run_dir.join("output.jsonl").as_os_str())));
    }
    words.push(flag_word("run-dir", Some(run_dir.as_os_str())));
    Ok(words)
}

fn job_name(job: &Job) -> String {
    let stem = job.input.prompts_file.file_stem().unwrap_or_default();
    sbatch::job_name(&format!("farm-{}", stem.to_string_lossy()))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::io(path, error))
}

/// The folder that farm is installed in: the module's, else this binary's own.
fn installation() -> Result<PathBuf> {
    let by_module = std::env::var_os("FARM_ROOT").filter(|root| !root.is_empty());
    let by_binary = std::env::current_exe().ok();
    let by_binary = by_binary.as_deref().and_then(Path::parent).and_then(Path::parent);
    let candidates = by_module.map(PathBuf::from).into_iter().chain(by_binary.map(Path::to_owned));
    let candidates: Vec<PathBuf> = candidates.collect();
    match candidates.iter().find(|root| templates(root).is_dir()) {
        Some(root) => absolute(root),
        None => Err(Error::input(format!(
            "no batch templates in {}: set FARM_ROOT to the folder that `make install PREFIX=…` \
             put farm in (the farm module sets it)",
            candidates
                .iter()
                .map(|root| templates(root).display().to_string())
                .collect::<Vec<_>>()
                .join(" or ")
        ))),
    }
}

fn templates(root: &Path) -> PathBuf {
    root.join("share/farm/slurm")
}

/// What the jobs have in common.
struct Batch<'a> {
    jobs: &'a JobArgs,
    arguments: Vec<OsString>,
    job_name: String,
    logs: PathBuf,
    root: PathBuf,
}

/// One job to hand in.
struct BatchJob {
    partition: String,
    options: Vec<String>,
    script: String,
}

impl Batch<'_> {
    fn job(&self, partition: &Partition) -> Result<BatchJob> {
        let name = match partition.gpus_per_node {
            0 => "farm-cpu.sbatch",
            _ => "farm-gpu.sbatch",
        };
        let file = templates(&self.root).join(name);
        let template = std::fs::read_to_string(&file)
            .map_err(|error| Error::input(format!("{}: {error}", file.display())))?;
        let options = self.options(partition, &template)?;
        let job = sbatch::Job { options: &options, root: &self.root, arguments: &self.arguments };
        let script =
            sbatch::render(&template, &job).map_err(|error| error.context(file.display()))?;
        Ok(BatchJob { partition: partition.name.clone(), options, script })
    }

    fn options(&self, partition: &Partition, template: &str) -> Result<Vec<String>> {
        let asked = self.jobs;
        let time = time(asked.time.as_deref(), sbatch::option(template, "time"), partition);
        let (tasks, gpus) = match partition.gpus_per_node {
            0 => (asked.ntasks_per_node, None),
            gpus => {
                let tasks = asked.ntasks_per_node.unwrap_or(gpus);
                (Some(tasks), Some(tasks.min(gpus)))
            }
        };
        let number = |value: Option<usize>| value.map(|value| value.to_string());
        let options = [
            ("partition", Some(partition.name.clone())),
            ("job-name", Some(self.job_name.clone())),
            ("output", Some(self.log_pattern()?)),
            ("nodes", number(asked.nodes)),
            ("ntasks-per-node", number(tasks)),
            ("gpus-per-node", number(gpus)),
            ("time", time),
            ("account", asked.account.clone()),
            ("qos", asked.qos.clone()),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let given = given.map(|(name, value)| format!("--{name}={value}"));
        Ok(given.chain(asked.sbatch_arg.iter().cloned()).collect())
    }

    /// Slurm's pattern of a log's name. It takes `%` for its own, and a `\` anywhere for
    /// the wish to have no pattern.
    fn log_pattern(&self) -> Result<String> {
        match self.logs.to_str() {
            Some(logs) if !logs.contains('\\') => {
                Ok(format!("{}/%x-%j.out", logs.replace('%', "%%")))
            }
            _ => Err(Error::input(format!(
                "--run-dir {}: Slurm cannot write a job's log into a folder whose name is not \
                 UTF-8 or has a \\; give another",
                self.logs.display()
            ))),
        }
    }
}

/// The `--time` to write into a script: what was asked for, else nothing where the template's
/// own will do, and the partition's limit where that is less. A job that asks for more than
/// the limit would wait for ever.
fn time(asked: Option<&str>, template: Option<&str>, partition: &Partition) -> Option<String> {
    let seconds = |text| partitions::seconds(text).unwrap_or(partitions::NO_LIMIT);
    let wished = asked.or(template)?;
    match partition.time_limit.as_deref() {
        Some(limit) if seconds(limit) < seconds(wished) => Some(limit.to_owned()),
        _ => asked.map(str::to_owned),
    }
}

/// The partitions that sinfo shows, of which `wanted` are chosen.
fn choose_partitions(wanted: &[String]) -> Result<Vec<Partition>> {
    let mut sinfo = Command::new("sinfo");
    // These would hide partitions, or show those that are not for this user.
    sinfo.args(partitions::SINFO_ARGUMENTS).env_remove("SINFO_PARTITION").env_remove("SINFO_ALL");
    if !wanted.iter().any(|name| name == partitions::ALL) {
        // A hidden partition may be named.
        sinfo.arg("--all");
    }
    let output = slurm_command(&mut sinfo, "")?;
    if !output.status.success() {
        return Err(Error::fault(format!("sinfo: {}", what_it_said(&output))));
    }
    let there = partitions::parse(&String::from_utf8_lossy(&output.stdout));
    let chosen = partitions::select(&there, wanted)?;
    for partition in chosen.iter().filter(|partition| !partition.usable) {
        say(format_args!(
            "farm: partition {} is not up or has no working node: its job will wait",
            partition.name
        ));
    }
    Ok(chosen)
}

/// Hands in every job and prints those that were taken; who refuses is named on stderr.
fn submit_all(jobs: &[BatchJob]) -> Result<()> {
    let mut taken = 0;
    for job in jobs {
        let mut sbatch = Command::new("sbatch");
        sbatch.arg("--parsable");
        for variable in sbatch::variables_against(&job.options) {
            sbatch.env_remove(variable);
        }
        let output = slurm_command(&mut sbatch, &job.script)?;
        let said = String::from_utf8_lossy(&output.stdout);
        // `ID;CLUSTER` where there are several clusters.
        let id = said.trim().split(';').next().unwrap_or_default();
        if output.status.success() && !id.is_empty() {
            taken += 1;
            print(&format!("job {id} in partition {}\n", job.partition))?;
        } else {
            let why = what_it_said(&output);
            say(format_args!("farm: partition {} refused its job: {why}", job.partition));
        }
    }
    match taken {
        0 => Err(Error::fault("no partition took a job; what they said is above")),
        _ => Ok(()),
    }
}

/// Runs one of Slurm's commands to its end.
fn slurm_command(command: &mut Command, input: &str) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::input(format!(
            "{name} is not on PATH: run farm submit on a login node of a Slurm cluster, after \
             `module load slurm` where the site has such a module"
        )),
        _ => Error::fault(format!("{name}: {error}")),
    })?;
    if let Some(mut stdin) = child.stdin.take() {
        // Who ends without reading says why by itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output().map_err(|error| Error::fault(format!("{name}: {error}")))
}

fn what_it_said(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    match said.trim() {
        "" => output.status.to_string(),
        said => said.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flag(name: &str, value: &str, on_command_line: bool) -> GivenFlag {
        GivenFlag { name: name.into(), value: Some(value.into()), on_command_line }
    }

    #[test]
    fn a_job_never_asks_for_more_time_than_its_partition_gives() {
        let partition = |limit: Option<&str>| Partition {
            name: "p".into(),
            usable: true,
            time_limit: limit.map(str::to_owned),
            gpus_per_node: 0,
        };
        for (asked, template, limit, expected) in [
            (None, Some("01:00:00"), None, None),
            (None, Some("01:00:00"), Some("2-00:00:00"), None),
            (None, Some("01:00:00"), Some("10:00"), Some("10:00")),
            (None, None, Some("10:00"), None),
            (Some("5"), Some("01:00:00"), Some("10:00"), Some("5")),
            (Some("11"), Some("01:00:00"), Some("10:00"), Some("10:00")),
            (Some("infinite"), None, Some("1-00:00:00"), Some("1-00:00:00")),
            (Some("infinite"), None, None, Some("infinite")),
        ] {
            let time = time(asked, template, &partition(limit));
            assert_eq!(time.as_deref(), expected, "{asked:?} {template:?} {limit:?}");
        }
    }

    #[test]
    fn the_run_gets_its_own_flags_and_no_others() {
        let given = [
            flag("partitions", "all", true),
            flag("model", "m", true),
            flag("temperature", "0.5", false),
        ];
        let names = |command| {
            let flags = flags_of_the_run(command, &given).unwrap();
            flags.into_iter().map(|flag| flag.name).collect::<Vec<_>>()
        };
        assert_eq!(names("generate"), ["model", "temperature"]);
        assert_eq!(names("score"), ["model"], "a site's variable is no error");
        let error = flags_of_the_run("score", &[flag("top-k", "3", true)]).unwrap_err();
        assert!(error.message.contains("--top-k"), "{error}");
    }
}
