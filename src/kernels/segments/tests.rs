use super::backward::{KEYS_A_TASK, differentiate, whole_units_suffice};
use super::forward::attend;
use super::*;
use crate::kernels::attention::{self, BLOCK_SIZE, Rows};
use crate::kernels::tests::{random, tiers};

const RULE: Rule<'static> = Rule { window: None, softcap: None, slopes: None };
const SLOPES: [f32; 8] = [0.707, 0.5, 0.3536, 0.25, 0.1768, 0.125, 0.0884, 0.0625];

#[derive(Clone)]
struct Case {
    h: Heads,
    rule: Rule<'static>,
    segments: Vec<Range<usize>>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

impl Case {
    fn new([heads, kv_heads, head_dim]: [usize; 3], lengths: &[usize]) -> Self {
        let mut rows = 0;
        let segments = lengths.iter().map(|len| {
            rows += len;
            rows - len..rows
        });
        let segments = segments.collect();
        let values = |heads: usize, seed| random(rows * heads * head_dim, seed);
        Self {
            h: Heads { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() },
            rule: RULE,
            segments,
            q: values(heads, 1),
            k: values(kv_heads, 2),
            v: values(kv_heads, 3),
            dout: values(heads, 4),
        }
    }

    /// The case of one of the segments alone.
    fn alone(&self, segment: &Range<usize>) -> Self {
        let part = |x: &[f32], heads: usize| {
            let width = heads * self.h.head_dim;
            x[segment.start * width..segment.end * width].to_vec()
        };
        let Heads { heads, kv_heads, .. } = self.h;
        Self {
            segments: std::iter::once(0..segment.len()).collect(),
            q: part(&self.q, heads),
            k: part(&self.k, kv_heads),
            v: part(&self.v, kv_heads),
            dout: part(&self.dout, heads),
            ..self.clone()
        }
    }

    fn run(&self, tier: Tier, whole_units: bool) -> Results {
        let Self { h, rule, q, k, v, segments, dout, .. } = self;
        let job = Job { tier, h: *h, rule: *rule, q, k, v };
        let like = |x: &[f32]| vec![f32::NAN; x.len()];
        let (mut out, mut lse) = (like(q), vec![f32::NAN; q.len() / h.head_dim]);
        attend(&job, segments, &mut out, &mut lse);
        let (mut dq, mut dk, mut dv) = (like(q), like(k), like(v));
        let given = Given { out: &out, lse: &lse, dout };
        differentiate(&job, &given, segments, whole_units, [&mut dq, &mut dk, &mut dv]);
        Results { out, lse, dq, dk, dv }
    }

    /// The result and the log-sum-exp of one head of one query in f64, as `Rule` says it.
    fn formula(&self, x: &Inputs, segment: &Range<usize>, row: usize, head: usize) -> Vec<f64> {
        let Heads { heads, kv_heads, head_dim, scale } = self.h;
        let (kv_head, scale) = (head / (heads / kv_heads), f64::from(scale));
        let round = |x: f64| f64::from(bf16::from_f64(x));
        let first = self.rule.window.map_or(0, |w| (row + 1).saturating_sub(segment.start + w));
        let first = (segment.start + first).max(segment.start);
        let at = |row: usize| (row * kv_heads + kv_head) * head_dim;
        let q = &x.q[(row * heads + head) * head_dim..][..head_dim];
        let weights: Vec<f64> = (first..=row)
            .map(|s| {
                let mut score =
                    q.iter().zip(&x.k[at(s)..]).map(|(q, k)| q * k).sum::<f64>() * scale;
                if let Some(cap) = self.rule.softcap.map(f64::from) {
                    score = cap * (score / cap).tanh();
                }
                if let Some(slopes) = self.rule.slopes {
                    let slope = round(f64::from(slopes[head]));
                    score += round(slope * (s - segment.start) as f64) * scale;
                }
                score.exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        let values = (0..head_dim).map(|d| {
            weights.iter().zip(first..).map(|(w, s)| w * x.v[at(s) + d]).sum::<f64>() / total
        });
        values.chain([total.ln()]).collect()
    }

    /// `Σ dout ∘ out` of the rows that those of `changed` can change, in f64.
    fn loss(&self, x: &Inputs, changed: usize) -> f64 {
        let Heads { heads, head_dim, .. } = self.h;
        let segment = self.segments.iter().find(|s| s.contains(&changed)).unwrap();
        let rows = (changed..segment.end).flat_map(|row| (0..heads).map(move |h| (row, h)));
        rows.map(|(row, head)| {
            let out = self.formula(x, segment, row, head);
            let dout = &self.dout[(row * heads + head) * head_dim..][..head_dim];
            dout.iter().zip(out).map(|(g, o)| f64::from(*g) * o).sum::<f64>()
        })
        .sum()
    }
}

/// The inputs in f64.
struct Inputs {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
}

#[derive(Clone, Debug, PartialEq)]
struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

fn close(got: f32, want: f64, what: &str) {
    assert!((f64::from(got) - want).abs() < 1e-5 * want.abs().max(1.0), "{what}: {got} {want}");
}

/// Forward against the formula, gradients against its differences at some elements, and
/// every tier and division of the work against the first.
fn check(case: &Case) {
    let first = case.run(Tier::Scalar, true);
    for tier in tiers() {
        for whole_units in [true, false] {
            let same = case.run(tier, whole_units) == first;
            assert!(same, "{tier:?} {whole_units} {:?} {:?}", case.h, case.rule);
        }
    }
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect();
    let mut x = Inputs { q: wide(&case.q), k: wide(&case.k), v: wide(&case.v) };
    let Heads { heads, kv_heads, head_dim, .. } = case.h;
    for segment in &case.segments {
        for row in segment.clone() {
            for head in 0..heads {
                let want = case.formula(&x, segment, row, head);
                let at = row * heads + head;
                close(first.lse[at], want[head_dim], "lse");
                let out = &first.out[at * head_dim..][..head_dim];
                out.iter().zip(&want).for_each(|(out, want)| close(*out, *want, "out"));
            }
        }
    }
    type Field = fn(&mut Inputs) -> &mut Vec<f64>;
    let fields: [(&str, &[f32], usize, Field); 3] = [
        ("dq", &first.dq, heads, |x| &mut x.q),
        ("dk", &first.dk, kv_heads, |x| &mut x.k),
        ("dv", &first.dv, kv_heads, |x| &mut x.v),
    ];
    for (name, got, heads, field) in fields {
        for at in (0..got.len()).step_by(got.len() / 12 + 1) {
            let row = at / (heads * head_dim);
            let before = field(&mut x)[at];
            let mut moved = |by: f64| {
                field(&mut x)[at] = before + by;
                case.loss(&x, row)
            };
            let step = 1e-4;
            let want = (moved(step) - moved(-step)) / (2.0 * step);
            field(&mut x)[at] = before;
            close(got[at], want, name);
        }
    }
}

#[test]
fn equals_softmax_attention_and_its_differences_in_every_tier_and_division() {
    check(&Case::new([4, 2, 16], &[37, 3]));
    check(&Case::new([2, 1, 64], &[20]));
    check(&Case::new([6, 1, 24], &[33, 1, 0, 16]));
    check(&Case::new([1, 1, 2], &[1]));
    check(&Case::new([2, 2, 80], &[18]));
    // Several tiles of queries and keys.
    check(&Case::new([2, 1, 6], &[131, 67]));
    check(&Case::new([1, 1, 16], &[KEYS_A_TASK + 30]));
}

#[test]
fn the_same_under_windows_caps_and_alibi() {
    for (shape, lengths) in [([4, 2, 4], vec![41, 90]), ([3, 1, 6], vec![150])] {
        let mut case = Case::new(shape, &lengths);
        let slopes = Some(&SLOPES[..shape[0]]);
        let mut check = |rule| {
            case.rule = rule;
            check(&case);
        };
        for window in [1, 2, 15, 16, 17, 50, 1000] {
            check(Rule { window: Some(window), ..RULE });
        }
        check(Rule { softcap: Some(0.5), ..RULE });
        check(Rule { slopes, ..RULE });
        check(Rule { window: Some(20), softcap: Some(0.5), slopes });
    }
}

#[test]
fn a_segment_gives_the_same_bits_alone_and_packed() {
    for rule in [RULE, Rule { window: Some(30), softcap: Some(0.7), slopes: Some(&SLOPES[..4]) }] {
        let mut case = Case::new([4, 2, 24], &[70, 1, 49, 16, 100]);
        case.rule = rule;
        let packed = case.run(tier(), true);
        for segment in &case.segments {
            let alone = case.alone(segment).run(tier(), true);
            let part =
                |x: &[f32], width: usize| x[segment.start * width..segment.end * width].to_vec();
            let Heads { heads, kv_heads, head_dim, .. } = case.h;
            assert_eq!(part(&packed.out, heads * head_dim), alone.out);
            assert_eq!(part(&packed.lse, heads), alone.lse);
            assert_eq!(part(&packed.dq, heads * head_dim), alone.dq);
            assert_eq!(part(&packed.dk, kv_heads * head_dim), alone.dk);
            assert_eq!(part(&packed.dv, kv_heads * head_dim), alone.dv);
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_bits() {
    let case = Case::new([4, 2, 16], &[300, 170]);
    let alone = case.run(tier(), true);
    for (threads, whole_units) in [(1, false), (3, true), (3, false)] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert!(pool.install(|| case.run(tier(), whole_units)) == alone, "{threads}");
    }
}

#[test]
fn equals_the_attention_of_generation() {
    let mut case = Case::new([4, 2, 32], &[100]);
    case.rule = Rule { window: Some(70), softcap: Some(2.0), slopes: Some(&SLOPES[..4]) };
    let h = case.h;
    let table: Vec<u32> = (0..100u32.div_ceil(BLOCK_SIZE as u32)).collect();
    let rows = Rows { first: 0, len: 100, start_position: 0, block_table: &table };
    let mut keys = vec![0.0; table.len() * h.block_len()];
    let mut values = keys.clone();
    attention::write_kv(h, rows, &case.k, &case.v, &mut keys, &mut values);
    let mut want = vec![0.0; case.q.len()];
    attention::paged_attention(h, case.rule, &case.q, &keys, &values, &[rows], &mut want);
    for (got, want) in case.run(tier(), true).out.iter().zip(&want) {
        assert!((got - want).abs() < 1e-6, "{got} {want}");
    }
}

#[test]
fn a_score_that_is_not_finite_shows_in_every_query_that_sees_it() {
    let mut case = Case::new([1, 1, 16], &[120]);
    case.k[20 * 16] = f32::NAN;
    let results = case.run(tier(), true);
    for (row, out) in results.out.chunks(16).enumerate() {
        assert_eq!(out.iter().all(|x| x.is_nan()), row >= 20, "{row}");
    }
}

#[test]
fn work_is_divided_further_where_units_are_few() {
    let h = Heads { heads: 8, kv_heads: 2, head_dim: 64, scale: 1.0 };
    let four: Vec<Range<usize>> = (0..4).map(|i| i * 100..i * 100 + 100).collect();
    assert!(whole_units_suffice(h, &four, 1));
    assert!(whole_units_suffice(h, &four, 8));
    assert!(!whole_units_suffice(h, &four[..1], 8));
    assert!(whole_units_suffice(h, &[], 8));
}
