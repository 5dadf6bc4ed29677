//! Backward of [`super::add_norm`]: the gradient of the norm is added to that of the residual
//! stream, and what the block that was added gets of it is written, in one pass over the rows.
//!
//! y = x·ρ∘g, ρ = (mean x² + ε)^-½:   dx = ρ·(g∘dy) − x·ρ³/H·Σ(g∘dy∘x).   x, dy, dx `[T, H]`
//! g `[H]`. Weights are frozen: no dg. Numerics: both sums are 16 chains (columns c, c+16, …)
//! joined in one order, in f32; ρ, and ρ³/H·Σ, in f64.

use crate::act::Act;
use crate::act::cpu::ActWriter;
use crate::buffer::Shared;
use crate::device::{Cpu, Device, Kind, part};
use crate::simd::{Kernel, LANES, Simd};
use crate::{Error, Plane, Vector};

/// A norm, what it read, and the gradient of what it made.
#[derive(Clone, Copy)]
pub struct NormBackward<'a> {
    /// x: h as [`super::add_norm`] left it.
    pub x: &'a Plane,
    pub weight: &'a Vector,
    pub eps: f32,
    pub dy: &'a Plane,
}

/// A block whose y was added to the residual stream, as it is or by way of its norm.
pub struct ResidualBackward<'a> {
    /// Of a post-norm: y, its weight and ε.
    pub post: Option<(&'a Plane, &'a Vector, f32)>,
    /// The gradient of y.
    pub dy: &'a mut Act,
}

/// `dh += norm'(dy)` of rows `0..rows`, if there is a norm; then the residual's `dy = dh`, or what
/// its post-norm makes of dh.
///
/// # Panics
/// On shapes that do not fit.
pub fn add_norm_backward(
    dev: &Device,
    norm: Option<NormBackward<'_>>,
    rows: usize,
    dh: &mut Plane,
    residual: Option<ResidualBackward<'_>>,
) {
    let width = dh.width();
    assert!(dh.holds(rows, width), "dh holds {rows} rows");
    if let Some(norm) = norm {
        check(norm, rows, rows, width);
    }
    if let Some(ResidualBackward { post, dy }) = &residual {
        assert!(dy.width() == width && dy.rows_max() >= rows, "dy holds {rows} rows of {width}");
        if let Some((y, weight, _)) = post {
            assert!(y.holds(rows, width), "y holds {rows} rows of {width}");
            assert_eq!(weight.len(), width, "a norm weight has {width} values");
        }
    }
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let width_of = |t: usize| t * width..(t + 1) * width;
            let dh = Shared::of(dh.on_mut().cpu_mut());
            let (post, out) = match residual {
                Some(ResidualBackward { post, dy }) => (post, Some(dy.on_mut().cpu_mut().writer())),
                None => (None, None),
            };
            fork(cpu, rows, width, &|t| {
                let dh = dh.get().wrapping_add(t * width);
                let post = post.map(|(y, weight, eps)| Slope {
                    x: y.on().cpu()[width_of(t)].as_ptr(),
                    weight: weight.values().as_ptr(),
                    dy: dh,
                    width,
                    eps,
                });
                let norm = norm.map(|norm| norm.slope(t, t));
                Row { norm, dh, width, residual: out.map(|out| (post, out, t)) }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("add_norm_backward")),
    }
}

/// The same for a norm of some rows ([`super::add_norm_rows`]): `dh[rows[i]] += norm'(dy[i])`.
/// Other rows of dh are left as they are.
///
/// # Panics
/// On shapes that do not fit, and rows that do not strictly increase.
pub fn add_norm_rows_backward(dev: &Device, norm: NormBackward<'_>, rows: &[u32], dh: &mut Plane) {
    let (width, end) = (dh.width(), rows.last().map_or(0, |&t| t as usize + 1));
    assert!(rows.is_sorted_by(|a, b| a < b), "rows strictly increase");
    assert!(dh.holds(end, width), "dh holds {end} rows");
    check(norm, end, rows.len(), width);
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let dh = Shared::of(dh.on_mut().cpu_mut());
            fork(cpu, rows.len(), width, &|i| {
                let t = rows[i] as usize;
                let dh = dh.get().wrapping_add(t * width);
                Row { norm: Some(norm.slope(t, i)), dh, width, residual: None }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("add_norm_rows_backward")),
    }
}

fn check(norm: NormBackward<'_>, rows: usize, made: usize, width: usize) {
    assert!(norm.x.holds(rows, width), "x holds {rows} rows of {width}");
    assert!(norm.dy.holds(made, width), "dy holds {made} rows of {width}");
    assert_eq!(norm.weight.len(), width, "a norm weight has {width} values");
}

fn fork(cpu: &Cpu, rows: usize, width: usize, row: &(dyn Fn(usize) -> Row + Sync)) {
    cpu.count_op();
    let isa = cpu.isa();
    let pieces = cpu.pieces(rows, width);
    cpu.fork(pieces, &|piece| {
        for i in part(rows, pieces, piece) {
            // SAFETY: rows are in bounds as asserted, and each belongs to one piece.
            unsafe { isa.run(row(i)) }
        }
    });
}

impl NormBackward<'_> {
    /// Of row `t`, which made row `i`.
    fn slope(&self, t: usize, i: usize) -> Slope {
        let width = self.weight.len();
        Slope {
            x: self.x.on().cpu()[t * width..][..width].as_ptr(),
            weight: self.weight.values().as_ptr(),
            dy: self.dy.on().cpu()[i * width..][..width].as_ptr(),
            width,
            eps: self.eps,
        }
    }
}

/// The norm of one row, or of one head: x, g and dy of `width` values.
#[derive(Clone, Copy)]
pub(crate) struct Slope {
    pub(crate) x: *const f32,
    pub(crate) weight: *const f32,
    pub(crate) dy: *const f32,
    pub(crate) width: usize,
    pub(crate) eps: f32,
}

impl Slope {
    /// ρ and ρ³/H·Σ(g∘dy∘x).
    ///
    /// # Safety
    /// The pointers are valid for `width` values.
    #[inline(always)]
    pub(crate) unsafe fn factors<S: Simd>(&self) -> [S::F; 2] {
        let (mut squares, mut products) = (S::zero(), S::zero());
        for c in (0..self.width).step_by(LANES) {
            let n = (self.width - c).min(LANES);
            let x = S::load_n(self.x.add(c), n);
            let dy = S::mul(S::load_n(self.weight.add(c), n), S::load_n(self.dy.add(c), n));
            squares = S::fma(x, x, squares);
            products = S::fma(dy, x, products);
        }
        let width = self.width as f64;
        let mean = f64::from(S::sum(squares)) / width;
        let root = 1.0 / (mean + f64::from(self.eps)).sqrt();
        let slope = root * root * root * f64::from(S::sum(products)) / width;
        [S::splat(root as f32), S::splat(slope as f32)]
    }

    /// dx of `n` columns from `c` on.
    ///
    /// # Safety
    /// As [`Self::factors`].
    #[inline(always)]
    pub(crate) unsafe fn at<S: Simd>(&self, [root, slope]: [S::F; 2], c: usize, n: usize) -> S::F {
        let dy = S::mul(S::load_n(self.weight.add(c), n), S::load_n(self.dy.add(c), n));
        S::sub(S::mul(root, dy), S::mul(slope, S::load_n(self.x.add(c), n)))
    }
}

struct Row {
    norm: Option<Slope>,
    dh: *mut f32,
    width: usize,
    /// The post-norm, whose dy is dh, and where its dx goes.
    residual: Option<(Option<Slope>, ActWriter, usize)>,
}

impl Kernel for Row {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let columns = (0..self.width).step_by(LANES).map(|c| (c, (self.width - c).min(LANES)));
        if let Some(norm) = self.norm {
            let factors = norm.factors::<S>();
            for (c, n) in columns.clone() {
                let dh = self.dh.add(c);
                let sum = S::add(S::load_n(dh, n), norm.at::<S>(factors, c, n));
                S::store_row_n(dh, n, sum);
            }
        }
        let Some((post, out, row)) = self.residual else { return };
        let post = post.map(|post| (post, post.factors::<S>()));
        for (c, n) in columns {
            let dy = match post {
                Some((post, factors)) => post.at::<S>(factors, c, n),
                None => S::load_n(self.dh.add(c), n),
            };
            out.store::<S>(row, c, n, dy);
        }
    }
}
