//! out = rmsnorm(h + post(y)) · w:   x / sqrt(mean(x²) + eps) · w.
//!
//! h `[T, H]`   y `[T, H]`   w `[H]`   out `[T, H]`. `post` is the norm Gemma puts behind a block;
//! else y is added as it is. (Gemma's 1 + w is folded into the weights at load.) A segment whose
//! adapter replaced the norm brings its own w. Numerics: the sum of squares is 16 chains (columns
//! c, c+16, …) joined in one order, in f32; the root in f64.

mod backward;

use crate::act::Act;
use crate::act::cpu::{self, ActWriter};
use crate::buffer::Shared;
use crate::device::{Cpu, Device, Kind, part};
use crate::segments::Segments;
use crate::simd::{GROUP, Isa, Kernel, LANES, Simd};
use crate::{Error, Plane, Vector};
pub(crate) use backward::Slope;
pub use backward::{NormBackward, ResidualBackward, add_norm_backward, add_norm_rows_backward};

/// RMS norm weights: the base's, and in its place those of segments whose adapter alone brings its
/// own.
#[derive(Clone, Copy)]
pub struct NormWeight<'a> {
    pub base: &'a Vector,
    /// Its index among a resident's norms.
    pub norm: usize,
}

impl<'a> NormWeight<'a> {
    /// The weight of a row of `segment`, of `width` values.
    pub(crate) fn of(
        &self,
        segments: Segments<'a>,
        segment: Option<usize>,
        width: usize,
    ) -> &'a [f32] {
        let own = segment.and_then(|g| segments.norm(g, self.norm));
        let weight = own.unwrap_or(self.base).values();
        assert_eq!(weight.len(), width, "a norm weight has {width} values");
        weight
    }
}

/// What a block adds to the residual stream: y, or its norm.
#[derive(Clone, Copy)]
pub struct Residual<'a> {
    pub y: &'a Plane,
    pub post: Option<NormWeight<'a>>,
}

/// `h += residual`, then `out[t] = norm(h[t])` for rows `0..rows`.
///
/// # Panics
/// On shapes that do not fit.
#[expect(clippy::too_many_arguments, reason = "operands of one formula")]
pub fn add_norm(
    dev: &Device,
    h: &mut Plane,
    rows: usize,
    residual: Option<Residual<'_>>,
    weight: NormWeight<'_>,
    eps: f32,
    segments: Segments<'_>,
    out: &mut Act,
) {
    segments.check(rows);
    check(h, rows, rows, residual, out);
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let h = Shared::of(h.on_mut().cpu_mut());
            let norm = Norm::new(residual, weight, eps, segments);
            norm.all(cpu, h, rows, out.on_mut().cpu_mut());
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("add_norm")),
    }
}

/// The same for the rows that are sampled only: `out[i] = norm(h[rows[i]] + residual[rows[i]])`; h
/// is not written. `segments` and the residual are those of the full batch.
///
/// # Panics
/// On shapes that do not fit.
#[expect(clippy::too_many_arguments, reason = "operands of one formula")]
pub fn add_norm_rows(
    dev: &Device,
    h: &Plane,
    rows: &[u32],
    residual: Option<Residual<'_>>,
    weight: NormWeight<'_>,
    eps: f32,
    segments: Segments<'_>,
    out: &mut Act,
) {
    let end = rows.iter().map(|&t| t as usize + 1).max().unwrap_or(0);
    check(h, rows.len(), end, residual, out);
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let norm = Norm::new(residual, weight, eps, segments);
            norm.some(cpu, h.on().cpu(), rows, out.on_mut().cpu_mut());
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("add_norm_rows")),
    }
}

fn check(h: &Plane, rows: usize, end: usize, residual: Option<Residual<'_>>, out: &Act) {
    let width = out.width();
    assert!(h.holds(end, width), "h holds {end} rows of {width}");
    assert!(rows <= out.rows_max(), "{rows} rows into an Act of {}", out.rows_max());
    if let Some(residual) = residual {
        assert!(residual.y.holds(end, width), "the residual holds {end} rows of {width}");
    }
}

/// What is done to every row.
#[derive(Clone, Copy)]
struct Norm<'a> {
    y: Option<&'a [f32]>,
    post: Option<NormWeight<'a>>,
    weight: NormWeight<'a>,
    eps: f32,
    segments: Segments<'a>,
}

impl<'a> Norm<'a> {
    /// Of operands on the CPU, whose shapes are checked.
    fn new(
        residual: Option<Residual<'a>>,
        weight: NormWeight<'a>,
        eps: f32,
        segments: Segments<'a>,
    ) -> Norm<'a> {
        let y = residual.map(|r| &r.y.on().cpu()[..]);
        Norm { y, post: residual.and_then(|r| r.post), weight, eps, segments }
    }

    fn all(&self, cpu: &Cpu, h: Shared<f32>, rows: usize, out: &mut cpu::Act) {
        cpu.count_op();
        let (width, out, isa) = (out.width(), out.writer(), cpu.isa());
        let pieces = cpu.pieces(rows, width / 2);
        cpu.fork(pieces, &|piece| {
            for t in part(rows, pieces, piece) {
                // SAFETY: rows are in bounds as asserted and belong to one piece.
                unsafe {
                    let h = h.get().add(t * width);
                    self.row(isa, t, Row { h, sum: h, out, row: t, width, eps: self.eps });
                }
            }
        });
    }

    fn some(&self, cpu: &Cpu, h: &[f32], rows: &[u32], out: &mut cpu::Act) {
        cpu.count_op();
        let (width, out, isa) = (out.width(), out.writer(), cpu.isa());
        let pieces = cpu.pieces(rows.len(), width / 2);
        cpu.fork(pieces, &|piece| {
            for i in part(rows.len(), pieces, piece) {
                let t = rows[i] as usize;
                // SAFETY: rows are in bounds as asserted; output row `i` belongs to one piece.
                unsafe {
                    let h = h.as_ptr().add(t * width);
                    let sum = out.row(i).cast_mut();
                    self.row(isa, t, Row { h, sum, out, row: i, width, eps: self.eps });
                }
            }
        });
    }

    /// Row `t` of the batch.
    unsafe fn row(&self, isa: Isa, t: usize, row: Row) {
        let (segment, width) = (self.segments.of_row(t), row.width);
        let of = |weight: NormWeight<'a>| weight.of(self.segments, segment, width).as_ptr();
        isa.run(NormRow {
            row,
            y: self.y.map(|y| y[t * width..][..width].as_ptr()),
            post: self.post.map(of),
            weight: of(self.weight),
        });
    }
}

/// One row: `sum = h + residual`, then `out[row] = norm(sum)`.
#[derive(Clone, Copy)]
struct Row {
    h: *const f32,
    sum: *mut f32,
    out: ActWriter,
    row: usize,
    width: usize,
    eps: f32,
}

struct NormRow {
    row: Row,
    y: Option<*const f32>,
    post: Option<*const f32>,
    weight: *const f32,
}

/// 1 / sqrt(mean(x²) + eps) of `width` values.
#[inline(always)]
pub(crate) unsafe fn inverse_rms<S: Simd>(x: *const f32, width: usize, eps: f32) -> f32 {
    let mut squares = S::zero();
    for c in (0..width).step_by(LANES) {
        let x = S::load_n(x.add(c), (width - c).min(LANES));
        squares = S::fma(x, x, squares);
    }
    let mean = f64::from(S::sum(squares)) / width as f64;
    (1.0 / (mean + f64::from(eps)).sqrt()) as f32
}

impl Kernel for NormRow {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Row { h, sum, out, row, width, eps } = self.row;
        let lanes = |c: usize| (width - c).min(LANES);
        if let Some(y) = self.y {
            let factor = self.post.map(|w| (w, S::splat(inverse_rms::<S>(y, width, eps))));
            for c in (0..width).step_by(LANES) {
                let mut y = S::load_n(y.add(c), lanes(c));
                if let Some((w, factor)) = factor {
                    y = S::mul(S::mul(y, factor), S::load_n(w.add(c), lanes(c)));
                }
                S::store_row_n(sum.add(c), lanes(c), S::add(S::load_n(h.add(c), lanes(c)), y));
            }
        }
        let x = if self.y.is_some() { sum.cast_const() } else { h };
        let factor = S::splat(inverse_rms::<S>(x, width, eps));
        for c in (0..width).step_by(LANES) {
            let x = S::mul(S::load_n(x.add(c), lanes(c)), factor);
            out.store::<S>(row, c, lanes(c), S::mul(x, S::load_n(self.weight.add(c), lanes(c))));
        }
        out.round::<S>(row, 0..width.div_ceil(GROUP));
    }
}
