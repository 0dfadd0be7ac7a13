//! The owners of a run and which of them are gone, looked at as seldom as will do.

use std::collections::BTreeMap;

use super::owner::{Evidence, Findings, Gone, JobRef, LaunchId, OwnerFile, OwnerState, judge};
use super::store::ClaimStore;
use super::table::ClaimsConfig;
use crate::Result;

/// How long a judgement on a live owner is good.
const LOOK_SECONDS: f64 = 1.0;

/// An owner as it was last seen.
#[derive(Clone, Debug, PartialEq)]
pub struct SeenOwner {
    /// Its file.
    pub file: OwnerFile,
    /// Why it counts as gone, if it does.
    pub gone: Option<Gone>,
}

/// For how long a file has been watched without its being written.
#[derive(Debug, Default)]
pub(super) struct Silence {
    latest_age: Option<f64>,
    watched_seconds: f64,
}

impl Silence {
    /// Takes a look in, and says whether a file of this age, whose owner should have
    /// written it, is given up (see the [module](super)). A look counts for one heartbeat
    /// at most: while nobody looks, nobody may have been able to write.
    pub(super) fn has_stopped(&mut self, age: f64, config: &ClaimsConfig) -> bool {
        let grown = self.latest_age.map_or(0.0, |latest| age - latest);
        self.latest_age = Some(age);
        self.watched_seconds = match grown < 0.0 {
            true => 0.0,
            false => self.watched_seconds + grown.min(config.heartbeat_seconds),
        };
        let timeout = config.heartbeat_timeout_seconds;
        let is_watched_enough = self.watched_seconds >= config.watch_seconds();
        self.watched_seconds >= timeout || (age > timeout && is_watched_enough)
    }
}

#[derive(Debug, Default)]
struct Watched {
    /// Its file as last read whole.
    file: Option<OwnerFile>,
    gone: Option<Gone>,
    next_look_seconds: f64,
    next_age_seconds: f64,
    /// Without a file since then, which takes the file's age's place.
    missing_since_seconds: Option<f64>,
    age_seconds: f64,
    silence: Silence,
    heartbeat_stopped: bool,
}

/// The judgements on all owners of a run.
#[derive(Debug)]
pub(super) struct Watch {
    config: ClaimsConfig,
    owners: BTreeMap<LaunchId, Watched>,
    /// All launches below this number have, or had, an owner file.
    known_below: LaunchId,
    /// The lowest number whose file was not read yet.
    next_owner: LaunchId,
    next_discovery_seconds: f64,
}

impl Watch {
    /// Watches the owners of a run where at least launches `1..known_below` took place.
    pub(super) fn new(config: ClaimsConfig, known_below: LaunchId) -> Self {
        Self {
            config,
            owners: BTreeMap::new(),
            known_below,
            next_owner: 1,
            next_discovery_seconds: f64::NEG_INFINITY,
        }
    }

    pub(super) fn config(&self) -> &ClaimsConfig {
        &self.config
    }

    /// Why `launch` counts as gone; `None` while it does not.
    pub(super) fn judge(
        &mut self,
        launch: LaunchId,
        store: &mut dyn ClaimStore,
        evidence: &mut dyn Evidence,
        now_seconds: f64,
    ) -> Result<Option<Gone>> {
        self.discover(store, now_seconds)?;
        let newer_restart = self.has_newer_restart(launch);
        let owner = self.owners.entry(launch).or_default();
        if owner.gone.is_some_and(Gone::is_final) || now_seconds < owner.next_look_seconds {
            return Ok(owner.gone);
        }
        owner.read(&OwnerFile::name(launch), store, now_seconds)?;
        let left = owner.file.as_ref().is_some_and(|file| file.state == OwnerState::Left);
        let mut findings = Findings { left, newer_restart, ..Findings::default() };
        if !left {
            owner.gather(&mut findings, launch, store, evidence, &self.config, now_seconds)?;
        }
        owner.gone = judge(&findings);
        // A stopped heartbeat is looked at again, since it may go on, but ever more seldom:
        // a run of many deaths has many such owners.
        let pause =
            owner.gone.map_or(LOOK_SECONDS, |_| (owner.age_seconds / 20.0).clamp(1.0, 60.0));
        owner.next_look_seconds = now_seconds + pause;
        Ok(owner.gone)
    }

    /// All owners that have a readable file, judged.
    pub(super) fn all(
        &mut self,
        store: &mut dyn ClaimStore,
        evidence: &mut dyn Evidence,
        now_seconds: f64,
    ) -> Result<Vec<SeenOwner>> {
        self.discover(store, now_seconds)?;
        let launches: Vec<LaunchId> = self.owners.keys().copied().collect();
        let mut seen = Vec::new();
        for launch in launches {
            let gone = self.judge(launch, store, evidence, now_seconds)?;
            let file = self.owners.get(&launch).and_then(|owner| owner.file.clone());
            seen.extend(file.map(|file| SeenOwner { file, gone }));
        }
        Ok(seen)
    }

    /// Reads the files of owners that came since the last time. Numbers have no gaps, so
    /// this looks for the next one and lists no directory of many claims.
    fn discover(&mut self, store: &mut dyn ClaimStore, now_seconds: f64) -> Result<()> {
        if now_seconds < self.next_discovery_seconds {
            return Ok(());
        }
        loop {
            let launch = self.next_owner;
            let name = OwnerFile::name(launch);
            let Some(next) = launch.checked_add(1) else { break };
            match store.read(&name)? {
                None if launch >= self.known_below => break,
                content => {
                    let file = content.and_then(|content| serde_json::from_slice(&content).ok());
                    self.owners.entry(launch).or_default().file = file;
                }
            }
            self.next_owner = next;
        }
        self.next_discovery_seconds = now_seconds + LOOK_SECONDS;
        Ok(())
    }

    fn has_newer_restart(&self, launch: LaunchId) -> bool {
        let Some(job) = self.owners.get(&launch).and_then(Watched::job) else { return false };
        self.owners.values().filter_map(Watched::job).any(|other| other.is_newer_restart_of(job))
    }
}

impl Watched {
    fn job(&self) -> Option<&JobRef> {
        self.file.as_ref()?.owner.job.as_ref()
    }

    /// Reads the owner's file. One that cannot be understood leaves the last one standing:
    /// it is damaged, and if its owner lives, whole again at the next heartbeat.
    fn read(&mut self, name: &str, store: &mut dyn ClaimStore, now_seconds: f64) -> Result<()> {
        match store.read(name)? {
            Some(content) => {
                self.missing_since_seconds = None;
                if let Ok(file) = serde_json::from_slice(&content) {
                    self.file = Some(file);
                }
            }
            None => {
                self.missing_since_seconds.get_or_insert(now_seconds);
            }
        }
        Ok(())
    }

    /// What can be found out about an owner that has not left. The age of its file is asked
    /// only when it may have become notable, and Slurm only when it has.
    fn gather(
        &mut self,
        findings: &mut Findings,
        launch: LaunchId,
        store: &mut dyn ClaimStore,
        evidence: &mut dyn Evidence,
        config: &ClaimsConfig,
        now_seconds: f64,
    ) -> Result<()> {
        let process = self.file.as_ref().map(|file| &file.owner.process);
        findings.process_is_gone = process.and_then(|process| evidence.process_is_gone(process));
        if now_seconds >= self.next_age_seconds {
            let age = match store.age_seconds(&OwnerFile::name(launch), now_seconds)? {
                Some(age) => age,
                None => now_seconds - *self.missing_since_seconds.get_or_insert(now_seconds),
            };
            self.heartbeat_stopped = self.silence.has_stopped(age, config);
            self.age_seconds = age;
            // Before then a file that was written this recently cannot be a quiet one.
            let pause = match age < 0.0 {
                true => config.heartbeat_seconds,
                false => (config.quiet_seconds() - age).max(0.0),
            };
            self.next_age_seconds = now_seconds + pause;
        }
        findings.heartbeat_stopped = self.heartbeat_stopped;
        if self.age_seconds >= config.quiet_seconds()
            && let Some(job) = self.job()
        {
            findings.step_has_ended = evidence.step_has_ended(job, now_seconds);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_has_stopped_when_it_is_old_and_seen_not_to_beat() {
        let config = ClaimsConfig::default();
        type AgeAtLook = fn(f64) -> f64;
        // And the first look at which the heartbeat has stopped.
        let table: [(&str, AgeAtLook, Option<u32>); 8] = [
            ("beats", |look| look % 5.0, None),
            ("dies", |look| look, Some(120)),
            ("died days ago", |look| 2e5 + look, Some(30)),
            ("seldom looked at, beats", |look| look * 400.0 % 7.0, None),
            ("seldom looked at, died", |look| look * 400.0, Some(6)),
            ("its clock is behind", |look| 300.0 + look % 5.0, None),
            ("its clock is ahead, dies", |look| look - 999.0, Some(120)),
            (
                "the server was away",
                |look| if (10.0..25.0).contains(&look) { 3590.0 + look } else { look % 5.0 },
                None,
            ),
        ];
        for (name, age, expected) in table {
            let mut silence = Silence::default();
            let stopped =
                (0..1000).find(|&look| silence.has_stopped(age(f64::from(look)), &config));
            assert_eq!(stopped, expected, "{name}");
        }
        let mut silence = Silence::default();
        assert!((0..100).any(|look| silence.has_stopped(500.0 + f64::from(look), &config)));
        assert!(!silence.has_stopped(2.0, &config), "it came back");
    }
}
