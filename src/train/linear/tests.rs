use super::*;
use crate::comm::{HostTensorComm, LocalComm, NoTensorComm};
use crate::kernels::tests::random;
use crate::train::lora::TargetModules;

const ROWS: usize = 5;
const INPUTS: usize = 12;
const OUTPUTS: usize = 8;
const RANK: usize = 3;

fn config(use_dora: bool, lora_dropout: f32) -> LoraConfig {
    LoraConfig {
        r: RANK,
        lora_alpha: 6.0,
        lora_dropout,
        target_modules: TargetModules::AllLinear,
        use_rslora: false,
        use_dora,
        layers_to_transform: None,
        modules_to_save: Vec::new(),
    }
}

fn tokens() -> Tokens {
    Tokens { training: true, numbers: (0..ROWS as u64).collect() }
}

/// A rank's part of one and the same layer with bias, and its trained tensors.
fn layer(split: Split, config: &LoraConfig, group: Arc<dyn TensorComm>) -> (Linear, Parameters) {
    let (rank, size) = (group.rank(), group.size());
    let part = |n: usize| rank * n / size..(rank + 1) * n / size;
    let (rows, cols) = match split {
        Split::Column => (part(OUTPUTS), 0..INPUTS),
        Split::Row => (0..OUTPUTS, part(INPUTS)),
        Split::Whole => (0..OUTPUTS, 0..INPUTS),
    };
    let whole = random(OUTPUTS * INPUTS, 1);
    let values = rows.clone().flat_map(|row| &whole[row * INPUTS..][cols.clone()]).copied();
    let weight = Weight::from_f32(rows.len(), cols.len(), values.collect());
    let bias =
        (split != Split::Row || rank == 0).then(|| random(OUTPUTS, 2)[rows.clone()].to_vec());
    let mut parameters = Parameters::default();
    let layer = Linear::frozen(Arc::new(weight), bias, split, group);
    let whole = Whole { module: "layer", shape: [OUTPUTS, INPUTS], rows: rows.collect(), cols };
    let mut layer = layer.with_lora(&whole, config, 7, &mut parameters);
    parameters.set(|tensor| Ok(begin(tensor.part, tensor.len()))).unwrap();
    layer.refresh(&parameters);
    (layer, parameters)
}

fn begin(part: Part, len: usize) -> Vec<f32> {
    match part {
        Part::A => random(len, 3),
        Part::B => random(len, 4),
        _ => random(len, 5).into_iter().map(|m| 1.5 + m).collect(),
    }
}

/// What a pass gives: output, gradient of the input, gradients of the whole tensors.
struct Passed {
    y: Vec<f32>,
    dx: Vec<f32>,
    gradients: Vec<f32>,
}

/// Forward and backward of the whole layer's `x` and `dy`, with the sums that callers take.
fn pass(split: Split, config: &LoraConfig, group: Arc<dyn TensorComm>) -> Passed {
    let (layer, mut p) = layer(split, config, group.clone());
    let (rank, size) = (group.rank(), group.size());
    let part = |values: &[f32], n: usize| -> Vec<f32> {
        values
            .chunks_exact(n)
            .flat_map(|row| &row[rank * n / size..(rank + 1) * n / size])
            .copied()
            .collect()
    };
    let (mut x, mut dy) = (random(ROWS * INPUTS, 8), random(ROWS * OUTPUTS, 9));
    match split {
        Split::Column => dy = part(&dy, OUTPUTS),
        Split::Row => x = part(&x, INPUTS),
        Split::Whole => {}
    }
    let (mut y, kept) = layer.forward(&p, &x, &tokens());
    let mut dx = vec![0.0; x.len()];
    layer.backward(&mut p, &x, &kept, &dy, &tokens(), Some(&mut dx));
    let joined = |local: &[f32], n: usize| -> Vec<f32> {
        let all = group.all_gather(local);
        let ranks: Vec<&[f32]> = all.chunks_exact(local.len()).collect();
        (0..ROWS)
            .flat_map(|row| ranks.iter().flat_map(move |r| r[row * n..(row + 1) * n].to_vec()))
            .collect()
    };
    match split {
        Split::Column => {
            group.all_reduce_sum(&mut dx);
            y = joined(&y, OUTPUTS / size);
        }
        Split::Row => dx = joined(&dx, INPUTS / size),
        Split::Whole => {}
    }
    p.sum_partial_gradients(&*group);
    let gradients = p.gathered(&p.gradients, &*group);
    Passed { y, dx, gradients }
}

fn assert_close(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= 2e-5 * (1.0 + b.abs()), "{what} [{i}]: {a} {b}");
    }
}

/// Forward, the input's gradient and those of A, B and magnitudes: split over ranks by output
/// or input features they are those of the whole layer.
#[test]
fn split_layers_equal_the_whole_one() {
    for config in [config(false, 0.0), config(true, 0.0), config(false, 0.4)] {
        let whole = pass(Split::Whole, &config, Arc::new(NoTensorComm));
        use Split::{Column, Row};
        for (split, size) in [(Column, 2), (Column, 4), (Row, 2), (Row, 4)] {
            let ranks = LocalComm::run(size, |comm| {
                pass(split, &config, Arc::new(HostTensorComm::new(comm)))
            });
            for rank in ranks {
                let what = format!("{split:?} {size} dora {}", config.use_dora);
                assert_close(&format!("{what}: y"), &rank.y, &whole.y);
                assert_close(&format!("{what}: dx"), &rank.dx, &whole.dx);
                assert_close(&format!("{what}: gradients"), &rank.gradients, &whole.gradients);
            }
        }
    }
}

/// In f64, from the formula: Σ dy · y.
fn objective(x: &[f32], a: &[f32], b: &[f32], gains: &[f64], scale: f64) -> f64 {
    let (w, bias, dy) =
        (random(OUTPUTS * INPUTS, 1), random(OUTPUTS, 2), random(ROWS * OUTPUTS, 9));
    let dot = |u: &[f32], v: &[f32]| -> f64 {
        u.iter().zip(v).map(|(u, v)| f64::from(*u) * f64::from(*v)).sum()
    };
    let mut sum = 0.0;
    for (row, x) in x.chunks_exact(INPUTS).enumerate() {
        let h: Vec<f64> = a.chunks_exact(INPUTS).map(|a| dot(a, x)).collect();
        for o in 0..OUTPUTS {
            let b = &b[o * RANK..(o + 1) * RANK];
            let low_rank: f64 = b.iter().zip(&h).map(|(b, h)| f64::from(*b) * h).sum();
            let y = gains[o] * (dot(&w[o * INPUTS..(o + 1) * INPUTS], x) + scale * low_rank);
            sum += f64::from(dy[row * OUTPUTS + o]) * (y + f64::from(bias[o]));
        }
    }
    sum
}

/// The gradients are the slopes of the formula. With DoRA the norm counts as a constant.
#[test]
fn gradients_are_slopes() {
    const STEP: f32 = 1.0 / 64.0;
    for use_dora in [false, true] {
        let config = config(use_dora, 0.0);
        let passed = pass(Split::Whole, &config, Arc::new(NoTensorComm));
        let (layer, p) = layer(Split::Whole, &config, Arc::new(NoTensorComm));
        let dora = layer.lora.as_ref().and_then(|lora| lora.dora.as_ref());
        let gains = |m: &[f32]| -> Vec<f64> {
            let inverse_norms = dora.map(|dora| &dora.inverse_norms);
            (0..OUTPUTS)
                .map(|o| inverse_norms.map_or(1.0, |norms| f64::from(norms[o]) * f64::from(m[o])))
                .collect()
        };
        let x = random(ROWS * INPUTS, 8);
        let (a, b) = (random(RANK * INPUTS, 3), random(OUTPUTS * RANK, 4));
        let m = p.values[a.len() + b.len()..].to_vec();
        let m = if use_dora { m } else { vec![1.0; OUTPUTS] };
        let vectors = [x, a, b, m];
        let slope = |which: usize, i: usize| {
            let at = |step: f32| {
                let mut v = vectors.clone();
                v[which][i] += step;
                objective(&v[0], &v[1], &v[2], &gains(&v[3]), f64::from(config.scale()))
            };
            ((at(STEP) - at(-STEP)) / f64::from(2.0 * STEP)) as f32
        };
        let slopes = |which: usize| -> Vec<f32> {
            (0..vectors[which].len()).map(|i| slope(which, i)).collect()
        };
        assert_close("dx", &passed.dx, &slopes(0));
        let of_tensors: Vec<f32> = (1..if use_dora { 4 } else { 3 }).flat_map(slopes).collect();
        assert_close("gradients", &passed.gradients, &of_tensors);
    }
}

/// What backward needs is the same with the output and without.
#[test]
fn what_is_kept_does_not_need_the_output() {
    for use_dora in [false, true] {
        let (layer, p) = layer(Split::Whole, &config(use_dora, 0.3), Arc::new(NoTensorComm));
        let x = random(ROWS * INPUTS, 8);
        let (_, with) = layer.forward(&p, &x, &tokens());
        let without = layer.keep(&p, &x, &tokens());
        assert_eq!((with.h, with.product), (without.h, without.product));
    }
}

/// Every value of A depends on the seed, the name and its place, not on the split.
#[test]
fn first_values_do_not_depend_on_the_split() {
    let draw = |split, group: Arc<dyn TensorComm>| {
        let (_, mut p) = layer(split, &config(false, 0.0), group.clone());
        p.draw(11);
        p.gathered(&p.values, &*group)
    };
    let whole = draw(Split::Whole, Arc::new(NoTensorComm));
    let bound = 1.0 / (INPUTS as f32).sqrt();
    assert!(whole[..RANK * INPUTS].iter().all(|a| a.abs() <= bound));
    for split in [Split::Row, Split::Column] {
        let ranks = LocalComm::run(2, |comm| draw(split, Arc::new(HostTensorComm::new(comm))));
        assert!(ranks.iter().all(|rank| *rank == whole), "{split:?}");
    }
}
