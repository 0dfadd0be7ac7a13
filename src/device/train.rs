//! What training needs of a device besides the operations of generation: gradients of norms,
//! activations and rotations, attention inside segments forward and backward, the loss over
//! the vocabulary, dropout. Their kernels are in kernels/train.cu; the formulas are those of
//! [`backward`](crate::kernels::backward), [`segments`](crate::kernels::segments),
//! [`dropout`](crate::train::dropout) and [`loss`](crate::train::loss).
//!
//! Nothing here allocates but [`Segments`], and nothing reads back.

use std::cmp::Reverse;
use std::ops::Range;

use super::{Arg, Array, Device, Dtype, blocks};
use crate::kernels::attention::Heads;
use crate::kernels::ops::Activation;
use crate::{Error, Result};

const THREADS: usize = 256;
/// Of a window that hides nothing; see `sees` in the kernels.
const NO_WINDOW: usize = 1 << 30;

/// A matrix whose rows lie `stride` values apart from the array's start on: columns of a
/// wider one.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Its values, from the first row's first.
    pub values: Array,
    /// Values from row to row.
    pub stride: usize,
}

impl Rows {
    /// Rows of `width` values one after another.
    pub fn new(values: &Array, width: usize) -> Self {
        Self { values: values.clone(), stride: width }
    }

    /// The columns from `first` on.
    ///
    /// # Panics
    /// If there are none.
    #[must_use]
    pub fn from_column(&self, first: usize) -> Self {
        let len = self.values.len();
        Self { values: self.values.slice(first.min(len)..len), stride: self.stride }
    }

    fn check(&self, dtype: Dtype, rows: usize, width: usize) {
        let needed = rows.checked_sub(1).map_or(0, |last| last * self.stride + width);
        assert!(self.values.dtype() == dtype && self.stride >= width);
        assert!(self.values.len() >= needed, "{:?} for {rows} rows of {width}", self.values);
    }
}

/// The weights of a norm over runs of as many values: an RMS norm, or, with a bias, a layer
/// norm.
#[derive(Debug, Clone, Copy)]
pub struct NormOf<'a> {
    /// f32.
    pub weight: &'a Array,
    /// f32.
    pub bias: Option<&'a Array>,
    /// Added to the mean square.
    pub eps: f32,
}

impl NormOf<'_> {
    fn launch(&self, device: &Device, kernel: &str, runs: usize, arguments: &[Arg]) -> Result<()> {
        let threads = self.weight.len().next_multiple_of(32).min(THREADS);
        device.launch(kernel, [blocks(runs, 1), 1, 1], [threads as u32, 1, 1], 0, arguments)
    }
}

/// Norms each of the `per_row` runs at the start of each of `rows` rows.
///
/// # Errors
/// A fault of the device.
pub fn head_norm(
    device: &Device,
    x: &Rows,
    norm: NormOf,
    [rows, per_row]: [usize; 2],
    out: &Rows,
) -> Result<()> {
    let (width, dtype) = (norm.weight.len(), x.values.dtype());
    x.check(dtype, rows, per_row * width);
    out.check(dtype, rows, per_row * width);
    norm.launch(
        device,
        &format!("head_norm_{}", dtype.suffix()),
        rows * per_row,
        &[
            (&x.values).into(),
            norm.weight.into(),
            norm.bias.into(),
            (&out.values).into(),
            width.into(),
            per_row.into(),
            x.stride.into(),
            out.stride.into(),
            norm.eps.into(),
            i32::from(norm.bias.is_some()).into(),
        ],
    )
}

/// The gradient of the norm of `x`, as [`head_norm`] takes it, from that of its result: `dx`, which
/// lies as `dy` and may be it; with `accumulate` it is added.
///
/// # Errors
/// A fault of the device.
pub fn norm_backward(
    device: &Device,
    x: &Rows,
    norm: NormOf,
    [rows, per_row]: [usize; 2],
    dy: &Rows,
    dx: &Array,
    accumulate: bool,
) -> Result<()> {
    let (width, dtype) = (norm.weight.len(), x.values.dtype());
    let dx = Rows { values: dx.clone(), stride: dy.stride };
    for matrix in [x, dy, &dx] {
        matrix.check(dtype, rows, per_row * width);
    }
    norm.launch(
        device,
        &format!("norm_backward_{}", dtype.suffix()),
        rows * per_row,
        &[
            (&x.values).into(),
            norm.weight.into(),
            (&dy.values).into(),
            (&dx.values).into(),
            width.into(),
            per_row.into(),
            x.stride.into(),
            dy.stride.into(),
            norm.eps.into(),
            i32::from(norm.bias.is_some()).into(),
            i32::from(accumulate).into(),
        ],
    )
}

/// The rotations of rows.
#[derive(Debug, Clone)]
pub struct RotationTable {
    /// `[rows, rotary_dim / 2]`.
    pub cos: Array,
    /// The same.
    pub sin: Array,
    /// Values at a head's start that are rotated.
    pub rotary_dim: usize,
    /// Pairs are neighbours.
    pub interleaved: bool,
}

/// Rotates the first `heads` heads of each row in place, or, `back`, takes their gradient.
///
/// # Errors
/// A fault of the device.
pub fn rotate(
    device: &Device,
    table: &RotationTable,
    x: &Rows,
    [heads, head_dim]: [usize; 2],
    back: bool,
) -> Result<()> {
    let half = table.rotary_dim / 2;
    if half == 0 {
        return Ok(());
    }
    let rows = table.cos.len() / half;
    assert!(table.sin.len() == table.cos.len() && 2 * half <= head_dim);
    x.check(x.values.dtype(), rows, heads * head_dim);
    let threads = (heads * half).next_multiple_of(32).min(THREADS);
    device.launch(
        &format!("turn_{}", x.values.dtype().suffix()),
        [blocks(rows, 1), 1, 1],
        [threads as u32, 1, 1],
        0,
        &[
            (&x.values).into(),
            (&table.cos).into(),
            (&table.sin).into(),
            heads.into(),
            x.stride.into(),
            head_dim.into(),
            table.rotary_dim.into(),
            i32::from(table.interleaved).into(),
            i32::from(back).into(),
        ],
    )
}

fn number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
    }
}

/// Launches over `len` values.
fn for_each(device: &Device, kernel: &str, len: usize, arguments: &[Arg]) -> Result<()> {
    // Enough blocks for every multiprocessor; each goes on until all is done.
    let most = 16 * device.properties().multiprocessors as u32;
    let grid = [blocks(len, THREADS).min(most), 1, 1];
    device.launch(kernel, grid, [THREADS as u32, 1, 1], 0, arguments)
}

/// The gradients of `act(gate) * up` from `d` `[m, inner]`: `gate_up` and `d_gate_up` have rows
/// of gate and up, `[m, 2 * inner]`.
///
/// # Errors
/// A fault of the device.
pub fn gated_backward(
    device: &Device,
    activation: Activation,
    gate_up: &Array,
    inner: usize,
    d: &Array,
    d_gate_up: &Array,
) -> Result<()> {
    assert!([gate_up, d_gate_up].iter().all(|x| x.dtype() == d.dtype() && x.len() == 2 * d.len()));
    let kernel = format!("gated_backward_{}", d.dtype().suffix());
    let len = Arg::U64(d.len() as u64);
    let arguments =
        [gate_up.into(), d.into(), d_gate_up.into(), len, inner.into(), number(activation).into()];
    for_each(device, &kernel, d.len(), &arguments)
}

/// `d *= act'(x)`.
///
/// # Errors
/// A fault of the device.
pub fn activate_backward(
    device: &Device,
    activation: Activation,
    x: &Array,
    d: &Array,
) -> Result<()> {
    assert!(x.dtype() == d.dtype() && x.len() == d.len());
    let len = Arg::U64(d.len() as u64);
    let arguments = [x.into(), d.into(), len, number(activation).into()];
    for_each(device, &format!("activate_backward_{}", d.dtype().suffix()), d.len(), &arguments)
}

/// The draws of one module's dropout.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    /// Draws below this are dropped.
    pub threshold: u32,
    /// What is kept is multiplied by this.
    pub factor: f32,
    /// What draws are keyed by.
    pub key: [u32; 2],
    /// This rank's first input feature in the whole.
    pub first_col: usize,
}

/// Writes `x` `[m, cols]` with values dropped to `out`, or adds it there. `numbers` is u64, one a
/// row.
///
/// # Errors
/// A fault of the device.
pub fn dropout(
    device: &Device,
    draws: &Draws,
    x: &Array,
    numbers: &Array,
    out: &Array,
    accumulate: bool,
) -> Result<()> {
    let rows = numbers.len();
    if rows == 0 {
        return Ok(());
    }
    let cols = x.len() / rows;
    assert!(numbers.dtype() == Dtype::U64 && rows * cols == x.len());
    assert!(out.dtype() == x.dtype() && out.len() == x.len());
    for_each(
        device,
        &format!("dropout_{}", x.dtype().suffix()),
        x.len().div_ceil(4),
        &[
            x.into(),
            out.into(),
            numbers.into(),
            rows.into(),
            cols.into(),
            draws.first_col.into(),
            draws.threshold.into(),
            draws.factor.into(),
            draws.key[0].into(),
            draws.key[1].into(),
            i32::from(accumulate).into(),
        ],
    )
}

/// Logits of some rows over some ids, and what they are to predict.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    /// f32 `[rows, ids]`.
    pub values: &'a Array,
    /// i32, one a row.
    pub targets: &'a Array,
    /// The first of the ids.
    pub first_id: usize,
    /// Logits become `cap · tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

impl Logits<'_> {
    fn ids(&self) -> usize {
        let rows = self.targets.len();
        assert!(self.values.len().is_multiple_of(rows) && self.targets.dtype() == Dtype::I32);
        self.values.len() / rows
    }
}

/// Of each row, into `sums` `[rows, 3]`: the largest logit, the sum of the exponentials of the
/// distances to it, and the target's logit, 0 if it is elsewhere.
///
/// # Errors
/// A fault of the device.
pub fn loss_sums(device: &Device, logits: &Logits, sums: &Array) -> Result<()> {
    let rows = logits.targets.len();
    if rows == 0 {
        return Ok(());
    }
    assert!(logits.values.dtype() == Dtype::F32 && sums.len() == 3 * rows);
    let arguments = [
        logits.values.into(),
        logits.targets.into(),
        sums.into(),
        logits.first_id.into(),
        logits.ids().into(),
        logits.softcap.unwrap_or(0.0).into(),
    ];
    device.launch("loss_sums", [blocks(rows, 1), 1, 1], [1024, 1, 1], 0, &arguments)
}

/// The gradient of the sum of the rows' losses with respect to the logits, from the sums over
/// the whole vocabulary; `d` may be the logits.
///
/// # Errors
/// A fault of the device.
pub fn loss_gradient(device: &Device, logits: &Logits, sums: &Array, d: &Array) -> Result<()> {
    let rows = logits.targets.len();
    if rows == 0 {
        return Ok(());
    }
    let ids = logits.ids();
    assert!(d.len() == logits.values.len() && sums.len() == 3 * rows);
    let grid = [blocks(ids, 4 * THREADS), blocks(rows, 1), 1];
    let arguments = [
        logits.values.into(),
        logits.targets.into(),
        sums.into(),
        d.into(),
        logits.first_id.into(),
        ids.into(),
        logits.softcap.unwrap_or(0.0).into(),
    ];
    let kernel = format!("loss_gradient_{}", d.dtype().suffix());
    device.launch(&kernel, grid, [THREADS as u32, 1, 1], 0, &arguments)
}

/// `sums[col] += weight · factors[col] · Σ a · b` over the rows.
///
/// # Errors
/// A fault of the device.
pub fn column_products(
    device: &Device,
    a: &Rows,
    b: &Rows,
    factors: &Array,
    rows: usize,
    weight: f32,
    sums: &Array,
) -> Result<()> {
    let cols = sums.len();
    assert!(factors.len() == cols && a.values.dtype() == b.values.dtype());
    a.check(a.values.dtype(), rows, cols);
    b.check(b.values.dtype(), rows, cols);
    let arguments = [
        (&a.values).into(),
        (&b.values).into(),
        factors.into(),
        sums.into(),
        rows.into(),
        cols.into(),
        a.stride.into(),
        b.stride.into(),
        weight.into(),
    ];
    let kernel = format!("column_products_{}", a.values.dtype().suffix());
    device.launch(&kernel, [blocks(cols, 64), 1, 1], [64, 1, 1], 0, &arguments)
}

/// `out = x · factors`, column by column.
///
/// # Errors
/// A fault of the device.
pub fn scale_columns(
    device: &Device,
    x: &Rows,
    factors: &Array,
    rows: usize,
    out: &Rows,
) -> Result<()> {
    let (cols, dtype) = (factors.len(), x.values.dtype());
    x.check(dtype, rows, cols);
    out.check(dtype, rows, cols);
    let arguments = [
        (&x.values).into(),
        factors.into(),
        (&out.values).into(),
        cols.into(),
        x.stride.into(),
        out.stride.into(),
    ];
    let kernel = format!("scale_columns_{}", dtype.suffix());
    device.launch(&kernel, [blocks(rows, 1), 1, 1], [THREADS as u32, 1, 1], 0, &arguments)
}

/// Where the rows of an embedding's gradient are to be found among those of a pass.
#[derive(Debug, Clone)]
pub struct TokenRows {
    ids: Array,
    first: Array,
    order: Array,
}

impl TokenRows {
    /// The rows of each of the ids `ids` that occur in `token_ids`.
    ///
    /// # Errors
    /// No memory on the device.
    pub fn new(device: &Device, token_ids: &[u32], ids: Range<usize>) -> Result<Self> {
        let mut order: Vec<i32> = (0..token_ids.len() as i32)
            .filter(|row| ids.contains(&(token_ids[*row as usize] as usize)))
            .collect();
        // Stable: the rows of an id stay in their order.
        order.sort_by_key(|row| token_ids[*row as usize]);
        let id = |place: usize| token_ids[order[place] as usize] as usize;
        let starts = (0..order.len()).filter(|place| *place == 0 || id(*place) != id(place - 1));
        let mut first: Vec<i32> = starts.map(|place| place as i32).collect();
        let of: Vec<i32> = first.iter().map(|at| (id(*at as usize) - ids.start) as i32).collect();
        first.push(order.len() as i32);
        let upload = |values: &[i32]| device.upload(values);
        Ok(Self { ids: upload(&of)?, first: upload(&first)?, order: upload(&order)? })
    }
}

/// `gradient[id] += factor · Σ d[row]` over the rows of each id, in their order.
///
/// # Errors
/// A fault of the device.
pub fn embedding_gradient(
    device: &Device,
    tokens: &TokenRows,
    d: &Array,
    factor: f32,
    width: usize,
    gradient: &Array,
) -> Result<()> {
    assert!(d.dtype() == Dtype::F32 && gradient.dtype() == Dtype::F32);
    let arguments = [
        d.into(),
        (&tokens.ids).into(),
        (&tokens.first).into(),
        (&tokens.order).into(),
        gradient.into(),
        width.into(),
        factor.into(),
    ];
    let grid = [blocks(tokens.ids.len(), 1), 1, 1];
    device.launch("embedding_gradient", grid, [THREADS as u32, 1, 1], 0, &arguments)
}

/// How the kernels cut up heads of one width: `ATTENTION` in kernels/train.cu.
#[derive(Debug, Clone, Copy)]
struct Shape {
    dtype: Dtype,
    width: usize,
    /// Queries and keys of a tile.
    forward: [usize; 2],
    backward: [usize; 2],
}

/// Values beyond a row of a tile; `PAD` in the kernels.
const PAD: usize = 8;

impl Shape {
    fn new(dtype: Dtype, head_dim: usize) -> Result<Self> {
        let width = [32, 64, 96, 128, 256].into_iter().find(|width| head_dim <= *width);
        let width = width.ok_or_else(|| {
            Error::input(format!("farm does not train heads of {head_dim} values on a device"))
        })?;
        let [forward, backward] = match (dtype, width) {
            (Dtype::F32, 256) => [[16, 16]; 2],
            (Dtype::F32, _) => [[32, 32]; 2],
            (_, 256) => [[64, 32], [32, 32]],
            _ => [[64, 64], [32, 64]],
        };
        Ok(Self { dtype, width, forward, backward })
    }

    fn kernel(&self, name: &str) -> String {
        format!("{name}_{}_{}", self.dtype.suffix(), self.width)
    }

    /// Tiles of queries, keys and values, weights, scores, and three numbers a query.
    fn forward_bytes(&self) -> usize {
        let ([q, k], size) = (self.forward, self.dtype.bytes());
        let operands = (q + 2 * k) * (self.width + PAD) * size;
        operands + q * (k + PAD) * (size + size_of::<f32>()) + 3 * q * size_of::<f32>()
    }

    /// Tiles of queries and their gradients, keys and values, two of pairs in either type, and
    /// two numbers a query.
    fn backward_bytes(&self) -> usize {
        let ([q, k], size) = (self.backward, self.dtype.bytes());
        let operands = 2 * (q + k) * (self.width + PAD) * size;
        operands + 2 * q * (k + PAD) * (size + size_of::<f32>()) + 2 * q * size_of::<f32>()
    }
}

/// Whether the device has room for attention's tiles.
///
/// # Errors
/// An input error: it has not.
pub fn check_attention(device: &Device, dtype: Dtype, head_dim: usize) -> Result<()> {
    let shape = Shape::new(dtype, head_dim)?;
    let (needed, has) = (
        shape.forward_bytes().max(shape.backward_bytes()),
        device.properties().shared_bytes_a_block,
    );
    if needed <= has {
        return Ok(());
    }
    Err(Error::input(format!(
        "training heads of {head_dim} values in {} takes {needed} bytes of shared memory; {} has \
         {has}",
        dtype.suffix(),
        device.properties().name
    )))
}

/// The examples of a micro-batch, cut into tiles.
pub struct Segments {
    shape: Shape,
    rows: usize,
    /// `[tiles, 4]`: first row, rows, and where its segment starts and ends.
    forward: Array,
    queries: Array,
    keys: Array,
}

impl Segments {
    /// Cuts up `segments`, which follow one another, for heads of `head_dim` values.
    ///
    /// # Errors
    /// Heads too wide; no memory on the device.
    pub fn new(
        device: &Device,
        segments: &[Range<usize>],
        dtype: Dtype,
        head_dim: usize,
    ) -> Result<Self> {
        let shape = Shape::new(dtype, head_dim)?;
        let rows = segments.last().map_or(0, |last| last.end);
        assert!(i32::try_from(rows).is_ok_and(|rows| (rows as usize) < NO_WINDOW));
        // The longest first, so that blocks end together.
        let by_queries = |tile: &[i32; 4]| Reverse(tile[0] - tile[2]);
        let by_keys = |tile: &[i32; 4]| Reverse(tile[3] - tile[0]);
        let upload = |mut tiles: Vec<[i32; 4]>, key: fn(&[i32; 4]) -> Reverse<i32>| {
            tiles.sort_by_key(key);
            device.upload(tiles.as_flattened())
        };
        Ok(Self {
            shape,
            rows,
            forward: upload(tiles(segments, shape.forward[0]), by_queries)?,
            queries: upload(tiles(segments, shape.backward[0]), by_queries)?,
            keys: upload(tiles(segments, shape.backward[1]), by_keys)?,
        })
    }
}

fn tiles(segments: &[Range<usize>], size: usize) -> Vec<[i32; 4]> {
    let mut tiles = Vec::new();
    for segment in segments {
        for first in segment.clone().step_by(size) {
            let rows = size.min(segment.end - first);
            tiles.push([first, rows, segment.start, segment.end].map(|x| x as i32));
        }
    }
    tiles
}

/// Queries, keys and values: heads of each row side by side.
#[derive(Debug, Clone)]
pub struct Qkv {
    /// Queries, or their gradients.
    pub q: Rows,
    /// Keys.
    pub k: Rows,
    /// Values.
    pub v: Rows,
}

/// Heads, and what becomes of their scores; see [`Rule`](crate::kernels::attention::Rule).
#[derive(Debug, Clone)]
pub struct Attention {
    /// The heads.
    pub heads: Heads,
    /// Keys that a query sees.
    pub window: Option<usize>,
    /// The cap of scores.
    pub softcap: Option<f32>,
    /// ALiBi's slopes, f32, one a query head.
    pub slopes: Option<Array>,
}

impl Attention {
    /// Attention inside segments: `out` `[rows, heads · head_dim]` and the log-sum-exps `lse`
    /// `[rows, heads]`.
    ///
    /// # Errors
    /// A fault of the device.
    pub fn forward(
        &self,
        device: &Device,
        qkv: &Qkv,
        segments: &Segments,
        out: &Array,
        lse: &Array,
    ) -> Result<()> {
        let shape = segments.shape;
        self.check(qkv, segments);
        assert!(out.dtype() == shape.dtype && out.len() == segments.rows * self.width());
        assert_eq!(lse.len(), segments.rows * self.heads.heads);
        let mut arguments: Vec<Arg> = qkv.all().map(Arg::Array).to_vec();
        arguments.extend([out, lse, &segments.forward].map(Arg::Array));
        self.push_arguments(qkv, &mut arguments, &[]);
        self.launch(device, "attend", shape, &segments.forward, self.heads.heads, &arguments)
    }

    /// The gradients of queries, keys and values from that of the result, `dout`. `delta` is
    /// scratch, f32 `[rows, heads]`.
    ///
    /// # Errors
    /// A fault of the device.
    #[allow(clippy::too_many_arguments, reason = "the operands of attention and their gradients")]
    pub fn backward(
        &self,
        device: &Device,
        qkv: &Qkv,
        segments: &Segments,
        [out, dout]: [&Array; 2],
        lse: &Array,
        delta: &Array,
        gradients: &Qkv,
    ) -> Result<()> {
        let shape = segments.shape;
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        self.check(qkv, segments);
        self.check(gradients, segments);
        let runs = segments.rows * heads;
        assert!([out, dout].iter().all(|x| x.dtype() == shape.dtype && x.len() == runs * head_dim));
        assert!(lse.len() == runs && delta.len() == runs);
        device.launch(
            &format!("attention_delta_{}", shape.dtype.suffix()),
            [blocks(runs, THREADS / 32), 1, 1],
            [THREADS as u32, 1, 1],
            0,
            &[out.into(), dout.into(), delta.into(), runs.into(), head_dim.into()],
        )?;
        let mut operands: Vec<Arg> = qkv.all().map(Arg::Array).to_vec();
        operands.extend([dout, lse, delta].map(Arg::Array));

        let mut of_keys = operands.clone();
        let [dk, dv] = [&gradients.k, &gradients.v];
        of_keys.extend([&dk.values, &dv.values, &segments.keys].map(Arg::Array));
        self.push_arguments(qkv, &mut of_keys, &[dk.stride, dv.stride]);
        self.launch(device, "attend_backward_keys", shape, &segments.keys, kv_heads, &of_keys)?;

        let mut of_queries = operands;
        let dq = &gradients.q;
        of_queries.extend([&dq.values, &segments.queries].map(Arg::Array));
        self.push_arguments(qkv, &mut of_queries, &[dq.stride]);
        let (name, tiles) = ("attend_backward_queries", &segments.queries);
        self.launch(device, name, shape, tiles, heads, &of_queries)
    }

    fn width(&self) -> usize {
        self.heads.heads * self.heads.head_dim
    }

    fn check(&self, qkv: &Qkv, segments: &Segments) {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        let Shape { dtype, width, .. } = segments.shape;
        assert!(head_dim <= width && heads.is_multiple_of(kv_heads) && self.window != Some(0));
        assert!(self.slopes.as_ref().is_none_or(|slopes| slopes.len() == heads));
        qkv.q.check(dtype, segments.rows, heads * head_dim);
        qkv.k.check(dtype, segments.rows, kv_heads * head_dim);
        qkv.v.check(dtype, segments.rows, kv_heads * head_dim);
    }

    /// What follows the arrays: slopes, sizes, the results' own strides, the rule.
    fn push_arguments<'a>(&'a self, qkv: &Qkv, arguments: &mut Vec<Arg<'a>>, strides: &[usize]) {
        let Heads { heads, kv_heads, head_dim, scale } = self.heads;
        arguments.push(self.slopes.as_ref().into());
        arguments.extend([heads, kv_heads, head_dim].map(Arg::from));
        arguments.extend([&qkv.q, &qkv.k, &qkv.v].map(|rows| Arg::from(rows.stride)));
        arguments.extend(strides.iter().map(|stride| Arg::from(*stride)));
        let window = self.window.unwrap_or(NO_WINDOW).min(NO_WINDOW);
        arguments.extend([Arg::F32(scale), window.into()]);
        arguments.push(self.softcap.unwrap_or(0.0).into());
        arguments.push(i32::from(self.slopes.is_some()).into());
    }

    fn launch(
        &self,
        device: &Device,
        name: &str,
        shape: Shape,
        tiles: &Array,
        heads: usize,
        arguments: &[Arg],
    ) -> Result<()> {
        let bytes = if name == "attend" { shape.forward_bytes() } else { shape.backward_bytes() };
        let grid = [blocks(tiles.len() / 4, 1), heads as u32, 1];
        device.launch(&shape.kernel(name), grid, [THREADS as u32, 1, 1], bytes, arguments)
    }
}

impl Qkv {
    fn all(&self) -> [&Array; 3] {
        [&self.q.values, &self.k.values, &self.v.values]
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests;
