use std::sync::Arc;

use super::*;
use crate::comm::{HostTensorComm, LocalComm, NoTensorComm};
use crate::kernels::tests::random;
use crate::model::weights::Weight;
use crate::train::linear::Split;

const WIDTH: usize = 6;
const VOCAB: usize = 11;
const TARGETS: [u32; 5] = [0, 10, 4, 4, 7];

fn run(group: Arc<dyn TensorComm>, softcap: Option<f32>, weight: Option<f32>) -> Loss {
    let (rank, size) = (group.rank(), group.size());
    let ids = rank * VOCAB / size..(rank + 1) * VOCAB / size;
    let matrix = random(VOCAB * WIDTH, 1)[ids.start * WIDTH..ids.end * WIDTH].to_vec();
    let weights = Arc::new(Weight::from_f32(ids.len(), WIDTH, matrix));
    let linear = Linear::frozen(weights, None, Split::Column, group.clone());
    let head = LossHead { linear, ids, softcap };
    let tokens = Tokens { training: true, numbers: vec![0; TARGETS.len()] };
    let x = random(TARGETS.len() * WIDTH, 2);
    head.run(&mut Parameters::default(), &*group, &x, &TARGETS, &tokens, weight)
}

/// In f64, from the formula.
fn reference(x: &[f32], softcap: Option<f32>) -> f64 {
    let w = random(VOCAB * WIDTH, 1);
    let row = |x: &[f32], target: u32| {
        let logits: Vec<f64> = w
            .chunks_exact(WIDTH)
            .map(|w| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>())
            .map(|logit| {
                softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh())
            })
            .collect();
        logits.iter().map(|l| l.exp()).sum::<f64>().ln() - logits[target as usize]
    };
    x.chunks_exact(WIDTH).zip(TARGETS).map(|(x, target)| row(x, target)).sum()
}

#[test]
fn loss_and_gradient_are_value_and_slopes_of_the_formula() {
    const WEIGHT: f32 = 0.2;
    for softcap in [None, Some(0.7)] {
        let loss = run(Arc::new(NoTensorComm), softcap, Some(WEIGHT));
        let x = random(TARGETS.len() * WIDTH, 2);
        assert!((loss.sum - reference(&x, softcap)).abs() < 1e-5, "{softcap:?}");
        for (i, dx) in loss.dx.iter().enumerate() {
            const STEP: f32 = 1.0 / 128.0;
            let at = |step: f32| {
                let mut x = x.clone();
                x[i] += step;
                reference(&x, softcap)
            };
            let slope = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP) * f64::from(WEIGHT);
            assert!((f64::from(*dx) - slope).abs() < 2e-5, "{softcap:?} [{i}]: {dx} {slope}");
        }
        let alone = run(Arc::new(NoTensorComm), softcap, None);
        assert_eq!((alone.sum, alone.dx.len()), (loss.sum, 0));
    }
}

#[test]
fn a_split_vocabulary_gives_the_same() {
    for softcap in [None, Some(0.7)] {
        let whole = run(Arc::new(NoTensorComm), softcap, Some(0.2));
        for size in [2, 3, 4] {
            let ranks = LocalComm::run(size, |comm| {
                run(Arc::new(HostTensorComm::new(comm)), softcap, Some(0.2))
            });
            for rank in ranks {
                assert!((rank.sum - whole.sum).abs() < 1e-5);
                let far = rank.dx.iter().zip(&whole.dx).any(|(a, b)| (a - b).abs() > 1e-6);
                assert!(!far, "{size} ranks");
            }
        }
    }
}

/// Logits that are far apart neither overflow nor lose the loss.
#[test]
fn large_logits_stay_finite() {
    let weights = Arc::new(Weight::from_f32(2, 1, vec![300.0, -300.0]));
    let linear = Linear::frozen(weights, None, Split::Column, Arc::new(NoTensorComm));
    let head = LossHead { linear, ids: 0..2, softcap: None };
    let tokens = Tokens { training: true, numbers: vec![0] };
    let mut p = Parameters::default();
    let loss = head.run(&mut p, &NoTensorComm, &[1.0], &[1], &tokens, Some(1.0));
    assert!((loss.sum - 600.0).abs() < 1e-3, "{}", loss.sum);
    assert!((loss.dx[0] - 600.0).abs() < 1e-3, "{}", loss.dx[0]);
}
