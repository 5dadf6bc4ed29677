//! The three products of an adapter that is being trained, forward and backward, segment by
//! segment of a call's rows:
//!
//! *shrink*  u = s·x·Fᵀ,   *expand*  y += s·u·F,   *outer*  dF += s·uᵀ·x.
//!
//! x `[T, W]`   F `[R, W]` f32, rank by rank (A as `[R, I]`, B as `[R, O]`)   u `[T, R]`. Forward:
//! u = x·Aᵀ, y += s·u·B. Backward: v = s·dy·Bᵀ, dB += s·uᵀ·dy, dA += vᵀ·x, dx += v·A. Segments are
//! jobs: each has rows, a rank, factors and a scale of its own, and rows of none cost nothing.
//!
//! Numerics: f32. Shrink is 16 chains (columns i, i+16, …) joined in one order; expand one chain
//! over the ranks; outer one chain over [`ROWS`] rows at a time, counted from the segment's own
//! start, each sum added to the gradient. So rows and gradients have the same bits alone, beside
//! other jobs, and on any number of threads.

use std::ops::Range;

use crate::act::Act;
use crate::buffer::Shared;
use crate::device::{Cpu, Device, Kind};
use crate::product::Product;
use crate::simd::{Kernel, LANES, Simd};
use crate::{Error, Plane};

/// Rows of a task, and of a partial sum of [`outer`].
const ROWS: usize = 64;
/// Columns of a task of [`outer`].
const COLUMNS: usize = 64;

/// A job's rows of a call, and its factors at one site.
#[derive(Debug, Clone)]
pub struct Factor<'a> {
    pub rows: Range<usize>,
    /// R.
    pub rank: usize,
    /// F: A `[R, I]` or B `[R, O]`.
    pub values: &'a [f32],
    /// s.
    pub scale: f32,
}

/// The same for a gradient that is added to.
#[derive(Debug)]
pub struct FactorGradient<'a> {
    pub rows: Range<usize>,
    /// R.
    pub rank: usize,
    /// dF: dA `[R, I]` or dB `[R, O]`.
    pub values: &'a mut [f32],
    /// s.
    pub scale: f32,
}

/// u = s·x·Fᵀ of every segment's rows. `u` is `[T, R]` or wider; nothing else of it is written.
///
/// # Panics
/// On shapes that do not fit, and rows that are in two segments or out of order.
pub fn shrink(dev: &Device, x: &Act, segments: &[Factor<'_>], u: &mut Plane) {
    let width = x.width();
    let end = check(segments.iter().map(|s| (&s.rows, s.rank, s.values.len())), width, u.width());
    assert!(end <= x.rows_max() && end <= u.rows_max(), "x and u have {end} rows");
    match &dev.kind {
        Kind::Cpu(cpu) => {
            cpu.count_op();
            let isa = cpu.isa();
            let (x, x_row) = x.on().cpu().wide();
            let (u_row, u) = (u.width(), Shared::of(u.on_mut().cpu_mut()));
            by_rows(cpu, segments, &|segment, rows| {
                let dots = Dots {
                    x: x[rows.start * x_row..].as_ptr(),
                    x_row,
                    segment,
                    width,
                    rows: rows.len(),
                    u: u.get().wrapping_add(rows.start * u_row),
                    u_row,
                };
                // SAFETY: bounds are asserted; a row belongs to one task.
                unsafe { isa.run(dots) }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("shrink")),
    }
}

/// y += s·u·F of every segment's rows. `u` is `[T, R]` or wider.
///
/// # Panics
/// As [`shrink`].
pub fn expand(dev: &Device, u: &Plane, segments: &[Factor<'_>], y: &mut Plane) {
    let width = y.width();
    let end = check(segments.iter().map(|s| (&s.rows, s.rank, s.values.len())), width, u.width());
    assert!(end <= y.rows_max() && end <= u.rows_max(), "u and y have {end} rows");
    match &dev.kind {
        Kind::Cpu(cpu) => {
            cpu.count_op();
            let isa = cpu.isa();
            let (u_row, u) = (u.width(), &u.on().cpu()[..]);
            let y = Shared::of(y.on_mut().cpu_mut());
            by_rows(cpu, segments, &|segment, rows| {
                let product = Product {
                    a: u[rows.start * u_row..].as_ptr(),
                    a_row: u_row,
                    a_step: 1,
                    b: segment.values.as_ptr(),
                    b_step: width,
                    c: y.get().wrapping_add(rows.start * width),
                    c_row: width,
                    rows: rows.len(),
                    steps: segment.rank,
                    columns: width,
                    factor: segment.scale,
                    add: true,
                };
                // SAFETY: bounds are asserted; a row belongs to one task.
                unsafe { isa.run(product) }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("expand")),
    }
}

/// dF += s·uᵀ·x over every segment's rows. `u` is `[T, R]` or wider.
///
/// # Panics
/// As [`shrink`].
pub fn outer(dev: &Device, u: &Plane, x: &Act, segments: &mut [FactorGradient<'_>]) {
    let width = x.width();
    let end = check(segments.iter().map(|s| (&s.rows, s.rank, s.values.len())), width, u.width());
    assert!(end <= x.rows_max() && end <= u.rows_max(), "u and x have {end} rows");
    match &dev.kind {
        Kind::Cpu(cpu) => {
            cpu.count_op();
            let isa = cpu.isa();
            let (u_row, u) = (u.width(), &u.on().cpu()[..]);
            let (x, x_row) = x.on().cpu().wide();
            let parts = width.div_ceil(COLUMNS);
            let (tasks, segments) = (segments.len() * parts, Shared::of(segments));
            cpu.fork(tasks, &|task| {
                let column = task % parts * COLUMNS;
                // SAFETY: the slice lives until the fork is over; a task only reads the segment,
                // and writes columns of its gradient that are its own.
                let (rows, rank, scale, values) = unsafe {
                    let segment = segments.get().add(task / parts);
                    let values = (&raw mut *(*segment).values).cast::<f32>();
                    ((*segment).rows.clone(), (*segment).rank, (*segment).scale, values)
                };
                for start in rows.clone().step_by(ROWS) {
                    let product = Product {
                        a: u[start * u_row..].as_ptr(),
                        a_row: 1,
                        a_step: u_row,
                        b: x[start * x_row + column..].as_ptr(),
                        b_step: x_row,
                        c: values.wrapping_add(column),
                        c_row: width,
                        rows: rank,
                        steps: rows.end.min(start + ROWS) - start,
                        columns: (width - column).min(COLUMNS),
                        factor: scale,
                        add: true,
                    };
                    // SAFETY: bounds are asserted; these columns belong to this task.
                    unsafe { isa.run(product) }
                }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("outer")),
    }
}

/// That segments are in order and their factors `[R, W]`; returns the last one's end.
fn check<'s>(
    segments: impl Iterator<Item = (&'s Range<usize>, usize, usize)>,
    width: usize,
    rank_max: usize,
) -> usize {
    let mut end = 0;
    for (g, (rows, rank, len)) in segments.enumerate() {
        assert!(end <= rows.start && rows.start <= rows.end, "segment {g} starts at row {end}");
        assert_eq!(len, rank * width, "segment {g}: factors are [{rank}, {width}]");
        assert!(rank <= rank_max, "segment {g}: rank {rank}, u has room for {rank_max}");
        end = rows.end;
    }
    end
}

/// Tasks of some rows of one segment.
fn by_rows(cpu: &Cpu, segments: &[Factor<'_>], run: &(dyn Fn(&Factor<'_>, Range<usize>) + Sync)) {
    let parts = |segment: &Factor<'_>| segment.rows.len().div_ceil(ROWS);
    cpu.fork(segments.iter().map(parts).sum(), &|mut task| {
        for segment in segments {
            if task < parts(segment) {
                let start = segment.rows.start + task * ROWS;
                return run(segment, start..segment.rows.end.min(start + ROWS));
            }
            task -= parts(segment);
        }
    });
}

/// u of some rows of a segment.
pub(crate) struct Dots<'a> {
    pub(crate) x: *const f32,
    pub(crate) x_row: usize,
    pub(crate) segment: &'a Factor<'a>,
    pub(crate) width: usize,
    pub(crate) rows: usize,
    pub(crate) u: *mut f32,
    pub(crate) u_row: usize,
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut row = 0;
        while row < self.rows {
            let left = self.rows - row;
            row += match left {
                4.. if S::WIDE => self.rows::<S, 4>(row),
                2.. => self.rows::<S, 2>(row),
                _ => self.rows::<S, 1>(row),
            };
        }
    }
}

impl Dots<'_> {
    /// All ranks of some rows; returns how many rows.
    #[inline(always)]
    unsafe fn rows<S: Simd, const ROWS: usize>(&self, row: usize) -> usize {
        let mut rank = 0;
        while rank < self.segment.rank {
            rank += match self.segment.rank - rank {
                4.. if S::WIDE => self.tile::<S, ROWS, 4>(row, rank),
                2.. => self.tile::<S, ROWS, 2>(row, rank),
                _ => self.tile::<S, ROWS, 1>(row, rank),
            };
        }
        ROWS
    }

    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "iterators over parts of `acc` spill it")]
    unsafe fn tile<S: Simd, const ROWS: usize, const RANKS: usize>(
        &self,
        row: usize,
        rank: usize,
    ) -> usize {
        let factors = self.segment.values.as_ptr().add(rank * self.width);
        let x = self.x.add(row * self.x_row);
        let mut acc = [[S::zero(); RANKS]; ROWS];
        for i in (0..self.width).step_by(LANES) {
            let n = (self.width - i).min(LANES);
            let mut of_rank = [S::zero(); RANKS];
            for r in 0..RANKS {
                of_rank[r] = S::load_n(factors.add(r * self.width + i), n);
            }
            for t in 0..ROWS {
                let x = S::load_n(x.add(t * self.x_row + i), n);
                for r in 0..RANKS {
                    acc[t][r] = S::fma(x, of_rank[r], acc[t][r]);
                }
            }
        }
        for t in 0..ROWS {
            let u = self.u.add((row + t) * self.u_row + rank);
            S::store_sums(u, acc[t], [self.segment.scale; RANKS]);
        }
        RANKS
    }
}
