//! Which ranks belong together: nodes, tensor-parallel groups, data-parallel groups.

use std::sync::Arc;

use super::Communicator;
use crate::{Error, Result};

/// How world ranks fall into tensor-parallel groups: contiguous ranks, the first of
/// each group its leader. `world_size = tensor_parallel_size × number of groups`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLayout {
    world_size: usize,
    tensor_parallel_size: usize,
}

impl GroupLayout {
    /// Fails (usage) with the sizes that would work if `tensor_parallel_size` does not
    /// divide `world_size`.
    pub fn new(world_size: usize, tensor_parallel_size: usize) -> Result<Self> {
        if tensor_parallel_size > world_size {
            let ranks = match world_size {
                1 => "there is 1".to_owned(),
                n => format!("there are {n}"),
            };
            return Err(Error::usage(format!(
                "--tensor-parallel {tensor_parallel_size} needs {tensor_parallel_size} ranks, and \
                 {ranks}: start them with srun -n {tensor_parallel_size} (or mpirun), or without \
                 a launcher with --local-ranks {tensor_parallel_size}"
            )));
        }
        if tensor_parallel_size == 0 || !world_size.is_multiple_of(tensor_parallel_size) {
            let sizes: Vec<String> = (1..=world_size)
                .filter(|&size| world_size.is_multiple_of(size))
                .map(|size| size.to_string())
                .collect();
            return Err(Error::usage(format!(
                "--tensor-parallel {tensor_parallel_size} does not divide the {world_size} ranks \
                 of this job; {} would work, or start another number of ranks",
                sizes.join(", ")
            )));
        }
        Ok(Self { world_size, tensor_parallel_size })
    }

    /// The group that world rank `rank` belongs to.
    pub fn group(&self, rank: usize) -> usize {
        rank / self.tensor_parallel_size
    }

    /// The place of world rank `rank` in its group.
    pub fn tensor_parallel_rank(&self, rank: usize) -> usize {
        rank % self.tensor_parallel_size
    }
}

/// The ranks of the job and the groups that this rank is in.
pub struct Topology {
    /// All ranks.
    pub world: Arc<dyn Communicator>,
    /// The ranks of this node; its rank 0 is the node's leader.
    pub node: Arc<dyn Communicator>,
    /// The nodes' leaders in order of node index; `None` on the other ranks. World rank 0
    /// leads node 0.
    pub leaders: Option<Arc<dyn Communicator>>,
    /// The ranks that hold one model's shards together with this one.
    pub tensor_parallel: Arc<dyn Communicator>,
    /// The ranks that have this one's place in their tensor-parallel groups; for the groups'
    /// leaders, the leaders, world rank 0 first.
    pub data_parallel: Arc<dyn Communicator>,
    /// How world ranks fall into tensor-parallel groups.
    pub layout: GroupLayout,
    /// This node, `0..num_nodes`.
    pub node_index: usize,
    /// Number of nodes.
    pub num_nodes: usize,
}

impl Topology {
    /// Groups the ranks of `world`. Collective; fails alike on all ranks.
    pub fn new(world: Arc<dyn Communicator>, tensor_parallel_size: usize) -> Result<Self> {
        let layout = GroupLayout::new(world.size(), tensor_parallel_size)?;
        let rank = world.rank();
        let node = world.split_shared_memory();
        let is_leader = node.rank() == 0;
        let leaders = member(is_leader, world.split(usize::from(!is_leader), rank));
        let mut place = [0u8; 16];
        if let Some(leaders) = &leaders {
            place[..8].copy_from_slice(&(leaders.rank() as u64).to_le_bytes());
            place[8..].copy_from_slice(&(leaders.size() as u64).to_le_bytes());
        }
        node.broadcast(0, &mut place);
        let place = u128::from_le_bytes(place);
        let tensor_parallel = world.split(layout.group(rank), rank);
        let data_parallel = world.split(layout.tensor_parallel_rank(rank), rank);
        Ok(Self {
            world,
            node,
            leaders,
            tensor_parallel,
            data_parallel,
            layout,
            node_index: place as u64 as usize,
            num_nodes: (place >> 64) as usize,
        })
    }

    /// The leaders of all tensor-parallel groups; `None` on the other ranks.
    pub fn group_leaders(&self) -> Option<&Arc<dyn Communicator>> {
        (self.tensor_parallel.rank() == 0).then_some(&self.data_parallel)
    }

    /// Whether this rank leads its node.
    pub fn is_node_leader(&self) -> bool {
        self.leaders.is_some()
    }
}

fn member(is_member: bool, group: Arc<dyn Communicator>) -> Option<Arc<dyn Communicator>> {
    is_member.then_some(group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::comm::LocalComm;

    #[test]
    fn groups_are_contiguous_ranks() {
        // (world, tensor parallel, group of each rank, leaders)
        let table: [(usize, usize, &[usize], &[usize]); 4] = [
            (1, 1, &[0], &[0]),
            (4, 1, &[0, 1, 2, 3], &[0, 1, 2, 3]),
            (4, 2, &[0, 0, 1, 1], &[0, 2]),
            (6, 3, &[0, 0, 0, 1, 1, 1], &[0, 3]),
        ];
        for (world, size, groups, leaders) in table {
            let layout = GroupLayout::new(world, size).unwrap();
            let got: Vec<usize> = (0..world).map(|rank| layout.group(rank)).collect();
            assert_eq!(got, groups, "world {world}, tensor parallel {size}");
            let heads = (0..world).filter(|&rank| layout.tensor_parallel_rank(rank) == 0);
            assert_eq!(heads.collect::<Vec<_>>(), leaders);
        }
    }

    #[test]
    fn a_size_that_does_not_divide_is_refused_with_those_that_do() {
        for size in [0, 4, 5] {
            let error = GroupLayout::new(6, size).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage);
            assert!(error.message.contains("1, 2, 3, 6 would work"), "{error}");
        }
    }

    #[test]
    fn node_leaders_and_groups_are_found_on_uneven_nodes() {
        // Nodes of 2, 2 and 1 ranks.
        let places = LocalComm::run_with_nodes(5, 2, |world| {
            let topology = Topology::new(world, 1).unwrap();
            (
                topology.node_index,
                topology.num_nodes,
                topology.node.rank(),
                topology.is_node_leader(),
                topology.leaders.as_ref().map(|leaders| leaders.rank()),
            )
        });
        assert_eq!(
            places,
            [
                (0, 3, 0, true, Some(0)),
                (0, 3, 1, false, None),
                (1, 3, 0, true, Some(1)),
                (1, 3, 1, false, None),
                (2, 3, 0, true, Some(2)),
            ]
        );
    }

    #[test]
    fn tensor_and_data_parallel_groups_cross() {
        let places = LocalComm::run(4, |world| {
            let topology = Topology::new(world, 2).unwrap();
            let groups = [topology.tensor_parallel, topology.data_parallel];
            groups.map(|group| (group.rank(), group.size()))
        });
        let expected = [[0, 0], [1, 0], [0, 1], [1, 1]].map(|ranks| ranks.map(|rank| (rank, 2)));
        assert_eq!(places, expected);
    }
}
