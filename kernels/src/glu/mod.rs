//! out = gate(g) ∘ u:   g, u `[T, I]`   out `[T, I]`.
//!
//! silu(x) = x·σ(x); gelu_tanh(x) = x·σ(2·√(2/π)·(x + 0.044715·x³)), which is ½x(1 + tanh(…))
//! rewritten.

mod backward;

use std::ops::Range;

use crate::act::Act;
use crate::act::cpu::{self, ActWriter};
use crate::device::{Cpu, Device, Kind, part};
use crate::simd::{GROUP, Kernel, LANES, Simd};
use crate::{Error, Plane};
pub use backward::{GluBackward, glu_backward};

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
pub fn glu(dev: &Device, gate: Gate, g: &Plane, u: &Plane, rows: usize, out: &mut Act) {
    let width = out.width();
    assert!(g.holds(rows, width) && u.holds(rows, width), "g and u hold {rows} rows of {width}");
    assert!(rows <= out.rows_max(), "{rows} rows into an Act of {}", out.rows_max());
    match &dev.kind {
        Kind::Cpu(cpu) => {
            on_cpu(cpu, gate, g.on().cpu(), u.on().cpu(), rows, out.on_mut().cpu_mut());
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("glu")),
    }
}

fn on_cpu(cpu: &Cpu, gate: Gate, g: &[f32], u: &[f32], rows: usize, out: &mut cpu::Act) {
    cpu.count_op();
    let width = out.width();
    let (out, isa) = (out.writer(), cpu.isa());
    // Pieces over (row, group) pairs, so that one wide row is shared too.
    let groups = width.div_ceil(GROUP);
    let pieces = cpu.pieces(rows * groups, 2 * GROUP);
    cpu.fork(pieces, &|piece| {
        let span = part(rows * groups, pieces, piece);
        // SAFETY: in bounds as asserted; a group belongs to one piece.
        unsafe {
            isa.run(Span { gate, g: g.as_ptr(), u: u.as_ptr(), width, groups, span, out });
        }
    });
}

struct Span {
    gate: Gate,
    g: *const f32,
    u: *const f32,
    width: usize,
    /// Of a row.
    groups: usize,
    span: Range<usize>,
    out: ActWriter,
}

impl Kernel for Span {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut index = self.span.start;
        while index < self.span.end {
            let (row, first) = (index / self.groups, index % self.groups);
            let end = self.groups.min(first + self.span.end - index);
            for column in (first * GROUP..self.width.min(end * GROUP)).step_by(LANES) {
                self.vector::<S>(row, column);
            }
            self.out.round::<S>(row, first..end);
            index += end - first;
        }
    }
}

impl Span {
    /// The values of a row from `column` on, as many as are lanes.
    #[inline(always)]
    unsafe fn vector<S: Simd>(&self, row: usize, column: usize) {
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
