//! GFLOP/s of the matrix products on one thread: `cargo bench --bench gemm [-- NAME…]`
//! with some of rows, linear, multiply, gradient, lora. Rates are over the thread's CPU
//! time, so that other tenants of the machine disturb them less.

mod support;

use farm::kernels::gemm::{self, Element, Matrix};
use farm::kernels::quant::{self, QuantMatrix, QuantType};
use half::{bf16, f16};
use rustix::time::{ClockId, clock_gettime};

/// Input and output features: attention, up and down projections and the head of a small
/// Llama, and a layer of a 1B one, whose rows are a power of two apart.
const SHAPES: [(usize, usize); 5] =
    [(768, 768), (768, 2048), (2048, 768), (768, 32000), (2048, 2048)];
/// Tokens of a micro-batch.
const MS: [usize; 3] = [64, 512, 2048];
/// Rows of activations in the comparison by type of weights.
const ROWS: [usize; 7] = [1, 4, 8, 16, 32, 128, 512];
/// Rank of an adapter.
const RANK: usize = 16;

fn main() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let peak = support::fma_flops(1) / 1e9;
    println!("GFLOP/s of one thread, {}; limit {peak:.0}", farm::kernels::tier().name());
    let chosen: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|c| c == name);
    if wanted("rows") {
        by_rows();
    }
    if wanted("linear") {
        table("out = x · Wᵀ", |m, cols, rows| {
            let (x, w, mut out) = (values(m * cols), values(rows * cols), vec![0.0; m * rows]);
            let w16: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
            let q4 = blocks(rows, cols);
            [
                rate(m, cols, rows, || gemm::linear(&x, m, matrix(&w, cols), None, &mut out)),
                rate(m, cols, rows, || gemm::linear(&x, m, matrix(&w16, cols), None, &mut out)),
                rate(m, cols, rows, || quant::linear(&x, m, q4_k(&q4, cols), None, &mut out)),
            ]
        });
    }
    if wanted("multiply") {
        table("dx = dy · W", |m, cols, rows| {
            let (y, w, mut dx) = (values(m * rows), values(rows * cols), vec![0.0; m * cols]);
            let w16: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
            let q4 = blocks(rows, cols);
            [
                rate(m, cols, rows, || gemm::multiply(&y, m, matrix(&w, cols), false, &mut dx)),
                rate(m, cols, rows, || gemm::multiply(&y, m, matrix(&w16, cols), false, &mut dx)),
                rate(m, cols, rows, || quant::multiply(&y, m, q4_k(&q4, cols), false, &mut dx)),
            ]
        });
    }
    if wanted("gradient") {
        println!("dW += dyᵀ · x");
        for (cols, rows) in [(768, 768), (768, 2048)] {
            print!("{cols:>6} {rows:>6} ");
            for m in MS {
                let (x, dy, mut dw) = (values(m * cols), values(m * rows), vec![0.0; rows * cols]);
                let rate = rate(m, cols, rows, || gemm::gradient(&dy, &x, m, true, &mut dw));
                print!(" {rate:>6.1}");
            }
            println!();
        }
    }
    if wanted("lora") {
        lora();
    }
}

/// The forward product by rows of activations and type of weights.
fn by_rows() {
    const WIDTH: usize = 2048;
    fn row<E: Element>(name: &str, from: impl Fn(f32) -> E) {
        let weights: Vec<E> = values(WIDTH * WIDTH).into_iter().map(from).collect();
        print!("{name:>5}");
        for m in ROWS {
            let (x, mut out) = (values(m * WIDTH), vec![0.0; m * WIDTH]);
            let w = matrix(&weights, WIDTH);
            let rate = rate(m, WIDTH, WIDTH, || gemm::linear(&x, m, w, None, &mut out));
            print!(" {rate:>6.1}");
        }
        println!();
    }
    println!("[m, {WIDTH}] x [{WIDTH}, {WIDTH}]");
    println!("type      m=1      4      8     16     32    128    512");
    row::<f32>("f32", |v| v);
    row::<bf16>("bf16", bf16::from_f32);
    let weights: Vec<bf16> = values(WIDTH * WIDTH).into_iter().map(bf16::from_f32).collect();
    print!("pairs");
    for m in ROWS {
        let (x, mut out) = (values(m * WIDTH), vec![0.0; m * WIDTH]);
        let w = matrix(&weights, WIDTH);
        let rate = rate(m, WIDTH, WIDTH, || gemm::linear_bf16(&x, m, w, None, &mut out));
        print!(" {rate:>6.1}");
    }
    println!("   (bf16, activations rounded to it)");
    row::<f16>("f16", f16::from_f32);
}

/// A product of all shapes, for f32, bf16 and q4_k weights.
fn table(name: &str, product: impl Fn(usize, usize, usize) -> [f64; 3]) {
    println!("{name}\n    in    out   m:  f32   bf16   q4_k");
    for (cols, rows) in SHAPES {
        print!("{cols:>6} {rows:>6} ");
        for m in MS {
            let [a, b, c] = product(m, cols, rows);
            print!(" {m:>5}: {a:>5.1} {b:>6.1} {c:>6.1}");
        }
        println!();
    }
}

/// The small products of an adapter on a layer of `WIDTH` by `WIDTH`.
fn lora() {
    const WIDTH: usize = 2048;
    println!("rank {RANK}, {WIDTH} wide: x·Aᵀ, h·Bᵀ, h·(Bᵀ), dy·B, dh·A, dyᵀ·h, dhᵀ·x");
    for m in MS {
        let (x, h, w) = (values(m * WIDTH), values(m * RANK), values(WIDTH * RANK));
        let (mut wide, mut narrow, mut grad) =
            (vec![0.0; m * WIDTH], vec![0.0; m * RANK], vec![0.0; WIDTH * RANK]);
        let (tall, flat) = (matrix(&w, RANK), matrix(&w, WIDTH));
        let rates = [
            rate(m, WIDTH, RANK, || gemm::linear(&x, m, flat, None, &mut narrow)),
            rate(m, WIDTH, RANK, || gemm::linear(&h, m, tall, None, &mut wide)),
            rate(m, WIDTH, RANK, || gemm::multiply(&h, m, flat, true, &mut wide)),
            rate(m, WIDTH, RANK, || gemm::multiply(&x, m, tall, false, &mut narrow)),
            rate(m, WIDTH, RANK, || gemm::multiply(&h, m, flat, true, &mut wide)),
            rate(m, WIDTH, RANK, || gemm::gradient(&x, &h, m, true, &mut grad)),
            rate(m, WIDTH, RANK, || gemm::gradient(&h, &x, m, true, &mut grad)),
        ];
        print!("{m:>6}");
        rates.iter().for_each(|rate| print!(" {rate:>6.1}"));
        println!();
    }
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect()
}

fn matrix<E>(data: &[E], cols: usize) -> Matrix<'_, E> {
    Matrix { data, rows: data.len() / cols, cols, stride: cols }
}

/// Any bytes will do, but for scales that f16 cannot hold.
fn blocks(rows: usize, cols: usize) -> Vec<u8> {
    let mixed = |i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    (0..rows * QuantType::Q4_K.row_bytes(cols)).map(|i| mixed(i) as u8 & 0xbb).collect()
}

fn q4_k(data: &[u8], cols: usize) -> QuantMatrix<'_> {
    let (quant, stride) = (QuantType::Q4_K, QuantType::Q4_K.row_bytes(cols));
    QuantMatrix { data, quant, rows: data.len() / stride, cols, skip: 0, stride }
}

/// GFLOP/s of the best of five goes at a product of `m` by `k` by `n`.
fn rate(m: usize, k: usize, n: usize, mut product: impl FnMut()) -> f64 {
    let flops = 2.0 * (m * k * n) as f64;
    let rounds = (1e9 / flops).ceil() as usize;
    let best = (0..5).map(|_| {
        let start = cpu_seconds();
        (0..rounds).for_each(|_| product());
        (cpu_seconds() - start) / rounds as f64
    });
    flops / best.fold(f64::MAX, f64::min) / 1e9
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
