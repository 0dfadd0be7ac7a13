//! Dropout of a module's inputs, drawn by counter: the same values are dropped whatever the
//! ranks, the micro-batches, or a restart.

use super::linear::Tokens;
use crate::device::train::Draws;
use crate::philox::philox4x32;

/// The dropout of one module.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Draws below this are dropped.
    threshold: u32,
    /// What is kept is multiplied by this.
    factor: f32,
    key: [u32; 2],
    /// This rank's first input feature in the whole.
    first_col: usize,
}

impl Dropout {
    /// Drops a share `p` of the values.
    pub fn new(p: f32, key: [u32; 2], first_col: usize) -> Self {
        let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
        Self { threshold, factor: 1.0 / (1.0 - p), key, first_col }
    }

    /// What a device draws by; `None` where nothing is dropped.
    pub fn draws(&self) -> Option<Draws> {
        let Self { threshold, factor, key, first_col } = *self;
        (threshold > 0).then_some(Draws { threshold, factor, key, first_col })
    }

    /// Whether anything is dropped.
    pub fn is_on(&self, tokens: &Tokens) -> bool {
        tokens.training && self.threshold > 0
    }

    /// `x` with its values dropped; `None` where nothing is.
    pub fn applied(&self, x: &[f32], cols: usize, tokens: &Tokens) -> Option<Vec<f32>> {
        self.is_on(tokens).then(|| {
            let mut x = x.to_vec();
            self.apply(&mut x, cols, tokens);
            x
        })
    }

    /// Drops values of `x`, `cols` features a row.
    pub fn apply(&self, x: &mut [f32], cols: usize, tokens: &Tokens) {
        for (row, number) in x.chunks_exact_mut(cols).zip(&tokens.numbers) {
            // Four draws a block; a rank's first feature may lie inside of one.
            let mut block = usize::MAX;
            let mut draws = [0; 4];
            for (i, x) in row.iter_mut().enumerate() {
                let col = self.first_col + i;
                if col / 4 != block {
                    block = col / 4;
                    let counter = [block as u32, *number as u32, (*number >> 32) as u32, 1];
                    draws = philox4x32(counter, self.key);
                }
                *x *= if draws[col % 4] < self.threshold { 0.0 } else { self.factor };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(numbers: &[u64]) -> Tokens {
        Tokens { training: true, numbers: numbers.to_vec() }
    }

    #[test]
    fn a_share_is_dropped_and_the_mean_stays() {
        let dropout = Dropout::new(0.25, [1, 2], 0);
        let numbers: Vec<u64> = (0..100).collect();
        let dropped = dropout.applied(&vec![1.0; 100 * 101], 101, &tokens(&numbers)).unwrap();
        let zeros = dropped.iter().filter(|x| **x == 0.0).count() as f32 / dropped.len() as f32;
        assert!((zeros - 0.25).abs() < 0.02, "{zeros}");
        assert!(dropped.iter().all(|x| *x == 0.0 || *x == 1.0 / 0.75));
    }

    /// A rank with the features from the 5th on drops what one with all of them drops there.
    #[test]
    fn draws_do_not_depend_on_the_split_or_the_company() {
        let x: Vec<f32> = (1..=36).map(|i| i as f32).collect();
        let whole = Dropout::new(0.5, [3, 4], 0).applied(&x, 12, &tokens(&[7, 8, 9])).unwrap();
        let part: Vec<f32> = x[12 + 5..24].to_vec();
        let part = Dropout::new(0.5, [3, 4], 5).applied(&part, 7, &tokens(&[8])).unwrap();
        assert_eq!(part, whole[12 + 5..24]);
    }

    #[test]
    fn nothing_is_dropped_outside_of_training() {
        let validation = Tokens { training: false, numbers: vec![0] };
        assert!(Dropout::new(0.5, [0, 0], 0).applied(&[1.0], 1, &validation).is_none());
        assert!(Dropout::new(0.0, [0, 0], 0).applied(&[1.0], 1, &tokens(&[0])).is_none());
    }
}
