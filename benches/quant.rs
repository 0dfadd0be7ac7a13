//! The linear kernels over quantized weights (activations rounded to 8 bits, and as they
//! are), beside f32 and bf16 ones, by rows of activations: GFLOP/s, and GB/s of weights as they are stored. The weights are
//! copies beyond the caches, as a model's layers are. Rates are over CPU time, so that
//! other tenants of the machine disturb them less.
//! `cargo bench --bench quant [-- THREADS TYPE…]`; one thread and all types unless told
//! otherwise.

mod support;

use farm::kernels::gemm::{self, Matrix};
use farm::kernels::quant::{self, QuantMatrix, QuantType};
use half::bf16;
use rustix::time::{ClockId, clock_gettime};

const IN: usize = 2048;
const OUT: usize = 5632;
const MS: [usize; 5] = [1, 4, 8, 32, 512];
/// Bytes of weights that a pass goes through before it meets a matrix again.
const WEIGHT_BYTES: usize = 192 << 20;

fn main() {
    let threads = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(1);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().unwrap();
    println!(
        "[m, {IN}] x [{IN}, {OUT}], {threads} threads, {}; limits: {:.1} GB/s, {:.0} GFLOP/s",
        farm::kernels::tier().name(),
        support::memory_bytes_per_second(threads) / 1e9,
        support::fma_flops(threads) / 1e9,
    );
    print!("GFLOP/s (GB/s)");
    MS.iter().for_each(|m| print!(" {:>14}", format!("m={m}")));
    println!();
    let values = |copies: usize| (0..copies * IN * OUT).map(|i| (i % 251) as f32 / 251.0 - 0.5);
    let copies = WEIGHT_BYTES / (IN * OUT * 4);
    let f32s: Vec<f32> = values(copies).collect();
    row("f32", "f32", &f32s, IN * OUT, |x, m, data, out| {
        gemm::linear(x, m, Matrix { data, rows: OUT, cols: IN, stride: IN }, None, out);
    });
    let bf16s: Vec<bf16> = values(2 * copies).map(bf16::from_f32).collect();
    row("bf16", "f32", &bf16s, IN * OUT, |x, m, data, out| {
        gemm::linear(x, m, Matrix { data, rows: OUT, cols: IN, stride: IN }, None, out);
    });
    for quant in QuantType::ALL {
        let matrix = OUT * quant.row_bytes(IN);
        // Any bytes will do, but for scales that f16 cannot hold.
        let bytes: Vec<u8> = (0..WEIGHT_BYTES / matrix * matrix)
            .map(|i| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 & 0xbb)
            .collect();
        row(quant.name(), "int8", &bytes, matrix, |x, m, data, out| {
            quant::int8::linear(x, m, matrix_of(quant, data), None, out);
        });
        row(quant.name(), "f32", &bytes, matrix, |x, m, data, out| {
            quant::linear(x, m, matrix_of(quant, data), None, out);
        });
    }
}

fn matrix_of(quant: QuantType, data: &[u8]) -> QuantMatrix<'_> {
    QuantMatrix { data, quant, rows: OUT, cols: IN, skip: 0, stride: quant.row_bytes(IN) }
}

/// The rates for each m; `weights` are copies of a matrix of `len` elements.
fn row<T>(
    name: &str,
    activations: &str,
    weights: &[T],
    len: usize,
    product: impl Fn(&[f32], usize, &[T], &mut [f32]),
) {
    let chosen = || std::env::args().skip(1).filter(|arg| !arg.starts_with('-'));
    let mut types = chosen().filter(|arg| arg.parse::<usize>().is_err()).peekable();
    if types.peek().is_some() && types.all(|arg| arg != name) {
        return;
    }
    print!("{:>14}", format!("{name} {activations}"));
    for m in MS {
        let x: Vec<f32> = (0..m * IN).map(|i| (i % 113) as f32 / 113.0 - 0.5).collect();
        let mut out = vec![0.0; m * OUT];
        let rounds = (64 / m).max(1);
        let mut copies = weights.chunks_exact(len).cycle();
        let best = (0..5).map(|_| {
            let start = cpu_seconds();
            copies.by_ref().take(rounds).for_each(|data| product(&x, m, data, &mut out));
            (cpu_seconds() - start) / (rounds * rayon::current_num_threads()) as f64
        });
        let seconds = best.fold(f64::MAX, f64::min);
        let flops = 2.0 * (m * IN * OUT) as f64 / seconds / 1e9;
        let bytes = (len * size_of::<T>()) as f64 / seconds / 1e9;
        print!(" {:>14}", format!("{flops:.1} ({bytes:.1})"));
    }
    println!();
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
