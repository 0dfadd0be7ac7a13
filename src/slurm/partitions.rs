//! The cluster's partitions as `sinfo` prints them: which may take a job, for how long,
//! with how many GPUs a node; and times as Slurm writes them.
//!
//! Left out: whether this user's account or QOS may use a partition. Only `sbatch` knows,
//! and says so when the job is handed in.

use std::collections::HashSet;

use crate::slurm::time_seconds;
use crate::{Error, Result};

/// The arguments of the `sinfo` call that [`parse`] reads: name, availability, time limit,
/// nodes allocated/idle/other/all, generic resources. Slurm prints a partition's nodes in
/// several lines where they differ.
pub const SINFO_ARGUMENTS: [&str; 3] = ["--noheader", "--format", "%R|%a|%l|%F|%G"];

/// The word that stands for every usable partition.
pub const ALL: &str = "all";

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Its name.
    pub name: String,
    /// Whether jobs start in it: it is up, and not all of its nodes are down or drained.
    pub usable: bool,
    /// Most time of a job, as Slurm writes it; `None` without a limit.
    pub time_limit: Option<String>,
    /// GPUs that every node has; 0 where some node has none.
    pub gpus_per_node: usize,
}

/// What `sinfo` printed, in its order. Lines of another form are passed over.
pub fn parse(sinfo: &str) -> Vec<Partition> {
    let mut partitions: Vec<Partition> = Vec::new();
    for partition in sinfo.lines().filter_map(parse_line) {
        match partitions.iter_mut().find(|known| known.name == partition.name) {
            Some(known) => {
                known.usable |= partition.usable;
                known.gpus_per_node = known.gpus_per_node.min(partition.gpus_per_node);
            }
            None => partitions.push(partition),
        }
    }
    partitions
}

fn parse_line(line: &str) -> Option<Partition> {
    let fields: Vec<&str> = line.split('|').map(str::trim).collect();
    let [name, available, time_limit, nodes, gres] = fields[..] else { return None };
    let has_nodes = nodes.split('/').take(2).any(|count| count != "0");
    let limited = seconds(time_limit).is_some_and(|seconds| seconds != NO_LIMIT);
    Some(Partition {
        name: name.to_owned(),
        usable: available == "up" && has_nodes,
        time_limit: limited.then(|| time_limit.to_owned()),
        gpus_per_node: gpus(gres),
    })
}

/// The GPUs in `gpu:a100:4(S:0-1),gpu:v100:2,lustre:1`: 6.
fn gpus(gres: &str) -> usize {
    // A comma between sockets, `(S:0,2)`, splits a resource behind its count: no matter.
    let count = |resource: &str| {
        let resource = resource.split('(').next()?.strip_prefix("gpu:")?;
        resource.rsplit(':').next()?.parse::<usize>().ok()
    };
    gres.split(',').filter_map(count).sum()
}

/// The partitions that `wanted` names, each once, in its order: `all` is every usable one.
///
/// # Errors
/// An input error where a name is unknown, with those there are, or where none is usable.
pub fn select(partitions: &[Partition], wanted: &[String]) -> Result<Vec<Partition>> {
    let mut chosen: Vec<Partition> = Vec::new();
    for name in wanted {
        let matches = |partition: &&Partition| match name.as_str() {
            ALL => partition.usable,
            name => partition.name == name,
        };
        let found: Vec<_> = partitions.iter().filter(matches).collect();
        if found.is_empty() {
            return Err(not_there(partitions, name));
        }
        chosen.extend(found.into_iter().cloned());
    }
    let mut seen = HashSet::new();
    chosen.retain(|partition| seen.insert(partition.name.clone()));
    Ok(chosen)
}

fn not_there(partitions: &[Partition], name: &str) -> Error {
    let names: Vec<&str> = partitions.iter().map(|partition| partition.name.as_str()).collect();
    let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    Error::input(match name {
        ALL => format!("--partitions all: no partition is up with a node that works (of: {names})"),
        _ => format!("--partitions {name}: no such partition; this cluster has: {names}"),
    })
}

/// [`seconds`] of a time without a limit.
pub const NO_LIMIT: u64 = u64::MAX;

/// The seconds of a time limit, [`time_seconds`] or `infinite`; `None` for any other text.
pub fn seconds(text: &str) -> Option<u64> {
    if ["infinite", "unlimited"].iter().any(|word| text.eq_ignore_ascii_case(word)) {
        return Some(NO_LIMIT);
    }
    // To Slurm a limit of 0 is none.
    time_seconds(text).map(|seconds| if seconds == 0 { NO_LIMIT } else { seconds })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn partition(name: &str, usable: bool, limit: Option<&str>, gpus_per_node: usize) -> Partition {
        Partition { name: name.into(), usable, time_limit: limit.map(str::to_owned), gpus_per_node }
    }

    /// As Slurm 22.05 prints it, with one of two nodes drained; `%R` has no `*` at the default.
    #[test]
    fn real_output_is_understood() {
        let text = "main|up|infinite|0/1/1/2|gpu:2\nshort|up|10:00|0/1/1/2|gpu:2\n";
        let expected =
            [partition("main", true, None, 2), partition("short", true, Some("10:00"), 2)];
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn lines_of_one_partition_are_put_together() {
        let text = "slurmctld says hello\n\
            big|up|2-00:00:00|0/0/3/3|(null)\n\
            big|up|2-00:00:00|1/0/0/1|gpu:4\n\
            off|inact|1:00:00|0/9/0/9|(null)\n\
            broken|up|1:00:00|0/0/9/9|(null)\n\
            gpu|up|1:00:00|1/0/0/1|gpu:a100:4(S:0,1),gpu:v100:2\n\
            gpu|up|1:00:00|1/0/0/1|lustre:1,gpu:a100:8(S:0-7)\n";
        let expected = [
            partition("big", true, Some("2-00:00:00"), 0),
            partition("off", false, Some("1:00:00"), 0),
            partition("broken", false, Some("1:00:00"), 0),
            partition("gpu", true, Some("1:00:00"), 6),
        ];
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn gpus_are_counted_in_every_form() {
        for (gres, expected) in [
            ("(null)", 0),
            ("", 0),
            ("gpu:2", 2),
            ("gpu:a100:4", 4),
            ("gpu:a100:4(S:0-1)", 4),
            ("gpu:a100_1g.5gb:7(S:0),gpu:2", 9),
            ("craynetwork:4", 0),
            ("gpu:many", 0),
        ] {
            assert_eq!(gpus(gres), expected, "{gres}");
        }
    }

    #[test]
    fn names_choose_and_all_takes_what_is_usable() {
        let there = [
            partition("main", true, None, 0),
            partition("down", false, None, 0),
            partition("gpu", true, None, 4),
        ];
        let chosen = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
            select(&there, &wanted).map(|chosen| {
                chosen.into_iter().map(|partition| partition.name).collect::<Vec<_>>()
            })
        };
        assert_eq!(chosen(&["all"]).unwrap(), ["main", "gpu"]);
        assert_eq!(chosen(&["gpu", "down", "gpu"]).unwrap(), ["gpu", "down"]);
        assert_eq!(chosen(&["gpu", "all"]).unwrap(), ["gpu", "main"]);
        let error = chosen(&["gpu", "nix"]).unwrap_err();
        assert!(error.message.contains("nix") && error.message.contains("main, down, gpu"));
        assert!(select(&there[1..2], &["all".into()]).is_err());
        assert!(select(&[], &["all".into()]).unwrap_err().message.contains("none"));
    }

    #[test]
    fn times_are_read_as_sbatch_reads_them() {
        for (text, expected) in [
            ("90", 5400),
            ("10:00", 600),
            ("1:30:00", 5400),
            ("01:00:00", 3600),
            ("1-12", 129_600),
            ("1-12:30", 131_400),
            ("2-00:00:00", 172_800),
            ("infinite", NO_LIMIT),
            ("UNLIMITED", NO_LIMIT),
            ("0", NO_LIMIT),
        ] {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
        for wrong in ["", "n/a", "1h", "1:2:3:4", "-5", "1-", "1.5", "+3", "1:"] {
            assert_eq!(seconds(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever a site's sinfo prints, farm does not panic over it.
        #[test]
        fn any_text_is_read(text in "[-a-z0-9|/:,()*\n ]{0,60}") {
            let _ = parse(&text);
            let _ = seconds(&text);
        }
    }
}
