//! Splits a kernel's work over the rank's threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::simd::{LANES, Simd};
use super::{dispatch, tier};

/// Work below this many floating-point operations runs on the calling thread:
/// waking another one costs more.
const SERIAL_FLOPS: usize = 400_000;

/// Runs `task(i)` for every `i` in `0..tasks`, each exactly once, on the threads
/// of rayon's pool. Threads take the next index when free, so neighbouring tasks
/// run at the same time (memory streams stay close) and a slow core takes fewer.
/// `flops` is the size of the whole: small work stays on this thread.
pub fn for_each(tasks: usize, flops: usize, task: impl Fn(usize) + Sync) {
    let threads = rayon::current_num_threads().min(tasks);
    if threads <= 1 || flops < SERIAL_FLOPS {
        (0..tasks).for_each(task);
        return;
    }
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            task(i);
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// Floating-point operations a second that this rank's threads reach with nothing but fused
/// multiply-adds in registers, in the tier in use: the limit that work is compared with.
/// Takes some 20 ms.
pub fn peak_flops() -> f64 {
    const ROUNDS: usize = 1 << 20;
    let threads = rayon::current_num_threads();
    let once = || {
        let start = Instant::now();
        for_each(threads, usize::MAX, |_| {
            let mut sums = [0f32; CHAINS * LANES];
            let (rounds, out) = (ROUNDS, &mut sums);
            dispatch!(tier(), chains, rounds: usize, out: &mut [f32; CHAINS * LANES]);
            std::hint::black_box(sums);
        });
        (2 * CHAINS * LANES * ROUNDS * threads) as f64 / start.elapsed().as_secs_f64()
    };
    once().max(once())
}

/// Independent sums: enough to hide the latency of an addition.
const CHAINS: usize = 12;

#[inline(always)]
unsafe fn chains<S: Simd>(rounds: usize, out: &mut [f32; CHAINS * LANES]) {
    // SAFETY: the tier's features, by the dispatcher; `out` holds the vectors.
    unsafe {
        let (x, y) = (S::splat(0.999), S::splat(1e-3));
        let mut sums = [S::splat(0.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = S::fma(*sum, x, y);
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            S::store(out.as_mut_ptr().add(i * LANES), sum);
        }
    }
}

/// A pointer that tasks may share because each writes its own elements.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<T>(*mut T);

// SAFETY: only handed to tasks that write disjoint elements (see each use).
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for (tasks, flops) in [(0, 0), (1, 1 << 30), (7, 10), (1000, 1 << 30)] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for_each(tasks, flops, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }
}
