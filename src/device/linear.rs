//! Weight matrices on the device, and products with them.
//!
//! A few rows of activations go through kernels of our own that are bound by the memory the
//! weights stream from (kernels/linear.cu, kernels/quant.cu); more rows through the device's
//! matrix product. Quantized weights stay ggml's blocks: their values, bit for bit those of
//! [`kernels::quant`](crate::kernels::quant), are made in registers; for a batch's rows they are
//! rounded to the type of the activations and multiplied from shared memory on the tensor cores
//! (kernels/quant_matmul.cu), and for still more written to scratch memory first.
//!
//! Left out: activations of 8 bits for integer or FP8 products. They would double what the
//! tensor cores do in a prefill, but the results would no longer be those of the weights'
//! values, and decoding gains nothing: it waits for the weights, whose blocks are as small.

use std::ops::Range;

use super::ops::{grid, long, row_threads, rows_of, wide};
use super::{Arg, Array, Device, Dtype, Gemm};
use crate::Result;
use crate::kernels::quant::QuantType;

/// Rows of activations that go through the kernel for few: up to four, floating-point units keep
/// up with the memory, and cuBLAS would pad them to a tile of its own.
const MAX_MATVEC: usize = 4;
/// The same for quantized weights, where the other way reads and writes all values more.
const MAX_QUANT_MATVEC: usize = 8;
/// Rows of activations up to which quantized weights are multiplied as they are taken apart.
const MAX_QUANT_MATMUL: usize = 128;
/// Rows of weights of a block, columns of a step, and values from row to row of those in
/// shared memory: TILE_ROWS, TILE_COLS and TILE_STRIDE of kernels/weight_tiles.cuh.
pub(super) const TILE_ROWS: usize = 128;
const TILE_COLS: usize = 64;
const TILE_STRIDE: usize = 72;
/// Blocks that a matrix should give work: one on each of a large card's multiprocessors.
const WANTED_BLOCKS: usize = 128;
/// Rows of weights of a warp, and warps of a block: ROWS and WARPS of kernels/matvec.cuh.
pub(super) const MATVEC_ROWS: usize = 2;
pub(super) const MATVEC_WARPS: usize = 8;
/// Warps that a matrix should give work: 16 on each of a large card's multiprocessors.
const WANTED_WARPS: usize = 2048;
/// Values of a row that a warp should have, so that its sums are not most of its work.
const LEAST_VALUES: usize = 512;
/// Bytes of dequantized weights, or of parts of sums, that there are at a time.
const SCRATCH_BYTES: usize = 64 << 20;
/// Values that a thread takes at a time.
const PIECE: usize = 8;

/// A weight matrix `[rows, cols]` (output features, input features) in device memory. Clones
/// share it.
#[derive(Clone)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    values: Values,
}

#[derive(Clone)]
enum Values {
    /// Floats, rows contiguous.
    Dense(Array),
    /// See [`QuantMatrix`](crate::kernels::quant::QuantMatrix).
    Blocks { quant: QuantType, skip: usize, stride: usize, blocks: Array },
}

impl Matrix {
    /// Floats of any width.
    ///
    /// # Panics
    /// If `values` are not `rows * cols` floats.
    pub fn dense(rows: usize, cols: usize, values: Array) -> Self {
        assert!(matches!(values.dtype(), Dtype::F32 | Dtype::F16 | Dtype::Bf16));
        assert_eq!(values.len(), rows * cols);
        Self { rows, cols, values: Values::Dense(values) }
    }

    /// ggml's blocks: `stride` bytes from row to row, of which column 0 is value `skip`.
    ///
    /// # Panics
    /// If the rows are not inside `blocks`, or not aligned as those of whole blocks are.
    pub fn quantized(
        quant: QuantType,
        rows: usize,
        cols: usize,
        skip: usize,
        stride: usize,
        blocks: Array,
    ) -> Self {
        assert!(blocks.dtype() == Dtype::U8 && skip < quant.block_len());
        let touched = (skip + cols).div_ceil(quant.block_len()) * quant.block_bytes();
        assert!(rows == 0 || (rows - 1) * stride + touched <= blocks.len());
        let aligned = |x: u64| x.is_multiple_of(alignment(quant));
        assert!(stride >= touched && aligned(stride as u64) && aligned(blocks.address()));
        Self { rows, cols, values: Values::Blocks { quant, skip, stride, blocks } }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that a product streams.
    pub fn bytes(&self) -> usize {
        self.rows * self.stride_bytes()
    }

    /// The floats, where it is not quantized.
    pub fn dense_values(&self) -> Option<&Array> {
        match &self.values {
            Values::Dense(values) => Some(values),
            Values::Blocks { .. } => None,
        }
    }

    /// The type of its blocks, where it is quantized.
    pub fn quant(&self) -> Option<QuantType> {
        match &self.values {
            Values::Dense(_) => None,
            Values::Blocks { quant, .. } => Some(*quant),
        }
    }

    /// Some of its rows; the memory is shared.
    #[must_use]
    pub fn slice_rows(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let len = rows.len();
        let values = match &self.values {
            Values::Dense(values) => {
                Values::Dense(values.slice(rows.start * self.cols..rows.end * self.cols))
            }
            Values::Blocks { quant, skip, stride, blocks } => {
                let end = if rows.end == self.rows { blocks.len() } else { rows.end * stride };
                let blocks = blocks.slice(rows.start * stride..end);
                Values::Blocks { quant: *quant, skip: *skip, stride: *stride, blocks }
            }
        };
        Self { rows: len, cols: self.cols, values }
    }

    /// What names of kernels call its values.
    pub(super) fn suffix(&self) -> &'static str {
        match &self.values {
            Values::Dense(values) => values.dtype().suffix(),
            Values::Blocks { quant, .. } => quant.name(),
        }
    }

    /// The memory.
    pub(super) fn storage(&self) -> &Array {
        match &self.values {
            Values::Dense(values) => values,
            Values::Blocks { blocks, .. } => blocks,
        }
    }

    /// Values before column 0 in a row's first block.
    pub(super) fn skip(&self) -> usize {
        match &self.values {
            Values::Dense(_) => 0,
            Values::Blocks { skip, .. } => *skip,
        }
    }

    /// Bytes from row to row.
    pub(super) fn stride_bytes(&self) -> usize {
        match &self.values {
            Values::Dense(values) => self.cols * values.dtype().bytes(),
            Values::Blocks { stride, .. } => *stride,
        }
    }

    /// Whether a kernel multiplies it with `m` rows of `dtype` directly.
    fn has_matvec(&self, dtype: Dtype, m: usize) -> bool {
        match &self.values {
            Values::Dense(v) => m <= MAX_MATVEC && [dtype, Dtype::F32].contains(&v.dtype()),
            Values::Blocks { .. } => m <= MAX_QUANT_MATVEC,
        }
    }

    /// 1 where rows can go by eight values against aligned rows of activations, else 0.
    pub(super) fn wide<'a>(&'a self, arrays: impl IntoIterator<Item = &'a Array>) -> i32 {
        // Blocks have their own alignment.
        let dense = self.dense_values();
        wide([self.cols, self.skip()], arrays.into_iter().chain(dense))
    }

    /// How a kernel multiplies the blocks with `m` rows of `dtype` from shared memory, if one does.
    fn matmul(&self, dtype: Dtype, m: usize) -> Option<Matmul> {
        let whole = self.cols.is_multiple_of(PIECE) && self.skip().is_multiple_of(PIECE);
        let wanted = MAX_QUANT_MATVEC < m && m <= MAX_QUANT_MATMUL && self.cols > 0;
        if self.quant().is_none() || dtype == Dtype::F32 || !whole || !wanted {
            return None;
        }
        let blocks = self.rows.div_ceil(TILE_ROWS).max(1);
        let parts = WANTED_BLOCKS.div_ceil(blocks).min(self.cols.div_ceil(LEAST_VALUES));
        let step = self.cols.div_ceil(parts).next_multiple_of(TILE_COLS);
        let tiles = m.div_ceil(16).next_power_of_two().max(2);
        let shape = Matmul { blocks, parts: self.cols.div_ceil(step), step, tiles };
        (shape.bytes() <= SCRATCH_BYTES).then_some(shape)
    }

    /// Rows that are made floats of `dtype` at a time, and the values from one to the next.
    fn chunk(&self, dtype: Dtype) -> (usize, usize) {
        let stride = match &self.values {
            Values::Dense(_) => self.cols,
            Values::Blocks { .. } => self.cols.next_multiple_of(PIECE),
        };
        let rows = SCRATCH_BYTES / (stride * dtype.bytes()).max(1);
        (rows.clamp(1, self.rows.max(1)), stride)
    }
}

/// The shape of a product from shared memory.
struct Matmul {
    /// Of [`TILE_ROWS`] rows of weights.
    blocks: usize,
    /// Parts of the columns, each of `step`, whose sums are added up afterwards.
    parts: usize,
    step: usize,
    /// Of 16 rows of activations.
    tiles: usize,
}

impl Matmul {
    /// The sums of all parts.
    fn len(&self) -> usize {
        self.parts * 16 * self.tiles * self.blocks * TILE_ROWS
    }

    fn bytes(&self) -> usize {
        self.len() * Dtype::F32.bytes()
    }
}

/// What kernels want rows of blocks to be aligned to: ALIGN of kernels/matvec.cuh.
fn alignment(quant: QuantType) -> u64 {
    match quant {
        QuantType::Q4_0 | QuantType::Q5_0 | QuantType::Q8_0 | QuantType::Q3_K | QuantType::Q6_K => {
            2
        }
        QuantType::Q4_1 | QuantType::Q2_K => 4,
        QuantType::Q5_1 => 8,
        QuantType::Q4_K | QuantType::Q5_K => 16,
    }
}

/// Bytes of scratch memory that [`linear`] needs for up to `m` rows of `dtype`.
pub fn scratch_bytes(matrix: &Matrix, dtype: Dtype, m: usize) -> usize {
    match matrix.dense_values().map(Array::dtype) {
        Some(values) if values == dtype => 0,
        _ if matrix.has_matvec(dtype, m) => 0,
        Some(Dtype::F32) => m * matrix.cols * Dtype::F32.bytes(),
        _ => {
            let (rows, stride) = matrix.chunk(dtype);
            // With fewer rows there may be a way that with more needs too much.
            let sums = [m, 128, 64, 32].into_iter().filter(|few| *few <= m);
            let sums = sums.filter_map(|few| Some(matrix.matmul(dtype, few)?.bytes())).max();
            sums.unwrap_or(0).max(rows * stride * dtype.bytes())
        }
    }
}

/// `out = x · matrixᵀ + beta * out` with `beta` 0 or 1, where row i of `out` is at
/// `i * out_stride`; `out` is f32 or of the type of `x`. An f32 matrix keeps its precision with
/// narrower activations, and `out` is f32 then. `scratch` is bytes, see [`scratch_bytes`].
///
/// # Errors
/// A device fault.
///
/// # Panics
/// If the arrays do not fit together (a bug, not bad input).
pub fn linear(
    device: &Device,
    x: &Array,
    matrix: &Matrix,
    out: &Array,
    out_stride: usize,
    beta: f32,
    scratch: &Array,
) -> Result<()> {
    let m = rows_of(x, matrix.cols);
    assert!(beta == 0.0 || beta == 1.0);
    assert!(out.dtype() == Dtype::F32 || out.dtype() == x.dtype());
    if m == 0 || matrix.rows == 0 {
        return Ok(());
    }
    assert!(out_stride >= matrix.rows && out.len() >= (m - 1) * out_stride + matrix.rows);
    if matrix.has_matvec(x.dtype(), m) {
        return matvec(device, x, matrix, out, out_stride, beta);
    }
    assert!(scratch.bytes() >= scratch_bytes(matrix, x.dtype(), m));
    if let Some(shape) = matrix.matmul(x.dtype(), m).filter(|_| matrix.wide([x]) == 1) {
        return matmul(device, x, matrix, &shape, (out, out_stride, beta), scratch);
    }
    let product = |x: &Array, values: &Array, stride: usize, rows: Range<usize>| {
        device.gemm(&Gemm {
            a: x,
            a_stride: matrix.cols,
            transpose_a: false,
            b: values,
            b_stride: stride,
            transpose_b: true,
            c: &out.slice(rows.start..out.len()),
            c_stride: out_stride,
            m,
            n: rows.len(),
            k: matrix.cols,
            alpha: 1.0,
            beta,
        })
    };
    match matrix.dense_values() {
        Some(values) if values.dtype() == x.dtype() => {
            product(x, values, matrix.cols, 0..matrix.rows)
        }
        Some(values) if values.dtype() == Dtype::F32 => {
            let wide_x = part(scratch, Dtype::F32, x.len());
            super::ops::convert(device, x, &wide_x)?;
            product(&wide_x, values, matrix.cols, 0..matrix.rows)
        }
        _ => {
            let (step, stride) = matrix.chunk(x.dtype());
            for first in (0..matrix.rows).step_by(step) {
                let rows = first..(first + step).min(matrix.rows);
                let values = part(scratch, x.dtype(), rows.len() * stride);
                dequantize(device, matrix, rows.clone(), &values, stride)?;
                product(x, &values, stride, rows)?;
            }
            Ok(())
        }
    }
}

/// The start of scratch memory as values.
fn part(scratch: &Array, dtype: Dtype, len: usize) -> Array {
    scratch.first(len * dtype.bytes()).cast(dtype)
}

fn matvec(
    device: &Device,
    x: &Array,
    matrix: &Matrix,
    out: &Array,
    out_stride: usize,
    beta: f32,
) -> Result<()> {
    let m = x.len() / matrix.cols;
    let parts = parts(matrix.rows, matrix.cols);
    let rows_a_block = MATVEC_WARPS / parts * MATVEC_ROWS;
    let compiled_m = if m == 3 { 4 } else { m.next_power_of_two() };
    device.launch(
        &format!("matvec_{}_{}_{compiled_m}", matrix.suffix(), x.dtype().suffix()),
        [grid(matrix.rows.div_ceil(rows_a_block)), 1, 1],
        [MATVEC_WARPS as u32 * 32, 1, 1],
        0,
        &[
            matrix.storage().into(),
            x.into(),
            out.into(),
            matrix.rows.into(),
            matrix.cols.into(),
            matrix.skip().into(),
            long(matrix.stride_bytes()),
            m.into(),
            long(out_stride),
            i32::from(out.dtype() == Dtype::F32).into(),
            i32::from(beta == 1.0).into(),
            parts.into(),
            matrix.wide([x]).into(),
        ],
    )
}

fn matmul(
    device: &Device,
    x: &Array,
    matrix: &Matrix,
    shape: &Matmul,
    (out, out_stride, beta): (&Array, usize, f32),
    scratch: &Array,
) -> Result<()> {
    let m = x.len() / matrix.cols;
    let sums = part(scratch, Dtype::F32, shape.len());
    device.launch(
        &format!("matmul_{}_{}_{}", matrix.suffix(), x.dtype().suffix(), shape.tiles),
        [grid(shape.blocks), grid(shape.parts), 1],
        [TILE_ROWS as u32 / 16 * 32, 1, 1],
        tile_bytes(shape.tiles),
        &[
            matrix.storage().into(),
            x.into(),
            (&sums).into(),
            matrix.rows.into(),
            matrix.cols.into(),
            matrix.skip().into(),
            long(matrix.stride_bytes()),
            m.into(),
            shape.step.into(),
        ],
    )?;
    let threads = 256;
    device.launch(
        &format!("add_partial_{}", out.dtype().suffix()),
        [grid(matrix.rows.div_ceil(threads)), grid(m), 1],
        [threads as u32, 1, 1],
        0,
        &[
            (&sums).into(),
            shape.parts.into(),
            (16 * shape.tiles).into(),
            (shape.blocks * TILE_ROWS).into(),
            out.into(),
            matrix.rows.into(),
            long(out_stride),
            i32::from(beta == 1.0).into(),
        ],
    )
}

/// Shared memory of a block that multiplies from there, 16 * `tiles` rows of activations.
pub(super) fn tile_bytes(tiles: usize) -> usize {
    (TILE_ROWS + 16 * tiles) * TILE_STRIDE * Dtype::F16.bytes()
}

/// Warps that share the sums of rows: more for a small matrix, by its shape only, so that
/// every card adds up alike.
pub(super) fn parts(rows: usize, cols: usize) -> usize {
    let warps = rows.div_ceil(MATVEC_ROWS);
    let mut parts = 1;
    while parts < MATVEC_WARPS && warps * parts < WANTED_WARPS && cols >= 2 * parts * LEAST_VALUES {
        parts *= 2;
    }
    parts
}

/// Row `ids[i] - first_id` of the table, times `factor`, becomes row i of `out`, in f32; an id
/// that the table does not have gives zeros (another rank has it).
///
/// # Errors
/// A device fault.
pub fn embed(
    device: &Device,
    table: &Matrix,
    first_id: usize,
    ids: &Array,
    factor: f32,
    out: &Array,
) -> Result<()> {
    assert!(ids.dtype() == Dtype::I32 && out.dtype() == Dtype::F32);
    assert_eq!(out.len(), ids.len() * table.cols);
    if out.is_empty() {
        return Ok(());
    }
    let Some(values) = table.dense_values() else {
        return launch_dequantize(device, table, Rows::Ids(ids, first_id), factor, out, table.cols);
    };
    device.launch(
        &format!("embed_{}", values.dtype().suffix()),
        [grid(ids.len()), 1, 1],
        [row_threads(table.cols.div_ceil(PIECE)), 1, 1],
        0,
        &[
            values.into(),
            ids.into(),
            out.into(),
            first_id.into(),
            table.rows.into(),
            table.cols.into(),
            factor.into(),
            table.wide([out]).into(),
        ],
    )
}

/// Rows of the matrix as floats of the type of `out`, `out_stride` values apart there; as many as
/// columns for a dense matrix.
///
/// # Errors
/// A device fault.
pub fn dequantize(
    device: &Device,
    matrix: &Matrix,
    rows: Range<usize>,
    out: &Array,
    out_stride: usize,
) -> Result<()> {
    assert!(rows.end <= matrix.rows && out_stride >= matrix.cols);
    if rows.is_empty() || matrix.cols == 0 {
        return Ok(());
    }
    assert!(out.len() >= (rows.len() - 1) * out_stride + matrix.cols);
    let Some(values) = matrix.dense_values() else {
        return launch_dequantize(device, matrix, Rows::Range(rows), 1.0, out, out_stride);
    };
    assert_eq!(out_stride, matrix.cols, "floats are converted as they lie");
    let from = values.slice(rows.start * matrix.cols..rows.end * matrix.cols);
    super::ops::convert(device, &from, &out.first(from.len()))
}

enum Rows<'a> {
    Range(Range<usize>),
    /// Ids, and that of row 0.
    Ids(&'a Array, usize),
}

fn launch_dequantize(
    device: &Device,
    matrix: &Matrix,
    rows: Rows,
    factor: f32,
    out: &Array,
    out_stride: usize,
) -> Result<()> {
    let (len, ids, first) = match rows {
        Rows::Range(range) => (range.len(), Arg::Null, range.start),
        Rows::Ids(ids, first) => (ids.len(), ids.into(), first),
    };
    let wide = i32::from(matrix.wide([out]) == 1 && out_stride.is_multiple_of(PIECE));
    device.launch(
        &format!("dequantize_{}_{}", matrix.suffix(), out.dtype().suffix()),
        [grid(len), 1, 1],
        [row_threads(matrix.cols.div_ceil(PIECE)), 1, 1],
        0,
        &[
            matrix.storage().into(),
            matrix.rows.into(),
            matrix.cols.into(),
            matrix.skip().into(),
            long(matrix.stride_bytes()),
            ids,
            first.into(),
            factor.into(),
            out.into(),
            long(out_stride),
            wide.into(),
        ],
    )
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::device::testing::{assert_close, devices, read_f32, rounded, upload_as};
    use crate::kernels::quant::{self, QuantMatrix};
    use crate::kernels::tests::random;

    const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

    /// ggml's own blocks of a type: rows of `blocks` of them.
    fn golden_rows(quant: QuantType, rows: usize, blocks: usize) -> Vec<u8> {
        const GOLDEN: &[u8] = include_bytes!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/quant/ggml.safetensors"
        ));
        let tensors = SafeTensors::deserialize(GOLDEN).unwrap();
        let all = tensors.tensor(&format!("{}.blocks", quant.name())).unwrap().data();
        // The last ones have random bytes and finite scales.
        let random = &all[all.len() - quant.row_bytes(1024)..];
        let mut chunks = random.chunks_exact(quant.block_bytes()).cycle();
        let mut rows_of_blocks = Vec::new();
        for _ in 0..rows {
            for _ in 0..blocks {
                rows_of_blocks.extend_from_slice(chunks.next().unwrap());
            }
            // Neighbouring rows must differ.
            chunks.next();
        }
        rows_of_blocks
    }

    /// A quantized matrix, and its values by the CPU's kernels.
    fn quantized(
        device: &Device,
        quant: QuantType,
        [rows, cols, skip]: [usize; 3],
    ) -> (Matrix, Vec<f32>) {
        let blocks = (skip + cols).div_ceil(quant.block_len());
        let (data, stride) = (golden_rows(quant, rows, blocks), blocks * quant.block_bytes());
        let host = QuantMatrix { data: &data, quant, rows, cols, skip, stride };
        let mut values = vec![0.0; rows * cols];
        for (row, values) in values.chunks_exact_mut(cols).enumerate() {
            quant::read_row(host, row, values);
        }
        let blocks = device.upload(&data).unwrap();
        (Matrix::quantized(quant, rows, cols, skip, stride, blocks), values)
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    /// Products in f64.
    fn products(x: &[f32], w: &[f32], cols: usize) -> Vec<f32> {
        let dot = |x: &[f32], w: &[f32]| -> f64 {
            x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(x, w) as f32)).collect()
    }

    /// All shapes of a block's cut: whole blocks, cuts at pieces of eight and anywhere.
    fn cuts(quant: QuantType) -> [[usize; 2]; 4] {
        let len = quant.block_len();
        [[2 * len, 0], [len, 16], [len + 7, 5], [9, 16]]
    }

    #[test]
    fn every_type_of_blocks_dequantizes_to_the_bits_of_the_cpu() {
        let device = Device::emulated();
        for quant in QuantType::ALL {
            for [cols, skip] in cuts(quant) {
                let rows = 5;
                let (matrix, want) = quantized(&device, quant, [rows, cols, skip]);
                for dtype in FLOATS {
                    let stride = cols.next_multiple_of(8);
                    let out = upload_as(&device, dtype, &vec![7.0; rows * stride]);
                    dequantize(&device, &matrix, 1..4, &out, stride).unwrap();
                    let got = read_f32(&device, &out);
                    for (got, want) in got.chunks(stride).zip(want[cols..4 * cols].chunks(cols)) {
                        assert_eq!(bits(&got[..cols]), bits(&rounded(dtype, want)), "{quant:?}");
                        assert!(got[cols..].iter().all(|x| *x == 7.0));
                    }
                }
            }
        }
    }

    #[test]
    fn an_embedding_reads_the_rows_of_its_ids_and_zeros_for_others() {
        let device = Device::emulated();
        let (rows, cols) = (4, 13);
        let values = random(rows * cols, 1);
        let mut tables: Vec<(Matrix, Vec<f32>)> = FLOATS
            .iter()
            .map(|dtype| {
                let values = rounded(*dtype, &values);
                let array = upload_as(&device, *dtype, &values);
                (Matrix::dense(rows, cols, array), values)
            })
            .collect();
        tables.push(quantized(&device, QuantType::Q6_K, [rows, 256, 0]));
        tables.push(quantized(&device, QuantType::Q8_0, [rows, 20, 3]));
        let ids = device.upload(&[12i32, 10, -1, 13, 14, 9, 0]).unwrap();
        for (table, values) in tables {
            let cols = table.cols();
            let out = upload_as(&device, Dtype::F32, &vec![7.0; ids.len() * cols]);
            embed(&device, &table, 10, &ids, 3.0, &out).unwrap();
            let got = read_f32(&device, &out);
            let rows = [Some(2), Some(0), None, Some(3), None, None, None];
            for (got, row) in got.chunks(cols).zip(rows) {
                let want = match row {
                    Some(row) => values[row * cols..][..cols].iter().map(|v| v * 3.0).collect(),
                    None => vec![0.0; cols],
                };
                assert_eq!(got, want);
            }
        }
    }

    /// A product, and what it should be.
    struct Case {
        matrix: Matrix,
        /// The matrix's values.
        values: Vec<f32>,
        dtype: Dtype,
        out: Dtype,
        beta: f32,
    }

    impl Case {
        fn check(&self, device: &Device, m: usize) {
            let (rows, cols) = (self.matrix.rows(), self.matrix.cols());
            let x = rounded(self.dtype, &random(m * cols, m as u64));
            let out_stride = rows + 3;
            let before = rounded(self.out, &random(m * out_stride, 9));
            let (x_there, out) =
                (upload_as(device, self.dtype, &x), upload_as(device, self.out, &before));
            let bytes = scratch_bytes(&self.matrix, self.dtype, m);
            let scratch = device.array(Dtype::U8, bytes).unwrap();
            linear(device, &x_there, &self.matrix, &out, out_stride, self.beta, &scratch).unwrap();
            let got = read_f32(device, &out);
            let weights = if bytes > 0 && self.matrix.quant().is_some() {
                &rounded(self.dtype, &self.values)
            } else {
                &self.values
            };
            let tolerance = match self.out {
                Dtype::F32 => 1e-5,
                Dtype::F16 => 1e-3,
                _ => 8e-3,
            };
            for (i, want) in products(&x, weights, cols).chunks(rows).enumerate() {
                let at = i * out_stride..i * out_stride + rows;
                let magnitude = want.iter().fold(1.0f32, |a, x| a.max(x.abs()));
                let close = |x: &f32| x / magnitude;
                let want: Vec<f32> = want
                    .iter()
                    .zip(&before[at.clone()])
                    .map(|(y, before)| close(&(y + self.beta * before)))
                    .collect();
                let row: Vec<f32> = got[at.clone()].iter().map(close).collect();
                assert_close(&row, &want, tolerance);
                assert_eq!(got[at.end..][..3], before[at.end..][..3]);
            }
        }
    }

    #[test]
    fn products_of_dense_matrices_equal_the_formula() {
        // (1030 values: several warps share a row.)
        for (device, [rows, cols]) in devices()
            .iter()
            .flat_map(|d| [[37, 72], [5, 19], [9, 1030], [33, 2048]].map(|s| (d, s)))
        {
            let values = random(rows * cols, 1);
            for (stored, dtype, out, beta) in [
                (Dtype::F32, Dtype::F32, Dtype::F32, 1.0),
                (Dtype::F16, Dtype::F16, Dtype::F16, 0.0),
                (Dtype::F16, Dtype::F16, Dtype::F32, 1.0),
                (Dtype::Bf16, Dtype::Bf16, Dtype::Bf16, 1.0),
                (Dtype::Bf16, Dtype::Bf16, Dtype::F32, 0.0),
                (Dtype::F32, Dtype::F16, Dtype::F32, 0.0),
                (Dtype::F32, Dtype::Bf16, Dtype::F32, 1.0),
            ] {
                let values = rounded(stored, &values);
                let matrix = Matrix::dense(rows, cols, upload_as(device, stored, &values));
                let case = Case { matrix, values, dtype, out, beta };
                for m in [1, 2, 3, 4, 5, 9] {
                    case.check(device, m);
                }
            }
        }
    }

    #[test]
    fn products_of_blocks_equal_the_formula() {
        for (device, dtype) in devices().iter().zip(FLOATS) {
            for quant in QuantType::ALL {
                for [cols, skip] in cuts(quant) {
                    let (matrix, values) = quantized(device, quant, [19, cols, skip]);
                    for out in [Dtype::F32, dtype] {
                        let (matrix, values) = (matrix.clone(), values.clone());
                        let case = Case { matrix, values, dtype, out, beta: 1.0 };
                        for m in [1, 2, 3, 7, 9] {
                            case.check(device, m);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn products_of_blocks_with_a_batch_equal_the_formula() {
        // More rows of weights than one block has; columns in several parts.
        for (device, dtype) in devices().iter().zip([Dtype::F16, Dtype::Bf16, Dtype::F16]) {
            let shapes = [
                (QuantType::Q8_0, [130, 64, 8]),
                (QuantType::Q4_K, [33, 1280, 0]),
                (QuantType::Q6_K, [20, 1024 - 48, 16]),
            ];
            for (quant, shape) in shapes {
                let (matrix, values) = quantized(device, quant, shape);
                for (out, beta) in [(Dtype::F32, 1.0), (dtype, 0.0)] {
                    let (matrix, values) = (matrix.clone(), values.clone());
                    let case = Case { matrix, values, dtype, out, beta };
                    for m in [9, 33, 65, 129] {
                        case.check(device, m);
                    }
                }
            }
        }
    }

    #[test]
    fn a_slice_of_rows_is_those_rows() {
        let device = Device::emulated();
        let (rows, cols) = (6, 40);
        let values = random(rows * cols, 1);
        let dense = Matrix::dense(rows, cols, device.upload(&values).unwrap());
        let (blocks, block_values) = quantized(&device, QuantType::Q5_0, [rows, cols, 0]);
        for (matrix, values) in [(dense, values), (blocks, block_values)] {
            for range in [0..2, 3..6] {
                let part = matrix.slice_rows(range.clone());
                let out = device.array(Dtype::F32, range.len() * cols).unwrap();
                dequantize(&device, &part, 0..range.len(), &out, cols).unwrap();
                assert_eq!(read_f32(&device, &out), values[range.start * cols..range.end * cols]);
            }
        }
    }
}
