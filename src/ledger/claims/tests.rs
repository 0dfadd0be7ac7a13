//! Several launches on one store: by hand, in every interleaving, and on a real directory.

use std::collections::BTreeMap;
use std::sync::Barrier;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::sim_store::{Crash, SimDeaths, SimDisk, SimEvidence};
use super::*;

/// A launch of the simulation, on a host of its own unless said otherwise.
struct Launch {
    claims: Claims,
    client: usize,
    owner: Owner,
}

struct World {
    disk: SimDisk,
    deaths: SimDeaths,
    pids: u32,
}

impl World {
    fn new(seed: u64, stale_seconds: f64) -> Self {
        Self { disk: SimDisk::new(seed, stale_seconds), deaths: SimDeaths::default(), pids: 0 }
    }

    fn now(&self) -> f64 {
        self.disk.now_seconds()
    }

    fn pass(&self, seconds: f64) {
        self.disk.advance_to(self.now() + seconds);
    }

    fn evidence(&self, host: &str) -> Box<SimEvidence> {
        Box::new(self.deaths.evidence(host, true))
    }

    fn join_as(&mut self, host: &str, job: Option<JobRef>) -> Launch {
        self.pids += 1;
        let process = ProcessId {
            host: host.to_owned(),
            boot_id: "boot".to_owned(),
            pid_namespace: None,
            pid: self.pids,
            pid_start: None,
        };
        let owner = Owner { process, job, facts: Value::Null };
        let store = self.disk.client();
        let client = store.client;
        let (evidence, config) = (self.evidence(host), ClaimsConfig::default());
        let claims =
            Claims::join(Box::new(store), evidence, owner.clone(), config, self.now()).unwrap();
        Launch { claims, client, owner }
    }

    fn join(&mut self) -> Launch {
        self.join_as(&format!("host-{}", self.pids + 1), None)
    }

    fn kill(&self, launch: &Launch) {
        self.disk.kill(launch.client);
        self.deaths.end_process(&launch.owner.process);
    }
}

fn free(generation: u32, taken_over_from: Option<LaunchId>) -> Standing {
    Standing::Free { generation, taken_over_from }
}

fn beat(launch: &mut Launch, now: f64) {
    launch.claims.beat(&OwnerProgress::default(), now).unwrap();
}

#[test]
fn a_claim_is_held_given_back_taken_and_done() {
    let mut world = World::new(0, 0.0);
    let (mut a, mut b) = (world.join(), world.join());
    assert_eq!((a.claims.launch(), b.claims.launch()), (1, 2));

    assert_eq!(b.claims.standing("merge", 0.0).unwrap(), free(1, None));
    assert_eq!(a.claims.claim("merge", 0.0).unwrap(), Standing::Mine);
    assert_eq!(a.claims.claim("merge", 0.0).unwrap(), Standing::Mine, "once more");
    assert_eq!(b.claims.claim("merge", 0.0).unwrap(), Standing::Held(1));
    assert!(!b.claims.release("merge").unwrap(), "it is not b's");
    assert!(!b.claims.complete("merge", &json!(0)).unwrap(), "it is not b's");
    assert!(a.claims.release("merge").unwrap());
    assert_eq!(b.claims.standing("merge", 0.0).unwrap(), free(3, None));
    assert_eq!(b.claims.claim("merge", 0.0).unwrap(), Standing::Mine);
    assert_eq!((b.claims.generation("merge"), a.claims.generation("merge")), (3, 2));
    assert!(b.claims.complete("merge", &json!({"records": 9})).unwrap());
    for launch in [&mut a, &mut b] {
        let done = Standing::Done(json!({"records": 9}));
        assert_eq!(launch.claims.claim("merge", 0.0).unwrap(), done);
        assert_eq!(launch.claims.generation("merge"), 4);
        assert!(launch.claims.lost("merge").unwrap());
        assert!(!launch.claims.release("merge").unwrap());
    }
}

#[test]
fn a_fresh_resource_costs_one_creation() {
    let mut world = World::new(0, 0.0);
    let mut a = world.join();
    let before = world.disk.operations(a.client);
    for block in 0..10 {
        assert_eq!(a.claims.claim(&format!("block-{block:08}"), 0.0).unwrap(), Standing::Mine);
    }
    assert_eq!(world.disk.operations(a.client) - before, 10);
}

/// How an owner that holds a block ends, and after how many seconds it is seen gone: from
/// another host, and from its own.
#[test]
fn the_dead_are_seen_at_once_where_there_is_proof_and_by_heartbeat_where_not() {
    let job = |restart_count| JobRef {
        cluster: Some("c".to_owned()),
        job_id: 9,
        restart_count,
        step_id: Some(0),
        user_id: None,
    };
    type End = fn(&mut World, &mut Launch);
    let table: [(&str, End, std::ops::RangeInclusive<u32>, std::ops::RangeInclusive<u32>); 6] = [
        (
            "leaves",
            |_, it| it.claims.leave("done", &OwnerProgress::default()).unwrap(),
            0..=1,
            0..=1,
        ),
        ("is killed", |world, it| world.kill(it), 119..=123, 0..=1),
        ("loses its host", |world, it| world.disk.kill(it.client), 119..=123, 119..=123),
        // Seen alive by its host, so a wrong answer of Slurm's does not count there.
        (
            "ends for Slurm",
            |world, it| {
                world.disk.kill(it.client);
                world.deaths.end_step(it.owner.job.as_ref().unwrap());
            },
            6..=9,
            119..=123,
        ),
        (
            "is started again",
            |world, it| {
                world.kill(it);
                let job = it.owner.job.clone().unwrap();
                world.join_as("other", Some(JobRef { restart_count: 4, ..job }));
            },
            0..=2,
            0..=2,
        ),
        ("lives", |_, _| {}, 1000..=1000, 1000..=1000),
    ];
    for (name, end, elsewhere, same_host) in table {
        for (host, expected) in [("watcher", elsewhere), ("h", same_host)] {
            let mut world = World::new(1, 0.0);
            let mut it = world.join_as("h", Some(job(3)));
            let mut watcher = world.join_as(host, None);
            assert_eq!(it.claims.claim("block", 0.0).unwrap(), Standing::Mine);
            assert_eq!(watcher.claims.claim("block", 0.0).unwrap(), Standing::Held(1));
            assert_eq!(watcher.claims.live_others(0.0).unwrap().len(), 1);
            end(&mut world, &mut it);
            let mut waited = 0;
            while waited < 1000 && !watcher.claims.is_gone(1, world.now()).unwrap() {
                waited += 1;
                world.pass(1.0);
                if name == "lives" && waited % 5 == 0 {
                    beat(&mut it, world.now());
                }
            }
            assert!(expected.contains(&waited), "{name}, seen from {host}: after {waited} s");
            if name != "lives" {
                let now = world.now();
                assert_eq!(watcher.claims.standing("block", now).unwrap(), free(2, Some(1)));
                assert_eq!(watcher.claims.claim("block", now).unwrap(), Standing::Mine);
                assert_eq!(watcher.claims.taken_over_from("block"), Some(1));
            }
        }
    }
}

#[test]
fn steps_of_one_start_of_a_job_work_side_by_side() {
    let mut world = World::new(0, 0.0);
    let step = |step_id| {
        Some(JobRef { job_id: 9, restart_count: 2, step_id: Some(step_id), ..JobRef::default() })
    };
    let (mut a, mut b) = (world.join_as("h", step(0)), world.join_as("h", step(1)));
    assert!(!a.claims.is_gone(2, 0.0).unwrap());
    assert!(!b.claims.is_gone(1, 0.0).unwrap());
}

#[test]
fn an_owner_that_was_suspended_learns_what_it_lost_and_is_alive_again() {
    let mut world = World::new(0, 0.0);
    let (mut a, mut b) = (world.join(), world.join());
    for block in ["b0", "b1"] {
        assert_eq!(a.claims.claim(block, 0.0).unwrap(), Standing::Mine);
    }
    for _ in 0..60 {
        world.pass(5.0);
        beat(&mut b, world.now());
        b.claims.is_gone(1, world.now()).unwrap();
    }
    assert_eq!(b.claims.claim("b0", world.now()).unwrap(), Standing::Mine);

    beat(&mut a, world.now());
    assert!(a.claims.lost("b0").unwrap());
    assert!(!a.claims.lost("b1").unwrap());
    assert!(!a.claims.complete("b0", &Value::Null).unwrap());
    assert_eq!(a.claims.standing("b0", world.now()).unwrap(), Standing::Held(2));
    world.pass(61.0);
    beat(&mut a, world.now());
    assert_eq!(b.claims.claim("b1", world.now()).unwrap(), Standing::Held(1));
}

#[test]
fn an_outage_of_the_file_system_makes_nobody_seem_dead() {
    let mut world = World::new(0, 0.0);
    let (mut a, mut b) = (world.join(), world.join());
    assert_eq!(a.claims.claim("b0", 0.0).unwrap(), Standing::Mine);
    b.claims.live_others(0.0).unwrap();
    world.pass(3600.0); // nobody could read or write; b is the first that can again
    assert_eq!(b.claims.claim("b0", world.now()).unwrap(), Standing::Held(1));
    let mut newcomer = world.join();
    assert_eq!(newcomer.claims.claim("b0", world.now()).unwrap(), Standing::Held(1));
    world.pass(6.0);
    beat(&mut a, world.now());
    for _ in 0..100 {
        assert_eq!(b.claims.claim("b0", world.now()).unwrap(), Standing::Held(1));
        assert_eq!(newcomer.claims.claim("b0", world.now()).unwrap(), Standing::Held(1));
        world.pass(1.0);
    }
}

#[test]
fn a_torn_or_damaged_claim_is_somebodys_until_it_is_old() {
    let mut world = World::new(0, 0.0);
    let (mut a, mut b) = (world.join(), world.join());
    world.disk.crash(a.client, 0, Crash::Torn);
    assert!(a.claims.claim("merge", 0.0).is_err());
    let mut waited = 0;
    while b.claims.claim("merge", world.now()).unwrap() == Standing::Held(UNKNOWN_LAUNCH) {
        world.pass(1.0);
        waited += 1;
        assert!(waited < 1000);
    }
    assert!((119..=122).contains(&waited), "{waited} s");
    assert_eq!(b.claims.standing("merge", world.now()).unwrap(), Standing::Mine);
    assert_eq!(b.claims.generation("merge"), 2);
}

#[test]
fn a_damaged_or_missing_owner_file_is_judged_by_its_heartbeat() {
    for remove in [false, true] {
        let mut world = World::new(0, 0.0);
        let (mut a, mut b) = (world.join(), world.join());
        assert_eq!(a.claims.claim("b0", 0.0).unwrap(), Standing::Mine);
        let mut vandal = world.disk.client();
        match remove {
            true => vandal.remove("owner-00001.json").unwrap(),
            false => vandal.replace("owner-00001.json", b"{\"launch\": 1, \"own").unwrap(),
        }
        assert_eq!(b.claims.claim("b0", 0.0).unwrap(), Standing::Held(1));
        assert_eq!(b.claims.owners(0.0).unwrap().len(), 1, "only b's own can be read");
        for _ in 0..121 {
            world.pass(1.0);
            b.claims.is_gone(1, world.now()).unwrap();
        }
        assert_eq!(b.claims.claim("b0", world.now()).unwrap(), Standing::Mine);
        beat(&mut a, world.now());
        world.pass(61.0);
        beat(&mut a, world.now());
        assert!(!b.claims.is_gone(1, world.now()).unwrap(), "whole again");
    }
}

#[test]
fn live_owners_are_read_once_a_second_and_dead_ones_not_at_all() {
    let mut world = World::new(0, 0.0);
    let (mut a, mut b) = (world.join(), world.join());
    let mut others: Vec<_> = (0..20).map(|_| world.join()).collect();
    others.iter_mut().for_each(|it| it.claims.leave("done", &OwnerProgress::default()).unwrap());
    a.claims.live_others(0.0).unwrap();
    let before = world.disk.operations(a.client);
    for tick in 0..1000 {
        let now = f64::from(tick) * 0.01;
        world.disk.advance_to(now);
        beat(&mut b, now);
        assert_eq!(a.claims.live_others(now).unwrap().len(), 1);
    }
    // Ten seconds: b's file, our own (it is an owner too), and the next owner's, each second.
    let operations = world.disk.operations(a.client) - before;
    assert!(operations <= 40, "{operations} operations");
}

#[test]
fn wishes_are_those_of_live_others() {
    let mut world = World::new(0, 0.0);
    let (mut a, mut b, mut c) = (world.join(), world.join(), world.join());
    for launch in [&mut b, &mut c] {
        launch.claims.wish(true).unwrap();
        launch.claims.wish(true).unwrap();
    }
    assert_eq!(a.claims.wishes_of_others(0.0).unwrap(), [2, 3]);
    assert_eq!(b.claims.wishes_of_others(0.0).unwrap(), [3]);
    b.claims.wish(false).unwrap();
    c.claims.leave("done", &OwnerProgress::default()).unwrap();
    assert!(!world.disk.contents().keys().any(|name| name.starts_with("wish")));
    assert_eq!(a.claims.wishes_of_others(2.0).unwrap(), [0; 0]);
}

#[test]
fn one_who_only_looks_sees_all_and_changes_nothing() {
    let mut world = World::new(0, 0.0);
    let (mut a, mut b) = (world.join(), world.join());
    a.claims.claim("b0", 0.0).unwrap();
    b.claims.leave("done", &OwnerProgress::default()).unwrap();
    let before = world.disk.contents();
    let (store, evidence) = (Box::new(world.disk.client()), world.evidence("login"));
    let mut view = Claims::view(store, evidence, ClaimsConfig::default()).unwrap();
    assert_eq!(view.launch(), UNKNOWN_LAUNCH);
    assert_eq!(view.standing("b0", 0.0).unwrap(), Standing::Held(1));
    let owners = view.owners(0.0).unwrap();
    let gone: Vec<_> = owners.iter().map(|owner| (owner.file.launch, owner.gone)).collect();
    assert_eq!(gone, [(1, None), (2, Some(Gone::Left))]);
    assert_eq!(view.live_others(0.0).unwrap().len(), 1);
    assert!(view.claim("b1", 0.0).is_err());
    assert!(view.release("b0").is_err());
    assert!(view.wish(true).is_err());
    assert!(view.beat(&OwnerProgress::default(), 0.0).is_err());
    assert!(view.leave("", &OwnerProgress::default()).is_err());
    assert_eq!(view.owner_file(&OwnerProgress::default()), None);
    assert_eq!(world.disk.contents(), before);
}

/// One step of one of the launches.
#[derive(Clone, Debug)]
enum Step {
    Claim(u8),
    Release(u8),
    Complete(u8),
    Crash(u8, u8),
    Leave,
    Pass(u8),
}

fn step() -> impl Strategy<Value = (u8, Step)> {
    let step = prop_oneof![
        8 => (0..4u8).prop_map(Step::Claim),
        3 => (0..4u8).prop_map(Step::Release),
        1 => (0..4u8).prop_map(Step::Complete),
        2 => (0..3u8, 0..3u8).prop_map(|(writes, how)| Step::Crash(writes, how)),
        1 => Just(Step::Leave),
        6 => (0..60u8).prop_map(Step::Pass),
    ];
    (0..4u8, step)
}

/// A slot of the property: a launch and what it was told it holds.
struct Slot {
    launch: Launch,
    holds: Vec<String>,
}

/// Passes time a second at a time, with a heartbeat of every live launch every 5 seconds.
fn pass(world: &World, slots: &mut [Slot], seconds: u8) {
    for _ in 0..seconds {
        world.pass(1.0);
        if world.now() % 5.0 == 0.0 {
            for slot in slots.iter_mut() {
                // One that is armed to crash may die of this write.
                let _ = slot.launch.claims.beat(&OwnerProgress::default(), world.now());
            }
        }
    }
}

/// Resources to the state of their newest generation; checks that chains have no gaps.
fn newest(world: &World) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut newest = BTreeMap::new();
    for (name, content) in world.disk.contents() {
        let Some((resource, generation)) = name.split_once('.') else { continue };
        let Ok(generation) = generation.parse::<u32>() else { continue };
        let (before, _) =
            newest.insert(resource.to_owned(), (generation, content)).unwrap_or_default();
        assert_eq!(generation, before + 1, "a gap in {resource}");
    }
    newest
}

fn is_done(content: &[u8]) -> bool {
    // Half a claim does not end in a line's end.
    content.ends_with(b"\n") && content.starts_with(b"{\"state\":\"done\"")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Launches that beat, on hosts that share nothing but the disk (or one host), dying
    /// anywhere, with reads and listings that are late: one live holder, `done` is the end.
    #[test]
    fn at_most_one_live_launch_holds_a_resource(
        seed: u64,
        stale_seconds in 0..20u8,
        one_host: bool,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new(seed, f64::from(stale_seconds));
        let host = |slot: usize| if one_host { "h".to_owned() } else { format!("h{slot}") };
        let mut slots: Vec<_> = (0..4)
            .map(|slot| Slot { launch: world.join_as(&host(slot), None), holds: Vec::new() })
            .collect();
        let mut before: BTreeMap<String, (u32, Vec<u8>)> = BTreeMap::new();
        for (at, step) in steps {
            let at = usize::from(at);
            let now = world.now();
            let Slot { launch, holds } = &mut slots[at];
            match step {
                Step::Claim(block) => {
                    let name = format!("block-{block}");
                    let held = holds.contains(&name);
                    match launch.claims.claim(&name, now) {
                        Ok(Standing::Mine) if !held => holds.push(name),
                        Ok(standing) => prop_assert_eq!(standing == Standing::Mine, held),
                        Err(_) => {}
                    }
                }
                Step::Release(block) | Step::Complete(block) => {
                    let name = format!("block-{block}");
                    let outcome = match step {
                        Step::Release(_) => launch.claims.release(&name),
                        _ => launch.claims.complete(&name, &json!(block)),
                    };
                    if let Ok(ours) = outcome {
                        prop_assert_eq!(ours, holds.contains(&name));
                    }
                    holds.retain(|held| *held != name);
                }
                Step::Crash(writes, how) => {
                    let how = [Crash::BeforeLink, Crash::Torn, Crash::AfterLink][usize::from(how)];
                    world.disk.crash(launch.client, writes.into(), how);
                }
                Step::Leave => {
                    if launch.claims.leave("done", &OwnerProgress::default()).is_ok() {
                        holds.clear();
                        world.kill(launch);
                    }
                }
                Step::Pass(seconds) => pass(&world, &mut slots, seconds),
            }
            for (at, slot) in slots.iter_mut().enumerate() {
                if world.disk.is_dead(slot.launch.client) {
                    world.deaths.end_process(&slot.launch.owner.process);
                    let launch = world.join_as(&host(at), None);
                    *slot = Slot { launch, holds: Vec::new() };
                }
            }

            let mut holders: Vec<&String> = slots.iter().flat_map(|slot| &slot.holds).collect();
            let all = holders.len();
            holders.sort();
            holders.dedup();
            prop_assert_eq!(holders.len(), all, "two live holders");
            let after = newest(&world);
            for (resource, (generation, content)) in &before {
                let (later, content_later) = &after[resource];
                prop_assert!(later >= generation, "{resource} went back");
                if is_done(content) || later == generation {
                    prop_assert_eq!((later, content_later), (generation, content));
                }
            }
            before = after;
        }
        // Whatever happened, work goes on: what is not done can be had in the end.
        for slot in &slots {
            world.kill(&slot.launch);
        }
        let mut last = world.join();
        for _ in 0..200 {
            world.pass(1.0);
            beat(&mut last, world.now());
            for block in 0..4 {
                last.claims.standing(&format!("block-{block}"), world.now()).unwrap();
            }
        }
        for block in 0..4 {
            let standing = last.claims.claim(&format!("block-{block}"), world.now()).unwrap();
            prop_assert!(
                matches!(standing, Standing::Mine | Standing::Done(_)), "block-{block} {standing:?}"
            );
        }
    }
}

#[test]
fn threads_that_race_on_a_directory_share_the_resources_out() {
    const LAUNCHES: u32 = 8;
    const BLOCKS: u32 = 200;
    let run = tempfile::tempdir().unwrap();
    let barrier = Barrier::new(LAUNCHES as usize);
    let race = || {
        let store = Box::new(FsStore::new(run.path()).unwrap());
        let evidence = SimDeaths::default().evidence("h", false);
        let owner = Owner::this_process(None, Value::Null);
        barrier.wait();
        let mut claims =
            Claims::join(store, Box::new(evidence), owner, ClaimsConfig::default(), 0.0).unwrap();
        let mut mine = Vec::new();
        for block in 0..BLOCKS {
            match claims.claim(&format!("block-{block:08}"), 0.0).unwrap() {
                Standing::Mine => mine.push(block),
                Standing::Held(by) => assert_ne!(by, UNKNOWN_LAUNCH),
                standing => panic!("{standing:?}"),
            }
        }
        (claims.launch(), mine)
    };
    let results: BTreeMap<LaunchId, Vec<u32>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..LAUNCHES).map(|_| scope.spawn(race)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.keys().copied().collect::<Vec<_>>(), (1..=LAUNCHES).collect::<Vec<_>>());
    let mut taken: Vec<u32> = results.into_values().flatten().collect();
    taken.sort_unstable();
    assert_eq!(taken, (0..BLOCKS).collect::<Vec<_>>());
    let names = std::fs::read_dir(run.path().join("claims")).unwrap();
    assert_eq!(names.count(), (LAUNCHES + BLOCKS) as usize, "nothing else is left behind");
}

#[test]
fn what_a_killed_launch_held_on_a_directory_is_taken_over() {
    let run = tempfile::tempdir().unwrap();
    let deaths = SimDeaths::default();
    let join = || {
        let store = Box::new(FsStore::new(run.path()).unwrap());
        let owner = Owner::this_process(None, Value::Null);
        let evidence = deaths.evidence(&owner.process.host, false);
        let config = ClaimsConfig::default();
        (Claims::join(store, Box::new(evidence), owner.clone(), config, 0.0).unwrap(), owner)
    };
    let (mut killed, owner) = join();
    assert_eq!(killed.claim("merge", 0.0).unwrap(), Standing::Mine);
    drop(killed);
    let (mut next, _) = join();
    assert_eq!(next.claim("merge", 0.0).unwrap(), Standing::Held(1));
    deaths.end_process(&owner.process);
    assert_eq!(next.claim("merge", 2.0).unwrap(), Standing::Mine);
    assert_eq!(next.taken_over_from("merge"), Some(1));
}
