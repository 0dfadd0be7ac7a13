//! Row-wise and elementwise operations on the device: norms, activations, sums, rows picked
//! and added. Their kernels are in kernels/ops.cu; [`linear`](super::linear) has the embedding.
//!
//! Rows are contiguous, and how many there are follows from the arrays' lengths; no rows are
//! no work. Nothing here allocates or reads back. The formulas are those of
//! [`kernels::ops`](crate::kernels::ops), in f32 whatever the arrays hold.
//!
//! Left out: softmax outside of attention and sampling, and sums over rows that may be the
//! same (their order would be by chance).

use super::{Arg, Array, Device, Dtype};
use crate::Result;
use crate::kernels::ops::Activation;

/// Values that a thread takes at a time.
const PIECE: usize = 8;
/// Threads of a block of elementwise work.
const THREADS: usize = 256;
/// Blocks of elementwise work at most; each then does several parts.
const MAX_BLOCKS: usize = 8192;
/// The longest row that a norm keeps in the registers of 1024 threads.
const MAX_NORM_WIDTH: usize = 2 * PIECE * 1024;

/// The values of a norm over rows: a layer norm where there is a bias, else an RMS norm.
#[derive(Clone)]
pub struct Norm {
    /// A factor a column, f32.
    pub weight: Array,
    /// What a column of a layer norm is moved by, f32.
    pub bias: Option<Array>,
    /// What keeps the root from zero.
    pub eps: f32,
}

impl Norm {
    /// Values of a row.
    pub fn width(&self) -> usize {
        self.weight.len()
    }

    fn check(&self) {
        assert!((1..=MAX_NORM_WIDTH).contains(&self.width()), "a norm of {}", self.width());
        assert_eq!(self.weight.dtype(), Dtype::F32);
        assert!(
            self.bias.as_ref().is_none_or(|bias| {
                bias.dtype() == Dtype::F32 && bias.len() == self.weight.len()
            })
        );
    }

    fn arrays(&self) -> impl Iterator<Item = &Array> {
        std::iter::once(&self.weight).chain(&self.bias)
    }

    /// One block a row, and threads enough for a row in as few pieces as may be.
    fn launch(&self, device: &Device, kernel: &str, rows: usize, args: &[Arg]) -> Result<()> {
        let threads = self.width().div_ceil(PIECE).next_multiple_of(32).min(1024);
        device.launch(kernel, [grid(rows), 1, 1], [threads as u32, 1, 1], 0, args)
    }
}

/// `out = norm(x)`; `out` may be `x`.
///
/// # Errors
/// A device fault.
pub fn norm(device: &Device, x: &Array, norm: &Norm, out: &Array) -> Result<()> {
    norm.check();
    let rows = rows_of(x, norm.width());
    assert_eq!(x.len(), out.len());
    if rows == 0 {
        return Ok(());
    }
    let wide = wide([norm.width()], [x, out].into_iter().chain(norm.arrays()));
    let kernel = format!("norm_{}_{}", x.dtype().suffix(), out.dtype().suffix());
    let (bias, width) = (norm.bias.as_ref().into(), norm.width());
    norm.launch(
        device,
        &kernel,
        rows,
        &[
            x.into(),
            (&norm.weight).into(),
            bias,
            norm.eps.into(),
            out.into(),
            width.into(),
            wide.into(),
        ],
    )
}

/// `x += y`, then `out = norm(x)`; `x` is f32.
///
/// # Errors
/// A device fault.
pub fn add_norm(device: &Device, y: &Array, x: &Array, norm: &Norm, out: &Array) -> Result<()> {
    norm.check();
    let rows = rows_of(x, norm.width());
    assert!(x.dtype() == Dtype::F32 && y.len() == x.len() && out.len() == x.len());
    if rows == 0 {
        return Ok(());
    }
    let wide = wide([norm.width()], [y, x, out].into_iter().chain(norm.arrays()));
    let kernel = format!("add_norm_{}_{}", y.dtype().suffix(), out.dtype().suffix());
    let (bias, width) = (norm.bias.as_ref().into(), norm.width());
    norm.launch(
        device,
        &kernel,
        rows,
        &[
            y.into(),
            x.into(),
            (&norm.weight).into(),
            bias,
            norm.eps.into(),
            out.into(),
            width.into(),
            wide.into(),
        ],
    )
}

/// `x += post(y)`; `x` is f32.
///
/// # Errors
/// A device fault.
pub fn norm_add(device: &Device, y: &Array, post: &Norm, x: &Array) -> Result<()> {
    post.check();
    let rows = rows_of(x, post.width());
    assert!(x.dtype() == Dtype::F32 && y.len() == x.len());
    if rows == 0 {
        return Ok(());
    }
    let wide = wide([post.width()], [y, x].into_iter().chain(post.arrays()));
    let kernel = format!("norm_add_{}", y.dtype().suffix());
    let (bias, width) = (post.bias.as_ref().into(), post.width());
    post.launch(
        device,
        &kernel,
        rows,
        &[
            y.into(),
            (&post.weight).into(),
            bias,
            post.eps.into(),
            x.into(),
            width.into(),
            wide.into(),
        ],
    )
}

/// `x += post(y)`, then `out = next(x)`, in one launch; `x` is f32.
///
/// # Errors
/// A device fault.
pub fn norm_add_norm(
    device: &Device,
    y: &Array,
    post: &Norm,
    x: &Array,
    next: &Norm,
    out: &Array,
) -> Result<()> {
    post.check();
    next.check();
    assert_eq!(post.width(), next.width());
    let rows = rows_of(x, post.width());
    assert!(x.dtype() == Dtype::F32 && y.len() == x.len() && out.len() == x.len());
    if rows == 0 {
        return Ok(());
    }
    let arrays = [y, x, out].into_iter().chain(post.arrays()).chain(next.arrays());
    let wide = wide([post.width()], arrays);
    let kernel = format!("norm_add_norm_{}_{}", y.dtype().suffix(), out.dtype().suffix());
    let (post_bias, next_bias) = (post.bias.as_ref().into(), next.bias.as_ref().into());
    post.launch(
        device,
        &kernel,
        rows,
        &[
            y.into(),
            (&post.weight).into(),
            post_bias,
            post.eps.into(),
            x.into(),
            (&next.weight).into(),
            next_bias,
            next.eps.into(),
            out.into(),
            post.width().into(),
            wide.into(),
        ],
    )
}

/// `out = act(gate) * up`, where a row of `gate_up` is `inner` gates and then as many ups.
///
/// # Errors
/// A device fault.
pub fn gated(
    device: &Device,
    act: Activation,
    gate_up: &Array,
    inner: usize,
    out: &Array,
) -> Result<()> {
    let rows = rows_of(out, inner);
    assert_eq!(gate_up.len(), 2 * out.len());
    if rows == 0 {
        return Ok(());
    }
    let (gate, up) = (gate_up.slice(0..gate_up.len()), gate_up.slice(inner..gate_up.len()));
    launch_gated(device, act, (&gate, &up, 2 * inner), inner, out)
}

/// `out = act(gate) * up`, elementwise.
///
/// # Errors
/// A device fault.
pub fn gated_pair(
    device: &Device,
    act: Activation,
    gate: &Array,
    up: &Array,
    out: &Array,
) -> Result<()> {
    assert!(gate.len() == out.len() && up.len() == out.len() && up.dtype() == gate.dtype());
    if out.is_empty() {
        return Ok(());
    }
    launch_gated(device, act, (gate, up, out.len()), out.len(), out)
}

fn launch_gated(
    device: &Device,
    act: Activation,
    (gate, up, stride): (&Array, &Array, usize),
    inner: usize,
    out: &Array,
) -> Result<()> {
    assert_eq!(gate.dtype(), out.dtype());
    let wide = wide([inner, stride], [gate, up, out]);
    let rows = out.len() / inner;
    elementwise(
        device,
        &format!("gated_{}", out.dtype().suffix()),
        rows * inner.next_multiple_of(PIECE),
        &[
            number(act),
            gate.into(),
            up.into(),
            out.into(),
            rows.into(),
            inner.into(),
            long(stride),
            wide.into(),
        ],
    )
}

/// `out = act(x)`, elementwise; `out` may be `x`.
///
/// # Errors
/// A device fault.
pub fn activate(device: &Device, act: Activation, x: &Array, out: &Array) -> Result<()> {
    assert!(x.len() == out.len() && x.dtype() == out.dtype());
    let wide = wide([x.len()], [x, out]);
    let args = [number(act), x.into(), out.into(), long(x.len()), wide.into()];
    elementwise(device, &format!("activate_{}", x.dtype().suffix()), x.len(), &args)
}

/// `x += bias` for each row of as many values as `bias`, which is f32.
///
/// # Errors
/// A device fault.
pub fn add_bias(device: &Device, x: &Array, bias: &Array) -> Result<()> {
    assert_eq!(bias.dtype(), Dtype::F32);
    let (rows, width) = (rows_of(x, bias.len()), bias.len());
    let wide = wide([width], [x, bias]);
    elementwise(
        device,
        &format!("add_bias_{}", x.dtype().suffix()),
        rows * width.next_multiple_of(PIECE),
        &[x.into(), bias.into(), rows.into(), width.into(), wide.into()],
    )
}

/// `x += y`, elementwise; `x` is f32.
///
/// # Errors
/// A device fault.
pub fn add(device: &Device, y: &Array, x: &Array) -> Result<()> {
    assert!(x.dtype() == Dtype::F32 && y.len() == x.len());
    let wide = wide([x.len()], [x, y]);
    let args = [y.into(), x.into(), long(x.len()), wide.into()];
    elementwise(device, &format!("add_{}", y.dtype().suffix()), x.len(), &args)
}

/// `x *= factor`, elementwise.
///
/// # Errors
/// A device fault.
pub fn scale(device: &Device, x: &Array, factor: f32) -> Result<()> {
    let args = [x.into(), factor.into(), long(x.len()), wide([x.len()], [x]).into()];
    elementwise(device, &format!("scale_{}", x.dtype().suffix()), x.len(), &args)
}

/// `x = cap * tanh(x / cap)`, elementwise; `x` is f32.
///
/// # Errors
/// A device fault.
pub fn softcap(device: &Device, x: &Array, cap: f32) -> Result<()> {
    assert_eq!(x.dtype(), Dtype::F32);
    let args = [x.into(), cap.into(), long(x.len()), wide([x.len()], [x]).into()];
    elementwise(device, "softcap", x.len(), &args)
}

/// The values of `from` in the dtype of `to`, rounded to nearest.
///
/// # Errors
/// A device fault.
pub fn convert(device: &Device, from: &Array, to: &Array) -> Result<()> {
    assert_eq!(from.len(), to.len());
    let wide = wide([to.len()], [from, to]);
    let kernel = format!("convert_{}_{}", from.dtype().suffix(), to.dtype().suffix());
    let args = [from.into(), to.into(), long(to.len()), wide.into()];
    elementwise(device, &kernel, to.len(), &args)
}

/// Row `indices[i]` of `from` becomes row i of `out`; an index of no row gives zeros.
///
/// # Errors
/// A device fault.
pub fn gather_rows(device: &Device, from: &Array, indices: &Array, out: &Array) -> Result<()> {
    assert!(indices.dtype() == Dtype::I32 && from.dtype() == out.dtype());
    if indices.is_empty() || out.is_empty() {
        return Ok(());
    }
    let width = out.len() / indices.len();
    assert_eq!(out.len(), indices.len() * width);
    let rows = rows_of(from, width);
    let bytes = width * from.dtype().bytes();
    let sixteen = bytes.is_multiple_of(16) && [from, out].iter().all(|a| is_aligned(a));
    let (kernel, unit) = if sixteen { ("gather_rows_16", 16) } else { ("gather_rows_2", 2) };
    assert!(bytes.is_multiple_of(unit));
    let units = bytes / unit;
    device.launch(
        kernel,
        [grid(indices.len()), 1, 1],
        [row_threads(units), 1, 1],
        0,
        &[from.into(), indices.into(), out.into(), rows.into(), units.into()],
    )
}

/// Adds row i of `from`, times `factors[i]`, to row `indices[i]` of `to`, which is f32. No two
/// indices are the same; a row whose index is of no row is left out.
///
/// # Errors
/// A device fault.
pub fn scatter_add_rows(
    device: &Device,
    from: &Array,
    indices: &Array,
    factors: Option<&Array>,
    to: &Array,
) -> Result<()> {
    assert!(indices.dtype() == Dtype::I32 && to.dtype() == Dtype::F32);
    assert!(factors.is_none_or(|f| f.dtype() == Dtype::F32 && f.len() == indices.len()));
    if indices.is_empty() || from.is_empty() {
        return Ok(());
    }
    let width = from.len() / indices.len();
    assert_eq!(from.len(), indices.len() * width);
    let rows = rows_of(to, width);
    let wide = wide([width], [from, to]);
    device.launch(
        &format!("scatter_add_rows_{}", from.dtype().suffix()),
        [grid(indices.len()), 1, 1],
        [row_threads(width.div_ceil(PIECE)), 1, 1],
        0,
        &[
            from.into(),
            indices.into(),
            factors.into(),
            to.into(),
            rows.into(),
            width.into(),
            wide.into(),
        ],
    )
}

// What the other wrappers share.

/// Rows of `width` values.
pub(super) fn rows_of(x: &Array, width: usize) -> usize {
    assert!(width > 0 && x.len().is_multiple_of(width), "{} values, rows of {width}", x.len());
    x.len() / width
}

/// 1 where rows of these widths, in these arrays, can go by 16 bytes, else 0.
pub(super) fn wide<'a>(
    widths: impl IntoIterator<Item = usize>,
    arrays: impl IntoIterator<Item = &'a Array>,
) -> i32 {
    let whole = widths.into_iter().all(|width| width.is_multiple_of(PIECE));
    i32::from(whole && arrays.into_iter().all(is_aligned))
}

fn is_aligned(array: &Array) -> bool {
    array.address().is_multiple_of(16)
}

/// A dimension of a grid.
pub(super) fn grid(n: usize) -> u32 {
    i32::try_from(n).expect("fewer than 2^31 blocks").unsigned_abs()
}

/// Threads for a row of which each takes one unit at a time.
pub(super) fn row_threads(units: usize) -> u32 {
    units.next_multiple_of(32).clamp(32, THREADS) as u32
}

/// A 64-bit integer argument.
pub(super) fn long(n: usize) -> Arg<'static> {
    Arg::U64(n as u64)
}

/// The number that kernels know an activation by.
pub(super) fn number(act: Activation) -> Arg<'static> {
    Arg::I32(match act {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    })
}

/// `len` values in pieces, by a grid of blocks; nothing for no values.
fn elementwise(device: &Device, kernel: &str, len: usize, args: &[Arg]) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    let blocks = len.div_ceil(PIECE * THREADS).min(MAX_BLOCKS) as u32;
    device.launch(kernel, [blocks, 1, 1], [THREADS as u32, 1, 1], 0, args)
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::testing::{assert_close, devices, read_f32, rounded, upload_as};
    use crate::kernels::ops as cpu;
    use crate::kernels::tests::random;

    const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh];

    /// How far a value of that type may be from the formula's.
    fn tolerance(dtype: Dtype) -> f32 {
        match dtype {
            Dtype::F32 => 1e-5,
            Dtype::F16 => 1e-3,
            _ => 8e-3,
        }
    }

    /// The CPU's norm.
    fn normed(x: &[f32], weight: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        match bias {
            None => cpu::rms_norm(x, weight, 1e-5, &mut out),
            bias => cpu::layer_norm(x, weight, bias, 1e-5, &mut out),
        }
        out
    }

    #[test]
    fn norms_equal_the_cpus() {
        let rows = 3;
        for device in devices() {
            // Odd, several warps, two pieces a thread.
            for width in [1, 64, 77, 520, 8 * 1024 + 72] {
                for (y_dtype, out_dtype) in FLOATS.iter().flat_map(|y| FLOATS.map(|o| (*y, o))) {
                    for with_bias in [false, true] {
                        check_norms(&device, [rows, width], y_dtype, out_dtype, with_bias);
                    }
                    if width > 1024 {
                        break;
                    }
                }
            }
        }
    }

    fn check_norms(
        device: &Device,
        [rows, width]: [usize; 2],
        y_dtype: Dtype,
        out_dtype: Dtype,
        with_bias: bool,
    ) {
        let len = rows * width;
        let y: Vec<f32> = random(len, 1).iter().map(|v| 3.0 * v + 1.0).collect();
        let (y, x) = (rounded(y_dtype, &y), random(len, 2));
        let (weights, bias) = (random(2 * width, 3), random(width, 4));
        let (post_weight, weight) = weights.split_at(width);
        let bias = with_bias.then_some(&bias[..]);
        let there = |weight: &[f32]| Norm {
            weight: device.upload(weight).unwrap(),
            bias: bias.map(|bias| device.upload(bias).unwrap()),
            eps: 1e-5,
        };
        let (post, next) = (there(post_weight), there(weight));
        let y_there = upload_as(device, y_dtype, &y);
        let out = upload_as(device, out_dtype, &vec![7.0; len]);
        let close = |want: &[f32]| {
            assert_close(&read_f32(device, &out), &rounded(out_dtype, want), tolerance(out_dtype));
        };

        norm(device, &y_there, &next, &out).unwrap();
        close(&normed(&y, weight, bias));

        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        let x_there = device.upload(&x).unwrap();
        add_norm(device, &y_there, &x_there, &next, &out).unwrap();
        assert_eq!(read_f32(device, &x_there), sum);
        close(&normed(&sum, weight, bias));

        let mut sum = normed(&y, post_weight, bias);
        sum.iter_mut().zip(&x).for_each(|(sum, x)| *sum += x);
        for with_next in [false, true] {
            let x_there = device.upload(&x).unwrap();
            if with_next {
                norm_add_norm(device, &y_there, &post, &x_there, &next, &out).unwrap();
                // The sum's rounding, enlarged by the norm of what may be a short row.
                if width > 1 {
                    close(&normed(&read_f32(device, &x_there), weight, bias));
                }
            } else {
                norm_add(device, &y_there, &post, &x_there).unwrap();
            }
            assert_close(&read_f32(device, &x_there), &sum, 1e-5);
        }
    }

    #[test]
    fn activations_equal_the_cpus() {
        let device = Device::emulated();
        for (dtype, [rows, inner]) in
            FLOATS.iter().flat_map(|d| [[3, 5], [2, 24], [1, 3000]].map(|s| (*d, s)))
        {
            let gate_up: Vec<f32> = random(2 * rows * inner, 1).iter().map(|v| 12.0 * v).collect();
            let gate_up = rounded(dtype, &gate_up);
            let half = |first: usize| -> Vec<f32> {
                gate_up.chunks(inner).skip(first).step_by(2).flatten().copied().collect()
            };
            let (gate, up) = (half(0), half(1));
            for act in ACTIVATIONS {
                let mut want = vec![0.0; gate.len()];
                cpu::gated(act, &gate, &up, &mut want);
                let out = upload_as(&device, dtype, &vec![7.0; want.len()]);
                let together = upload_as(&device, dtype, &gate_up);
                gated(&device, act, &together, inner, &out).unwrap();
                assert_close(&read_f32(&device, &out), &want, tolerance(dtype));
                let (g, u) = (upload_as(&device, dtype, &gate), upload_as(&device, dtype, &up));
                gated_pair(&device, act, &g, &u, &out).unwrap();
                assert_close(&read_f32(&device, &out), &want, tolerance(dtype));
                let mut want = gate.clone();
                cpu::activate(act, &mut want);
                activate(&device, act, &g, &g).unwrap();
                assert_close(&read_f32(&device, &g), &want, tolerance(dtype));
            }
        }
    }

    #[test]
    fn elementwise_sums_factors_and_caps_equal_the_formulas() {
        let device = Device::emulated();
        for (dtype, [rows, width]) in
            FLOATS.iter().flat_map(|d| [[3, 5], [2, 24], [1, 5001]].map(|s| (*d, s)))
        {
            let len = rows * width;
            let x: Vec<f32> = random(len, 1).iter().map(|v| 40.0 * v).collect();
            let (y, bias) = (rounded(dtype, &random(len, 2)), random(width, 3));

            let there = upload_as(&device, dtype, &y);
            add_bias(&device, &there, &device.upload(&bias).unwrap()).unwrap();
            let want: Vec<f32> = y.iter().zip(bias.iter().cycle()).map(|(y, b)| y + b).collect();
            assert_eq!(read_f32(&device, &there), rounded(dtype, &want));

            let there = upload_as(&device, dtype, &y);
            let sum = device.upload(&x).unwrap();
            add(&device, &there, &sum).unwrap();
            let want: Vec<f32> = y.iter().zip(&x).map(|(y, x)| y + x).collect();
            assert_eq!(read_f32(&device, &sum), want);

            scale(&device, &there, 0.3).unwrap();
            let want: Vec<f32> = y.iter().map(|y| y * 0.3).collect();
            assert_eq!(read_f32(&device, &there), rounded(dtype, &want));

            let there = device.upload(&x).unwrap();
            softcap(&device, &there, 30.0).unwrap();
            let mut want = x.clone();
            cpu::softcap(&mut want, 30.0);
            assert_close(&read_f32(&device, &there), &want, 1e-5);

            for to in FLOATS {
                let (from, to) = (upload_as(&device, dtype, &y), device.array(to, len).unwrap());
                convert(&device, &from, &to).unwrap();
                assert_eq!(read_f32(&device, &to), rounded(to.dtype(), &y));
            }
        }
    }

    #[test]
    fn rows_are_picked_and_added_where_the_indices_say() {
        let device = Device::emulated();
        let indices = [2, -1, 0, 5, 1];
        let there = device.upload(&indices).unwrap();
        for (dtype, width) in FLOATS.iter().flat_map(|d| [1, 7, 16, 600].map(|w| (*d, w))) {
            let from = rounded(dtype, &random(3 * width, 1));
            let row = |values: &[f32], i: i32| match usize::try_from(i) {
                Ok(i) if i < 3 => values[i * width..][..width].to_vec(),
                _ => vec![0.0; width],
            };
            let out = upload_as(&device, dtype, &vec![7.0; 5 * width]);
            gather_rows(&device, &upload_as(&device, dtype, &from), &there, &out).unwrap();
            let want: Vec<f32> = indices.iter().flat_map(|i| row(&from, *i)).collect();
            assert_eq!(read_f32(&device, &out), want);

            let (added, before) = (rounded(dtype, &random(5 * width, 2)), random(3 * width, 3));
            for factors in [None, Some([0.5f32, 1.0, 2.0, 1.0, -1.0])] {
                let mut want = before.clone();
                for (i, index) in indices.iter().enumerate().filter(|(_, x)| (0..3).contains(*x)) {
                    let (factor, row) =
                        (factors.map_or(1.0, |f| f[i]), &added[i * width..][..width]);
                    let to = &mut want[*index as usize * width..][..width];
                    to.iter_mut().zip(row).for_each(|(to, x)| *to += factor * x);
                }
                let to = device.upload(&before).unwrap();
                let from = upload_as(&device, dtype, &added);
                let factors = factors.map(|f| device.upload(&f).unwrap());
                scatter_add_rows(&device, &from, &there, factors.as_ref(), &to).unwrap();
                assert_close(&read_f32(&device, &to), &want, 1e-6);
            }
        }
    }

    #[test]
    fn no_rows_are_no_work() {
        let device = Device::emulated();
        let none = device.array(Dtype::F32, 0).unwrap();
        let indices = device.array(Dtype::I32, 0).unwrap();
        let some = Norm { weight: device.upload(&[1.0f32; 8]).unwrap(), bias: None, eps: 1e-5 };
        norm(&device, &none, &some, &none).unwrap();
        add_norm(&device, &none, &none, &some, &none).unwrap();
        norm_add_norm(&device, &none, &some, &none, &some, &none).unwrap();
        gated(&device, Activation::Silu, &none, 4, &none).unwrap();
        scale(&device, &none, 2.0).unwrap();
        gather_rows(&device, &some.weight, &indices, &none).unwrap();
        scatter_add_rows(&device, &none, &indices, None, &some.weight).unwrap();
    }
}
