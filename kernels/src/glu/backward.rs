//! Backward of [`super::glu`], a = f(g)∘u:   du = da∘f(g),   dg = da∘u∘f′(g).
//!
//! g, u, da, dg, du `[T, I]`. Both gates are f(x) = x·σ(z): z = x (SiLU), or
//! z = 2·√(2/π)·(x + 0.044715·x³) (GELU by tanh); so f′ = σ·(1 + x·(1 − σ)·z′).

use crate::act::Act;
use crate::act::cpu::ActWriter;
use crate::device::{Cpu, Device, Kind, part};
use crate::glu::Gate;
use crate::simd::{Kernel, LANES, Simd};
use crate::{Error, Plane};

/// What the gate's gradient is made of: g, u, da, `[T, I]` each.
#[derive(Clone, Copy)]
pub struct GluBackward<'a> {
    pub gate: Gate,
    pub g: &'a Plane,
    pub u: &'a Plane,
    pub da: &'a Plane,
}

/// See the module page.
///
/// # Panics
/// On shapes that do not fit.
pub fn glu_backward(dev: &Device, of: GluBackward<'_>, rows: usize, dg: &mut Act, du: &mut Act) {
    let width = dg.width();
    for (name, plane) in [("g", of.g), ("u", of.u), ("da", of.da)] {
        assert!(plane.holds(rows, width), "{name} holds {rows} rows of {width}");
    }
    assert_eq!(du.width(), width, "dg and du have the width of g");
    assert!(rows <= dg.rows_max() && rows <= du.rows_max(), "dg and du have {rows} rows");
    match &dev.kind {
        Kind::Cpu(cpu) => on_cpu(cpu, of, rows, dg, du),
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("glu_backward")),
    }
}

fn on_cpu(cpu: &Cpu, of: GluBackward<'_>, rows: usize, dg: &mut Act, du: &mut Act) {
    cpu.count_op();
    let isa = cpu.isa();
    let width = dg.width();
    let [g, u, da] = [of.g, of.u, of.da].map(|plane| &plane.on().cpu()[..]);
    let [dg, du] = [dg, du].map(|act| act.on_mut().cpu_mut().writer());
    let pieces = cpu.pieces(rows, 4 * width);
    cpu.fork(pieces, &|piece| {
        for row in part(rows, pieces, piece) {
            let at = row * width..(row + 1) * width;
            let [g, u, da] = [g, u, da].map(|values| &values[at.clone()]);
            // SAFETY: a row belongs to one piece; rows are in bounds as asserted.
            unsafe { isa.run(Row { gate: of.gate, g, u, da, dg, du, row }) }
        }
    });
}

struct Row<'a> {
    gate: Gate,
    g: &'a [f32],
    u: &'a [f32],
    da: &'a [f32],
    dg: ActWriter,
    du: ActWriter,
    row: usize,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // 2·√(2/π)
        const STEEP: f32 = 1.595_769;
        let one = S::splat(1.0);
        for c in (0..self.g.len()).step_by(LANES) {
            let n = (self.g.len() - c).min(LANES);
            let x = S::load_n(self.g.as_ptr().add(c), n);
            let u = S::load_n(self.u.as_ptr().add(c), n);
            let da = S::load_n(self.da.as_ptr().add(c), n);
            let (z, slope) = match self.gate {
                Gate::Silu => (x, one),
                Gate::GeluTanh => {
                    let square = S::mul(S::splat(0.044715), S::mul(x, x));
                    let slope = S::fma(S::splat(3.0), square, one);
                    let steep = S::splat(STEEP);
                    (S::mul(steep, S::fma(square, x, x)), S::mul(steep, slope))
                }
            };
            let sigma = S::div(one, S::add(one, S::exp(S::sub(S::zero(), z))));
            let rest = S::mul(S::mul(x, S::sub(one, sigma)), slope);
            let slope = S::mul(sigma, S::add(one, rest));
            self.dg.store::<S>(self.row, c, n, S::mul(S::mul(da, u), slope));
            self.du.store::<S>(self.row, c, n, S::mul(da, S::mul(x, sigma)));
        }
    }
}
