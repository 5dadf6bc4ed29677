//! out = gate(g) ∘ u:   g, u `[T, I]`   out `[T, I]`.
//!
//! silu(x) = x·σ(x); gelu_tanh(x) = x·σ(2·√(2/π)·(x + 0.044715·x³)), which is ½x(1 + tanh(…))
//! rewritten.

use crate::act::{Act, ActWriter};
use crate::device::{Device, part};
use crate::simd::{Kernel, LANES, Simd};

/// The activation of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    Silu,
    GeluTanh,
}

/// See the module page.
///
/// # Panics
/// On shapes that do not fit.
pub fn glu(dev: &Device, gate: Gate, g: &[f32], u: &[f32], rows: usize, out: &mut Act) {
    dev.count_op();
    let width = out.width();
    assert!(
        g.len() >= rows * width && u.len() >= rows * width,
        "g and u hold {rows} rows of {width}"
    );
    assert!(rows <= out.rows_max(), "{rows} rows into an Act of {}", out.rows_max());
    let (out, isa) = (out.writer(), dev.isa());
    // Pieces over (row, vector) pairs, so that one wide row is shared too.
    let vectors = width.div_ceil(LANES);
    let pieces = dev.pieces(rows * vectors, 2 * LANES);
    dev.fork(pieces, &|piece| {
        let span = part(rows * vectors, pieces, piece);
        // SAFETY: in bounds as asserted; a vector belongs to one piece.
        unsafe {
            isa.run(Span { gate, g: g.as_ptr(), u: u.as_ptr(), width, vectors, span, out });
        }
    });
}

struct Span {
    gate: Gate,
    g: *const f32,
    u: *const f32,
    width: usize,
    vectors: usize,
    span: std::ops::Range<usize>,
    out: ActWriter,
}

impl Kernel for Span {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for index in self.span {
            let (row, column) = (index / self.vectors, index % self.vectors * LANES);
            let n = (self.width - column).min(LANES);
            let x = S::load_n(self.g.add(row * self.width + column), n);
            let exponent = match self.gate {
                Gate::Silu => S::sub(S::zero(), x),
                Gate::GeluTanh => {
                    let cubic = S::mul(S::splat(0.044715), S::mul(x, x));
                    let inner = S::fma(cubic, x, x);
                    // -2·√(2/π)
                    S::mul(S::splat(-1.595_769), inner)
                }
            };
            let gate = S::div(x, S::add(S::splat(1.0), S::exp(exponent)));
            let u = S::load_n(self.u.add(row * self.width + column), n);
            self.out.store::<S>(row, column, n, S::mul(gate, u));
        }
    }
}
