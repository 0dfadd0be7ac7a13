//! Splits a kernel's work over the rank's threads.

use std::sync::atomic::{AtomicUsize, Ordering};

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
