//! Routed experts on the device (see `model::moe` for what they are): the choice, and the
//! products of this rank's experts with the rows that chose them.
//!
//! Kernels find the weights by a table of addresses and the rows by lists made on the device: the
//! host need not know the choice, so that such a step can be recorded. A decode's few rows are
//! bound by the memory that the chosen experts' weights stream from (kernels/experts.cu), more
//! go over the tensor cores (kernels/experts_matmul.cu). Where experts' matrices are not alike,
//! or activations are f32, the host reads how many rows each expert has and multiplies one
//! after another. Always a row's sum is in the experts' order.
//!
//! Left out: the sum over ranks and the router's product, which are the caller's.

use std::ops::Range;

use super::linear::{self, MATVEC_ROWS, MATVEC_WARPS, Matrix, TILE_ROWS};
use super::ops::{self, grid, long, number, rows_of};
use super::{Arg, Array, Device, Dtype};
use crate::Result;
use crate::kernels::ops::Activation;

/// Rows up to which f32 activations, or matrices of odd widths, go without the host.
pub const DIRECT_ROWS: usize = 64;
/// Rows an expert up to which the kernel for few is better: it reads an expert's weights for
/// every four of its rows.
const FEW_ROWS: usize = 4;
/// Bytes of the experts' results before they are summed; more rows go in turns.
const RESULT_BYTES: usize = 128 << 20;
/// Threads of the block that lists experts' rows, a warp an expert.
const LIST_THREADS: u32 = 1024;

/// One expert's matrices.
#[derive(Clone)]
pub struct ExpertMatrices {
    /// `[inner, hidden]`.
    pub gate: Matrix,
    /// `[inner, hidden]`.
    pub up: Matrix,
    /// `[hidden, inner]`.
    pub down: Matrix,
}

/// How rows choose.
#[derive(Debug, Clone, Copy)]
pub struct Routing {
    /// Experts of the layer, on all ranks.
    pub num_experts: usize,
    /// How many a row takes.
    pub per_token: usize,
    /// Whether the weights of a row's experts are made to sum to 1.
    pub norm_topk_prob: bool,
}

/// A layer's experts of this rank.
pub struct Experts {
    /// By number.
    mine: Range<usize>,
    experts: Vec<ExpertMatrices>,
    routing: Routing,
    act: Activation,
    /// Addresses of gates, ups and downs, where all experts' matrices are alike.
    table: Option<Array>,
    /// 1 where all matrices can go by eight values, else 0.
    wide: i32,
}

/// How rows meet the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Kernels for few rows.
    Few,
    /// The tensor cores.
    Tiles,
    /// One expert after another, counted by the host.
    InTurn,
}

/// Which of an expert's products.
#[derive(Clone, Copy)]
enum Part {
    GateUp,
    Down,
}

/// What a pass needs beside its input and output; layers of one shape can share it.
pub struct Scratch {
    /// Rows that go together.
    rows_at_once: usize,
    chosen: Array,
    weights: Array,
    counts: Array,
    active: Array,
    pairs: Array,
    rows: Array,
    factors: Array,
    gathered: Array,
    gate_up: Array,
    inner: Array,
    y: Array,
    bytes: Array,
}

impl Experts {
    /// `experts` are those numbered `mine`.
    ///
    /// # Errors
    /// No memory on the device.
    ///
    /// # Panics
    /// If they do not fit together (a bug, not bad input).
    pub fn new(
        device: &Device,
        mine: Range<usize>,
        experts: Vec<ExpertMatrices>,
        routing: Routing,
        act: Activation,
    ) -> Result<Self> {
        assert!(mine.len() == experts.len() && mine.end <= routing.num_experts);
        assert!((1..=routing.num_experts).contains(&routing.per_token));
        for ExpertMatrices { gate, up, down } in &experts {
            let shape = (down.cols(), down.rows());
            assert!((gate.rows(), gate.cols()) == shape && (up.rows(), up.cols()) == shape);
            assert!(shape == (experts[0].gate.rows(), experts[0].gate.cols()));
        }
        let alike = experts.iter().all(|e| {
            is_like(&e.gate, &experts[0].gate)
                && is_like(&e.up, &experts[0].gate)
                && is_like(&e.down, &experts[0].down)
        });
        let part = |part: fn(&ExpertMatrices) -> &Matrix| {
            experts.iter().map(move |e| part(e).storage().address()).collect::<Vec<u64>>()
        };
        let addresses = [part(|e| &e.gate), part(|e| &e.up), part(|e| &e.down)].concat();
        let table = (alike && !experts.is_empty()).then(|| device.upload(&addresses));
        let matrices = experts.iter().flat_map(|e| [&e.gate, &e.up, &e.down]);
        let wide = matrices.map(|matrix| matrix.wide([])).min().unwrap_or(1);
        Ok(Self { mine, experts, routing, act, table: table.transpose()?, wide })
    }

    /// Bytes of the matrices.
    pub fn bytes(&self) -> usize {
        let matrices = self.experts.iter().flat_map(|e| [&e.gate, &e.up, &e.down]);
        matrices.map(Matrix::bytes).sum()
    }

    /// Whether `m` rows of `dtype` need nothing from the host, so that they can be recorded.
    pub fn is_direct(&self, dtype: Dtype, m: usize) -> bool {
        self.experts.is_empty() || self.way(dtype, m) != Way::InTurn
    }

    fn way(&self, dtype: Dtype, m: usize) -> Way {
        let (Some(first), Some(_)) = (self.experts.first(), &self.table) else {
            return Way::InTurn;
        };
        // (Which kernels there are.)
        let has_kernels = |matrix: &Matrix| match matrix.dense_values() {
            Some(values) => values.dtype() == dtype,
            None => dtype != Dtype::F32,
        };
        let few = m * self.routing.per_token <= FEW_ROWS * self.routing.num_experts;
        if !has_kernels(&first.gate) || !has_kernels(&first.down) {
            Way::InTurn
        } else if dtype != Dtype::F32 && self.wide == 1 && !few {
            Way::Tiles
        } else if m <= DIRECT_ROWS || few && dtype != Dtype::F32 {
            Way::Few
        } else {
            Way::InTurn
        }
    }

    /// Scratch memory for up to `max_rows` rows of `dtype`.
    ///
    /// # Errors
    /// No memory on the device.
    pub fn scratch(&self, device: &Device, max_rows: usize, dtype: Dtype) -> Result<Scratch> {
        let hidden = self.experts.first().map_or(0, |e| e.gate.cols());
        let row_bytes = self.routing.per_token * hidden * Dtype::F32.bytes();
        let rows = RESULT_BYTES / row_bytes.max(1);
        self.scratch_in_turns(device, rows.clamp(1, max_rows.max(1)), dtype)
    }

    fn scratch_in_turns(&self, device: &Device, rows: usize, dtype: Dtype) -> Result<Scratch> {
        let (pairs, mine) = (rows * self.routing.per_token, self.mine.len());
        let (inner, hidden) =
            self.experts.first().map_or((0, 0), |e| (e.gate.rows(), e.gate.cols()));
        let matrices = self.experts.iter().flat_map(|e| [&e.gate, &e.up, &e.down]);
        let bytes = matrices.map(|m| linear::scratch_bytes(m, dtype, rows)).max();
        Ok(Scratch {
            rows_at_once: rows,
            chosen: device.array(Dtype::I32, pairs)?,
            weights: device.array(Dtype::F32, pairs)?,
            counts: device.array(Dtype::I32, mine)?,
            active: device.array(Dtype::I32, mine)?,
            pairs: device.array(Dtype::I32, mine * rows)?,
            rows: device.array(Dtype::I32, mine * rows)?,
            factors: device.array(Dtype::F32, mine * rows)?,
            gathered: device.array(dtype, rows * hidden)?,
            gate_up: device.array(dtype, pairs * 2 * inner)?,
            inner: device.array(dtype, pairs * inner)?,
            y: device.array(Dtype::F32, pairs * hidden)?,
            bytes: device.array(Dtype::U8, bytes.unwrap_or(0))?,
        })
    }

    /// The weighted sum of this rank's experts for each row of `x` `[m, hidden]` into `out`
    /// `[m, hidden]`, f32. `scores` `[m, num_experts]` are the router's, f32.
    ///
    /// # Errors
    /// A device fault.
    pub fn forward(
        &self,
        device: &Device,
        scores: &Array,
        x: &Array,
        out: &Array,
        scratch: &Scratch,
    ) -> Result<()> {
        let num_experts = self.routing.num_experts;
        let m = rows_of(scores, num_experts);
        assert!(x.len() == out.len() && x.dtype() == scratch.inner.dtype());
        assert!(scores.dtype() == Dtype::F32 && out.dtype() == Dtype::F32);
        if self.experts.is_empty() {
            return device.fill_zero(out);
        }
        let hidden = self.experts[0].gate.cols();
        assert_eq!(x.len(), m * hidden);
        let way = self.way(x.dtype(), m);
        for first in (0..m).step_by(scratch.rows_at_once) {
            let rows = first..(first + scratch.rows_at_once).min(m);
            let part =
                |array: &Array, width: usize| array.slice(rows.start * width..rows.end * width);
            self.route(device, &part(scores, num_experts), rows.len(), scratch)?;
            let (x, out) = (part(x, hidden), part(out, hidden));
            match way {
                Way::InTurn => self.forward_in_turn(device, &x, &out, scratch)?,
                _ => self.forward_together(device, way, &x, &out, scratch)?,
            }
        }
        Ok(())
    }

    /// Who chose whom.
    fn route(&self, device: &Device, scores: &Array, m: usize, scratch: &Scratch) -> Result<()> {
        let Routing { num_experts, per_token, norm_topk_prob } = self.routing;
        device.launch(
            "route_rows",
            [grid(m), 1, 1],
            [32, 1, 1],
            (num_experts + 2 * per_token) * size_of::<u32>(),
            &[
                scores.into(),
                num_experts.into(),
                per_token.into(),
                i32::from(norm_topk_prob).into(),
                (&scratch.chosen).into(),
                (&scratch.weights).into(),
            ],
        )?;
        device.launch(
            "list_experts",
            [1; 3],
            [LIST_THREADS, 1, 1],
            0,
            &[
                (&scratch.chosen).into(),
                (&scratch.weights).into(),
                m.into(),
                per_token.into(),
                self.mine.start.into(),
                self.mine.len().into(),
                scratch.rows_at_once.into(),
                (&scratch.counts).into(),
                (&scratch.active).into(),
                (&scratch.pairs).into(),
                (&scratch.rows).into(),
                (&scratch.factors).into(),
            ],
        )
    }

    /// All experts at once.
    fn forward_together(
        &self,
        device: &Device,
        way: Way,
        x: &Array,
        out: &Array,
        scratch: &Scratch,
    ) -> Result<()> {
        let (down, inner) = (&self.experts[0].down, self.experts[0].gate.rows());
        let m = x.len() / down.rows();
        let h = scratch.inner.first(m * self.routing.per_token * inner);
        match way {
            Way::Tiles => {
                let gate_up = scratch.gate_up.first(2 * h.len());
                self.launch_tiles(device, Part::GateUp, (x, &gate_up), scratch)?;
                ops::gated(device, self.act, &gate_up, inner, &h)?;
                self.launch_tiles(device, Part::Down, (&h, &scratch.y), scratch)?;
            }
            _ => {
                self.launch_few(device, Part::GateUp, (x, &h), scratch)?;
                self.launch_few(device, Part::Down, (&h, &scratch.y), scratch)?;
            }
        }
        device.launch(
            "combine_experts",
            [grid(m), 1, 1],
            [256, 1, 1],
            0,
            &[
                (&scratch.y).into(),
                (&scratch.chosen).into(),
                (&scratch.weights).into(),
                self.routing.per_token.into(),
                self.mine.start.into(),
                self.mine.len().into(),
                out.into(),
                down.rows().into(),
            ],
        )
    }

    /// The matrix that stands for all of a part, and where theirs are.
    fn product(&self, part: Part) -> (&Matrix, Array) {
        let table = self.table.as_ref().expect("experts that are alike");
        match part {
            Part::GateUp => (&self.experts[0].gate, table.clone()),
            Part::Down => (&self.experts[0].down, table.slice(2 * self.mine.len()..table.len())),
        }
    }

    /// `to = act(gate · from) * (up · from)`, or `to = down · from`.
    fn launch_few(
        &self,
        device: &Device,
        part: Part,
        (from, to): (&Array, &Array),
        scratch: &Scratch,
    ) -> Result<()> {
        let (matrix, table) = self.product(part);
        let per_token = self.routing.per_token;
        let (name, rows_a_row, act) = match part {
            Part::GateUp => ("gate_up", 1, Some([self.mine.len().into(), number(self.act)])),
            Part::Down => ("down", per_token, None),
        };
        let m = from.len() / matrix.cols() / rows_a_row;
        let parts = linear::parts(matrix.rows() * per_token, matrix.cols());
        let rows_a_block = MATVEC_WARPS / parts * MATVEC_ROWS;
        let mut args = lists(&table, scratch);
        args.push(per_token.into());
        args.extend(act.into_iter().flatten());
        args.extend::<[Arg; 2]>([from.into(), to.into()]);
        args.extend(shape(matrix));
        args.extend::<[Arg; 2]>([parts.into(), self.wide.min(ops::wide([], [from])).into()]);
        let (weights, dtype) = (matrix.suffix(), from.dtype().suffix());
        let compiled_m = if m == 1 { 1 } else { 4 };
        device.launch(
            &format!("experts_{name}_{weights}_{dtype}_{compiled_m}"),
            [grid(matrix.rows().div_ceil(rows_a_block)), self.experts_with_rows(m), 1],
            [MATVEC_WARPS as u32 * 32, 1, 1],
            0,
            &args,
        )
    }

    /// `to = [gate · from, up · from]`, or `to = down · from`.
    fn launch_tiles(
        &self,
        device: &Device,
        part: Part,
        (from, to): (&Array, &Array),
        scratch: &Scratch,
    ) -> Result<()> {
        assert_eq!(ops::wide([], [from]), 1, "rows at odd addresses");
        let (matrix, table) = self.product(part);
        let per_token = self.routing.per_token;
        // Pairs of a row of `from`, and matrices of an expert.
        let (divisor, matrices) = match part {
            Part::GateUp => (per_token, 2),
            Part::Down => (1, 1),
        };
        let m = from.len() / matrix.cols() * divisor / per_token;
        let tiles = if m * per_token > 32 * self.routing.num_experts { 4 } else { 2 };
        let mut args = lists(&table, scratch);
        args.extend::<[Arg; 4]>([divisor.into(), self.mine.len().into(), from.into(), to.into()]);
        args.push(i32::from(to.dtype() == Dtype::F32).into());
        args.extend(shape(matrix));
        args.push(long(matrices * matrix.rows()));
        let (weights, dtype) = (matrix.suffix(), from.dtype().suffix());
        device.launch(
            &format!("experts_matmul_{weights}_{dtype}_{tiles}"),
            [grid(matrix.rows().div_ceil(TILE_ROWS)), self.experts_with_rows(m), grid(matrices)],
            [TILE_ROWS as u32 / 16 * 32, 1, 1],
            linear::tile_bytes(tiles),
            &args,
        )
    }

    /// Experts of this rank that `m` rows can have chosen.
    fn experts_with_rows(&self, m: usize) -> u32 {
        grid(self.mine.len().min(m * self.routing.per_token))
    }

    /// One expert after another, each with all of its rows.
    fn forward_in_turn(
        &self,
        device: &Device,
        x: &Array,
        out: &Array,
        scratch: &Scratch,
    ) -> Result<()> {
        let counts: Vec<i32> = device.read(&scratch.counts)?;
        device.fill_zero(out)?;
        for (i, (expert, count)) in self.experts.iter().zip(counts).enumerate() {
            let count = usize::try_from(count).expect("a count");
            if count > 0 {
                let list = i * scratch.rows_at_once..i * scratch.rows_at_once + count;
                let (rows, factors) =
                    (scratch.rows.slice(list.clone()), scratch.factors.slice(list));
                self.pass(device, expert, (x, &rows), scratch)?;
                let y = scratch.y.first(count * expert.down.rows());
                ops::scatter_add_rows(device, &y, &rows, Some(&factors), out)?;
            }
        }
        Ok(())
    }

    /// An expert's output for the rows `rows` of `x`, into the scratch memory's `y`.
    fn pass(
        &self,
        device: &Device,
        expert: &ExpertMatrices,
        (x, rows): (&Array, &Array),
        scratch: &Scratch,
    ) -> Result<()> {
        let (inner, hidden, n) = (expert.gate.rows(), expert.gate.cols(), rows.len());
        let gathered = scratch.gathered.first(n * hidden);
        ops::gather_rows(device, x, rows, &gathered)?;
        let gate_up = scratch.gate_up.first(n * 2 * inner);
        let up = gate_up.slice(inner..gate_up.len());
        for (matrix, out) in [(&expert.gate, &gate_up), (&expert.up, &up)] {
            linear::linear(device, &gathered, matrix, out, 2 * inner, 0.0, &scratch.bytes)?;
        }
        let h = scratch.inner.first(n * inner);
        ops::gated(device, self.act, &gate_up, inner, &h)?;
        let y = scratch.y.first(n * hidden);
        linear::linear(device, &h, &expert.down, &y, hidden, 0.0, &scratch.bytes)
    }
}

/// What all kernels that go by the lists begin with.
fn lists<'a>(table: &'a Array, scratch: &'a Scratch) -> Vec<Arg<'a>> {
    vec![
        table.into(),
        (&scratch.active).into(),
        (&scratch.counts).into(),
        (&scratch.pairs).into(),
        scratch.rows_at_once.into(),
    ]
}

/// Rows, columns, skip and stride.
fn shape(matrix: &Matrix) -> [Arg<'static>; 4] {
    let stride = long(matrix.stride_bytes());
    [matrix.rows().into(), matrix.cols().into(), matrix.skip().into(), stride]
}

/// Whether kernels see two matrices alike, but for where they are.
fn is_like(a: &Matrix, b: &Matrix) -> bool {
    a.suffix() == b.suffix() && a.skip() == b.skip() && a.stride_bytes() == b.stride_bytes()
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::testing::{assert_close, devices, read_f32, rounded, upload_as};
    use crate::kernels::quant::{self, QuantType};
    use crate::kernels::tests::random;

    const HIDDEN: usize = 64;
    const INNER: usize = 40;
    const EXPERTS: usize = 7;

    /// Matrices of an expert, and their values: dense of `dtype`, or q8_0 (a cut for the down
    /// projection, whose rows are no whole blocks).
    struct Expert {
        matrices: ExpertMatrices,
        values: [Vec<f32>; 3],
    }

    fn matrix(
        device: &Device,
        dtype: Dtype,
        quantized: bool,
        [rows, cols]: [usize; 2],
        seed: u64,
    ) -> (Matrix, Vec<f32>) {
        let stored_cols = if quantized { cols.next_multiple_of(32) } else { cols };
        let values = rounded(dtype, &random(rows * stored_cols, seed));
        if !quantized {
            return (Matrix::dense(rows, cols, upload_as(device, dtype, &values)), values);
        }
        let mut blocks = Vec::new();
        quant::quantize_rows(QuantType::Q8_0, &values, stored_cols, &mut blocks).unwrap();
        let mut wide = vec![0.0; values.len()];
        quant::dequantize_row(QuantType::Q8_0, &blocks, &mut wide);
        let values = wide.chunks(stored_cols).flat_map(|row| row[..cols].to_vec()).collect();
        let (stride, blocks) = (blocks.len() / rows, device.upload(&blocks).unwrap());
        (Matrix::quantized(QuantType::Q8_0, rows, cols, 0, stride, blocks), values)
    }

    fn expert(device: &Device, dtype: Dtype, quantized: bool, number: usize) -> Expert {
        let shapes = [[INNER, HIDDEN], [INNER, HIDDEN], [HIDDEN, INNER]];
        let mut parts = shapes.into_iter().enumerate().map(|(part, shape)| {
            matrix(device, dtype, quantized, shape, (1 + 100 * part + number) as u64)
        });
        let mut next = || parts.next().unwrap();
        let ((gate, a), (up, b), (down, c)) = (next(), next(), next());
        Expert { matrices: ExpertMatrices { gate, up, down }, values: [a, b, c] }
    }

    fn times(w: &[f32], x: &[f64]) -> Vec<f64> {
        w.chunks(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
    }

    /// One row by the formula; `experts` are those of numbers `mine`.
    fn reference(
        scores: &[f32],
        x: &[f32],
        experts: &[Expert],
        mine: &Range<usize>,
        routing: Routing,
    ) -> Vec<f32> {
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let e: Vec<f64> = scores.iter().map(|s| f64::from(*s).exp()).collect();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| e[*b].total_cmp(&e[*a]));
        order.truncate(routing.per_token);
        let divisor: f64 =
            if routing.norm_topk_prob { order.iter().map(|i| e[*i]).sum() } else { e.iter().sum() };
        let mut out = vec![0.0; HIDDEN];
        for number in order.into_iter().filter(|number| mine.contains(number)) {
            let [gate, up, down] = &experts[number - mine.start].values;
            let (gate, up) = (times(gate, &x), times(up, &x));
            let inner: Vec<f64> =
                gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            for (out, y) in out.iter_mut().zip(times(down, &inner)) {
                *out += e[number] / divisor * y;
            }
        }
        out.into_iter().map(|y| y as f32).collect()
    }

    fn check(device: &Device, dtype: Dtype, quantized: bool, mine: Range<usize>, routing: Routing) {
        let all: Vec<Expert> =
            mine.clone().map(|number| expert(device, dtype, quantized, number)).collect();
        let matrices = all.iter().map(|e| e.matrices.clone()).collect();
        let experts =
            Experts::new(device, mine.clone(), matrices, routing, Activation::Silu).unwrap();
        let scratch = experts.scratch(device, 70, dtype).unwrap();
        // Few rows, and many: on the tensor cores, or with the host for f32.
        for m in [1, 2, 9, 70] {
            let x = rounded(dtype, &random(m * HIDDEN, m as u64));
            let mut scores = random(m * EXPERTS, 50 + m as u64);
            // Equal scores: the first are chosen.
            scores[..EXPERTS].fill(0.25);
            let (scores_there, x_there) =
                (device.upload(&scores).unwrap(), upload_as(device, dtype, &x));
            let out = upload_as(device, Dtype::F32, &vec![7.0; m * HIDDEN]);
            experts.forward(device, &scores_there, &x_there, &out, &scratch).unwrap();
            let want: Vec<f32> = scores
                .chunks(EXPERTS)
                .zip(x.chunks(HIDDEN))
                .flat_map(|(scores, x)| reference(scores, x, &all, &mine, routing))
                .collect();
            let magnitude = want.iter().fold(1.0f32, |a, x| a.max(x.abs()));
            let close = |x: &f32| x / magnitude;
            let want: Vec<f32> = want.iter().map(close).collect();
            let got: Vec<f32> = read_f32(device, &out).iter().map(close).collect();
            let tolerance = match dtype {
                Dtype::F32 => 1e-5,
                Dtype::F16 => 2e-3,
                _ => 1.5e-2,
            };
            assert_close(&got, &want, tolerance);
        }
    }

    #[test]
    fn equal_the_formula_with_few_rows_and_with_many() {
        for (i, device) in devices().iter().enumerate() {
            for (per_token, norm_topk_prob) in [(1, true), (2, true), (3, false), (EXPERTS, false)]
            {
                let routing = Routing { num_experts: EXPERTS, per_token, norm_topk_prob };
                check(device, Dtype::F32, false, 0..EXPERTS, routing);
                let dtype = [Dtype::F16, Dtype::Bf16][i % 2];
                check(device, dtype, false, 0..EXPERTS, routing);
                check(device, dtype, true, 0..EXPERTS, routing);
                check(device, Dtype::F32, true, 0..EXPERTS, routing);
            }
        }
    }

    #[test]
    fn a_rank_sums_its_own_experts() {
        let device = Device::emulated();
        let routing = Routing { num_experts: EXPERTS, per_token: 2, norm_topk_prob: true };
        for mine in [0..3, 3..7, 2..2] {
            check(&device, Dtype::F32, false, mine, routing);
        }
    }

    #[test]
    fn rows_go_in_turns_where_scratch_memory_is_short() {
        let device = Device::emulated();
        let routing = Routing { num_experts: EXPERTS, per_token: 3, norm_topk_prob: true };
        for dtype in [Dtype::F32, Dtype::F16] {
            let matrices: Vec<ExpertMatrices> =
                (0..EXPERTS).map(|number| expert(&device, dtype, false, number).matrices).collect();
            let experts =
                Experts::new(&device, 0..EXPERTS, matrices, routing, Activation::Silu).unwrap();
            let x = upload_as(&device, dtype, &random(70 * HIDDEN, 1));
            let scores = device.upload(&random(70 * EXPERTS, 2)).unwrap();
            let [whole, in_turns] = [70, 32].map(|rows| {
                let out = device.array(Dtype::F32, 70 * HIDDEN).unwrap();
                let scratch = experts.scratch_in_turns(&device, rows, dtype).unwrap();
                experts.forward(&device, &scores, &x, &out, &scratch).unwrap();
                read_f32(&device, &out)
            });
            assert_close(&in_turns, &whole, 1e-5);
        }
    }

    #[test]
    fn which_way_rows_go() {
        let device = Device::emulated();
        let routing = Routing { num_experts: EXPERTS, per_token: 2, norm_topk_prob: true };
        let ways = |dtype| {
            let all = (0..EXPERTS).map(|number| expert(&device, dtype, false, number).matrices);
            let all = all.collect();
            let experts =
                Experts::new(&device, 0..EXPERTS, all, routing, Activation::Silu).unwrap();
            [1, 14, 15, 64, 65].map(|m| experts.way(dtype, m))
        };
        use Way::{Few, InTurn, Tiles};
        assert_eq!(ways(Dtype::F32), [Few, Few, Few, Few, InTurn]);
        assert_eq!(ways(Dtype::Bf16), [Few, Few, Tiles, Tiles, Tiles]);
    }

    #[test]
    fn few_rows_are_recorded_and_take_the_choice_of_the_replay() {
        let device = Device::emulated();
        let routing = Routing { num_experts: EXPERTS, per_token: 2, norm_topk_prob: true };
        let all: Vec<Expert> =
            (0..EXPERTS).map(|number| expert(&device, Dtype::F32, false, number)).collect();
        let matrices = all.iter().map(|e| e.matrices.clone()).collect();
        let experts =
            Experts::new(&device, 0..EXPERTS, matrices, routing, Activation::Silu).unwrap();
        let scratch = experts.scratch(&device, 3, Dtype::F32).unwrap();
        assert!(experts.is_direct(Dtype::F32, 3) && !experts.is_direct(Dtype::F32, 65));
        let x = random(3 * HIDDEN, 1);
        let scores = device.array(Dtype::F32, 3 * EXPERTS).unwrap();
        let (x_there, out) =
            (device.upload(&x).unwrap(), device.array(Dtype::F32, 3 * HIDDEN).unwrap());
        let work = || experts.forward(&device, &scores, &x_there, &out, &scratch);
        let graph = device.capture(work).unwrap();
        for seed in [5, 6] {
            let values = random(3 * EXPERTS, seed);
            device.write(&scores, &values).unwrap();
            graph.replay().unwrap();
            for (row, got) in read_f32(&device, &out).chunks(HIDDEN).enumerate() {
                let (scores, x) =
                    (&values[row * EXPERTS..][..EXPERTS], &x[row * HIDDEN..][..HIDDEN]);
                let want = reference(scores, x, &all, &(0..EXPERTS), routing);
                assert_close(got, &want, 1e-4);
            }
        }
    }
}
