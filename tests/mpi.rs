//! The bodies that every communicator must pass, run as real MPI processes: this test
//! starts itself again under mpirun with 1, 2, 3 and 4 ranks. Without an mpirun it
//! says so and passes.
#![cfg(feature = "mpi")]

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::has_mpirun;
use farm::comm::{Communicator, Launch, MpiWorld, conformance, world};

/// Set in the processes that mpirun starts: what they run.
const ROLE: &str = "FARM_TEST_MPI_ROLE";

#[test]
fn communicators_conform_under_mpirun() {
    if !has_mpirun() {
        return;
    }
    for ranks in 1..=4 {
        let (succeeded, output) = mpirun(ranks, "conform");
        assert!(succeeded, "mpirun -n {ranks}:\n{output}");
        assert_eq!(output.matches("conforms").count(), ranks, "mpirun -n {ranks}:\n{output}");
    }
}

#[test]
fn a_panic_on_one_rank_ends_the_job_and_names_rank_and_host() {
    if !has_mpirun() {
        return;
    }
    let (succeeded, output) = mpirun(3, "panic");
    assert!(!succeeded);
    assert!(output.contains("farm: rank 1 on "), "{output}");
}

/// Not a test of its own: what each rank runs.
#[test]
#[ignore = "started by the others under mpirun"]
fn rank() {
    match std::env::var(ROLE).as_deref() {
        Ok("conform") => conform(),
        Ok("panic") => panic_on_rank_1(),
        _ => println!("not started by mpirun: nothing to do"),
    }
}

fn conform() {
    let mpi = MpiWorld::start().expect("MPI starts");
    // Once as in production, once with chunks so short that most messages need several.
    for comm in [mpi.comm(), mpi.comm_with_chunk_bytes(100_000)] {
        let comm: Arc<dyn Communicator> = Arc::new(comm);
        for (name, body) in conformance::BODIES {
            let started = Instant::now();
            body(comm.clone());
            comm.barrier();
            if comm.rank() == 0 {
                println!("{name}: {:?}", started.elapsed());
            }
        }
        // Under mpirun the launcher says how many ranks share this node.
        let expected = std::env::var("OMPI_COMM_WORLD_LOCAL_SIZE").ok();
        let node = comm.split_shared_memory();
        assert!(expected.is_none_or(|size| size == node.size().to_string()));
    }
    println!("rank {} conforms", mpi.comm().rank());
}

fn panic_on_rank_1() {
    let world = world(&Launch::of_this_process()).expect("MPI starts");
    if world.comm.rank() == 1 {
        panic!("as it must");
    }
    world.comm.barrier();
}

/// Runs [`rank`] in `role` as `ranks` processes; whether it succeeded, and what it said.
fn mpirun(ranks: usize, role: &str) -> (bool, String) {
    let this = std::env::current_exe().expect("path of this test");
    let mut command = common::mpirun(ranks);
    command
        .arg(this)
        .args(["--exact", "rank", "--ignored", "--nocapture", "--test-threads=1"])
        .env(ROLE, role);
    let ended = common::run(&mut command);
    let stdout = String::from_utf8_lossy(&ended.stdout).into_owned();
    (ended.code == Some(0), stdout + &ended.stderr)
}
