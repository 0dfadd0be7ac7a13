//! [`Claims`]: what this launch holds and how everything else stands, over any store.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::owner::{
    Evidence, Gone, LaunchId, Owner, OwnerFile, OwnerProgress, OwnerState, UNKNOWN_LAUNCH,
};
use super::store::ClaimStore;
use super::watch::{SeenOwner, Silence, Watch};
use crate::{Error, Result};

/// How claims tell the living from the dead.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClaimsConfig {
    /// Between two heartbeats of a launch.
    pub heartbeat_seconds: f64,
    /// A heartbeat older than this has stopped, where nothing else is known.
    pub heartbeat_timeout_seconds: f64,
}

impl Default for ClaimsConfig {
    fn default() -> Self {
        Self { heartbeat_seconds: 5.0, heartbeat_timeout_seconds: 120.0 }
    }
}

impl ClaimsConfig {
    /// Without a heartbeat for so long an owner is worth a question to Slurm.
    pub(super) fn quiet_seconds(&self) -> f64 {
        1.5 * self.heartbeat_seconds
    }

    /// Even the oldest heartbeat is watched for so long before it counts as stopped.
    pub(super) fn watch_seconds(&self) -> f64 {
        6.0 * self.heartbeat_seconds
    }
}

/// How a resource stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    /// Never claimed, given back, or its owner is gone.
    Free {
        /// The generation that would take it.
        generation: u32,
        /// Whose it was, if it was not given back.
        taken_over_from: Option<LaunchId>,
    },
    /// This launch holds it.
    Mine,
    /// Another launch holds it ([`UNKNOWN_LAUNCH`]: one whose claim is not readable yet).
    Held(LaunchId),
    /// There is nothing left to do.
    Done(Value),
}

/// The content of a claim file, before its checksum line.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Claim {
    Held { launch: LaunchId, taken_over_from: Option<LaunchId> },
    Free { launch: LaunchId },
    Done { launch: LaunchId, value: Value },
}

impl Claim {
    /// A line of JSON and a line with its checksum: half of it is no claim.
    fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self).map_err(Error::fault)?;
        let sum = crc32fast::hash(&bytes);
        bytes.extend(format!("\n{sum:08x}\n").into_bytes());
        Ok(bytes)
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (json, sum) = bytes.split_at_checked(bytes.len().checked_sub(10)?)?;
        let is_whole = sum == format!("\n{:08x}\n", crc32fast::hash(json)).as_bytes();
        is_whole.then(|| serde_json::from_slice(json).ok())?
    }
}

/// What is known of a resource.
#[derive(Debug, Default)]
struct Chain {
    /// The newest generation known to exist; 0 = none.
    generation: u32,
    /// Its content; `None` if it was not seen or is not readable.
    claim: Option<Claim>,
    /// Whether somebody may still be about to write that content.
    silence: Silence,
}

/// The claims of a run, as one launch sees and makes them. Takes the time, has no clock.
pub struct Claims {
    store: Box<dyn ClaimStore>,
    evidence: Box<dyn Evidence>,
    /// Who we are; `None` for one who only looks.
    me: Option<OwnerFile>,
    chains: HashMap<String, Chain>,
    watch: Watch,
    wishes: bool,
}

impl Claims {
    /// Registers this launch: takes the next free launch number. From here on its heartbeat
    /// has to go on ([`Claims::owner_file`] for [`super::Heartbeat`]).
    ///
    /// # Errors
    /// Those of the store.
    pub fn join(
        mut store: Box<dyn ClaimStore>,
        evidence: Box<dyn Evidence>,
        owner: Owner,
        config: ClaimsConfig,
        now_seconds: f64,
    ) -> Result<Self> {
        let _ = now_seconds; // the store dates the file; here so that all steps look alike
        let mut launch = newest_launch(store.as_mut())?;
        let me = loop {
            launch = launch.checked_add(1).ok_or_else(|| {
                Error::fault("claims: no launch number is left; take a new --run-dir")
            })?;
            let me = OwnerFile::running(launch, owner.clone(), OwnerProgress::default());
            if store.create(&OwnerFile::name(launch), &me.to_bytes())? {
                break me;
            }
        };
        let watch = Watch::new(config, launch);
        Ok(Self { store, evidence, me: Some(me), chains: HashMap::new(), watch, wishes: false })
    }

    /// Claims to look at without taking part: no launch number, no file written.
    ///
    /// # Errors
    /// Those of the store.
    pub fn view(
        mut store: Box<dyn ClaimStore>,
        evidence: Box<dyn Evidence>,
        config: ClaimsConfig,
    ) -> Result<Self> {
        let known_below = newest_launch(store.as_mut())?.saturating_add(1);
        let watch = Watch::new(config, known_below);
        Ok(Self { store, evidence, me: None, chains: HashMap::new(), watch, wishes: false })
    }

    /// This launch's number; [`UNKNOWN_LAUNCH`] for one who only looks.
    pub fn launch(&self) -> LaunchId {
        self.me.as_ref().map_or(UNKNOWN_LAUNCH, |me| me.launch)
    }

    /// This launch's owner file, with `progress`; `None` for one who only looks.
    pub fn owner_file(&self, progress: &OwnerProgress) -> Option<OwnerFile> {
        self.me.clone().map(|me| OwnerFile { progress: progress.clone(), ..me })
    }

    /// How a resource stands: what is known of it, and one look for the next generation.
    ///
    /// # Errors
    /// Those of the store.
    pub fn standing(&mut self, resource: &str, now_seconds: f64) -> Result<Standing> {
        let launch = self.launch();
        let chain = read_chain(&mut self.chains, self.store.as_mut(), resource)?;
        let next = next_generation(chain.generation, resource)?;
        let free = |from| Standing::Free { generation: next, taken_over_from: from };
        Ok(match &chain.claim {
            None if chain.generation == 0 => free(None),
            None => {
                let name = claim_name(resource, chain.generation);
                let age = self.store.age_seconds(&name, now_seconds)?;
                match age.is_some_and(|age| chain.silence.has_stopped(age, self.watch.config())) {
                    true => free(Some(UNKNOWN_LAUNCH)),
                    false => Standing::Held(UNKNOWN_LAUNCH),
                }
            }
            Some(Claim::Free { .. }) => free(None),
            Some(Claim::Done { value, .. }) => Standing::Done(value.clone()),
            Some(Claim::Held { launch: holder, .. }) => {
                let holder = *holder;
                if holder == launch {
                    Standing::Mine
                } else if self.is_gone(holder, now_seconds)? {
                    free(Some(holder))
                } else {
                    Standing::Held(holder)
                }
            }
        })
    }

    /// Takes a resource if it is free: [`Standing::Mine`] on success, else how it stands.
    /// For one that nothing is known of this is one exclusive creation and nothing else.
    ///
    /// # Errors
    /// Those of the store; a fault for one who only looks.
    pub fn claim(&mut self, resource: &str, now_seconds: f64) -> Result<Standing> {
        let launch = self.joined()?.launch;
        let mut standing = match self.generation(resource) {
            0 => Standing::Free { generation: 1, taken_over_from: None },
            _ => self.standing(resource, now_seconds)?,
        };
        // A loser looks again: every turn of this loop is another launch's success.
        while let Standing::Free { generation, taken_over_from } = standing {
            let claim = Claim::Held { launch, taken_over_from };
            if self.create(resource, generation, claim)? {
                return Ok(Standing::Mine);
            }
            standing = self.standing(resource, now_seconds)?;
        }
        Ok(standing)
    }

    /// Gives a resource back. `false`: it was not ours (any more).
    ///
    /// # Errors
    /// Those of the store.
    pub fn release(&mut self, resource: &str) -> Result<bool> {
        let launch = self.joined()?.launch;
        self.follow(resource, Claim::Free { launch })
    }

    /// Says that nothing is left to do for a resource, for ever. `false`: it was not ours
    /// (any more), and whoever has it decides.
    ///
    /// # Errors
    /// Those of the store.
    pub fn complete(&mut self, resource: &str, value: &Value) -> Result<bool> {
        let launch = self.joined()?.launch;
        self.follow(resource, Claim::Done { launch, value: value.clone() })
    }

    /// The newest generation of a resource that this launch knows of, from 1; 0 = none.
    pub fn generation(&self, resource: &str) -> u32 {
        self.chains.get(resource).map_or(0, |chain| chain.generation)
    }

    /// From which launch that is gone the present holder, as last seen, took a resource.
    pub fn taken_over_from(&self, resource: &str) -> Option<LaunchId> {
        match self.chains.get(resource)?.claim {
            Some(Claim::Held { taken_over_from, .. }) => taken_over_from,
            _ => None,
        }
    }

    /// Whether a resource is not, or no longer, ours: a generation has followed our claim
    /// because we were thought dead. To be asked after a heartbeat that came late.
    ///
    /// # Errors
    /// Those of the store.
    pub fn lost(&mut self, resource: &str) -> Result<bool> {
        read_chain(&mut self.chains, self.store.as_mut(), resource)?;
        Ok(!self.holds(resource))
    }

    /// Whether another launch is gone, by a judgement at most a second old (older where it
    /// has been silent for long). This launch itself is never gone.
    ///
    /// # Errors
    /// Those of the store.
    pub fn is_gone(&mut self, launch: LaunchId, now_seconds: f64) -> Result<bool> {
        if launch == self.launch() {
            return Ok(false);
        }
        let (store, evidence) = (self.store.as_mut(), self.evidence.as_mut());
        Ok(self.watch.judge(launch, store, evidence, now_seconds)?.is_some())
    }

    /// Whether another launch is gone and nothing can bring it back.
    ///
    /// # Errors
    /// Those of the store.
    pub fn is_gone_for_good(&mut self, launch: LaunchId, now_seconds: f64) -> Result<bool> {
        if launch == self.launch() || launch == UNKNOWN_LAUNCH {
            return Ok(false);
        }
        let (store, evidence) = (self.store.as_mut(), self.evidence.as_mut());
        let gone = self.watch.judge(launch, store, evidence, now_seconds)?;
        Ok(gone.is_some_and(Gone::is_final))
    }

    /// Other launches that are not gone.
    ///
    /// # Errors
    /// Those of the store.
    pub fn live_others(&mut self, now_seconds: f64) -> Result<Vec<OwnerFile>> {
        let me = self.launch();
        let owners = self.owners(now_seconds)?.into_iter();
        let live = owners.filter(|owner| owner.gone.is_none() && owner.file.launch != me);
        Ok(live.map(|owner| owner.file).collect())
    }

    /// All launches of the run by number, this one too, gone or not. Those whose file was
    /// never readable are left out.
    ///
    /// # Errors
    /// Those of the store.
    pub fn owners(&mut self, now_seconds: f64) -> Result<Vec<SeenOwner>> {
        self.watch.all(self.store.as_mut(), self.evidence.as_mut(), now_seconds)
    }

    /// Says, or takes back, that this launch has nothing to do and would take what others
    /// give back.
    ///
    /// # Errors
    /// Those of the store.
    pub fn wish(&mut self, yes: bool) -> Result<()> {
        let name = wish_name(self.joined()?.launch);
        if yes != self.wishes {
            match yes {
                true => self.store.create(&name, b"").map(drop)?,
                false => self.store.remove(&name)?,
            }
            self.wishes = yes;
        }
        Ok(())
    }

    /// The live launches that would take something.
    ///
    /// # Errors
    /// Those of the store.
    pub fn wishes_of_others(&mut self, now_seconds: f64) -> Result<Vec<LaunchId>> {
        let mut wishing = Vec::new();
        for owner in self.live_others(now_seconds)? {
            if self.store.read(&wish_name(owner.launch))?.is_some() {
                wishing.push(owner.launch);
            }
        }
        Ok(wishing)
    }

    /// One heartbeat, for who has no [`super::Heartbeat`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn beat(&mut self, progress: &OwnerProgress, now_seconds: f64) -> Result<()> {
        let _ = now_seconds; // the store dates the file
        let me = OwnerFile { progress: progress.clone(), ..self.joined()?.clone() };
        self.store.replace(&OwnerFile::name(me.launch), &me.to_bytes())
    }

    /// Says good-bye: all that this launch holds is free at once. Nothing may be claimed or
    /// written after; a [`super::Heartbeat`] has to be stopped before.
    ///
    /// # Errors
    /// Those of the store.
    pub fn leave(&mut self, how: &str, progress: &OwnerProgress) -> Result<()> {
        let me = OwnerFile {
            state: OwnerState::Left,
            left_with: Some(how.to_owned()),
            progress: progress.clone(),
            ..self.joined()?.clone()
        };
        self.wish(false)?;
        self.store.replace(&OwnerFile::name(me.launch), &me.to_bytes())
    }

    fn joined(&self) -> Result<&OwnerFile> {
        self.me.as_ref().ok_or_else(|| Error::fault("claims: only looked at, not joined"))
    }

    fn holds(&self, resource: &str) -> bool {
        let claim = self.chains.get(resource).and_then(|chain| chain.claim.as_ref());
        matches!(claim, Some(&Claim::Held { launch, .. }) if launch == self.launch())
    }

    /// Follows our own claim with another; `false` where it is not ours (any more).
    fn follow(&mut self, resource: &str, claim: Claim) -> Result<bool> {
        if !self.holds(resource) {
            return Ok(false);
        }
        let next = next_generation(self.generation(resource), resource)?;
        self.create(resource, next, claim)
    }

    /// Creates a generation; whoever does it, it exists afterwards.
    fn create(&mut self, resource: &str, generation: u32, claim: Claim) -> Result<bool> {
        let created = self.store.create(&claim_name(resource, generation), &claim.to_bytes()?)?;
        let claim = created.then_some(claim);
        let chain = Chain { generation, claim, silence: Silence::default() };
        self.chains.insert(resource.to_owned(), chain);
        Ok(created)
    }
}

/// Brings what is known of a resource up to date. `done` is the end of every chain.
fn read_chain<'a>(
    chains: &'a mut HashMap<String, Chain>,
    store: &mut dyn ClaimStore,
    resource: &str,
) -> Result<&'a mut Chain> {
    let chain = match chains.entry(resource.to_owned()) {
        Entry::Occupied(chain) => chain.into_mut(),
        Entry::Vacant(chain) => chain.insert(Chain::default()),
    };
    if chain.claim.is_none() && chain.generation > 0 {
        let content = store.read(&claim_name(resource, chain.generation))?;
        chain.claim = content.and_then(|content| Claim::from_bytes(&content));
    }
    while !matches!(chain.claim, Some(Claim::Done { .. })) {
        let generation = next_generation(chain.generation, resource)?;
        let Some(content) = store.read(&claim_name(resource, generation))? else { break };
        let claim = Claim::from_bytes(&content);
        *chain = Chain { generation, claim, silence: Silence::default() };
    }
    Ok(chain)
}

fn next_generation(generation: u32, resource: &str) -> Result<u32> {
    let full = || Error::fault(format!("claims: {resource} has no generation left"));
    generation.checked_add(1).ok_or_else(full)
}

fn claim_name(resource: &str, generation: u32) -> String {
    format!("{resource}.{generation:04}")
}

fn wish_name(launch: LaunchId) -> String {
    format!("wish-{launch:05}")
}

/// The highest launch number in the store; 0 = none.
fn newest_launch(store: &mut dyn ClaimStore) -> Result<LaunchId> {
    let names = store.list()?;
    Ok(names.iter().filter_map(|name| OwnerFile::launch_of(name)).max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_claim_is_read_back_and_part_of_it_or_a_flipped_bit_is_no_claim() {
        for claim in [
            Claim::Held { launch: 3, taken_over_from: Some(2) },
            Claim::Held { launch: 3, taken_over_from: None },
            Claim::Free { launch: 3 },
            Claim::Done { launch: 3, value: json!({"records": 1_u64 << 60, "share": 0.1}) },
        ] {
            let bytes = claim.to_bytes().unwrap();
            assert_eq!(Claim::from_bytes(&bytes), Some(claim));
            for end in 0..bytes.len() {
                assert_eq!(Claim::from_bytes(&bytes[..end]), None);
            }
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Claim::from_bytes(&flipped), None, "bit {bit}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_content_makes_reading_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(Claim::from_bytes(&bytes), None);
        }
    }
}
