//! Backward of the rotation in [`super::rope_store`], and of the norm per head before it.
//!
//! d `[T, N, D]` is the gradient of rotated q (or k). Rotated back by −θ, with c, s of the position
//! (YaRN's factor is in both, so it multiplies as it did forward):
//!
//! dx[d] = d[d]·c[d] + d[d + D/2]·s[d]   and   dx[d + D/2] = d[d + D/2]·c[d] − d[d]·s[d].
//!
//! Where heads are normed (Qwen3, Gemma 3) that is the gradient of the norm's output, and the
//! norm's own follows ([`crate::add_norm_backward`] has its formula), over D.

use crate::act::Act;
use crate::act::cpu::ActWriter;
use crate::buffer::Shared;
use crate::device::{Cpu, Device, Kind, part};
use crate::norm::Slope;
use crate::rope::RopeTable;
use crate::simd::{Kernel, LANES, Simd};
use crate::{Error, Plane, Vector};

/// The norm of every head: x `[T, N·D]` before it, its weight `[D]`, ε.
#[derive(Clone, Copy)]
pub struct HeadNorm<'a> {
    pub x: &'a Plane,
    pub weight: &'a Vector,
    pub eps: f32,
}

/// See the module page. `d` is left rotated back; `dx` is the gradient of what the site of q (or k)
/// made, with its copies.
///
/// # Panics
/// On shapes that do not fit, or a position beyond the table.
pub fn rope_backward(
    dev: &Device,
    d: &mut Plane,
    heads: usize,
    positions: &[u32],
    rope: &RopeTable,
    norm: Option<HeadNorm<'_>>,
    dx: &mut Act,
) {
    let (rows, dim) = (positions.len(), 2 * rope.half);
    let width = heads * dim;
    assert!(d.holds(rows, width), "d holds {rows} rows of {heads} x {dim}");
    assert!(dx.width() == width && dx.rows_max() >= rows, "dx holds {rows} rows of {width}");
    for (t, &position) in positions.iter().enumerate() {
        let beyond = position as usize >= rope.positions_max;
        assert!(!beyond, "row {t}: position {position} beyond the rope table");
    }
    if let Some(norm) = norm {
        assert!(norm.x.holds(rows, width), "x holds {rows} rows of {heads} x {dim}");
        assert_eq!(norm.weight.len(), dim, "a norm of heads has {dim} values");
    }
    match &dev.kind {
        Kind::Cpu(cpu) => on_cpu(cpu, d, heads, positions, rope, norm, dx),
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("rope_backward")),
    }
}

fn on_cpu(
    cpu: &Cpu,
    d: &mut Plane,
    heads: usize,
    positions: &[u32],
    rope: &RopeTable,
    norm: Option<HeadNorm<'_>>,
    dx: &mut Act,
) {
    cpu.count_op();
    let isa = cpu.isa();
    let (rows, dim, out) = (positions.len(), 2 * rope.half, dx.on_mut().cpu_mut().writer());
    let width = heads * dim;
    let d = Shared::of(d.on_mut().cpu_mut());
    let pieces = cpu.pieces(rows, width);
    cpu.fork(pieces, &|piece| {
        for t in part(rows, pieces, piece) {
            let (cos, sin) = rope.at(positions[t] as usize);
            let norm = norm.map(|norm| {
                let x = norm.x.on().cpu()[t * width..][..width].as_ptr();
                (x, norm.weight.values().as_ptr(), norm.eps)
            });
            let d = d.get().wrapping_add(t * width);
            let row = Row { d, heads, dim, cos, sin, norm, out, row: t };
            // SAFETY: bounds are asserted; a row belongs to one piece.
            unsafe { isa.run(row) }
        }
    });
}

struct Row<'a> {
    d: *mut f32,
    heads: usize,
    dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    /// x of the row, g, ε.
    norm: Option<(*const f32, *const f32, f32)>,
    out: ActWriter,
    row: usize,
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let half = self.dim / 2;
        for head in 0..self.heads {
            let start = head * self.dim;
            let d = self.d.add(start);
            for c in (0..half).step_by(LANES) {
                let n = (half - c).min(LANES);
                let (low, high) = (S::load_n(d.add(c), n), S::load_n(d.add(c + half), n));
                let cos = S::load_n(self.cos.as_ptr().add(c), n);
                let sin = S::load_n(self.sin.as_ptr().add(c), n);
                let plus = S::add(S::mul(low, cos), S::mul(high, sin));
                S::store_row_n(d.add(c), n, plus);
                let minus = S::sub(S::mul(high, cos), S::mul(low, sin));
                S::store_row_n(d.add(c + half), n, minus);
            }
            let norm = self.norm.map(|(x, weight, eps)| {
                let slope = Slope { x: x.add(start), weight, dy: d, width: self.dim, eps };
                (slope, slope.factors::<S>())
            });
            for c in (0..self.dim).step_by(LANES) {
                let n = (self.dim - c).min(LANES);
                let dx = match norm {
                    Some((slope, factors)) => slope.at::<S>(factors, c, n),
                    None => S::load_n(d.add(c), n),
                };
                self.out.store::<S>(self.row, start + c, n, dx);
            }
        }
    }
}
