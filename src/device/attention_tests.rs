//! The device's attention against the formula in f64, and the rotation against the CPU's kernels.

use proptest::prelude::*;

use super::super::emulator::{self, ThreadOrder};
use super::super::testing::{assert_close, devices, read_f32, rounded, upload_as};
use super::*;
use crate::kernels::attention::alibi_slopes;
use crate::kernels::ops;
use crate::kernels::tests::random;

/// A step: sequences with `(start_position, rows)` each, then rows of padding.
#[derive(Debug, Clone)]
struct Case {
    shape: Shape,
    dtype: Dtype,
    window: Option<usize>,
    softcap: Option<f32>,
    alibi: bool,
    sequences: Vec<(usize, usize)>,
    padding: usize,
    max_blocks: usize,
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> Shape {
    Shape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
}

fn case(shape: Shape, dtype: Dtype, sequences: &[(usize, usize)]) -> Case {
    Case {
        shape,
        dtype,
        window: None,
        softcap: None,
        alibi: false,
        sequences: sequences.to_vec(),
        padding: 2,
        max_blocks: 64,
    }
}

impl Case {
    fn slopes(&self) -> Option<Vec<f32>> {
        self.alibi.then(|| alibi_slopes(self.shape.heads))
    }

    fn rows(&self) -> usize {
        self.sequences.iter().map(|(_, rows)| rows).sum::<usize>() + self.padding
    }

    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    fn tolerance(&self) -> f32 {
        match self.dtype {
            Dtype::Bf16 => 1e-2,
            Dtype::F16 => 2e-3,
            _ => 1e-5,
        }
    }
}

/// What a case is made of, on the host and on a device.
struct Data {
    q: Vec<f32>,
    /// Of each sequence, `[context][kv_heads * head_dim]`.
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    keys: Array,
    values: Array,
    q_array: Array,
    slopes: Option<Array>,
    sequence_of_row: Array,
    positions: Array,
    block_tables: Array,
    num_rows: Vec<usize>,
    first_row: Array,
    num_rows_array: Array,
    start_position: Array,
}

impl Data {
    /// Blocks lie in shuffled order; what no row sees is NaN, and tables lead nowhere
    /// where no row looks.
    fn new(device: &Device, case: &Case) -> Self {
        let Shape { heads, kv_heads, head_dim, .. } = case.shape;
        let width = kv_heads * head_dim;
        let pool = case.sequences.iter().map(|(start, rows)| (start + rows).div_ceil(16)).sum();
        let mut free = shuffled(pool);
        let mut keys = vec![f32::NAN; pool * case.shape.block_len()];
        let mut values = keys.clone();
        let mut tables = vec![-1i32 << 20; case.sequences.len() * case.max_blocks];
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let (mut sequence_of_row, mut positions) = (Vec::new(), Vec::new());
        let (mut first_rows, mut starts) = (Vec::new(), Vec::new());
        for (s, &(start, rows)) in case.sequences.iter().enumerate() {
            let seed = 10 + 2 * s as u64;
            let context = start + rows;
            k.push(rounded(case.dtype, &random(context * width, seed)));
            v.push(rounded(case.dtype, &random(context * width, seed + 1)));
            first_rows.push(positions.len() as i32);
            starts.push(start as i32);
            positions.extend((start..context).map(|p| p as i32));
            sequence_of_row.extend(std::iter::repeat_n(s as i32, rows));
            for t in case.first_seen(start)..context {
                let entry = &mut tables[s * case.max_blocks + t / 16];
                if *entry < 0 {
                    *entry = free.pop().unwrap() as i32;
                }
                for head in 0..kv_heads {
                    let to = ((*entry as usize * kv_heads + head) * 16 + t % 16) * head_dim;
                    let from = t * width + head * head_dim;
                    keys[to..to + head_dim].copy_from_slice(&k[s][from..from + head_dim]);
                    values[to..to + head_dim].copy_from_slice(&v[s][from..from + head_dim]);
                }
            }
        }
        for i in 0..case.padding {
            // Either marks it.
            sequence_of_row.push(if i % 2 == 0 { -1 } else { 0 });
            positions.push(if i % 2 == 0 { 5 } else { -1 });
        }
        let q = rounded(case.dtype, &random(case.rows() * heads * head_dim, 1));
        let num_rows: Vec<usize> = case.sequences.iter().map(|(_, rows)| *rows).collect();
        let num_rows_i32: Vec<i32> = num_rows.iter().map(|rows| *rows as i32).collect();
        Self {
            q_array: upload_as(device, case.dtype, &q),
            q,
            k,
            v,
            keys: upload_as(device, case.dtype, &keys),
            values: upload_as(device, case.dtype, &values),
            slopes: case.slopes().map(|slopes| device.upload(&slopes).unwrap()),
            sequence_of_row: device.upload(&sequence_of_row).unwrap(),
            positions: device.upload(&positions).unwrap(),
            block_tables: device.upload(&tables).unwrap(),
            first_row: device.upload(&first_rows).unwrap(),
            num_rows_array: device.upload(&num_rows_i32).unwrap(),
            start_position: device.upload(&starts).unwrap(),
            num_rows,
        }
    }

    fn cache(&self) -> Cache<'_> {
        Cache { keys: &self.keys, values: &self.values }
    }

    fn rule(&self, case: &Case) -> Rule<'_> {
        Rule { window: case.window, softcap: case.softcap, slopes: self.slopes.as_ref() }
    }
}

fn shuffled(n: usize) -> Vec<usize> {
    let mut list: Vec<(u32, usize)> = random(n, 99).iter().map(|x| x.to_bits()).zip(0..n).collect();
    list.sort_unstable();
    list.into_iter().map(|(_, i)| i).collect()
}

/// The formula, in f64.
fn expected(case: &Case, data: &Data) -> Vec<f32> {
    let Shape { heads, kv_heads, head_dim, scale } = case.shape;
    let round = |x: f64| f64::from(half::bf16::from_f64(x));
    let slopes = case.slopes();
    let mut out = Vec::new();
    for (s, &(start, rows)) in case.sequences.iter().enumerate() {
        for position in start..start + rows {
            let row = out.len() / (heads * head_dim);
            for head in 0..heads {
                let q = &data.q[(row * heads + head) * head_dim..][..head_dim];
                let at = |t: usize| (t * kv_heads + head / (heads / kv_heads)) * head_dim;
                let seen = case.first_seen(position)..position + 1;
                let weight = |t: usize| {
                    let k = &data.k[s][at(t)..at(t) + head_dim];
                    let dot: f64 =
                        q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    let mut score = dot * f64::from(scale);
                    if let Some(cap) = case.softcap.map(f64::from) {
                        score = cap * (score / cap).tanh();
                    }
                    if let Some(slopes) = &slopes {
                        let bias = round(round(f64::from(slopes[head])) * round(t as f64));
                        score += bias * f64::from(scale);
                    }
                    score
                };
                let scores: Vec<f64> = seen.clone().map(weight).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..head_dim {
                    let values = seen.clone().map(|t| f64::from(data.v[s][at(t) + d]));
                    let sum: f64 = weights.iter().zip(values).map(|(w, v)| w * v).sum();
                    out.push((sum / total) as f32);
                }
            }
        }
    }
    out.resize(case.rows() * heads * head_dim, 0.0);
    out
}

/// All rows one by one; and, where the device can, chunks as tiles and the rest as rows.
fn check(device: &Device, case: &Case) {
    let data = Data::new(device, case);
    let want = expected(case, &data);
    let (shape, properties) = (case.shape, device.properties());
    let scratch_len = scratch_len(properties, shape, case.dtype, case.rows(), case.max_blocks);
    let scratch = device.upload(&vec![f32::NAN; scratch_len]).unwrap();
    let new_out = || upload_as(device, case.dtype, &vec![f32::NAN; want.len()]);
    let mut rows = Rows {
        sequence_of_row: &data.sequence_of_row,
        positions: &data.positions,
        block_tables: &data.block_tables,
        max_blocks: case.max_blocks,
        list: None,
    };
    let rule = data.rule(case);
    let attend = |rows: &Rows, out: &Array| {
        attend_rows(device, shape, &rule, &data.q_array, data.cache(), rows, &scratch, out)
            .unwrap();
    };
    let out = new_out();
    attend(&rows, &out);
    assert_close(&read_f32(device, &out), &want, case.tolerance());

    let plan = Plan::new(properties, shape, case.dtype, &data.num_rows);
    let out = new_out();
    let list = device.upload(&plan.rows).unwrap();
    rows.list = Some(&list);
    attend(&rows, &out);
    let tiles = device.upload(&plan.tiles).unwrap();
    if !plan.tiles.is_empty() {
        let chunks = Chunks {
            tiles: &tiles,
            first_row: &data.first_row,
            num_rows: &data.num_rows_array,
            start_position: &data.start_position,
            block_tables: &data.block_tables,
            max_blocks: case.max_blocks,
        };
        let (q, cache) = (&data.q_array, data.cache());
        attend_chunks(device, shape, &rule, q, cache, &chunks, case.rows(), &out).unwrap();
    }
    // Padding is in no plan: its rows stay as they were.
    let planned = want.len() - case.padding * shape.heads * shape.head_dim;
    assert_close(&read_f32(device, &out)[..planned], &want[..planned], case.tolerance());
}

const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

#[test]
fn attention_is_the_formula_for_every_head_and_group() {
    let shapes = [
        (4, 2, 8),
        (2, 2, 64),
        (8, 1, 64),
        (3, 1, 80),
        (7, 1, 96),
        (4, 4, 128),
        (8, 2, 128),
        (5, 1, 256),
        (2, 1, 6),
        (20, 1, 16),
        (9, 1, 10),
    ];
    for device in devices() {
        for (heads, kv_heads, head_dim) in shapes {
            for dtype in FLOATS {
                let sequences = [(0, 19), (37, 1), (21, 13), (0, 1)];
                check(&device, &case(shape(heads, kv_heads, head_dim), dtype, &sequences));
            }
        }
    }
}

#[test]
fn windows_caps_and_alibi_are_those_of_the_cpu() {
    for device in devices() {
        for ((heads, kv_heads, head_dim), dtype) in
            [((4, 2, 16), Dtype::Bf16), ((6, 1, 80), Dtype::F16), ((2, 1, 6), Dtype::F32)]
        {
            let sequences = [(0, 40), (90, 1), (70, 9), (15, 3)];
            let mut case = case(shape(heads, kv_heads, head_dim), dtype, &sequences);
            for window in [1, 2, 15, 16, 17, 33, 1000] {
                case.window = Some(window);
                check(&device, &case);
            }
            case.window = None;
            case.softcap = Some(0.5);
            check(&device, &case);
            case.alibi = true;
            check(&device, &case);
            (case.softcap, case.window) = (None, Some(20));
            check(&device, &case);
        }
    }
}

#[test]
fn splits_of_a_long_context_add_up() {
    for device in devices() {
        for (dtype, shape) in [
            (Dtype::F32, shape(4, 1, 24)),
            (Dtype::F16, shape(4, 1, 32)),
            (Dtype::Bf16, shape(18, 1, 64)),
        ] {
            // A row alone has as many splits as its context has; several have fewer.
            for sequences in [vec![(1000, 1)], vec![(1000, 1), (3, 1), (255, 1), (256, 1)]] {
                let mut case = case(shape, dtype, &sequences);
                check(&device, &case);
                case.window = Some(300);
                check(&device, &case);
            }
        }
    }
}

/// Scores that grow from key to key make the tensor cores' sums be scaled again and again.
#[test]
fn sums_follow_scores_that_grow_beyond_their_slack() {
    for device in devices() {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            check_growing_scores(&device, dtype);
        }
    }
}

fn check_growing_scores(device: &Device, dtype: Dtype) {
    let mut case = case(shape(2, 1, 64), dtype, &[(0, 90), (200, 1)]);
    case.shape.scale = 30.0;
    case.padding = 0;
    let want = expected(&case, &Data::new(device, &case));
    assert!(want.iter().any(|x| x.abs() > 0.9), "some query looks at a single key");
    check(device, &case);
}

/// A device that is like an A100, a consumer card, a V100 or a T4.
fn another(compute_capability: (u32, u32), shared_kib: usize, order: ThreadOrder) -> Device {
    let mut properties = Device::emulated().properties().clone();
    properties.compute_capability = compute_capability;
    properties.shared_bytes_a_block = shared_kib << 10;
    emulator::open_as(properties, order)
}

#[test]
fn devices_with_less_shared_memory_get_smaller_tiles() {
    for (capability, kib) in [((8, 0), 163), ((8, 6), 99), ((7, 0), 96), ((7, 5), 64)] {
        let device = another(capability, kib, ThreadOrder::Shuffled(3));
        for head_dim in [64, 96, 128, 256] {
            check(&device, &case(shape(4, 2, head_dim), Dtype::F16, &[(5, 70), (90, 1)]));
        }
    }
}

/// f16 by the tensor cores' older interface, bf16 without them.
#[test]
fn volta_has_kernels_of_its_own() {
    for order in [ThreadOrder::Rising, ThreadOrder::Falling, ThreadOrder::Shuffled(5)] {
        let device = another((7, 0), 96, order);
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for (heads, kv_heads, head_dim) in [(4, 2, 64), (18, 1, 80), (3, 1, 128), (2, 1, 256)] {
                let mut case = case(
                    shape(heads, kv_heads, head_dim),
                    dtype,
                    &[(5, 20), (90, 1), (0, 70), (400, 1)],
                );
                check(&device, &case);
                (case.window, case.softcap, case.alibi) = (Some(33), Some(0.5), true);
                check(&device, &case);
            }
            check_growing_scores(&device, dtype);
        }
    }
}

#[test]
fn a_launch_depends_on_lengths_alone() {
    let properties = Device::emulated().properties().clone();
    let shape = shape(8, 2, 64);
    assert_eq!(splits(&properties, shape, 16, 1, 64), 4);
    assert_eq!(splits(&properties, shape, 16, 1, 1 << 13), 8);
    assert_eq!(splits(&properties, shape, 16, 8, 1 << 13), 1);
    assert_eq!(splits(&properties, shape, 16, 1, 1), 1);
    // More rows may need less: the most of any number is asked for.
    let one = scratch_len(&properties, shape, Dtype::F32, 1, 1 << 13);
    assert!(scratch_len(&properties, shape, Dtype::F32, 100, 1 << 13) >= one && one > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_is_the_formula(
        group in 1usize..9,
        kv_heads in 1usize..3,
        half_dim in prop_oneof![1usize..20, Just(32), Just(40), Just(48), Just(64), Just(128)],
        dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::Bf16)],
        window in prop::option::of(1usize..80),
        softcap in prop::option::of(0.3f32..3.0),
        alibi: bool,
        sequences in prop::collection::vec((0usize..120, 1usize..30), 1..4),
        padding in 0usize..3,
        order in 0u32..9,
    ) {
        let order = if order == 0 { ThreadOrder::Falling } else { ThreadOrder::Shuffled(order + 1) };
        let shape = shape(group * kv_heads, kv_heads, 2 * half_dim);
        let max_blocks = 16;
        let case = Case { shape, dtype, window, softcap, alibi, sequences, padding, max_blocks };
        check(&emulator::open(order), &case);
    }
}

// --- rotation ---------------------------------------------------------------------------

#[derive(Debug, Clone, Copy)]
struct Turn {
    shape: Shape,
    dtype: Dtype,
    rotary_dim: usize,
    interleaved: bool,
    norms: bool,
    in_place: bool,
}

/// Slots of five rows, one of them padding.
const SLOTS: [i32; 5] = [35, 3, -1, 16, 15];
const TABLE_ROWS: usize = 7;

fn check_turn(device: &Device, turn: Turn) {
    let Shape { heads, kv_heads, head_dim, .. } = turn.shape;
    let (rows, width) = (SLOTS.len(), (heads + 2 * kv_heads) * head_dim);
    let half = turn.rotary_dim / 2;
    let qkv = rounded(turn.dtype, &random(rows * width, 1));
    let table_row = [6, 0, -9, 2, 6];
    let angles = random(TABLE_ROWS * half, 2);
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    let weights = [random(head_dim, 3), random(head_dim, 4)];
    let eps = 1e-5;

    let qkv_array = upload_as(device, turn.dtype, &qkv);
    let own_q = upload_as(device, turn.dtype, &vec![7.0; rows * heads * head_dim]);
    let q_array = if turn.in_place { &qkv_array } else { &own_q };
    let cache_len = 3 * turn.shape.block_len();
    let [keys, values] = [0, 1].map(|_| upload_as(device, turn.dtype, &vec![9.0; cache_len]));
    let [q_weight, k_weight] = weights.each_ref().map(|w| device.upload(w).unwrap());
    let norms = Norms { q_weight: &q_weight, k_weight: &k_weight, eps };
    let [cos_array, sin_array] = [&cos, &sin].map(|x| device.upload(x).unwrap());
    let table_row_array = device.upload(&table_row).unwrap();
    let rotation = Rotation {
        cos: &cos_array,
        sin: &sin_array,
        table_row: &table_row_array,
        rotary_dim: turn.rotary_dim,
        interleaved: turn.interleaved,
    };
    rope_and_cache(
        device,
        turn.shape,
        &qkv_array,
        turn.norms.then_some(&norms),
        (half > 0).then_some(&rotation),
        q_array,
        Cache { keys: &keys, values: &values },
        &device.upload(&SLOTS).unwrap(),
    )
    .unwrap();

    let q_stride = if turn.in_place { width } else { heads * head_dim };
    let mut want_q = if turn.in_place { qkv.clone() } else { vec![7.0; own_q.len()] };
    let mut want_keys = vec![9.0; cache_len];
    let mut want_values = want_keys.clone();
    for (row, slot) in SLOTS.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
        let angle = table_row[row] as usize * half;
        for head in 0..heads + 2 * kv_heads {
            let mut x = qkv[row * width + head * head_dim..][..head_dim].to_vec();
            let (is_q, is_k) = (head < heads, head >= heads && head < heads + kv_heads);
            if turn.norms && (is_q || is_k) {
                let from = x.clone();
                ops::rms_norm(&from, &weights[usize::from(is_k)], eps, &mut x);
            }
            if half > 0 && (is_q || is_k) {
                let angles = angle..angle + half;
                let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
                ops::rotate(&mut x, head_dim, turn.rotary_dim, turn.interleaved, cos, sin);
            }
            let (to, at) = if is_q {
                (&mut want_q, row * q_stride + head * head_dim)
            } else {
                let kv_head = (head - heads) % kv_heads;
                let slot = *slot as usize;
                let at = ((slot / 16 * kv_heads + kv_head) * 16 + slot % 16) * head_dim;
                (if is_k { &mut want_keys } else { &mut want_values }, at)
            };
            to[at..at + head_dim].copy_from_slice(&x);
        }
    }
    let tolerance = match turn.dtype {
        Dtype::Bf16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
        _ => 1e-6,
    };
    assert_close(&read_f32(device, q_array), &want_q, tolerance);
    assert_close(&read_f32(device, &keys), &want_keys, tolerance);
    assert_close(&read_f32(device, &values), &want_values, tolerance);
}

#[test]
fn rotation_norms_and_the_caches_are_those_of_the_cpu() {
    let shapes = [
        (4, 2, 8, 8),
        (3, 1, 64, 64),
        (2, 2, 80, 32),
        (4, 1, 96, 96),
        (6, 2, 128, 128),
        (1, 1, 256, 64),
        (3, 3, 6, 4),
        (2, 1, 64, 24),
        (2, 1, 128, 0),
        (2, 1, 10, 0),
    ];
    for device in devices() {
        for (heads, kv_heads, head_dim, rotary_dim) in shapes {
            for dtype in FLOATS {
                for bits in 0..8 {
                    let [interleaved, norms, in_place] = [1, 2, 4].map(|bit| bits & bit != 0);
                    let shape = shape(heads, kv_heads, head_dim);
                    check_turn(
                        &device,
                        Turn { shape, dtype, rotary_dim, interleaved, norms, in_place },
                    );
                }
            }
        }
    }
}
