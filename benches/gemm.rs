//! GFLOP/s of the linear kernel on one thread, by rows of activations and type of
//! weights: `cargo bench --bench gemm`. Rates are over the thread's CPU time, so
//! that other tenants of the machine disturb them less.

use farm::kernels::gemm::{Element, Matrix, linear};
use half::{bf16, f16};
use rustix::time::{ClockId, clock_gettime};

const IN: usize = 2048;
const OUT: usize = 2048;

fn main() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    println!("[m, {IN}] x [{IN}, {OUT}], {}", farm::kernels::tier().name());
    println!("type      m=1      4      8     16     32    128    512");
    row::<f32>("f32", |v| v);
    row::<bf16>("bf16", bf16::from_f32);
    row::<f16>("f16", f16::from_f32);
}

fn row<E: Element>(name: &str, from: impl Fn(f32) -> E) {
    let weights: Vec<E> = (0..IN * OUT).map(|i| from((i % 251) as f32 / 251.0 - 0.5)).collect();
    let w = Matrix { data: &weights, rows: OUT, cols: IN, stride: IN };
    print!("{name:>5}");
    for m in [1, 4, 8, 16, 32, 128, 512] {
        let x: Vec<f32> = (0..m * IN).map(|i| (i % 113) as f32 / 113.0 - 0.5).collect();
        let mut out = vec![0.0; m * OUT];
        let rounds = (256 / m).clamp(2, 64);
        let best = (0..5).map(|_| {
            let start = cpu_seconds();
            (0..rounds).for_each(|_| linear(&x, m, w, None, &mut out));
            (cpu_seconds() - start) / rounds as f64
        });
        let flops = 2.0 * (m * IN * OUT) as f64;
        print!(" {:>6.1}", flops / best.fold(f64::MAX, f64::min) / 1e9);
    }
    println!();
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
