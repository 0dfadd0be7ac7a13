//! The ledger in virtual time: no files, no threads, no clock, and a seed replays a run.
//!
//! [`handout`] asks what the hand-out of records is worth against a static split. [`run`]
//! has several launches on one run that are killed, drained and suspended at any moment,
//! on a file system that shows things late and tears writes, with messages that take their
//! time. What decides there is farm's own: [`Claims`](super::claims::Claims),
//! [`Feed`](super::Feed), [`Handout`](super::Handout), [`Dealer`](super::dealer::Dealer),
//! [`RemoteLink`](super::RemoteLink) and the journal's frames. Left out: models, MPI, and
//! what real file systems do ([`super::tests`] and the end-to-end tests have those).

mod handout;
mod journals;
mod network;
mod run;

/// A small counter-based generator (splitmix64), so that a seed replays a run.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    fn next(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.next()
    }

    /// From `low` to `high`, both included.
    fn count(&mut self, low: u64, high: u64) -> u64 {
        low + self.bits() % (high - low + 1)
    }

    fn chance(&mut self, probability: f64) -> bool {
        self.next() < probability
    }

    /// Tokens of a record: Pareto with shape 1.5 (infinite variance) from `least` to `most`.
    fn pareto_tokens(&mut self, least: f64, most: f64) -> u32 {
        (least / (1.0 - self.next()).powf(1.0 / 1.5)).min(most) as u32
    }
}
