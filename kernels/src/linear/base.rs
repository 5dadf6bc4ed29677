//! How the base products of a call are cut into tasks, and a task into tiles.
//!
//!   y = x·Wᵀ (+ bias):   x `[T, I]`   W `[O, I]` packed   y `[T, O]`.
//!
//! A tile of a few rows by 4 panels lives in registers ([`super::tile`]). Many rows are taken
//! through a chunk of weights, tile by tile, while the next chunk is fetched beside the products;
//! partial sums rest in y meanwhile, which changes no bit. Few rows read the block as one stream,
//! for which the CPU's own prefetch is best. Products of many rows leave the memory idle: where
//! deltas follow, their B is fetched beside them.

use std::marker::PhantomData;
use std::ops::Range;

use crate::act::Outlier;
use crate::act::cpu::Act;
use crate::buffer::Shared;
use crate::device::{Cpu, part};
use crate::linear::change::{Change, FEW_ROWS};
use crate::linear::floats::Floats;
use crate::linear::ints::Ints;
use crate::linear::lines::Lines;
use crate::linear::operands::{Linear, SITES_MAX};
use crate::linear::stream::LINE;
use crate::linear::tile::{Block, Product, Tile, X, rows_max, ticks};
use crate::matrix::BLOCK;
use crate::matrix::cpu::Matrix;
use crate::simd::{Isa, Kernel, LANES, Simd};
use crate::{Dtype, Vector, WeightDtype};

/// Bytes of a block that rows are taken through at a time. Two tiles leave little time to fetch
/// what comes next and do best with what the first-level cache holds; more tiles stream the weights
/// from the second.
const CHUNK_BYTES_FEW: usize = 32 << 10;
const CHUNK_BYTES: usize = 96 << 10;
/// Tiles of one panel come to the same chunk once a panel: half of the first-level cache.
const CHUNK_BYTES_NARROW: usize = 16 << 10;
/// Tasks per thread: enough that a late thread delays the fork by little. Fewer where a task is a
/// stream of weights, which the CPU's own prefetch has to find anew each time.
const TASKS_PER_THREAD: usize = 8;
const STREAMS_PER_THREAD: usize = 4;
/// Rows per task when rows are split.
const SPLIT_ROWS: usize = 48;

/// How the base products of one call are cut into tasks.
pub(super) struct Cut {
    rows: usize,
    row_parts: usize,
    blocks: [usize; SITES_MAX],
    runs: [usize; SITES_MAX],
    /// The first of the last runs, and into how many tasks each of them is cut by rows, where
    /// others are not.
    last: usize,
    last_parts: usize,
}

impl Cut {
    pub(super) fn new(cpu: &Cpu, rows: usize, sites: &Sites<'_>) -> Cut {
        let blocks =
            sites.each_ref().map(|site| site.as_ref().map_or(0, |site| site.weight.blocks()));
        let total: usize = blocks.iter().sum();
        let per_thread = if rows <= FEW_ROWS { STREAMS_PER_THREAD } else { TASKS_PER_THREAD };
        let target = per_thread * cpu.threads();
        let run = total.div_ceil(target);
        let row_parts = target.div_ceil(total).min(rows / SPLIT_ROWS).max(1);
        let runs = blocks.map(|count| count.div_ceil(run));
        // Were all tasks alike, some threads would have one more than the others.
        let all: usize = runs.iter().sum();
        let rest = if row_parts == 1 { all % cpu.threads() } else { 0 };
        let last_parts = cpu.threads().checked_div(rest).unwrap_or(1);
        let last_parts = last_parts.min(rows / FEW_ROWS).max(1);
        Cut { rows, row_parts, blocks, runs, last: all - rest, last_parts }
    }

    /// Tasks of any call: `TASKS_PER_THREAD` a thread and one more a site, or, where rows are cut
    /// too, fewer than twice that.
    pub(super) fn tasks_max(cpu: &Cpu) -> usize {
        2 * TASKS_PER_THREAD * cpu.threads() + SITES_MAX
    }

    pub(super) fn tasks(&self) -> usize {
        let all: usize = self.runs.iter().sum();
        (self.last + (all - self.last) * self.last_parts) * self.row_parts
    }

    /// Site, rows and blocks of a task. Rows vary fastest, so tasks that run at the same time share
    /// weights.
    pub(super) fn task(&self, task: usize) -> (usize, Range<usize>, Range<usize>) {
        let whole = self.last * self.row_parts;
        let (mut run, parts, index) = match task.checked_sub(whole) {
            None => (task / self.row_parts, self.row_parts, task % self.row_parts),
            Some(task) => {
                (self.last + task / self.last_parts, self.last_parts, task % self.last_parts)
            }
        };
        let rows = part(self.rows, parts, index);
        for site in 0..SITES_MAX {
            if run < self.runs[site] {
                return (site, rows, part(self.blocks[site], self.runs[site], run));
            }
            run -= self.runs[site];
        }
        unreachable!("task {task} of {}", self.tasks())
    }
}

/// The sites of a call.
pub(super) type Sites<'a> = [Option<Site<'a>>; SITES_MAX];

/// One site of a call, as its tasks see it.
pub(super) struct Site<'a> {
    pub(super) weight: &'a Matrix,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) y: Shared<f32>,
    x: X,
    /// Some row has a delta here: x·Wᵀ is left as it is, for a gain may stand between it and the
    /// bias.
    pub(super) changed: bool,
}

impl<'a> Site<'a> {
    pub(super) fn new(isa: Isa, x: &Act, out: &mut Linear<'a>, changed: bool) -> Site<'a> {
        let x = match out.weight.dtype() {
            WeightDtype::Bf16 if isa.multiplies_pairs() => X::of_floats(x.words(Dtype::Bf16)),
            WeightDtype::F32 | WeightDtype::Bf16 => X::of_floats(x.words(Dtype::F32)),
            _ => X::of_bytes(x.rounded()),
        };
        let (weight, bias) = (out.weight.on().cpu(), out.bias.map(Vector::values));
        Site { weight, bias, y: Shared::of(out.y.on_mut().cpu_mut()), x, changed }
    }

    /// The bias, where it needs not wait for deltas.
    fn bias_now(&self) -> Option<&[f32]> {
        self.bias.filter(|_| !self.changed)
    }

    /// # Safety
    /// Rows are within x and y, blocks within W; no other task writes these outputs of these rows.
    pub(super) unsafe fn run(
        &self,
        isa: Isa,
        rows: Range<usize>,
        blocks: Range<usize>,
        after: *const u32,
        changes: &[Change],
        outliers: &[Outlier],
    ) {
        let start = outliers.partition_point(|outlier| (outlier.row as usize) < rows.start);
        let end = outliers.partition_point(|outlier| (outlier.row as usize) < rows.end);
        let outliers = &outliers[start..end];
        let task = Task { site: self, isa, rows, blocks, after, changes, outliers };
        match self.weight.dtype() {
            WeightDtype::F32 => task.run::<Floats<false>>(),
            WeightDtype::Bf16 => task.run::<Floats<true>>(),
            WeightDtype::Int8 => task.run::<Ints<8, 32, false>>(),
            WeightDtype::Int8By16 => task.run::<Ints<8, 16, false>>(),
            WeightDtype::Int8Min => task.run::<Ints<8, 32, true>>(),
            WeightDtype::Int4 => task.run::<Ints<4, 32, false>>(),
            WeightDtype::Int4Min => task.run::<Ints<4, 32, true>>(),
        }
    }
}

/// Some rows of some blocks.
struct Task<'a> {
    site: &'a Site<'a>,
    isa: Isa,
    rows: Range<usize>,
    blocks: Range<usize>,
    /// What this thread probably reads next.
    after: *const u32,
    /// Those of the rows.
    changes: &'a [Change],
    outliers: &'a [Outlier],
}

impl Task<'_> {
    unsafe fn run<P: Product>(self) {
        let gathers = self.gathers::<P>();
        self.isa.run(Blocks::<P> { task: self, gathers, product: PhantomData });
    }

    /// Whether the deltas bring so many lines, and the rows so many products, that fetching the
    /// ones beside the others pays.
    fn gathers<P: Product>(&self) -> bool {
        let block = self.blocks.start;
        // SAFETY: changes are of this call.
        let bytes = |c: &Change| unsafe { c.delta() }.b_bytes(block..block + 1);
        let lines = self.changes.iter().map(bytes).sum::<usize>() / LINE;
        let groups = self.rows.len().div_ceil(P::ROWS);
        groups > 1 && lines >= self.site.weight.steps() * P::TICKS / 2
    }

    /// Block and steps of a turn: a stretch of weights all rows are taken through.
    #[inline(always)]
    fn turn(&self, turn: usize, chunks: usize) -> (usize, Range<usize>) {
        let block = self.blocks.start + turn / chunks;
        (block, part(self.site.weight.steps(), chunks, turn % chunks))
    }

    #[inline(always)]
    unsafe fn tile(&self, block: usize, span: Range<usize>, row: usize) -> Tile {
        let site = self.site;
        let outputs = site.weight.outputs();
        Tile {
            x: site.x.at_row(row),
            w: site.weight.place(block, span.start),
            panels: site.weight.panels(block),
            panel: 0,
            start: span.start,
            fresh: span.start == 0,
            steps: span.len(),
            y: site.y.get().add(row * outputs + block * BLOCK),
            y_stride: outputs,
            outputs: (outputs - block * BLOCK).min(BLOCK),
            ahead: std::ptr::null(),
            ahead_rate: 0,
            gather: std::ptr::null(),
            gather_rate: 0,
        }
    }

    /// Adds to the sums of a block what its tiles leave out: outliers, the bias. Never inlined:
    /// beside it the tiles' loops would have fewer registers.
    #[inline(never)]
    unsafe fn complete<P: Product>(&self, block: usize) {
        self.isa.run(Rest::<P> { task: self, block, product: PhantomData });
    }
}

/// What the tiles of a block leave out.
struct Rest<'a, P> {
    task: &'a Task<'a>,
    block: usize,
    product: PhantomData<P>,
}

impl<P: Product> Kernel for Rest<'_, P> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Rest { task, block, .. } = self;
        let (site, y_stride) = (task.site, task.site.weight.outputs());
        let block = Block {
            w: site.weight.place(block, 0),
            panels: site.weight.panels(block),
            y: site.y.get().add(block * BLOCK),
            y_stride,
            outputs: (y_stride - block * BLOCK).min(BLOCK),
        };
        if P::ROUNDED {
            P::add_outliers::<S>(task.outliers, block);
        }
        let Some(bias) = site.bias_now() else { return };
        let bias = bias.as_ptr().add(self.block * BLOCK);
        for row in task.rows.clone() {
            for start in (0..block.outputs).step_by(LANES) {
                let y = block.y.add(row * y_stride + start);
                let n = (block.outputs - start).min(LANES);
                S::store_n(y, n, S::add(S::load_n(y, n), S::load_n(bias.add(start), n)));
            }
        }
    }
}

/// A task, by a way to multiply.
struct Blocks<'a, P> {
    task: Task<'a>,
    /// The deltas' B is fetched beside the products.
    gathers: bool,
    product: PhantomData<P>,
}

impl<P: Product> Kernel for Blocks<'_, P> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let task = &self.task;
        let weight = task.site.weight;
        let steps = weight.steps();
        let groups = task.rows.len().div_ceil(rows_max::<S, P>());
        let bytes = steps * weight.step_words(task.blocks.start) * size_of::<u32>();
        let chunks = match groups {
            _ if task.rows.len() == 1 => 1,
            _ if !S::WIDE => bytes.div_ceil(CHUNK_BYTES_NARROW),
            1 => 1,
            2 => bytes.div_ceil(CHUNK_BYTES_FEW),
            _ => bytes.div_ceil(CHUNK_BYTES),
        };
        let chunks = chunks.min(steps);
        let turns = task.blocks.len() * chunks;
        let mut lines: Lines = Lines::none();
        let has_rest = !task.outliers.is_empty() || task.site.bias_now().is_some();
        for turn in 0..turns {
            let (block, part_of) = task.turn(turn, chunks);
            // Where registers are few, each panel is a pass of its own.
            let passes = if S::WIDE { 1 } else { weight.panels(block) };
            if self.gathers && turn % chunks == 0 {
                lines.list(task.changes, block, ticks::<S, P>(steps) * groups * passes);
            }
            let ahead = if turn + 1 < turns {
                let (block, next) = task.turn(turn + 1, chunks);
                weight.place(block, next.start)
            } else {
                task.after
            };
            for group in 0..groups {
                let r = part(task.rows.len(), groups, group);
                let mut tile = task.tile(block, part_of.clone(), task.rows.start + r.start);
                let ticks = ticks::<S, P>(part_of.len());
                // A lone group is a stream, which the CPU fetches by itself.
                if (groups > 1 || chunks > 1) && !ahead.is_null() {
                    let words = weight.step_words(block) * part_of.len();
                    tile.look_ahead(ahead, words, ticks, group, groups);
                }
                if self.gathers {
                    let index = turn % chunks * groups + group;
                    (tile.gather, tile.gather_rate) =
                        lines.share(index, chunks * groups, ticks * passes);
                }
                tile.rows::<S, P>(r.len());
            }
            if has_rest && turn % chunks == chunks - 1 {
                task.complete::<P>(block);
            }
        }
    }
}
