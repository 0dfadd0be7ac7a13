//! When the workers would be finished: what the hand-out decides by near the end.

/// A worker's measured speed: cost a second while its batch is full, over about the last
/// [`Speed::MEMORY_SECONDS`].
#[derive(Debug, Default)]
pub(super) struct Speed {
    cost: f64,
    seconds: f64,
}

impl Speed {
    const MEMORY_SECONDS: f64 = 20.0;

    /// `cost` was worked off in `seconds`.
    pub(super) fn observe(&mut self, cost: f64, seconds: f64) {
        let keep = (-seconds / Self::MEMORY_SECONDS).exp();
        self.cost = self.cost * keep + cost;
        self.seconds = self.seconds * keep + seconds;
    }

    /// Cost a second, once something was observed.
    pub(super) fn known(&self) -> Option<f64> {
        (self.seconds > 0.0 && self.cost > 0.0).then(|| self.cost / self.seconds)
    }
}

/// What one worker is expected to do.
#[derive(Debug)]
pub(super) struct WorkerOutlook {
    /// Cost a second.
    pub(super) rate: f64,
    /// Real cost of what it still has to do.
    pub(super) remaining: f64,
    /// Sequences that it runs at once; 0 if it has not said so yet.
    pub(super) slots: usize,
}

/// What all workers are expected to do, at one moment.
pub(super) struct Outlook {
    workers: Vec<WorkerOutlook>,
    total_rate: f64,
    /// Seconds until all would finish if the window were shared by speed.
    finish_seconds: f64,
    /// Real cost for one of estimate.
    pub(super) ratio: f64,
}

impl Outlook {
    /// With `window_cost` (real) not handed out.
    pub(super) fn new(workers: Vec<WorkerOutlook>, window_cost: f64, ratio: f64) -> Self {
        let total_rate = workers.iter().map(|w| w.rate).sum::<f64>();
        let total = workers.iter().map(|w| w.remaining).sum::<f64>() + window_cost;
        Self { workers, total_rate, finish_seconds: total / total_rate, ratio }
    }

    /// The worker's share of all speed.
    pub(super) fn share(&self, worker: usize) -> f64 {
        self.workers[worker].rate / self.total_rate
    }

    /// Whether a record of this real cost, on top of `taken` not counted yet, is for this
    /// worker: it finishes it in time, or no other is clearly the better one.
    pub(super) fn accepts(&self, worker: usize, taken: f64, cost: f64) -> bool {
        // Equal workers differ a little in what was measured of them: that must not make one
        // of them take all that is left, nor all but one wait.
        const MUCH_SOONER: f64 = 0.8;
        const AS_SOON: f64 = 1.1;
        let load = self.load_seconds(worker, taken + cost);
        let finish = load.max(self.alone_seconds(worker, worker, cost));
        if finish <= self.finish_seconds {
            return true;
        }
        let better = |v: usize| {
            let other_load = self.load_seconds(v, cost);
            let other = other_load.max(self.alone_seconds(v, worker, cost));
            let relieves = load > self.finish_seconds && other_load < load;
            other < MUCH_SOONER * finish || (relieves && other < AS_SOON * finish)
        };
        !(0..self.workers.len()).any(|v| v != worker && better(v))
    }

    /// The largest real cost that the worker finishes in time.
    pub(super) fn fits(&self, worker: usize, taken: f64) -> f64 {
        let w = &self.workers[worker];
        let capacity = self.finish_seconds * w.rate;
        (capacity - w.remaining - taken).min(capacity / w.slots.max(1) as f64)
    }

    /// Seconds of all the worker's work and `cost` more at full speed.
    fn load_seconds(&self, worker: usize, cost: f64) -> f64 {
        let w = &self.workers[worker];
        (w.remaining + cost) / w.rate
    }

    /// Seconds that one record takes by itself in the worker's full batch. A worker that has
    /// not reported is taken to run as many sequences as the one that asks.
    fn alone_seconds(&self, worker: usize, asking: usize, cost: f64) -> f64 {
        let slots = match self.workers[worker].slots {
            0 => self.workers[asking].slots,
            slots => slots,
        };
        cost * slots.max(1) as f64 / self.workers[worker].rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outlook(workers: &[(f64, f64)], window_cost: f64) -> Outlook {
        let workers = workers
            .iter()
            .map(|&(rate, remaining)| WorkerOutlook { rate, remaining, slots: 4 })
            .collect();
        Outlook::new(workers, window_cost, 1.0)
    }

    /// (speed, remaining) of the workers, cost in the window, a record's cost, who takes it.
    #[test]
    fn who_takes_a_record() {
        type Case = (&'static [(f64, f64)], f64, f64, &'static [bool]);
        let cases: &[Case] = &[
            // Far from the end everybody does.
            (&[(1.0, 10.0), (3.0, 10.0)], 1000.0, 5.0, &[true, true]),
            // At the end a slow worker leaves the long record to the fast one, …
            (&[(1.0, 0.0), (3.0, 4.0)], 10.0, 10.0, &[false, true]),
            // … unless that has too much to do.
            (&[(1.0, 0.0), (3.0, 200.0)], 10.0, 10.0, &[true, false]),
            // Of two about equally fast the less loaded takes it, …
            (&[(1.0, 4.0), (1.01, 8.0)], 3.0, 3.0, &[true, false]),
            // … and one of them surely does where both are idle.
            (&[(1.0, 0.0), (1.01, 0.0)], 10.0, 10.0, &[false, true]),
        ];
        for (workers, window_cost, cost, expected) in cases {
            let outlook = outlook(workers, *window_cost);
            let takers: Vec<_> =
                (0..workers.len()).map(|w| outlook.accepts(w, 0.0, *cost)).collect();
            assert_eq!(takers, *expected, "{workers:?}");
        }
    }

    #[test]
    fn what_fits_is_accepted() {
        let outlook = outlook(&[(1.0, 0.0), (3.0, 30.0)], 10.0);
        assert!(outlook.accepts(0, 0.0, outlook.fits(0, 0.0)));
        assert!(outlook.fits(1, 0.0) < 1e-9, "it has its share already");
        assert_eq!(outlook.share(1), 0.75);
    }

    #[test]
    fn speed_follows_a_change() {
        let mut speed = Speed::default();
        assert_eq!(speed.known(), None);
        (0..100).for_each(|_| speed.observe(10.0, 1.0));
        (0..60).for_each(|_| speed.observe(2.0, 1.0));
        assert!((2.0..2.6).contains(&speed.known().unwrap_or_default()));
    }
}
