//! dx = Σ dy·W   (or dx += …),   some sites that read the same x:   dy `[T, O]`   W `[O, I]` packed
//! dx `[T, I]`.
//!
//! A task has 64 columns of W and some rows. It turns the columns, so many outputs at a time, into
//! a block packed as the forward product's weights are, and takes the rows through it with that
//! product's tile ([`super::tile`]); partial sums rest in dx meanwhile. So there is no second copy
//! of the weights, and one element of dx is one chain over the outputs of all sites laid end to
//! end: its bits depend neither on the other rows nor on the threads.
//!
//! Numerics: where the CPU multiplies pairs of bf16, all weights but f32 are rounded to bf16 (bf16
//! ones are exact) and multiply dy rounded to bf16; else both are f32.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::act::Act;
use crate::buffer::Shared;
use crate::device::{Cpu, Device, Kind, part};
use crate::linear::floats::Floats;
use crate::linear::lines::Lines;
use crate::linear::stream::LINE;
use crate::linear::tile::{Product, Tile, X, rows_max, ticks};
use crate::linear::turn::{Turn, turn, turns_pairs};
use crate::matrix::{BLOCK, Matrix};
use crate::simd::{Isa, Kernel, LANES, Simd};
use crate::{Dtype, Error, Plane};

/// Steps of turned columns that rows are taken through at a time: 96 KiB, as in the forward pass.
const STEPS: usize = 384;
/// Rows from which on a block of columns may be turned by several threads, each for its rows.
const SPLIT_ROWS: usize = 32;

/// Whether a sum is written, or added to what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    Overwrite,
    Add,
}

/// One site: W, and the gradient of what it made, `[T, O]`.
#[derive(Clone, Copy)]
pub struct LinearBackward<'a> {
    pub weight: &'a Matrix,
    /// Made with a bf16 copy ([`Dtype::Bf16`]), unless W is f32.
    pub dy: &'a Act,
}

/// See the module page. `sites` are summed in their order.
///
/// # Panics
/// On shapes that do not fit, no site at all, and a dy without the copy that W reads.
pub fn linear_backward(
    dev: &Device,
    sites: &[LinearBackward<'_>],
    rows: usize,
    dx: &mut Plane,
    accumulate: Accumulate,
) {
    let inputs = dx.width();
    assert!(!sites.is_empty(), "a site at least");
    assert!(dx.holds(rows, inputs), "dx holds {rows} rows");
    for (i, site) in sites.iter().enumerate() {
        let outputs = site.weight.outputs();
        assert_eq!(site.weight.inputs(), inputs, "site {i}: W is [{outputs}, I]");
        assert_eq!(site.dy.width(), outputs, "site {i}: dy is [T, {outputs}]");
        assert!(site.dy.rows_max() >= rows, "site {i}: dy has {rows} rows");
    }
    match &dev.kind {
        Kind::Cpu(cpu) => on_cpu(cpu, sites, rows, dx, accumulate),
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("linear_backward")),
    }
}

fn on_cpu(
    cpu: &Cpu,
    sites: &[LinearBackward<'_>],
    rows: usize,
    dx: &mut Plane,
    accumulate: Accumulate,
) {
    cpu.count_op();
    if rows == 0 {
        return;
    }
    let (inputs, isa) = (dx.width(), cpu.isa());
    let dx = Shared::of(dx.on_mut().cpu_mut());
    // Were all tasks whole blocks, some threads would have one more than the others.
    let (blocks, threads) = (inputs.div_ceil(BLOCK), cpu.threads());
    let parts = if rows < SPLIT_ROWS { 1 } else { threads };
    let whole = if parts == 1 { blocks } else { blocks - blocks % threads };
    cpu.fork(whole + (blocks - whole) * parts, &|task| {
        let (block, rows) = match task.checked_sub(whole) {
            None => (task, 0..rows),
            Some(task) => (whole + task / parts, part(rows, parts, task % parts)),
        };
        // Every thread claims tasks in turn.
        let then = Some(block + threads).filter(|&then| then < blocks);
        let task = Task { isa, sites, rows, block, then, dx, inputs, accumulate };
        // SAFETY: shapes are checked; a (block, row) belongs to one task.
        unsafe { isa.run(task) };
    });
}

/// Some rows of 64 columns.
struct Task<'a> {
    isa: Isa,
    sites: &'a [LinearBackward<'a>],
    rows: Range<usize>,
    block: usize,
    /// The block that this thread probably takes next.
    then: Option<usize>,
    dx: Shared<f32>,
    inputs: usize,
    accumulate: Accumulate,
}

/// Columns of some outputs, packed as a block of the forward product: `[STEPS][panels][16]` words.
#[repr(align(64))]
struct Turned(MaybeUninit<[u32; STEPS * BLOCK]>);

/// Cache lines of weights that are turned at a time.
const LINES: usize = STEPS * BLOCK * size_of::<u32>() / LINE;

impl Kernel for Task<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut turned = Turned(MaybeUninit::uninit());
        let to = turned.0.as_mut_ptr().cast::<u32>();
        let mut fresh = self.accumulate == Accumulate::Overwrite;
        let mut lines = Lines::<LINES>::none();
        let mut next = self.chunk::<S>(self.block, (0, 0), to);
        while let Some((site, columns)) = next {
            let dtype = columns.weight.dtype();
            let (pairs, outputs) = (turns_pairs::<S>(dtype), columns.outputs.clone());
            next = self.chunk::<S>(self.block, (site, outputs.end), to);
            turn(self.isa, columns);
            let ahead = match &next {
                Some((_, columns)) => Some(columns.clone()),
                None => self.then.and_then(|block| Some(self.chunk::<S>(block, (0, 0), to)?.1)),
            };
            lines.list_stretches(ahead.iter().flat_map(|columns| columns.stretches()));
            let dy = self.sites[site].dy.on().cpu();
            if pairs {
                let tile = self.tile(dy.words(Dtype::Bf16), to, outputs, LANES / 2, fresh);
                self.multiply::<S, Floats<true>>(tile, &lines);
            } else {
                let tile = self.tile(dy.words(Dtype::F32), to, outputs, LANES, fresh);
                self.multiply::<S, Floats<false>>(tile, &lines);
            }
            fresh = false;
        }
    }
}

impl<'a> Task<'a> {
    /// Columns of a site from a panel of outputs on, as many as are turned at a time, or the next
    /// site's first; `None` behind the last.
    #[inline(always)]
    unsafe fn chunk<S: Simd>(
        &self,
        block: usize,
        (site, panel): (usize, usize),
        to: *mut u32,
    ) -> Option<(usize, Turn<'a>)> {
        let panels = |site: &LinearBackward<'_>| site.weight.outputs().div_ceil(LANES);
        let (site, panel) = match panel == panels(&self.sites[site]) {
            true => (site + 1, 0),
            false => (site, panel),
        };
        let weight = self.sites.get(site)?.weight.on().cpu();
        let steps = if turns_pairs::<S>(weight.dtype()) { LANES / 2 } else { LANES };
        let outputs = panel..panels(&self.sites[site]).min(panel + STEPS / steps);
        Some((site, Turn { weight, outputs, block, to }))
    }

    /// The tile of row 0 and of some panels of dy, each of so many steps.
    #[inline(always)]
    unsafe fn tile(
        &self,
        words: (*const u32, usize),
        w: *const u32,
        panels: Range<usize>,
        steps: usize,
        fresh: bool,
    ) -> Tile {
        let columns = (self.inputs - self.block * BLOCK).min(BLOCK);
        Tile {
            x: X::of_floats(words),
            w,
            panels: columns.div_ceil(LANES),
            panel: 0,
            start: panels.start * steps,
            fresh,
            steps: panels.len() * steps,
            y: self.dx.get().add(self.block * BLOCK),
            y_stride: self.inputs,
            outputs: columns,
            ahead: std::ptr::null(),
            ahead_rate: 0,
            gather: std::ptr::null(),
            gather_rate: 0,
        }
    }

    /// Takes all rows through what is turned, and brings near what is turned next.
    #[inline(always)]
    unsafe fn multiply<S: Simd, P: Product>(&self, tile: Tile, lines: &Lines<LINES>) {
        let groups = self.rows.len().div_ceil(rows_max::<S, P>());
        let ticks = ticks::<S, P>(tile.steps) * if S::WIDE { 1 } else { tile.panels };
        for group in 0..groups {
            let r = part(self.rows.len(), groups, group);
            let mut of_rows = tile;
            let row = self.rows.start + r.start;
            of_rows.x = tile.x.at_row(row);
            of_rows.y = tile.y.add(row * self.inputs);
            (of_rows.gather, of_rows.gather_rate) = lines.share(group, groups, ticks);
            of_rows.rows::<S, P>(r.len());
        }
    }
}
