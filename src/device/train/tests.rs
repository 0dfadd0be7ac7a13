use super::*;
use crate::device::testing::{assert_close, devices, read_f32, rounded, upload_as};
use crate::kernels::attention::Rule;
use crate::kernels::tests::random;
use crate::kernels::{backward, ops, segments};
use crate::philox::philox4x32;

const DTYPES: [(Dtype, f32); 3] = [(Dtype::F32, 1e-5), (Dtype::F16, 2e-3), (Dtype::Bf16, 2e-2)];

/// Values in a device's array of that type, and as the host has them.
fn both(device: &Device, dtype: Dtype, len: usize, seed: u64) -> (Array, Vec<f32>) {
    let values = rounded(dtype, &random(len, seed));
    (upload_as(device, dtype, &values), values)
}

#[test]
fn norms_of_heads_and_their_gradients_equal_those_of_the_host() {
    for device in devices() {
        for (dtype, tolerance) in DTYPES {
            for (width, per_row, rows, centred) in
                [(40, 1, 3, false), (16, 3, 2, false), (300, 1, 2, true), (8, 2, 3, true)]
            {
                let len = rows * per_row * width;
                let (x, x_host) = both(&device, dtype, len, 1);
                let (dy, dy_host) = both(&device, dtype, len, 2);
                let (dx, dx_host) = both(&device, dtype, len, 3);
                let (weight, w) = both(&device, Dtype::F32, width, 4);
                let (bias, b) = both(&device, Dtype::F32, width, 5);
                let norm = NormOf { weight: &weight, bias: centred.then_some(&bias), eps: 1e-5 };
                let out = device.array(dtype, len).unwrap();
                let rows_of = |x: &Array| Rows::new(x, per_row * width);
                head_norm(&device, &rows_of(&x), norm, [rows, per_row], &rows_of(&out)).unwrap();
                let shape = [rows, per_row];
                norm_backward(&device, &rows_of(&x), norm, shape, &rows_of(&dy), &dx, true)
                    .unwrap();
                let (mut want, mut d) = (vec![0.0; len], vec![0.0; len]);
                if centred {
                    ops::layer_norm(&x_host, &w, Some(&b), 1e-5, &mut want);
                    backward::layer_norm(&x_host, &w, 1e-5, &dy_host, &mut d);
                } else {
                    ops::rms_norm(&x_host, &w, 1e-5, &mut want);
                    backward::rms_norm(&x_host, &w, 1e-5, &dy_host, &mut d);
                }
                assert_close(&read_f32(&device, &out), &want, tolerance);
                d.iter_mut().zip(dx_host).for_each(|(d, before)| *d += before);
                assert_close(&read_f32(&device, &dx), &d, tolerance);
                // In place of what it comes from.
                norm_backward(&device, &rows_of(&x), norm, shape, &rows_of(&dy), &dy, false)
                    .unwrap();
                norm_backward(&device, &rows_of(&x), norm, shape, &rows_of(&dx), &dx, false)
                    .unwrap();
            }
        }
    }
}

#[test]
fn rotations_turn_the_columns_asked_for_and_back() {
    let (rows, heads, head_dim, stride) = (3, 2, 12, 30);
    for device in devices() {
        for (rotary_dim, interleaved) in [(12, false), (8, true), (4, false)] {
            let half = rotary_dim / 2;
            let (cos, c) = both(&device, Dtype::F32, rows * half, 1);
            let (sin, s) = both(&device, Dtype::F32, rows * half, 2);
            let table = RotationTable { cos, sin, rotary_dim, interleaved };
            for back in [false, true] {
                let (x, mut want) = both(&device, Dtype::F32, rows * stride, 3);
                let columns = Rows::new(&x, stride).from_column(6);
                rotate(&device, &table, &columns, [heads, head_dim], back).unwrap();
                for row in 0..rows {
                    let part = &mut want[row * stride + 6..][..heads * head_dim];
                    let (c, s) = (&c[row * half..][..half], &s[row * half..][..half]);
                    match back {
                        false => ops::rotate(part, head_dim, rotary_dim, interleaved, c, s),
                        true => backward::rotate(part, head_dim, rotary_dim, interleaved, c, s),
                    }
                }
                assert_close(&read_f32(&device, &x), &want, 1e-6);
            }
        }
    }
}

#[test]
fn gradients_of_activations_equal_those_of_the_host() {
    let (rows, inner) = (3, 37);
    for device in devices() {
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            for (dtype, tolerance) in DTYPES {
                let (gate_up, mut host) = both(&device, dtype, rows * 2 * inner, 1);
                // Far out too.
                for (x, at) in [(-100.0, 0), (100.0, 1), (-12.0, 2), (0.0, 3), (13.0, 4)] {
                    host[at] = x;
                }
                device.copy(&upload_as(&device, dtype, &host), &gate_up).unwrap();
                let (d, d_host) = both(&device, dtype, rows * inner, 2);
                let out = device.array(dtype, 2 * rows * inner).unwrap();
                gated_backward(&device, activation, &gate_up, inner, &d, &out).unwrap();
                let column = |first: usize| -> Vec<f32> {
                    host.chunks(2 * inner).flat_map(|r| &r[first..first + inner]).copied().collect()
                };
                let (gate, up) = (column(0), column(inner));
                let (mut dgate, mut dup) = (vec![0.0; gate.len()], vec![0.0; up.len()]);
                backward::gated(activation, &gate, &up, &d_host, &mut dgate, &mut dup);
                let want: Vec<f32> = (dgate.chunks(inner).zip(dup.chunks(inner)))
                    .flat_map(|(a, b)| [a, b].concat())
                    .collect();
                assert_close(&read_f32(&device, &out), &want, tolerance);
                let mut want = d_host.clone();
                backward::activate(activation, &gate, &mut want);
                activate_backward(&device, activation, &upload_as(&device, dtype, &gate), &d)
                    .unwrap();
                assert_close(&read_f32(&device, &d), &want, tolerance);
            }
        }
    }
}

#[test]
fn dropout_takes_the_draws_of_the_host() {
    let numbers = [7u64, 1 << 40, (3 << 40) + 5];
    for device in devices() {
        let on_device = device.upload(&numbers).unwrap();
        for (cols, first_col) in [(12, 0), (13, 5), (1, 2)] {
            let draws = Draws { threshold: 1 << 31, factor: 2.0, key: [3, 4], first_col };
            let (x, mut want) = both(&device, Dtype::F32, 3 * cols, 1);
            let out = device.array(Dtype::F32, 3 * cols).unwrap();
            dropout(&device, &draws, &x, &on_device, &out, false).unwrap();
            for (row, number) in want.chunks_mut(cols).zip(numbers) {
                for (i, x) in row.iter_mut().enumerate() {
                    let col = first_col + i;
                    let counter = [(col / 4) as u32, number as u32, (number >> 32) as u32, 1];
                    let draw = philox4x32(counter, [3, 4])[col % 4];
                    *x *= if draw < 1 << 31 { 0.0 } else { 2.0 };
                }
            }
            assert_eq!(read_f32(&device, &out), want);
            dropout(&device, &draws, &x, &on_device, &out, true).unwrap();
            let twice: Vec<f32> = want.iter().map(|x| 2.0 * x).collect();
            assert_eq!(read_f32(&device, &out), twice);
        }
    }
}

#[test]
fn the_loss_and_its_gradient_are_those_of_softmax() {
    let (rows, ids, first_id) = (3, 50, 20);
    let targets = [25i32, 69, 3];
    for device in devices() {
        for softcap in [None, Some(0.7f32)] {
            let (values, host) = both(&device, Dtype::F32, rows * ids, 1);
            let on_device = device.upload(&targets).unwrap();
            let logits = Logits { values: &values, targets: &on_device, first_id, softcap };
            let sums = device.array(Dtype::F32, 3 * rows).unwrap();
            loss_sums(&device, &logits, &sums).unwrap();
            let d = device.array(Dtype::F32, rows * ids).unwrap();
            loss_gradient(&device, &logits, &sums, &d).unwrap();
            loss_gradient(&device, &logits, &sums, &values).unwrap();
            let (mut want_sums, mut want) = (Vec::new(), Vec::new());
            for (row, target) in host.chunks(ids).zip(targets) {
                let capped = |x: f32| softcap.map_or(x, |cap| cap * (x / cap).tanh());
                let row: Vec<f32> = row.iter().map(|x| capped(*x)).collect();
                let top = row.iter().copied().fold(f32::MIN, f32::max);
                let sum: f32 = row.iter().map(|x| (x - top).exp()).sum();
                let place = target - first_id as i32;
                let own = (0..ids as i32).contains(&place).then_some(place as usize);
                want_sums.extend([top, sum, own.map_or(0.0, |place| row[place])]);
                want.extend(row.iter().enumerate().map(|(i, x)| {
                    let slope = softcap.map_or(1.0, |cap| 1.0 - (x / cap) * (x / cap));
                    let hit = if own == Some(i) { 1.0 } else { 0.0 };
                    ((x - top).exp() / sum - hit) * slope
                }));
            }
            assert_close(&read_f32(&device, &sums), &want_sums, 1e-6);
            assert_close(&read_f32(&device, &d), &want, 1e-6);
            assert_eq!(read_f32(&device, &values), read_f32(&device, &d));
        }
    }
}

#[test]
fn an_embeddings_gradient_sums_the_rows_of_each_id() {
    let (tokens, width) = ([5u32, 9, 5, 2, 7, 5], 10);
    for device in devices() {
        let rows = TokenRows::new(&device, &tokens, 3..8).unwrap();
        let (d, host) = both(&device, Dtype::F32, tokens.len() * width, 1);
        let (gradient, mut want) = both(&device, Dtype::F32, 5 * width, 2);
        embedding_gradient(&device, &rows, &d, 0.5, width, &gradient).unwrap();
        for (token, d) in tokens.iter().zip(host.chunks(width)) {
            if let Some(row) = (*token as usize).checked_sub(3).filter(|row| *row < 5) {
                want[row * width..][..width].iter_mut().zip(d).for_each(|(w, d)| *w += 0.5 * d);
            }
        }
        assert_close(&read_f32(&device, &gradient), &want, 1e-6);
    }
}

struct Case {
    heads: Heads,
    lengths: Vec<usize>,
    rule: Rule<'static>,
}

const RULE: Rule<'static> = Rule { window: None, softcap: None, slopes: None };
const SLOPES: [f32; 4] = [0.707, 0.5, 0.3536, 0.25];

impl Case {
    fn new(
        [heads, kv_heads, head_dim]: [usize; 3],
        lengths: &[usize],
        rule: Rule<'static>,
    ) -> Self {
        let heads = Heads { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        Self { heads, lengths: lengths.to_vec(), rule }
    }

    fn segments(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let segment = |len: &usize| {
            end += len;
            end - len..end
        };
        self.lengths.iter().map(segment).collect()
    }

    /// Out, log-sum-exps, dq, dk and dv of the host.
    fn on_the_host(&self, [q, k, v, dout]: [&[f32]; 4]) -> [Vec<f32>; 5] {
        let (h, rule, segments) = (self.heads, self.rule, self.segments());
        let zeros = |like: &[f32]| vec![0.0; like.len()];
        let (mut out, mut lse) = (zeros(q), vec![0.0; q.len() / h.head_dim]);
        segments::attention(h, rule, q, k, v, &segments, &mut out, &mut lse);
        let (mut dq, mut dk, mut dv) = (zeros(q), zeros(k), zeros(v));
        segments::attention_backward(
            h, rule, q, k, v, &out, &lse, dout, &segments, &mut dq, &mut dk, &mut dv,
        );
        [out, lse, dq, dk, dv]
    }

    /// The same on a device, from columns of one matrix as a fused projection leaves them.
    fn on(&self, device: &Device, dtype: Dtype, [q, k, v, dout]: [&[f32]; 4]) -> [Vec<f32>; 5] {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let rows: usize = self.lengths.iter().sum();
        let widths = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
        let stride: usize = widths.iter().sum();
        let mut fused = Vec::new();
        for row in 0..rows {
            for (part, width) in [q, k, v].into_iter().zip(widths) {
                fused.extend_from_slice(&part[row * width..][..width]);
            }
        }
        let columns = |array: &Array| {
            let all = Rows::new(array, stride);
            let (k, v) = (all.from_column(widths[0]), all.from_column(widths[0] + widths[1]));
            Qkv { q: all, k, v }
        };
        let fused = upload_as(device, dtype, &fused);
        let dout = upload_as(device, dtype, dout);
        let attention = Attention {
            heads: self.heads,
            window: self.rule.window,
            softcap: self.rule.softcap,
            slopes: self.rule.slopes.map(|slopes| device.upload(slopes).unwrap()),
        };
        let segments = Segments::new(device, &self.segments(), dtype, head_dim).unwrap();
        let array = |dtype, len| device.array(dtype, len).unwrap();
        let out = array(dtype, rows * widths[0]);
        let [lse, delta] = [0, 1].map(|_| array(Dtype::F32, rows * heads));
        attention.forward(device, &columns(&fused), &segments, &out, &lse).unwrap();
        let gradients = array(dtype, fused.len());
        let given = [&out, &dout];
        let (qkv, to) = (columns(&fused), columns(&gradients));
        attention.backward(device, &qkv, &segments, given, &lse, &delta, &to).unwrap();
        let gradients = read_f32(device, &gradients);
        let mut first = 0;
        let [dq, dk, dv] = widths.map(|width| {
            let cols = first..first + width;
            first = cols.end;
            gradients.chunks(stride).flat_map(|row| &row[cols.clone()]).copied().collect()
        });
        [read_f32(device, &out), read_f32(device, &lse), dq, dk, dv]
    }

    fn check(&self, device: &Device, dtype: Dtype, tolerance: f32) {
        let rows: usize = self.lengths.iter().sum();
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let values = |heads, seed| rounded(dtype, &random(rows * heads * head_dim, seed));
        let (q, k) = (values(heads, 1), values(kv_heads, 2));
        let (v, dout) = (values(kv_heads, 3), values(heads, 4));
        let given = [&q[..], &k, &v, &dout];
        let want = self.on_the_host(given);
        for (got, want) in self.on(device, dtype, given).iter().zip(&want) {
            assert_close(got, want, tolerance);
        }
    }
}

#[test]
fn attention_and_its_gradients_equal_those_of_the_host() {
    for device in devices() {
        for (dtype, tolerance) in DTYPES {
            Case::new([4, 2, 16], &[37, 3], RULE).check(&device, dtype, tolerance);
            Case::new([2, 1, 6], &[70, 0, 1], RULE).check(&device, dtype, tolerance);
        }
        for window in [1, 17, 40] {
            let rule = Rule { window: Some(window), ..RULE };
            Case::new([2, 1, 8], &[75, 50], rule).check(&device, Dtype::F32, 1e-5);
        }
        let rule = Rule { window: Some(20), softcap: Some(0.5), slopes: Some(&SLOPES) };
        Case::new([4, 1, 8], &[41], rule).check(&device, Dtype::F32, 1e-5);
    }
}

/// Every width of heads that there is a kernel for, and several tiles.
#[test]
fn attention_of_every_width_equals_that_of_the_host() {
    let device = Device::emulated();
    for (dtype, tolerance) in DTYPES {
        for head_dim in [24, 64, 80, 128, 256] {
            Case::new([2, 1, head_dim], &[5, 33], RULE).check(&device, dtype, tolerance);
        }
        let rule = Rule { window: Some(100), softcap: Some(3.0), slopes: Some(&SLOPES[..2]) };
        Case::new([2, 2, 32], &[150], rule).check(&device, dtype, tolerance);
    }
}

/// The sums follow a maximum that rises late, by more than they are let run behind.
#[test]
fn attention_follows_scores_that_rise() {
    let device = Device::emulated();
    for (dtype, tolerance) in DTYPES {
        let case = Case::new([1, 1, 16], &[200], RULE);
        let (q, v, dout) = (vec![4.0; 200 * 16], random(200 * 16, 1), random(200 * 16, 2));
        let k: Vec<f32> = (0..200 * 16).map(|i| (i / 16) as f32 / 64.0).collect();
        let [k, v, dout] = [k, v, dout].map(|x| rounded(dtype, &x));
        let given = [&q[..], &k, &v, &dout];
        let want = case.on_the_host(given);
        for (got, want) in case.on(&device, dtype, given).iter().zip(&want) {
            assert_close(got, want, 4.0 * tolerance);
        }
    }
}

#[test]
fn a_score_that_is_not_finite_shows_in_every_query_that_sees_it() {
    let device = Device::emulated();
    let case = Case::new([1, 1, 16], &[120], RULE);
    let (q, mut k) = (random(120 * 16, 1), random(120 * 16, 2));
    k[20 * 16] = f32::NAN;
    let [out, ..] = case.on(&device, Dtype::F32, [&q, &k, &q, &q]);
    for (row, out) in out.chunks(16).enumerate() {
        assert_eq!(out.iter().all(|x| x.is_nan()), row >= 20, "{row}");
    }
}
