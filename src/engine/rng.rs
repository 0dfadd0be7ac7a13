//! The sampler's draws: a function of the record and the token's place in it.

use crate::philox::philox4x32;

/// The uniform draw in [0, 1), a multiple of 2⁻⁵³, for the `step`-th new token
/// of a record's completion.
pub fn uniform(seed: u64, record_index: u64, completion: u32, step: u32) -> f64 {
    let counter = [step, completion, record_index as u32, (record_index >> 32) as u32];
    let [low, high, ..] = philox4x32(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_coordinate_changes_the_draw() {
        let draws = [
            uniform(1, 2, 3, 4),
            uniform(1 + (1 << 32), 2, 3, 4),
            uniform(1, 2 + (1 << 32), 3, 4),
            uniform(1, 2, 4, 4),
            uniform(1, 2, 3, 5),
        ];
        for (i, a) in draws.iter().enumerate() {
            assert!((0.0..1.0).contains(a));
            assert!(draws[..i].iter().all(|b| a != b));
        }
    }

    #[test]
    fn draws_fill_the_interval_evenly() {
        let mut tenths = [0u32; 10];
        for step in 0..10_000 {
            tenths[(uniform(7, 0, 0, step) * 10.0) as usize] += 1;
        }
        assert!(tenths.iter().all(|n| (850..1150).contains(n)), "{tenths:?}");
    }
}
