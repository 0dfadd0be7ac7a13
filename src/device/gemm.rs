//! Matrix products: what is asked for, checked; the drivers compute them (cuBLAS on a GPU).

use super::{Array, Dtype};

/// `c[m, n] = alpha · op(a)[m, k] · op(b)[k, n] + beta · c`, all row-major. Sums are in f32.
#[derive(Debug, Clone)]
pub struct Gemm<'a> {
    /// `[m, k]`, or `[k, m]` where it is transposed: f32, f16 or bf16.
    pub a: &'a Array,
    /// Values from row to row of `a`.
    pub a_stride: usize,
    /// `a` is stored transposed.
    pub transpose_a: bool,
    /// `[k, n]`, or `[n, k]` where it is transposed (a weight); of `a`'s type.
    pub b: &'a Array,
    /// Values from row to row of `b`.
    pub b_stride: usize,
    /// `b` is stored transposed.
    pub transpose_b: bool,
    /// `[m, n]`: f32, or of `a`'s type.
    pub c: &'a Array,
    /// Values from row to row of `c`.
    pub c_stride: usize,
    /// Rows of `c`.
    pub m: usize,
    /// Columns of `c`.
    pub n: usize,
    /// Products a sum.
    pub k: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what `c` held; 0: it may have been anything.
    pub beta: f32,
}

/// A checked product, by addresses.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Call {
    pub a: u64,
    pub a_stride: usize,
    pub transpose_a: bool,
    pub b: u64,
    pub b_stride: usize,
    pub transpose_b: bool,
    pub c: u64,
    pub c_stride: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub alpha: f32,
    pub beta: f32,
    pub operands: Dtype,
    pub result: Dtype,
}

impl<'a> Gemm<'a> {
    /// `out[m, n] = x[m, k] · wᵀ`, with `w` stored `[n, k]`, all contiguous.
    pub fn linear(x: &'a Array, w: &'a Array, out: &'a Array, [m, n, k]: [usize; 3]) -> Gemm<'a> {
        Gemm {
            a: x,
            a_stride: k,
            transpose_a: false,
            b: w,
            b_stride: k,
            transpose_b: true,
            c: out,
            c_stride: n,
            m,
            n,
            k,
            alpha: 1.0,
            beta: 0.0,
        }
    }

    /// `None` where there is nothing to compute.
    pub(super) fn call(&self) -> Option<Call> {
        let (operands, result) = (self.a.dtype(), self.c.dtype());
        assert!(matches!(operands, Dtype::F32 | Dtype::F16 | Dtype::Bf16));
        assert_eq!(self.b.dtype(), operands);
        assert!(result == Dtype::F32 || result == operands);
        let shape = |transposed, rows, cols| if transposed { (cols, rows) } else { (rows, cols) };
        check("a", self.a, shape(self.transpose_a, self.m, self.k), self.a_stride);
        check("b", self.b, shape(self.transpose_b, self.k, self.n), self.b_stride);
        check("c", self.c, (self.m, self.n), self.c_stride);
        (self.m > 0 && self.n > 0).then(|| Call {
            a: self.a.address(),
            a_stride: self.a_stride,
            transpose_a: self.transpose_a,
            b: self.b.address(),
            b_stride: self.b_stride,
            transpose_b: self.transpose_b,
            c: self.c.address(),
            c_stride: self.c_stride,
            m: self.m,
            n: self.n,
            k: self.k,
            alpha: self.alpha,
            beta: self.beta,
            operands,
            result,
        })
    }
}

fn check(name: &str, array: &Array, (rows, cols): (usize, usize), stride: usize) {
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols };
    assert!(
        stride >= cols && array.len() >= needed,
        "{name}: {array:?} for {rows} rows of {cols}, {stride} apart"
    );
}
