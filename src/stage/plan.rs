//! Who reads, who receives, who reuses: decided from what each node has and can take.
//!
//! Pure: every node computes the same plan from the same states. [`super::transfer`]
//! carries the phases out; a faster algorithm replaces the phases here and the relay
//! there, nothing else. Now one node reads a chunk and it runs down a chain of the
//! nodes that need it, so the slowest link carries each byte once.

use serde::{Deserialize, Serialize};

use super::manifest::FileEntry;
use crate::{Error, Result};

/// Fewer chunks are not worth another node that opens the model.
const CHUNKS_A_MAKER: usize = 8;

/// A piece of a file, the unit of transfer and of verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index into the manifest's files.
    pub file: usize,
    /// Where it begins in the file, bytes.
    pub offset: u64,
    /// Length, bytes; at least 1.
    pub bytes: usize,
    /// Whether it lies nowhere but in copies, and a node without one makes it.
    pub made: bool,
}

/// `files` cut into pieces of at most `chunk_bytes`.
pub fn chunks(files: &[FileEntry], chunk_bytes: usize) -> Vec<Chunk> {
    let step = chunk_bytes.max(1);
    let mut chunks = Vec::new();
    for (file, entry) in files.iter().enumerate() {
        for offset in (0..entry.bytes).step_by(step) {
            let bytes = (entry.bytes - offset).min(step as u64) as usize;
            chunks.push(Chunk { file, offset, bytes, made: entry.made });
        }
    }
    chunks
}

/// What to do where a node cannot take a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StageFallback {
    /// Stop with an error.
    #[default]
    Error,
    /// Read the model where it is.
    InPlace,
}

/// Free memory or disk for a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Bytes that may still be written.
    pub free_bytes: u64,
    /// What sets that limit, for the message.
    pub limited_by: String,
}

/// A copy that a node has, after each chunk was compared with its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyState {
    /// Hash of the copy's chunk hashes: equal on nodes whose copies should be equal.
    pub digest: String,
    /// Chunks that are not what their hash says, ascending.
    pub bad: Vec<usize>,
}

/// What a node's leader found out before the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeState {
    /// The node's name, for messages.
    pub host: String,
    /// Its copy, if it has one.
    pub copy: Option<CopyState>,
    /// Room for a new copy, or why there can be none.
    pub space: std::result::Result<Space, String>,
}

/// What a node does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Its copy is good.
    Reuse,
    /// Its copy is good but for these chunks, which are written again.
    Mend(Vec<usize>),
    /// It gets a new copy.
    Receive,
    /// It reads the model where it is, for this reason.
    InPlace(String),
}

impl Action {
    /// Whether the node writes this chunk.
    pub fn needs(&self, chunk: usize) -> bool {
        match self {
            Action::Reuse | Action::InPlace(_) => false,
            Action::Mend(bad) => bad.binary_search(&chunk).is_ok(),
            Action::Receive => true,
        }
    }
}

/// Where a reader reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The model itself, on the parallel file system.
    Model,
    /// The reader's own staged copy.
    Copy,
    /// The copy that the reader is writing, of which it has made these chunks.
    Made,
}

/// Chunks that one node reads and a chain of nodes receives, each from the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phase {
    /// The node that reads.
    pub reader: usize,
    /// Where it reads.
    pub source: Source,
    /// The receiving nodes in the order of the chain; empty if only the reader writes.
    pub chain: Vec<usize>,
    /// The chunks, in order.
    pub chunks: Vec<usize>,
}

/// The whole plan, the same on every node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePlan {
    /// What each node does.
    pub actions: Vec<Action>,
    /// The chunks that each node makes before the transfers.
    pub makes: Vec<Vec<usize>>,
    /// The transfers, one after another.
    pub phases: Vec<Phase>,
    /// The node whose copy's hashes all others must meet, if any has a copy.
    pub trusted: Option<usize>,
}

impl StagePlan {
    /// Decides from the states of all `nodes`. Fails (fault) if a node cannot take the
    /// `chunks` and `fallback` is [`StageFallback::Error`]: the message says how much is
    /// needed and how much is free, and where.
    pub fn new(chunks: &[Chunk], nodes: &[NodeState], fallback: StageFallback) -> Result<Self> {
        let trusted = nodes.iter().position(|node| node.copy.is_some());
        let digest = trusted.and_then(|node| nodes[node].copy.as_ref()).map(|copy| &copy.digest);
        let good_copy = |node: &NodeState| -> Option<Vec<usize>> {
            let copy = node.copy.as_ref().filter(|copy| Some(&copy.digest) == digest)?;
            Some(copy.bad.clone())
        };
        let needed_bytes = chunks.iter().map(|chunk| chunk.bytes as u64).sum();
        let actions: Vec<Action> = nodes
            .iter()
            .map(|node| match (good_copy(node), obstacle(node, needed_bytes)) {
                (Some(bad), _) if bad.is_empty() => Action::Reuse,
                (Some(bad), _) => Action::Mend(bad),
                (None, None) => Action::Receive,
                (None, Some(reason)) => Action::InPlace(reason),
            })
            .collect();
        if fallback == StageFallback::Error {
            refuse_in_place(&actions)?;
        }
        let has = |node: usize, chunk: usize| {
            matches!(&actions[node], Action::Reuse | Action::Mend(_)) && !actions[node].needs(chunk)
        };
        let makes = makes(chunks, &actions, has);
        let phases = phases(chunks.len(), &actions, &makes, has);
        Ok(Self { actions, makes, phases, trusted })
    }
}

/// Why `node` cannot take a new copy.
fn obstacle(node: &NodeState, needed_bytes: u64) -> Option<String> {
    match &node.space {
        Err(reason) => Some(format!("{}: {reason}", node.host)),
        Ok(space) if space.free_bytes < needed_bytes => Some(format!(
            "{}: the model needs {}, {} are free ({})",
            node.host,
            gigabytes(needed_bytes),
            gigabytes(space.free_bytes),
            space.limited_by
        )),
        Ok(_) => None,
    }
}

/// Fails if a node would read in place; one message for all such nodes.
fn refuse_in_place(actions: &[Action]) -> Result<()> {
    let reasons: Vec<&str> = actions
        .iter()
        .filter_map(|action| match action {
            Action::InPlace(reason) => Some(reason.as_str()),
            _ => None,
        })
        .collect();
    let Some(first) = reasons.first() else { return Ok(()) };
    let others = match reasons.len() - 1 {
        0 => String::new(),
        others => format!(" (and {others} more nodes)"),
    };
    Err(Error::fault(format!(
        "cannot stage the model on {first}{others}; ask for more memory (--mem=0), stage to a \
         local disk (--stage-dir \"$TMPDIR\"), or read in place (--stage-fallback in-place)"
    )))
}

/// The chunks that no node `has`, in runs of neighbours, over the nodes that need them.
fn makes(
    chunks: &[Chunk],
    actions: &[Action],
    has: impl Fn(usize, usize) -> bool,
) -> Vec<Vec<usize>> {
    let needs = |node: usize, chunk: usize| actions[node].needs(chunk);
    let nodes = 0..actions.len();
    let is_missing = |chunk: &usize| {
        let anywhere = || nodes.clone().any(|node| has(node, *chunk));
        chunks[*chunk].made && nodes.clone().any(|node| needs(node, *chunk)) && !anywhere()
    };
    let missing: Vec<usize> = (0..chunks.len()).filter(is_missing).collect();
    let mut makers: Vec<usize> =
        nodes.clone().filter(|&node| missing.iter().any(|&chunk| needs(node, chunk))).collect();
    makers.truncate(missing.len().div_ceil(CHUNKS_A_MAKER));
    let mut makes = vec![Vec::new(); actions.len()];
    for (place, &chunk) in missing.iter().enumerate() {
        let maker = makers[place * makers.len() / missing.len()];
        let maker = [maker].into_iter().chain(nodes.clone()).find(|&node| needs(node, chunk));
        makes[maker.unwrap_or(0)].push(chunk);
    }
    makes
}

/// One phase a reader: the first node that `has` a chunk, the one that made it, or node 0 from
/// the model itself.
fn phases(
    num_chunks: usize,
    actions: &[Action],
    makes: &[Vec<usize>],
    has: impl Fn(usize, usize) -> bool,
) -> Vec<Phase> {
    let makes = |node: usize, chunk: usize| makes[node].binary_search(&chunk).is_ok();
    let mut phases: Vec<Phase> = Vec::new();
    for chunk in 0..num_chunks {
        if !actions.iter().any(|action| action.needs(chunk)) {
            continue;
        }
        let nodes = 0..actions.len();
        let owner = nodes.clone().find(|&node| has(node, chunk));
        let maker = nodes.clone().find(|&node| makes(node, chunk));
        let (reader, source) = match (owner, maker) {
            (Some(node), _) => (node, Source::Copy),
            (None, Some(node)) => (node, Source::Made),
            (None, None) => (0, Source::Model),
        };
        match phases.iter_mut().find(|phase| (phase.reader, phase.source) == (reader, source)) {
            Some(phase) => phase.chunks.push(chunk),
            None => phases.push(Phase { reader, source, chain: Vec::new(), chunks: vec![chunk] }),
        }
    }
    for phase in &mut phases {
        let receives = |node: usize| phase.chunks.iter().any(|&chunk| actions[node].needs(chunk));
        phase.chain =
            (0..actions.len()).filter(|&node| node != phase.reader && receives(node)).collect();
    }
    phases.retain(|phase| phase.source != Source::Made || !phase.chain.is_empty());
    phases
}

/// Bytes as a person reads them.
pub(super) fn gigabytes(bytes: u64) -> String {
    match bytes {
        100_000_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
        100_000.. => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(copy: Option<(&str, &[usize])>, free_bytes: u64) -> NodeState {
        NodeState {
            host: "n".into(),
            copy: copy.map(|(digest, bad)| CopyState { digest: digest.into(), bad: bad.to_vec() }),
            space: Ok(Space { free_bytes, limited_by: "/dev/shm".into() }),
        }
    }

    fn four_chunks() -> Vec<Chunk> {
        (0..4).map(|index| Chunk { file: 0, offset: index * 10, bytes: 10, made: false }).collect()
    }

    fn plan(nodes: &[NodeState]) -> StagePlan {
        StagePlan::new(&four_chunks(), nodes, StageFallback::Error).unwrap()
    }

    #[test]
    fn cold_nodes_receive_what_node_0_reads_once() {
        let plan = plan(&[node(None, 40), node(None, 40), node(None, 40)]);
        assert_eq!(plan.actions, vec![Action::Receive; 3]);
        let all =
            Phase { reader: 0, source: Source::Model, chain: vec![1, 2], chunks: vec![0, 1, 2, 3] };
        assert_eq!(plan.phases, [all]);
    }

    #[test]
    fn warm_nodes_do_nothing() {
        let warm = node(Some(("d", &[])), 0);
        let plan = plan(&[warm.clone(), warm]);
        assert_eq!(plan.actions, [Action::Reuse, Action::Reuse]);
        assert!(plan.phases.is_empty());
    }

    #[test]
    fn a_warm_node_seeds_the_others_and_the_model_is_read_only_for_what_nobody_has() {
        let plan =
            plan(&[node(None, 40), node(Some(("d", &[2])), 0), node(Some(("d", &[1, 2])), 0)]);
        assert_eq!(plan.trusted, Some(1));
        assert_eq!(plan.actions[1], Action::Mend(vec![2]));
        assert_eq!(
            plan.phases,
            [
                Phase { reader: 1, source: Source::Copy, chain: vec![0, 2], chunks: vec![0, 1, 3] },
                Phase { reader: 0, source: Source::Model, chain: vec![1, 2], chunks: vec![2] },
            ]
        );
    }

    #[test]
    fn a_copy_that_claims_other_content_is_replaced() {
        let plan = plan(&[node(Some(("d", &[])), 0), node(Some(("other", &[])), 40)]);
        assert_eq!(plan.actions, [Action::Reuse, Action::Receive]);
    }

    #[test]
    fn a_shortage_is_an_error_with_both_figures_or_a_fall_back() {
        let nodes = [node(None, 40), node(None, 39)];
        let error =
            StagePlan::new(&four_chunks(), &nodes, StageFallback::Error).unwrap_err().message;
        assert!(error.contains("needs 40 bytes, 39 bytes are free (/dev/shm)"), "{error}");
        let plan = StagePlan::new(&four_chunks(), &nodes, StageFallback::InPlace).unwrap();
        assert!(matches!(plan.actions[1], Action::InPlace(_)));
        assert_eq!(plan.phases[0].chain, Vec::<usize>::new());
    }

    #[test]
    fn chunks_cover_files_and_skip_empty_ones() {
        let entry = |bytes| FileEntry {
            path: "f".into(),
            source: "/f".into(),
            bytes,
            mtime_ns: 0,
            made: false,
        };
        let cut = chunks(&[entry(25), entry(0), entry(10)], 10);
        let places: Vec<_> = cut.iter().map(|c| (c.file, c.offset, c.bytes)).collect();
        assert_eq!(places, [(0, 0, 10), (0, 10, 10), (0, 20, 5), (2, 0, 10)]);
    }

    #[test]
    fn what_is_made_is_made_in_runs_by_those_that_need_it_and_relayed() {
        let made = |count: u64| -> Vec<Chunk> {
            (0..count).map(|i| Chunk { file: 0, offset: i * 10, bytes: 10, made: i > 0 }).collect()
        };
        let cold = || node(None, 1000);
        let plan = |chunks: &[Chunk], nodes: &[NodeState]| {
            StagePlan::new(chunks, nodes, StageFallback::Error).unwrap()
        };
        let two = plan(&made(17), &[cold(), cold(), cold()]);
        assert_eq!(two.makes, [(1..9).collect(), (9..17).collect(), Vec::new()]);
        let phase = |reader, source, chain: &[usize], chunks: Vec<usize>| Phase {
            reader,
            source,
            chain: chain.to_vec(),
            chunks,
        };
        assert_eq!(
            two.phases,
            [
                phase(0, Source::Model, &[1, 2], vec![0]),
                phase(0, Source::Made, &[1, 2], (1..9).collect()),
                phase(1, Source::Made, &[0, 2], (9..17).collect()),
            ]
        );
        // Nobody to pass it on to; a copy elsewhere; one bad chunk in all copies.
        assert_eq!(plan(&made(17), &[cold()]).phases, [phase(0, Source::Model, &[], vec![0])]);
        let warm = node(Some(("d", &[])), 0);
        let seeded = plan(&made(17), &[cold(), warm]);
        assert_eq!(seeded.makes, [Vec::<usize>::new(), Vec::new()]);
        let bad = node(Some(("d", &[3])), 0);
        let mended = plan(&made(17), &[node(Some(("d", &[3, 4])), 0), bad]);
        assert_eq!(mended.makes, [vec![3], Vec::new()]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the nodes have: each needed chunk is read once, by a node that has
        /// it, and reaches every node that needs it.
        #[test]
        fn every_node_ends_with_every_chunk(
            states in prop::collection::vec(
                prop::option::of(prop::collection::btree_set(0usize..4, 0..4)), 1..6),
        ) {
            let nodes: Vec<NodeState> = states
                .iter()
                .map(|bad| {
                    let bad: Option<Vec<usize>> =
                        bad.as_ref().map(|bad| bad.iter().copied().collect());
                    node(bad.as_deref().map(|bad| ("d", bad)), 40)
                })
                .collect();
            let plan = plan(&nodes);
            for chunk in 0..4 {
                let phases: Vec<&Phase> =
                    plan.phases.iter().filter(|phase| phase.chunks.contains(&chunk)).collect();
                let needed = plan.actions.iter().any(|action| action.needs(chunk));
                prop_assert_eq!(phases.len(), usize::from(needed));
                for (index, action) in plan.actions.iter().enumerate() {
                    if action.needs(chunk) {
                        prop_assert!(phases[0].reader == index || phases[0].chain.contains(&index));
                    }
                }
                if let Some(phase) = phases.first() && phase.source == Source::Copy {
                    prop_assert!(!plan.actions[phase.reader].needs(chunk));
                }
            }
        }
    }
}
