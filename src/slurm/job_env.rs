//! The job's environment variables, parsed.
//!
//! Names and meanings are those of srun(1) and sbatch(1), "OUTPUT ENVIRONMENT
//! VARIABLES". A variable that is missing or does not parse is `None`: farm runs
//! without Slurm too.

use serde::{Deserialize, Serialize};

/// What Slurm says about this job and task.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEnv {
    /// `SLURM_CLUSTER_NAME`: job ids count within it.
    #[serde(default)]
    pub cluster: Option<String>,
    /// `SLURM_JOB_ID`.
    pub job_id: Option<u64>,
    /// `SLURM_STEP_ID`; absent in a batch script.
    pub step_id: Option<u64>,
    /// `SLURM_ARRAY_JOB_ID`.
    pub array_job_id: Option<u64>,
    /// `SLURM_ARRAY_TASK_ID`.
    pub array_task_id: Option<u64>,
    /// `SLURM_RESTART_COUNT`: how often the job was requeued.
    pub restart_count: Option<u64>,
    /// `SLURM_JOB_NODELIST` as Slurm writes it, `node[01-04]`.
    pub nodelist: Option<String>,
    /// `SLURM_JOB_NUM_NODES`.
    pub num_nodes: Option<usize>,
    /// `SLURMD_NODENAME`: this node.
    pub node_name: Option<String>,
    /// `SLURM_JOB_PARTITION`.
    pub partition: Option<String>,
    /// `SLURM_NTASKS`; in a batch script it is the job's, not a step's.
    pub ntasks: Option<usize>,
    /// `SLURM_STEP_NUM_TASKS`: tasks that this `srun` started.
    pub step_num_tasks: Option<usize>,
    /// `SLURM_CPUS_PER_TASK`; set only where the user asked for it.
    pub cpus_per_task: Option<usize>,
    /// `SLURM_CPUS_ON_NODE`: CPUs of this node in the allocation.
    pub cpus_on_node: Option<usize>,
    /// `SLURM_GPUS_ON_NODE`: GPUs of this node in the allocation.
    #[serde(default)]
    pub gpus_on_node: Option<usize>,
    /// `SLURM_MEM_PER_NODE`, MiB; 0 = all of the node's.
    pub mem_per_node_mib: Option<u64>,
    /// `SLURM_MEM_PER_CPU`, MiB.
    pub mem_per_cpu_mib: Option<u64>,
    /// `SLURM_JOB_END_TIME`: when the time limit ends the job, Unix seconds.
    pub end_time_unix_seconds: Option<u64>,
}

impl JobEnv {
    /// Reads this process's environment.
    pub fn from_env() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    /// The same from any source of variables.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let text = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let number = |name: &str| text(name).and_then(|value| value.parse::<u64>().ok());
        let count = |name: &str| number(name).and_then(|value| usize::try_from(value).ok());
        Self {
            cluster: text("SLURM_CLUSTER_NAME"),
            job_id: number("SLURM_JOB_ID"),
            step_id: number("SLURM_STEP_ID"),
            array_job_id: number("SLURM_ARRAY_JOB_ID"),
            array_task_id: number("SLURM_ARRAY_TASK_ID"),
            restart_count: number("SLURM_RESTART_COUNT"),
            nodelist: text("SLURM_JOB_NODELIST"),
            num_nodes: count("SLURM_JOB_NUM_NODES"),
            node_name: text("SLURMD_NODENAME"),
            partition: text("SLURM_JOB_PARTITION"),
            ntasks: count("SLURM_NTASKS"),
            step_num_tasks: count("SLURM_STEP_NUM_TASKS"),
            cpus_per_task: count("SLURM_CPUS_PER_TASK").filter(|&n| n > 0),
            cpus_on_node: count("SLURM_CPUS_ON_NODE").filter(|&n| n > 0),
            gpus_on_node: count("SLURM_GPUS_ON_NODE"),
            mem_per_node_mib: number("SLURM_MEM_PER_NODE"),
            mem_per_cpu_mib: number("SLURM_MEM_PER_CPU"),
            end_time_unix_seconds: number("SLURM_JOB_END_TIME"),
        }
    }

    /// Memory that the job may use on this node, bytes; `None` = all of it.
    pub fn memory_limit_bytes(&self) -> Option<u64> {
        const MIB: u64 = 1 << 20;
        let per_node = self.mem_per_node_mib.filter(|&mib| mib > 0);
        let per_cpu = || {
            let cpus = u64::try_from(self.cpus_on_node?).ok()?;
            self.mem_per_cpu_mib.filter(|&mib| mib > 0)?.checked_mul(cpus)
        };
        per_node.or_else(per_cpu)?.checked_mul(MIB)
    }
}

/// This process's rank as the launcher gives it, known before MPI starts. `None`
/// without a launcher. Good enough to say who prints; the MPI world decides the rest.
pub fn launcher_rank(lookup: impl Fn(&str) -> Option<String>) -> Option<usize> {
    // Under mpirun in a batch script SLURM_PROCID is the script's own: ask it last.
    first_number(&lookup, &["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"])
}

/// How many ranks the launcher started on this node, known before MPI starts.
pub fn launcher_local_ranks(lookup: impl Fn(&str) -> Option<String>) -> Option<usize> {
    first_number(&lookup, &["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"]).or_else(|| {
        let node = first_number(&lookup, &["SLURM_NODEID"])?;
        tasks_on_node(&lookup("SLURM_STEP_TASKS_PER_NODE")?, node)
    })
}

fn first_number(lookup: &impl Fn(&str) -> Option<String>, names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| lookup(name)?.parse().ok())
}

/// Tasks on the `node`th node of Slurm's list, `2(x3),1` = 2, 2, 2, 1.
fn tasks_on_node(list: &str, node: usize) -> Option<usize> {
    let mut before = 0usize;
    for group in list.split(',') {
        let (tasks, nodes) = match group.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
            None => (group, 1),
        };
        before = before.checked_add(nodes)?;
        if node < before {
            return tasks.parse().ok();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    }

    /// A step's environment as Slurm 22.05 sets it.
    const STEP: &[(&str, &str)] = &[
        ("SLURM_CLUSTER_NAME", "farm"),
        ("SLURM_JOB_ID", "412"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_JOB_NODELIST", "node[01-04]"),
        ("SLURM_JOB_NUM_NODES", "4"),
        ("SLURMD_NODENAME", "node02"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_STEP_NUM_TASKS", "8"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x4)"),
        ("SLURM_NODEID", "1"),
        ("SLURM_PROCID", "3"),
        ("SLURM_CPUS_PER_TASK", "2"),
        ("SLURM_CPUS_ON_NODE", "4"),
        ("SLURM_MEM_PER_NODE", "2048"),
        ("SLURM_JOB_PARTITION", "cpu"),
        ("SLURM_JOB_END_TIME", "1790000000"),
        ("SLURM_RESTART_COUNT", "1"),
    ];

    #[test]
    fn a_step_is_read() {
        let job = JobEnv::from_lookup(lookup(STEP));
        assert_eq!((job.job_id, job.step_id, job.step_num_tasks), (Some(412), Some(0), Some(8)));
        assert_eq!(job.cluster.as_deref(), Some("farm"));
        assert_eq!(job.nodelist.as_deref(), Some("node[01-04]"));
        assert_eq!((job.cpus_per_task, job.restart_count), (Some(2), Some(1)));
        assert_eq!(job.end_time_unix_seconds, Some(1_790_000_000));
        assert_eq!(job.memory_limit_bytes(), Some(2 << 30));
        assert_eq!(launcher_rank(lookup(STEP)), Some(3));
        assert_eq!(launcher_local_ranks(lookup(STEP)), Some(2));
    }

    /// A workstation has no such variables; a broken one must not stop a run.
    #[test]
    fn missing_and_broken_variables_are_none() {
        assert_eq!(JobEnv::from_lookup(|_| None), JobEnv::default());
        let odd = [("SLURM_JOB_ID", "x"), ("SLURM_CPUS_PER_TASK", "0"), ("SLURMD_NODENAME", "")];
        assert_eq!(JobEnv::from_lookup(lookup(&odd)), JobEnv::default());
        assert_eq!(launcher_rank(|_| None), None);
    }

    #[test]
    fn memory_limit_takes_either_form() {
        let limit =
            |pairs: &[(&str, &str)]| JobEnv::from_lookup(lookup(pairs)).memory_limit_bytes();
        assert_eq!(limit(&[("SLURM_MEM_PER_NODE", "0")]), None);
        assert_eq!(
            limit(&[("SLURM_MEM_PER_CPU", "512"), ("SLURM_CPUS_ON_NODE", "4")]),
            Some(2 << 30)
        );
        assert_eq!(limit(&[("SLURM_MEM_PER_CPU", "512")]), None);
    }

    /// mpirun inside a batch script: Slurm's own rank variable is the script's.
    #[test]
    fn mpirun_wins_over_the_batch_script() {
        let pairs = [
            ("SLURM_PROCID", "0"),
            ("OMPI_COMM_WORLD_RANK", "5"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "6"),
        ];
        assert_eq!(launcher_rank(lookup(&pairs)), Some(5));
        assert_eq!(launcher_local_ranks(lookup(&pairs)), Some(6));
    }

    #[test]
    fn tasks_per_node_lists() {
        for (list, node, expected) in [
            ("2(x3),1", 0, Some(2)),
            ("2(x3),1", 2, Some(2)),
            ("2(x3),1", 3, Some(1)),
            ("2(x3),1", 4, None),
            ("4", 0, Some(4)),
            ("x(y", 0, None),
        ] {
            assert_eq!(tasks_on_node(list, node), expected, "{list} {node}");
        }
    }
}
