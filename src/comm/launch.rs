//! How this process was started: alone, or as one of many by a launcher.
//!
//! Alone means no MPI at all, so farm also runs where MPI cannot start. The decision
//! is a function of the environment; so is the check that the world came out as
//! large as the launcher meant it, because an MPI that does not understand the
//! launcher silently gives N worlds of one, and each would do the whole job.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Communicator, LocalComm};
use crate::error::say;
use crate::{Error, Result};

/// Variables that only a launcher sets, each in the processes it starts: Open MPI's
/// mpirun, PMIx (srun --mpi=pmix, prte), PMI-1 and PMI-2 (srun --mpi=pmi2, Hydra).
const LAUNCHER_VARIABLES: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_FD"];

/// Whether there are other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaunchKind {
    /// No launcher: one rank, no MPI.
    Alone,
    /// A launcher started this process: MPI says how many there are.
    Mpi,
}

/// What the environment says about how this process was started.
#[derive(Debug, Clone, Default)]
pub struct Launch {
    variables: HashMap<String, String>,
    /// The text of /proc/self/cgroup: tells a batch script's processes from a step's.
    cgroup: String,
}

impl Launch {
    /// From environment variables and the text of `/proc/self/cgroup`.
    pub fn new<K: Into<String>, V: Into<String>>(
        variables: impl IntoIterator<Item = (K, V)>,
        cgroup: impl Into<String>,
    ) -> Self {
        let variables =
            variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { variables, cgroup: cgroup.into() }
    }

    /// Of this process.
    pub fn of_this_process() -> Self {
        let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        Self::new(
            std::env::vars_os().map(|(name, value)| (text(name), text(value))),
            std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default(),
        )
    }

    fn number(&self, name: &str) -> Option<usize> {
        self.variables.get(name)?.trim().parse().ok()
    }

    /// Tasks that mpirun says it started, if it started this process.
    fn mpirun_tasks(&self) -> Option<usize> {
        self.number("OMPI_COMM_WORLD_SIZE")
    }

    /// Tasks of the Slurm step that this process is in. `None` in a batch script or an
    /// `salloc` shell: SLURM_NTASKS there counts what srun would start, and step
    /// variables there are left over from where `sbatch` was called.
    fn slurm_step_tasks(&self) -> Option<usize> {
        let outside_steps = ["/step_batch", "/step_extern", "/step_interactive"];
        if outside_steps.iter().any(|part| self.cgroup.contains(part)) {
            return None;
        }
        let tasks = self.number("SLURM_STEP_NUM_TASKS")?;
        let numbered_step =
            self.number("SLURM_STEP_ID").or_else(|| self.number("SLURM_STEPID")).is_some();
        let its_task = self.number("SLURM_PROCID").is_some_and(|task| task < tasks);
        (numbered_step && its_task).then_some(tasks)
    }

    /// Whether to initialize MPI.
    pub fn kind(&self) -> LaunchKind {
        let by_launcher = LAUNCHER_VARIABLES.iter().any(|name| self.variables.contains_key(*name));
        let by_srun = self.slurm_step_tasks().is_some_and(|tasks| tasks > 1);
        if by_launcher || by_srun { LaunchKind::Mpi } else { LaunchKind::Alone }
    }

    /// Whether this process is the launcher's first: the one to speak when the ranks
    /// could not find each other.
    pub fn is_first_task(&self) -> bool {
        let first = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"]
            .iter()
            .find_map(|name| self.number(name));
        self.kind() == LaunchKind::Alone || first.is_none_or(|rank| rank == 0)
    }

    /// Before MPI starts: Open MPI under srun without PMI would end the process with a
    /// message of its own, or run N times alone.
    #[cfg(feature = "mpi")]
    fn check_before_start(&self, library: &str) -> Result<()> {
        let reachable = LAUNCHER_VARIABLES.iter().any(|name| self.variables.contains_key(*name));
        match self.slurm_step_tasks() {
            Some(tasks) if tasks > 1 && !reachable && library.starts_with("Open MPI") => {
                Err(alone_in_step(tasks, library))
            }
            _ => Ok(()),
        }
    }

    /// After MPI has started: fails (usage) if the launcher started several tasks and
    /// the MPI world is this one only. `library` names the MPI in use.
    pub fn check_world_size(&self, world_size: usize, library: &str) -> Result<()> {
        match (world_size, self.mpirun_tasks(), self.slurm_step_tasks()) {
            (1, Some(tasks), _) if tasks > 1 => Err(Error::usage(format!(
                "mpirun started {tasks} tasks, but the MPI world is 1: this mpirun belongs to \
                 another MPI than farm's ({library}). Put that MPI's mpirun first on PATH (load \
                 its module), or rebuild farm against the MPI of this mpirun"
            ))),
            // mpirun's own daemons are a Slurm step too; what mpirun says counts.
            (1, None, Some(tasks)) if tasks > 1 => Err(alone_in_step(tasks, library)),
            _ => Ok(()),
        }
    }
}

fn alone_in_step(tasks: usize, library: &str) -> Error {
    Error::usage(format!(
        "Slurm started {tasks} tasks in this step, but the MPI world is 1: each would do the \
         whole job alone. farm's MPI ({library}) was not reached through srun. Start with \
         `srun --mpi=pmix farm …` (`srun --mpi=list` shows what this Slurm offers; pmi2 suits \
         MPICH and Intel MPI), or with `mpirun farm …` inside the job, or rebuild farm against \
         the cluster's MPI"
    ))
}

/// The ranks of this job, and MPI as long as this lives (where it was started).
pub struct World {
    /// All ranks.
    pub comm: Arc<dyn Communicator>,
    #[cfg(feature = "mpi")]
    _mpi: Option<super::MpiWorld>,
}

impl World {
    fn alone() -> Self {
        let [comm] = LocalComm::world(1).try_into().unwrap_or_else(|_| unreachable!("one rank"));
        Self {
            comm: Arc::new(comm),
            #[cfg(feature = "mpi")]
            _mpi: None,
        }
    }
}

/// The world that the launcher made, or of this process alone without one. In a world of
/// several, a panic on any thread from now on ends the whole job, with a message that
/// names rank and host. Fails (usage) if the launcher's tasks did not find each other.
pub fn world(launch: &Launch) -> Result<World> {
    match launch.kind() {
        LaunchKind::Alone => Ok(World::alone()),
        LaunchKind::Mpi => mpi_world(launch),
    }
}

#[cfg(feature = "mpi")]
fn mpi_world(launch: &Launch) -> Result<World> {
    let library = super::mpi::library_version();
    launch.check_before_start(&library)?;
    let mpi = super::MpiWorld::start()?;
    let comm: Arc<dyn Communicator> = Arc::new(mpi.comm());
    launch.check_world_size(comm.size(), &library)?;
    if comm.size() > 1 {
        abort_on_panic(comm.clone());
    }
    Ok(World { comm, _mpi: Some(mpi) })
}

#[cfg(not(feature = "mpi"))]
fn mpi_world(launch: &Launch) -> Result<World> {
    let tasks = launch.mpirun_tasks().or(launch.slurm_step_tasks()).unwrap_or(1);
    if tasks == 1 {
        return Ok(World::alone());
    }
    Err(Error::usage(format!(
        "a launcher started {tasks} tasks, but this farm was built without MPI: rebuild with \
         `--features mpi`, or start one task with --local-ranks {tasks}"
    )))
}

/// The other ranks would wait for ever for one that is gone.
#[cfg(feature = "mpi")]
fn abort_on_panic(comm: Arc<dyn Communicator>) {
    let print_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print_panic(info);
        let (rank, host) = (comm.rank(), comm.host());
        say(format_args!("farm: rank {rank} on {host} panicked; the job ends"));
        comm.abort(crate::ErrorKind::Fault.exit_code());
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP_OF_4: [(&str, &str); 3] =
        [("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "2")];

    fn launch(groups: &[&[(&str, &str)]], cgroup: &str) -> Launch {
        Launch::new(groups.concat(), cgroup)
    }

    #[test]
    fn the_environment_decides_whether_mpi_starts() {
        use LaunchKind::{Alone, Mpi};
        let table: [(&str, Launch, LaunchKind); 8] = [
            ("a workstation", launch(&[], ""), Alone),
            ("mpirun", launch(&[&[("OMPI_COMM_WORLD_SIZE", "2")]], ""), Mpi),
            ("srun --mpi=pmix", launch(&[&STEP_OF_4, &[("PMIX_RANK", "2")]], ""), Mpi),
            ("srun --mpi=pmi2", launch(&[&[("PMI_RANK", "0")]], ""), Mpi),
            ("srun without PMI", launch(&[&STEP_OF_4], ""), Mpi),
            (
                "srun -n 1 without PMI",
                launch(
                    &[&[
                        ("SLURM_STEP_NUM_TASKS", "1"),
                        ("SLURM_STEP_ID", "3"),
                        ("SLURM_PROCID", "0"),
                    ]],
                    "",
                ),
                Alone,
            ),
            (
                "a batch script",
                launch(&[&[("SLURM_NTASKS", "16"), ("SLURM_PROCID", "0")]], ""),
                Alone,
            ),
            (
                "a batch script submitted from inside a step",
                launch(&[&STEP_OF_4], "0::/system.slice/slurmstepd.scope/job_7/step_batch/user"),
                Alone,
            ),
        ];
        for (name, launch, kind) in table {
            assert_eq!(launch.kind(), kind, "{name}");
        }
    }

    #[test]
    fn tasks_that_did_not_find_each_other_are_an_error_with_the_fix() {
        let mpirun = |tasks| [("OMPI_COMM_WORLD_SIZE", tasks)];
        let fails = |launch: &Launch, size| {
            launch.check_world_size(size, "Open MPI v5").err().map(|error| error.message)
        };
        let srun = launch(&[&STEP_OF_4], "");
        assert!(fails(&srun, 1).unwrap().contains("srun --mpi=pmix"));
        assert_eq!(fails(&srun, 4), None);
        let foreign = launch(&[&mpirun("4")], "");
        assert!(fails(&foreign, 1).unwrap().contains("another MPI"));
        // mpirun -n 1 whose daemons srun started on four nodes.
        assert_eq!(fails(&launch(&[&STEP_OF_4, &mpirun("1")], ""), 1), None);
        assert_eq!(fails(&launch(&[], ""), 1), None);
    }

    #[test]
    fn one_task_speaks_for_all() {
        assert!(launch(&[], "").is_first_task());
        assert!(!launch(&[&STEP_OF_4], "").is_first_task());
        assert!(
            launch(&[&[("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", "0")]], "")
                .is_first_task()
        );
    }

    #[cfg(feature = "mpi")]
    #[test]
    fn open_mpi_is_not_started_where_srun_gave_it_no_way_to_the_others() {
        let srun = launch(&[&STEP_OF_4], "");
        assert!(srun.check_before_start("Open MPI v4.1.4").is_err());
        // MPICH on Slurm's PMI-1 needs no variable.
        assert!(srun.check_before_start("MPICH Version: 4.0").is_ok());
    }
}
