//! DoRA's magnitudes, segment by segment of a call's rows:   y = (m/c)∘z + bias.
//!
//! z `[T, O]` = x·Wᵀ + s·(x·Aᵀ)·B   m, c `[O]` of every segment, c from [`dora_norms`]; rows of no
//! segment are z + bias. Backward, with no gradient through c (as PEFT has it):
//! dm += Σ_rows dy∘z/c,   dz = (m/c)∘dy. Numerics: f32; dm is one chain over 64 rows at a time,
//! counted from the segment's own start, each sum added to the gradient, so it has the same bits
//! alone, beside other jobs, and on any number of threads.

mod norms;

use std::ops::Range;

use crate::act::Act;
use crate::act::cpu::ActWriter;
use crate::buffer::Shared;
use crate::device::{Cpu, Device, Kind, part};
use crate::simd::{Kernel, LANES, Simd};
use crate::{Error, Plane, Vector};
pub use norms::{DoraFactors, DoraScratch, dora_norms, weight_squares};

/// Rows of a partial sum.
const ROWS: usize = 64;
/// Columns of a task.
const COLUMNS: usize = 64;

/// A job's rows of a call, its magnitudes and norms at one site: m, c `[O]`.
#[derive(Debug, Clone)]
pub struct Magnitude<'a> {
    pub rows: Range<usize>,
    pub values: &'a [f32],
    pub norms: &'a [f32],
}

/// The same, and the gradient that is added to: dm `[O]`.
#[derive(Debug)]
pub struct MagnitudeGradient<'a> {
    pub of: Magnitude<'a>,
    pub gradient: &'a mut [f32],
}

/// y of rows `0..rows`; see the module page.
///
/// # Panics
/// On shapes that do not fit, and rows that are in two segments or out of order.
pub fn dora(
    dev: &Device,
    z: &Plane,
    rows: usize,
    segments: &[Magnitude<'_>],
    bias: Option<&Vector>,
    y: &mut Plane,
) {
    let width = y.width();
    assert!(y.holds(rows, width) && z.holds(rows, width), "z and y hold {rows} rows of {width}");
    assert!(bias.is_none_or(|bias| bias.len() == width), "the bias has {width} values");
    assert!(check(segments.iter(), width) <= rows, "segments end within {rows} rows");
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let bias = bias.map(Vector::values);
            forward(cpu, z.on().cpu(), rows, segments, bias, y);
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("dora")),
    }
}

/// dm of every segment, and dz in the place of `dy` `[T, O]`, with its copies.
///
/// # Panics
/// As [`dora`].
pub fn dora_backward(
    dev: &Device,
    z: &Plane,
    segments: &mut [MagnitudeGradient<'_>],
    dy: &mut Act,
) {
    let width = dy.width();
    let end = check(segments.iter().map(|segment| &segment.of), width);
    assert!(z.holds(end, width) && dy.rows_max() >= end, "z and dy have {end} rows of {width}");
    assert!(segments.iter().all(|s| s.gradient.len() == width), "dm has {width} values");
    match &dev.kind {
        Kind::Cpu(cpu) => backward(cpu, z.on().cpu(), segments, dy),
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("dora_backward")),
    }
}

/// That segments are in order and have m and c of `[O]`; returns the last one's end.
fn check<'s>(segments: impl Iterator<Item = &'s Magnitude<'s>>, width: usize) -> usize {
    let mut end = 0;
    for (g, Magnitude { rows, values, norms }) in segments.enumerate() {
        assert!(end <= rows.start && rows.start <= rows.end, "segment {g} starts at row {end}");
        let both = values.len() == width && norms.len() == width;
        assert!(both, "segment {g}: magnitudes and norms have {width} values");
        end = rows.end;
    }
    end
}

fn forward(
    cpu: &Cpu,
    z: &[f32],
    rows: usize,
    segments: &[Magnitude<'_>],
    bias: Option<&[f32]>,
    y: &mut Plane,
) {
    cpu.count_op();
    let (width, isa) = (y.width(), cpu.isa());
    let y = Shared::of(y.on_mut().cpu_mut());
    let pieces = cpu.pieces(rows, width / 4);
    cpu.fork(pieces, &|piece| {
        for t in part(rows, pieces, piece) {
            let after = segments.partition_point(|segment| segment.rows.end <= t);
            let segment = segments.get(after).filter(|segment| segment.rows.contains(&t));
            let z = &z[t * width..][..width];
            let y = y.get().wrapping_add(t * width);
            // SAFETY: rows are in bounds as asserted, and each belongs to one piece.
            unsafe { isa.run(Scale { z, segment, bias, y }) }
        }
    });
}

/// One row.
struct Scale<'a> {
    z: &'a [f32],
    segment: Option<&'a Magnitude<'a>>,
    bias: Option<&'a [f32]>,
    y: *mut f32,
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for c in (0..self.z.len()).step_by(LANES) {
            let n = (self.z.len() - c).min(LANES);
            let load = |values: &[f32]| S::load_n(values.as_ptr().add(c), n);
            let mut y = load(self.z);
            if let Some(Magnitude { values, norms, .. }) = self.segment {
                y = S::mul(S::div(load(values), load(norms)), y);
            }
            if let Some(bias) = self.bias {
                y = S::add(y, load(bias));
            }
            S::store_row_n(self.y.add(c), n, y);
        }
    }
}

fn backward(cpu: &Cpu, z: &[f32], segments: &mut [MagnitudeGradient<'_>], dy: &mut Act) {
    cpu.count_op();
    let (width, isa) = (dy.width(), cpu.isa());
    let dy = dy.on_mut().cpu_mut().writer();
    let parts = width.div_ceil(COLUMNS);
    let (tasks, segments) = (segments.len() * parts, Shared::of(segments));
    cpu.fork(tasks, &|task| {
        // SAFETY: the slice lives until the fork is over; a task reads the segment, and writes
        // columns of its gradient, and of its rows, that are its own.
        unsafe {
            let segment = segments.get().add(task / parts);
            let gradient = (&raw mut *(*segment).gradient).cast::<f32>();
            let of = &(*segment).of;
            let start = task % parts * COLUMNS;
            let columns = start..width.min(start + COLUMNS);
            isa.run(Slope { z, width, of, gradient, columns, dy });
        }
    });
}

/// Some columns of a segment.
struct Slope<'a> {
    z: &'a [f32],
    width: usize,
    of: &'a Magnitude<'a>,
    gradient: *mut f32,
    columns: Range<usize>,
    dy: ActWriter,
}

impl Kernel for Slope<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Magnitude { rows, values, norms } = self.of;
        for start in rows.clone().step_by(ROWS) {
            let some = start..rows.end.min(start + ROWS);
            for c in self.columns.clone().step_by(LANES) {
                let n = (self.width - c).min(LANES);
                let norm = S::load_n(norms.as_ptr().add(c), n);
                let gain = S::div(S::load_n(values.as_ptr().add(c), n), norm);
                let mut sum = S::zero();
                for t in some.clone() {
                    let z = S::load_n(self.z.as_ptr().add(t * self.width + c), n);
                    let dy = S::load_n(self.dy.row(t).add(c), n);
                    sum = S::fma(dy, z, sum);
                    self.dy.store::<S>(t, c, n, S::mul(gain, dy));
                }
                let to = self.gradient.add(c);
                // Lanes beyond the width are divided by zero, and not stored.
                S::store_n(to, n, S::add(S::load_n(to, n), S::div(sum, norm)));
            }
        }
    }
}
