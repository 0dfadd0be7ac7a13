//! Attention over the paged KV cache on a device: the rotation that comes before it, and the
//! choice among its kernels (`kernels/attention.cu`).
//!
//! A row that is the only one of its sequence in a step (decode) is split over its keys by
//! [`attend_rows`]; the chunks of prompts go to [`attend_chunks`], tiles of queries on the
//! tensor cores. Rows of any kind can go to the former, which is all there is for f32 and for
//! heads that 16 does not divide: [`Plan`] sorts them.
//!
//! [`rope_and_cache`] and [`attend_rows`] may be recorded: what they launch depends on
//! lengths of arrays alone, never on their values.
//!
//! Left out: attention sinks, and splitting the keys of chunks (a short chunk after a long
//! context occupies as few multiprocessors as it has tiles).

use super::{Arg, Array, Device, Dtype, Properties, blocks};
use crate::Result;

/// Tokens of a KV cache block.
pub const BLOCK_SIZE: usize = 16;
/// The widest head.
pub const MAX_HEAD_DIM: usize = 256;

/// Threads of a block in `attend_rows_*` and `attend_split_*`.
const ROW_THREADS: usize = 128;
const ROW_WARPS: usize = ROW_THREADS / 32;
/// Keys of a split, at least: `Seen` in the kernels.
const MIN_SPLIT: usize = 256;
/// Queries of a tensor-core tile.
const TILE: usize = 16;

/// The heads of this rank, as [`crate::kernels::attention::Heads`] has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

impl Shape {
    /// Query heads a KV head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Values of one block of keys (or of values) in one layer.
    pub fn block_len(&self) -> usize {
        self.kv_heads * BLOCK_SIZE * self.head_dim
    }
}

/// What a layer does to its scores besides scaling them
/// ([`crate::kernels::attention::Rule`]).
#[derive(Debug, Clone, Copy, Default)]
pub struct Rule<'a> {
    /// Sliding window, at least 1.
    pub window: Option<usize>,
    /// `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// ALiBi's slopes, f32 `[heads]`.
    pub slopes: Option<&'a Array>,
}

/// One layer's cache: `[block][kv_head][16][head_dim]` each.
#[derive(Debug, Clone, Copy)]
pub struct Cache<'a> {
    /// Keys.
    pub keys: &'a Array,
    /// Values.
    pub values: &'a Array,
}

/// RMS norms of each head of the queries and keys.
#[derive(Debug, Clone, Copy)]
pub struct Norms<'a> {
    /// f32 `[head_dim]`.
    pub q_weight: &'a Array,
    /// f32 `[head_dim]`.
    pub k_weight: &'a Array,
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotations, `[rows of the table][rotary_dim / 2]` f32 each.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Cosines.
    pub cos: &'a Array,
    /// Sines.
    pub sin: &'a Array,
    /// i32, the row of the table for each row of the step: usually its position.
    pub table_row: &'a Array,
    /// Values at a head's start that are rotated.
    pub rotary_dim: usize,
    /// Pairs are neighbours, not halves ([`crate::kernels::ops::rotate`]).
    pub interleaved: bool,
}

/// Norms and rotates the queries and keys of `qkv`, `[rows][(heads + 2 * kv_heads) * head_dim]`
/// (query heads, key heads, value heads), and writes keys and values to the cache. Queries
/// go to the same place in the rows of `q`: `[rows][heads * head_dim]`, or `qkv` itself. Rows whose slot (`block * 16 +
/// place`, i32) is below 0 are left alone.
///
/// # Errors
/// A fault of the driver.
///
/// # Panics
/// If lengths do not fit together.
#[allow(clippy::too_many_arguments, reason = "what a layer has at this point")]
pub fn rope_and_cache(
    device: &Device,
    shape: Shape,
    qkv: &Array,
    norms: Option<&Norms>,
    rotation: Option<&Rotation>,
    q: &Array,
    cache: Cache,
    slots: &Array,
) -> Result<()> {
    let (rows, d) = (slots.len(), shape.head_dim);
    let heads_a_row = shape.heads + 2 * shape.kv_heads;
    check_cache(shape, qkv.dtype(), cache);
    assert_eq!(qkv.len(), rows * heads_a_row * d);
    if rows == 0 {
        return Ok(());
    }
    let q_stride = row_stride(shape, q, rows, qkv.dtype());
    let rotary_dim = rotation.map_or(0, |rotation| rotation.rotary_dim);
    if let Some(rotation) = rotation {
        assert!(rotary_dim > 0 && rotary_dim <= d && rotary_dim.is_multiple_of(2));
        assert!(rotation.cos.len() == rotation.sin.len() && rotation.table_row.len() >= rows);
        assert!(rotation.cos.len().is_multiple_of(rotary_dim / 2));
        check_dtypes(&[rotation.cos, rotation.sin], Dtype::F32);
        check_dtypes(&[rotation.table_row], Dtype::I32);
    }
    if let Some(norms) = norms {
        assert!(norms.q_weight.len() == d && norms.k_weight.len() == d);
        check_dtypes(&[norms.q_weight, norms.k_weight], Dtype::F32);
    }
    check_dtypes(&[slots], Dtype::I32);
    let by_16 = d.is_multiple_of(16) && rotary_dim.is_multiple_of(16);
    if by_16 {
        check_alignment(&[qkv, q, cache.keys, cache.values]);
    }
    let lanes = if by_16 { (d / 16).next_power_of_two() } else { 32 };
    let kernel = match qkv.dtype() {
        Dtype::F16 => "rope_and_cache_f16",
        Dtype::Bf16 => "rope_and_cache_bf16",
        _ => "rope_and_cache_f32",
    };
    let arguments = [
        qkv.into(),
        q.into(),
        q_stride.into(),
        norms.map(|norms| norms.q_weight).into(),
        norms.map(|norms| norms.k_weight).into(),
        norms.map_or(0.0, |norms| norms.eps).into(),
        rotation.map(|rotation| rotation.cos).into(),
        rotation.map(|rotation| rotation.sin).into(),
        rotary_dim.into(),
        Arg::I32(rotation.is_some_and(|rotation| rotation.interleaved).into()),
        rotation.map(|rotation| rotation.table_row).into(),
        slots.into(),
        cache.keys.into(),
        cache.values.into(),
        rows.into(),
        shape.heads.into(),
        shape.kv_heads.into(),
        d.into(),
        lanes.into(),
    ];
    let grid = [blocks(rows * heads_a_row * lanes, 256), 1, 1];
    device.launch(kernel, grid, [256, 1, 1], 0, &arguments)
}

/// The rows of a step, as the device knows them. A row with a position or a sequence below 0
/// is padding and gets zeros.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// i32 `[rows]`.
    pub sequence_of_row: &'a Array,
    /// i32 `[rows]`: a row sees the keys up to its own position.
    pub positions: &'a Array,
    /// i32 `[sequences][max_blocks]`.
    pub block_tables: &'a Array,
    /// Blocks of the longest sequence that there may be.
    pub max_blocks: usize,
    /// i32, the rows that are wanted; all without it.
    pub list: Option<&'a Array>,
}

impl Rows<'_> {
    fn count(&self) -> usize {
        self.list.unwrap_or(self.positions).len()
    }
}

/// Attention of single rows, any number, each over the keys of its sequence up to itself. `q` is what
/// [`rope_and_cache`] left, `out` is `[rows][heads * head_dim]`. `scratch` holds
/// [`scratch_len`] f32 values.
///
/// # Errors
/// A fault of the driver.
///
/// # Panics
/// If lengths do not fit together.
#[allow(clippy::too_many_arguments, reason = "the arguments of the CPU's kernel, and scratch")]
pub fn attend_rows(
    device: &Device,
    shape: Shape,
    rule: &Rule,
    q: &Array,
    cache: Cache,
    rows: &Rows,
    scratch: &Array,
    out: &Array,
) -> Result<()> {
    let (all, wanted) = (rows.positions.len(), rows.count());
    if wanted == 0 {
        return Ok(());
    }
    let dtype = out.dtype();
    check_cache(shape, dtype, cache);
    assert!(out.len() == all * shape.heads * shape.head_dim && rows.sequence_of_row.len() == all);
    assert!(rows.max_blocks > 0 && rows.block_tables.len().is_multiple_of(rows.max_blocks));
    check_dtypes(&[rows.sequence_of_row, rows.positions, rows.block_tables], Dtype::I32);
    let kernel = RowKernel::choose(device.properties(), shape, dtype);
    let splits = splits(device.properties(), shape, kernel.queries(), wanted, rows.max_blocks);
    assert!(splits == 1 || scratch.len() >= wanted * splits * shape.heads * (shape.head_dim + 2));
    check_dtypes(&[scratch], Dtype::F32);
    if shape.head_dim.is_multiple_of(8) {
        check_alignment(&[q, cache.keys, cache.values]);
    }
    let mut arguments = vec![
        q.into(),
        row_stride(shape, q, all, dtype).into(),
        cache.keys.into(),
        cache.values.into(),
        out.into(),
        if splits > 1 { scratch.into() } else { Arg::Null },
        rows.list.into(),
        rows.sequence_of_row.into(),
        rows.positions.into(),
        rows.block_tables.into(),
        rows.max_blocks.into(),
    ];
    arguments.extend(shape_and_rule(shape, rule));
    let tiles = shape.kv_heads * shape.group().div_ceil(kernel.queries());
    let grid = [wanted as u32, tiles as u32, splits as u32];
    let block = [ROW_THREADS as u32, 1, 1];
    let (name, shared_bytes) = (kernel.name(dtype), kernel.shared_bytes(shape.head_dim));
    match kernel {
        RowKernel::Plain { .. } => device.launch(&name, grid, block, shared_bytes, &arguments)?,
        RowKernel::Tiles { stages, .. } => {
            let arguments = [&arguments[..], &[stages.into()]].concat();
            device.launch(&name, grid, block, shared_bytes, &arguments)?;
        }
    }
    if splits == 1 {
        return Ok(());
    }
    arguments.push(splits.into());
    let name = match dtype {
        Dtype::F16 => "attend_combine_f16",
        Dtype::Bf16 => "attend_combine_bf16",
        _ => "attend_combine_f32",
    };
    device.launch(name, [wanted as u32, shape.heads as u32, 1], block, 0, &arguments)
}

/// f32 values of scratch memory for any number of rows up to `max_rows`.
pub fn scratch_len(
    properties: &Properties,
    shape: Shape,
    dtype: Dtype,
    max_rows: usize,
    max_blocks: usize,
) -> usize {
    let queries = RowKernel::choose(properties, shape, dtype).queries();
    let parts = |rows| match splits(properties, shape, queries, rows, max_blocks) {
        1 => 0,
        splits => rows * splits,
    };
    let most = (1..=max_rows).map(parts).max().unwrap_or(0);
    most * shape.heads * (shape.head_dim + 2)
}

/// How many blocks share a row's keys: as many as give each multiprocessor four blocks, two
/// at a time. By lengths alone, so that the launch can be recorded; those with nothing to do leave.
fn splits(
    properties: &Properties,
    shape: Shape,
    queries: usize,
    rows: usize,
    max_blocks: usize,
) -> usize {
    let tiles = rows * shape.kv_heads * shape.group().div_ceil(queries);
    let most = (max_blocks * BLOCK_SIZE).div_ceil(MIN_SPLIT);
    (4 * properties.multiprocessors).div_ceil(tiles).clamp(1, most.max(1))
}

/// The kernel for single rows.
#[derive(Debug, Clone, Copy, PartialEq)]
enum RowKernel {
    /// `attend_rows_*`: query heads of a block, and the widest head.
    Plain { queries: usize, dims: usize },
    /// `attend_split_*`: width that heads are padded to, tiles of keys in flight, and [`volta`].
    Tiles { dim: usize, stages: usize, volta: bool },
}

impl RowKernel {
    fn choose(properties: &Properties, shape: Shape, dtype: Dtype) -> Self {
        if on_tensor_cores(properties, shape, dtype) {
            let dim = tile_dim(shape.head_dim);
            let volta = volta(properties);
            let two = Self::Tiles { dim, stages: 2, volta };
            let fits = two.shared_bytes(shape.head_dim) <= properties.shared_bytes_a_block;
            return if fits { two } else { Self::Tiles { dim, stages: 1, volta } };
        }
        let queries = match shape.group() {
            1 => 1,
            2..=4 => 4,
            _ => 8,
        };
        Self::Plain { queries, dims: if shape.head_dim <= 128 { 128 } else { 256 } }
    }

    /// Query heads of a block.
    fn queries(self) -> usize {
        match self {
            Self::Plain { queries, .. } => queries,
            Self::Tiles { .. } => TILE,
        }
    }

    fn name(self, dtype: Dtype) -> String {
        let suffix = dtype.suffix();
        match self {
            Self::Plain { queries, dims } => format!("attend_rows_{suffix}_q{queries}_d{dims}"),
            Self::Tiles { dim, volta: true, .. } => format!("attend_split_{suffix}_volta_d{dim}"),
            Self::Tiles { dim, .. } => format!("attend_split_{suffix}_d{dim}"),
        }
    }

    fn shared_bytes(self, head_dim: usize) -> usize {
        let stats = |queries| ROW_WARPS * queries * 2 * 4;
        match self {
            Self::Plain { queries, .. } => {
                let q = head_dim.next_multiple_of(8);
                let floats = queries * (q + ROW_WARPS * (BLOCK_SIZE + head_dim));
                4 * floats + stats(queries)
            }
            Self::Tiles { dim, stages, volta } => {
                let tile = 2 * BLOCK_SIZE * (dim + 8);
                let scores = scores_bytes(volta, BLOCK_SIZE);
                tile + ROW_WARPS * (scores + stages * 2 * tile) + stats(TILE)
            }
        }
    }
}

/// The chunks of a step, as the device knows them; i32 all. Sequences that no tile names
/// are left alone.
#[derive(Debug, Clone, Copy)]
pub struct Chunks<'a> {
    /// [`Plan::tiles`].
    pub tiles: &'a Array,
    /// `[sequences]`.
    pub first_row: &'a Array,
    /// `[sequences]`.
    pub num_rows: &'a Array,
    /// `[sequences]`.
    pub start_position: &'a Array,
    /// `[sequences][max_blocks]`.
    pub block_tables: &'a Array,
    /// Blocks of the longest sequence that there may be.
    pub max_blocks: usize,
}

/// Attention of chunks on the tensor cores; see [`on_tensor_cores`]. `rows` are those of `q`
/// and `out`; the chunks' own keys and values are in the cache.
///
/// # Errors
/// A fault of the driver.
///
/// # Panics
/// If lengths do not fit together, or this device cannot.
#[allow(clippy::too_many_arguments, reason = "the arguments of the CPU's kernel")]
pub fn attend_chunks(
    device: &Device,
    shape: Shape,
    rule: &Rule,
    q: &Array,
    cache: Cache,
    chunks: &Chunks,
    rows: usize,
    out: &Array,
) -> Result<()> {
    let dtype = out.dtype();
    assert!(on_tensor_cores(device.properties(), shape, dtype));
    check_cache(shape, dtype, cache);
    check_alignment(&[q, cache.keys, cache.values, out]);
    assert_eq!(out.len(), rows * shape.heads * shape.head_dim);
    let sequences = chunks.num_rows.len();
    assert!(chunks.first_row.len() == sequences && chunks.start_position.len() == sequences);
    assert!(chunks.block_tables.len() >= sequences * chunks.max_blocks);
    let counts = [chunks.first_row, chunks.num_rows, chunks.start_position];
    check_dtypes(&counts, Dtype::I32);
    check_dtypes(&[chunks.tiles, chunks.block_tables], Dtype::I32);
    if chunks.tiles.is_empty() {
        return Ok(());
    }
    let tiling = Tiling::choose(device.properties(), shape);
    let mut arguments = vec![
        q.into(),
        row_stride(shape, q, rows, dtype).into(),
        cache.keys.into(),
        cache.values.into(),
        out.into(),
        chunks.tiles.into(),
        chunks.first_row.into(),
        chunks.num_rows.into(),
        chunks.start_position.into(),
        chunks.block_tables.into(),
        chunks.max_blocks.into(),
    ];
    arguments.extend(shape_and_rule(shape, rule));
    arguments.push(tiling.stages.into());
    let variant = if tiling.volta { "_volta" } else { "" };
    let name = format!("attend_prefill_{}{variant}_d{}", dtype.suffix(), tiling.dim);
    let grid = [(chunks.tiles.len() / 2) as u32, shape.kv_heads as u32, 1];
    device.launch(&name, grid, [32 * tiling.warps as u32, 1, 1], tiling.shared_bytes(), &arguments)
}

/// How `attend_prefill_*` is launched.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Tiling {
    /// Width that heads are padded to.
    dim: usize,
    /// Warps of a block, of 16 queries each.
    warps: usize,
    /// Tiles of keys in shared memory.
    stages: usize,
    /// See [`volta`].
    volta: bool,
}

impl Tiling {
    /// More queries share the loads of keys and values, and a second tile hides them, as far
    /// as the shared memory goes.
    fn choose(properties: &Properties, shape: Shape) -> Self {
        let dim = tile_dim(shape.head_dim);
        let tilings = [(8, 2), (8, 1), (4, 2), (4, 1), (2, 1)];
        let volta = volta(properties);
        let mut tilings =
            tilings.map(|(warps, stages)| Self { dim, warps, stages, volta }).into_iter();
        let fits = |tiling: &Self| tiling.shared_bytes() <= properties.shared_bytes_a_block;
        tilings.find(fits).expect("shared memory for a tile: every GPU since Volta has 64 KiB")
    }

    /// Keys of a tile: the kernels' parameter.
    fn keys(self) -> usize {
        if self.dim <= 128 { 64 } else { 32 }
    }

    fn shared_bytes(self) -> usize {
        let (row, keys) = (2 * (self.dim + 8), self.keys());
        let scores = scores_bytes(self.volta, keys);
        self.warps * (TILE * row + scores) + self.stages * 2 * keys * row
    }

    /// Queries of a block.
    fn queries(self) -> usize {
        self.warps * TILE
    }
}

/// Whether this device multiplies matrices of such heads on its tensor cores: f16 and (from compute
/// capability 8.0) bf16, heads that 16 divides.
pub fn on_tensor_cores(properties: &Properties, shape: Shape, dtype: Dtype) -> bool {
    let has = match dtype {
        Dtype::F16 => properties.compute_capability >= (7, 0),
        Dtype::Bf16 => properties.has_bf16(),
        _ => false,
    };
    has && shape.head_dim.is_multiple_of(16)
}

/// The kernels by wmma are taken, which need memory for scores: before compute capability 8.0.
fn volta(properties: &Properties) -> bool {
    properties.compute_capability < (8, 0)
}

/// Shared memory of a warp's scores.
fn scores_bytes(volta: bool, keys: usize) -> usize {
    if volta { 4 * TILE * (keys + 8) } else { 0 }
}

/// Which kernel takes which rows of a step with chunks: made on the host, to be uploaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// `(sequence, first query)` of each tile of [`attend_chunks`]; queries are counted row by
    /// row and head by head of a group. A sequence's last tiles, which see most, come first.
    pub tiles: Vec<i32>,
    /// Rows for [`attend_rows`].
    pub rows: Vec<i32>,
}

impl Plan {
    /// Of sequences with `num_rows` rows each, one after another.
    pub fn new(properties: &Properties, shape: Shape, dtype: Dtype, num_rows: &[usize]) -> Self {
        let tensor_cores = on_tensor_cores(properties, shape, dtype);
        let queries = Tiling::choose(properties, shape).queries();
        let mut plan = Self::default();
        let mut first_row = 0;
        for (sequence, &rows) in num_rows.iter().enumerate() {
            if rows > 1 && tensor_cores {
                let tiles = (rows * shape.group()).div_ceil(queries);
                let firsts = (0..tiles).rev().map(|tile| tile * queries);
                plan.tiles.extend(firsts.flat_map(|first| [sequence as i32, first as i32]));
            } else {
                plan.rows.extend((first_row..first_row + rows).map(|row| row as i32));
            }
            first_row += rows;
        }
        plan
    }
}

/// The width of the kernel that takes heads of `head_dim`.
fn tile_dim(head_dim: usize) -> usize {
    let dims = [64, 96, 128, MAX_HEAD_DIM];
    *dims.iter().find(|dim| head_dim <= **dim).expect("a head of at most 256 values")
}

/// The arguments that all attention kernels share.
fn shape_and_rule<'a>(shape: Shape, rule: &Rule<'a>) -> [Arg<'a>; 7] {
    assert!(rule.window != Some(0) && rule.slopes.is_none_or(|s| s.len() == shape.heads));
    assert!(rule.softcap.is_none_or(|cap| cap > 0.0));
    // A window longer than any context is none.
    let window = rule.window.and_then(|window| i32::try_from(window).ok()).unwrap_or(0);
    [
        shape.heads.into(),
        shape.kv_heads.into(),
        shape.head_dim.into(),
        shape.scale.into(),
        window.into(),
        rule.softcap.unwrap_or(0.0).into(),
        rule.slopes.into(),
    ]
}

/// Values from row to row of the queries.
fn row_stride(shape: Shape, q: &Array, rows: usize, dtype: Dtype) -> usize {
    let stride = q.len() / rows;
    assert!(stride * rows == q.len() && stride >= shape.heads * shape.head_dim);
    check_dtypes(&[q], dtype);
    stride
}

fn check_cache(shape: Shape, dtype: Dtype, cache: Cache) {
    assert!(shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads));
    assert!((1..=MAX_HEAD_DIM).contains(&shape.head_dim));
    assert!(cache.keys.len() == cache.values.len());
    assert!(cache.keys.len().is_multiple_of(shape.block_len()));
    check_dtypes(&[cache.keys, cache.values], dtype);
}

fn check_dtypes(arrays: &[&Array], dtype: Dtype) {
    assert!(arrays.iter().all(|array| array.dtype() == dtype), "{arrays:?} are not {dtype:?}");
}

/// 16-byte loads need it; slices may begin anywhere.
fn check_alignment(arrays: &[&Array]) {
    assert!(arrays.iter().all(|array| array.address().is_multiple_of(16)));
}

#[cfg(all(test, feature = "emulator"))]
#[path = "attention_tests.rs"]
mod tests;
