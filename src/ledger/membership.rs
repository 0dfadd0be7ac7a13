//! A launch's place among those that work on a run: it registers, shows that it lives,
//! and leaves.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::claims::{
    Claims, ClaimsConfig, Evidence, FsStore, Heartbeat, JobRef, LaunchId, Owner, OwnerFile,
    OwnerProgress, Standing,
};
use super::merge::counts_of;
use super::run_dir::Launch;
use super::{OutputCounts, RunDir};
use crate::{Error, Result};

/// A launch on a run, from its registration until it leaves.
pub struct Membership {
    run_dir: PathBuf,
    file: OwnerFile,
    heartbeat: Option<Heartbeat>,
    progress: Arc<Mutex<OwnerProgress>>,
    /// The merge that this launch may have a part in: those before it are done.
    merge: u32,
    merged: Option<OutputCounts>,
    late_seconds: f64,
}

impl Membership {
    /// Registers this launch on the run in `run_dir`.
    ///
    /// # Errors
    /// The run directory cannot be read or written.
    pub fn join(
        run_dir: &Path,
        job: Option<JobRef>,
        facts: &Launch,
        evidence: Box<dyn Evidence>,
        config: ClaimsConfig,
    ) -> Result<(Self, Claims)> {
        let facts = serde_json::to_value(facts).map_err(Error::fault)?;
        let owner = Owner::this_process(job, facts);
        let late_seconds = config.heartbeat_timeout_seconds / 2.0;
        let heartbeat_seconds = config.heartbeat_seconds;
        let store = Box::new(FsStore::new(run_dir)?);
        let mut claims = Claims::join(store, evidence, owner, config, 0.0)?;
        let starting = OwnerProgress { phase: "starting".into(), ..OwnerProgress::default() };
        let file = claims.owner_file(&starting);
        let file = file.ok_or_else(|| Error::fault("a launch without an owner file"))?;
        let heartbeat = Heartbeat::start(FsStore::new(run_dir)?, file.clone(), heartbeat_seconds);
        let progress = heartbeat.progress();
        let (merge, merged) = merges_done(&mut claims)?;
        let member = Self {
            run_dir: run_dir.to_owned(),
            file,
            heartbeat: Some(heartbeat),
            progress,
            merge,
            merged,
            late_seconds,
        };
        Ok((member, claims))
    }

    /// This launch's number.
    pub fn launch(&self) -> LaunchId {
        self.file.launch
    }

    /// The claim on writing the output.
    pub fn merge_name(&self) -> String {
        merge_name(self.merge)
    }

    /// What the output held that was written last before this launch.
    pub fn merged(&self) -> Option<OutputCounts> {
        self.merged
    }

    /// After a merge to another output: the one that may be this launch's.
    pub fn next_merge(&mut self) {
        self.merge += 1;
    }

    /// Changes what others see of this launch, from the next heartbeat on.
    pub fn progress(&self, change: impl FnOnce(&mut OwnerProgress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Why the heartbeat fails: the run directory has vanished, is full or read-only.
    pub fn error(&self) -> Option<Error> {
        self.heartbeat.as_ref()?.error()
    }

    /// Whether, since the last time that this was asked, the heartbeat came so late that
    /// others may have thought this launch gone.
    pub fn was_late(&self) -> bool {
        let gap = self.heartbeat.as_ref().map_or(0.0, Heartbeat::take_longest_gap_seconds);
        gap > self.late_seconds
    }

    /// Leaves: what this launch claimed and did not do is free at once.
    pub fn leave(&mut self, how: &str) {
        if let Some(heartbeat) = self.heartbeat.take()
            && let Err(error) = FsStore::new(&self.run_dir)
                .and_then(|store| heartbeat.leave(store, self.file.clone(), how))
        {
            tracing::warn!("{error}; other jobs will notice by themselves that this one has left");
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.leave("ended before its work began");
    }
}

fn merge_name(number: u32) -> String {
    format!("merge-{number:04}")
}

/// A launch's name for people.
pub fn who(owner: &Owner) -> String {
    match &owner.job {
        Some(job) => format!("job {} on host {}", job.job_id, owner.process.host),
        None => format!("process {} on host {}", owner.process.pid, owner.process.host),
    }
}

/// A run as one sees it who has no part in it.
pub struct Look {
    /// The launches at work.
    pub live: Vec<OwnerFile>,
    /// Launches that ever were.
    pub launches: u64,
    /// What the output holds that was written last.
    pub merged: Option<OutputCounts>,
}

/// Looks at the run in `run_dir`.
///
/// # Errors
/// The run directory cannot be read.
pub fn look(run_dir: &Path, evidence: Box<dyn Evidence>) -> Result<Look> {
    let folder = RunDir::claims_of(run_dir);
    if !folder.is_dir() {
        return Ok(Look { live: Vec::new(), launches: 0, merged: None });
    }
    let store = Box::new(FsStore::view(run_dir)?);
    let mut claims = Claims::view(store, evidence, ClaimsConfig::default())?;
    let (_, merged) = merges_done(&mut claims)?;
    let launches = claims.owners(0.0)?.len() as u64;
    Ok(Look { live: claims.live_others(0.0)?, launches, merged })
}

/// The first merge that is not done, and what the one before it wrote.
fn merges_done(claims: &mut Claims) -> Result<(u32, Option<OutputCounts>)> {
    let (mut merge, mut merged) = (0, None);
    while let Standing::Done(done) = claims.standing(&merge_name(merge), 0.0)? {
        merge += 1;
        merged = Some(counts_of(&done));
    }
    Ok((merge, merged))
}
