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
        assert!(self.bias.as_ref().is_none_or(|bias| {
            bias.dtype() == Dtype::F32 && bias.len() == self.weight.len()
        }));
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
    let (bias, width) = (optional(&norm.bias), norm.width());
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
    let (bias, width) = (optional(&norm.bias), norm.width());
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
    let (bias, width) = (optional(&post.bias), post.width());
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
    let (post_bias, next_bias) = (optional(&post.bias), optional(&next.bias));
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
    if out.len() == 0 {
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
    if indices.len() == 0 || out.len() == 0 {
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
    if indices.len() == 0 || from.len() == 0 {
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
            factors.map_or(Arg::U64(0), Arg::from),
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

/// An array's address, or null.
pub(super) fn optional(array: &Option<Array>) -> Arg<'_> {
    array.as_ref().map_or(Arg::U64(0), Arg::from)
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
