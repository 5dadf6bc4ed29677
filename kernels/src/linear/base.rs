//! y = x·Wᵀ (+ bias):   x `[T, I]`   W `[O, I]` packed   y `[T, O]`.
//!
//! A tile of up to 6 rows by 4 panels lives in registers; each of its lanes is one chain over the
//! inputs in order. Many rows are taken through a chunk of weights, tile by tile, while the next
//! chunk is fetched beside the products; partial sums rest in y meanwhile, which changes no bit.
//! Few rows read the block as one stream, for which the CPU's own prefetch is best. Products of
//! many rows leave the memory idle: where deltas follow, their B is fetched beside them.

use std::ops::Range;

use crate::Dtype;
use crate::act::Act;
use crate::buffer::Shared;
use crate::device::{Device, part};
use crate::linear::lines::{LINE, Lines, RATE_ONE};
use crate::linear::{Change, Linear, SITES_MAX};
use crate::matrix::{BLOCK, BLOCK_PANELS, Matrix};
use crate::simd::{Isa, Kernel, LANES, Simd};

/// Rows of a tile at most.
const TILE_ROWS: usize = 6;
/// Steps of a block (256 bytes each) that rows are taken through at a time. Two tiles leave little
/// time to fetch what comes next and do best with what the first-level cache holds; more tiles
/// stream the weights from the second.
const CHUNK_STEPS_FEW: usize = 128;
const CHUNK_STEPS: usize = 384;
/// Tasks per thread: enough that a late thread delays the fork by little.
const TASKS_PER_THREAD: usize = 8;
/// Rows per task when rows are split.
const SPLIT_ROWS: usize = 48;

/// How the base products of one call are cut into tasks.
pub(super) struct Cut {
    rows: usize,
    row_parts: usize,
    blocks: [usize; SITES_MAX],
    runs: [usize; SITES_MAX],
}

impl Cut {
    pub(super) fn new(dev: &Device, rows: usize, outs: &[Linear<'_>]) -> Cut {
        let blocks = std::array::from_fn(|i| outs.get(i).map_or(0, |out| out.weight.blocks()));
        let total: usize = blocks.iter().sum();
        let target = TASKS_PER_THREAD * dev.threads();
        let run = total.div_ceil(target);
        let row_parts = target.div_ceil(total).min(rows / SPLIT_ROWS).max(1);
        Cut { rows, row_parts, blocks, runs: blocks.map(|count| count.div_ceil(run)) }
    }

    /// Tasks of any call: `TASKS_PER_THREAD` a thread and one more a site, or, where rows are cut
    /// too, fewer than twice that.
    pub(super) fn tasks_max(dev: &Device) -> usize {
        2 * TASKS_PER_THREAD * dev.threads() + SITES_MAX
    }

    pub(super) fn tasks(&self) -> usize {
        self.runs.iter().sum::<usize>() * self.row_parts
    }

    /// Site, rows and blocks of a task. Rows vary fastest, so tasks that run at the same time share
    /// weights.
    pub(super) fn task(&self, task: usize) -> (usize, Range<usize>, Range<usize>) {
        let rows = part(self.rows, self.row_parts, task % self.row_parts);
        let mut run = task / self.row_parts;
        for site in 0..SITES_MAX {
            if run < self.runs[site] {
                return (site, rows, part(self.blocks[site], self.runs[site], run));
            }
            run -= self.runs[site];
        }
        unreachable!("task {task} of {}", self.tasks())
    }
}

/// One site of a call, as its tasks see it.
pub(super) struct Site<'a> {
    pub(super) weight: &'a Matrix,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) y: Shared<f32>,
    x: Shared<u32>,
    x_stride: usize,
    /// Some row has a delta here: x·Wᵀ is left as it is, for a gain may stand between it and the
    /// bias.
    pub(super) changed: bool,
}

impl<'a> Site<'a> {
    pub(super) fn new(x: &Act, out: &mut Linear<'a>, changed: bool) -> Site<'a> {
        let (words, x_stride) = x.words(out.weight.dtype());
        Site {
            weight: out.weight,
            bias: out.bias,
            y: Shared::of(out.y),
            x: Shared::new(words.cast_mut()),
            x_stride,
            changed,
        }
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
    ) {
        let at = Blocks::<true, false> { site: self, rows, blocks, after, changes };
        match self.weight.dtype() {
            Dtype::F32 => isa.run(at.of::<false, false>()),
            Dtype::Bf16 if at.gathers() => isa.run(at.of::<true, true>()),
            Dtype::Bf16 => isa.run(at),
        }
    }
}

struct Blocks<'a, const BF16: bool, const GATHER: bool> {
    site: &'a Site<'a>,
    rows: Range<usize>,
    blocks: Range<usize>,
    /// What this thread probably reads next.
    after: *const u32,
    /// Those of the rows; their B is fetched beside the products if `GATHER`.
    changes: &'a [Change],
}

/// One tile's place: some rows, one or four panels, some steps.
#[derive(Clone, Copy)]
struct Tile {
    x: *const u32,
    x_stride: usize,
    w: *const u32,
    /// Words from one step of a panel to the next.
    w_stride: usize,
    steps: usize,
    y: *mut f32,
    y_stride: usize,
    /// Outputs of the tile, fewer than its lanes at W's end.
    outputs: usize,
    /// Null, or the bias of the first output, to be added now.
    bias: *const f32,
    /// Sums start at zero; else at y.
    first: bool,
    /// What to bring near beside the steps, from here on: so many lines a step, in `RATE_ONE`ths.
    ahead: *const u32,
    ahead_rate: usize,
    /// What else to bring near: a list, and how many of it a step, in `RATE_ONE`ths.
    gather: *const *const u8,
    gather_rate: usize,
}

impl<const BF16: bool, const GATHER: bool> Kernel for Blocks<'_, BF16, GATHER> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let steps = self.site.weight.steps();
        let groups = self.rows.len().div_ceil(TILE_ROWS);
        let chunks = match groups {
            1 => 1,
            2 => steps.div_ceil(CHUNK_STEPS_FEW),
            _ => steps.div_ceil(CHUNK_STEPS),
        };
        let turns = self.blocks.len() * chunks;
        let mut lines = Lines::none();
        for turn in 0..turns {
            let (block, part_of) = self.turn(turn, chunks);
            if GATHER && turn % chunks == 0 {
                lines.list(self.changes, block, steps * groups);
            }
            let ahead = if turn + 1 < turns {
                let (block, next) = self.turn(turn + 1, chunks);
                self.place(block, next.start)
            } else {
                self.after
            };
            for group in 0..groups {
                let r = part(self.rows.len(), groups, group);
                let mut tile = self.tile(block, part_of.clone(), self.rows.start + r.start);
                if groups > 1 {
                    tile.look_ahead(ahead, group, groups);
                }
                if GATHER {
                    let index = turn % chunks * groups + group;
                    (tile.gather, tile.gather_rate) =
                        lines.share(index, chunks * groups, part_of.len());
                }
                tile.rows::<S, BF16, GATHER>(r.len(), self.site.weight.panels(block));
            }
        }
    }
}

impl<'a, const BF16: bool, const GATHER: bool> Blocks<'a, BF16, GATHER> {
    fn of<const B: bool, const G: bool>(self) -> Blocks<'a, B, G> {
        let Blocks { site, rows, blocks, after, changes } = self;
        Blocks { site, rows, blocks, after, changes }
    }

    /// Whether the deltas bring so many lines, and the rows so many products, that fetching the
    /// ones beside the others pays.
    fn gathers(&self) -> bool {
        let block = self.blocks.start;
        // SAFETY: changes are of this call.
        let bytes = |c: &Change| unsafe { c.delta() }.b_bytes(block..block + 1);
        let lines = self.changes.iter().map(bytes).sum::<usize>() / LINE;
        self.rows.len() > TILE_ROWS && lines >= self.site.weight.steps() / 2
    }

    /// Block and steps of a turn: a stretch of weights all rows are taken through.
    #[inline(always)]
    fn turn(&self, turn: usize, chunks: usize) -> (usize, Range<usize>) {
        let block = self.blocks.start + turn / chunks;
        (block, part(self.site.weight.steps(), chunks, turn % chunks))
    }

    #[inline(always)]
    fn place(&self, block: usize, step: usize) -> *const u32 {
        let weight = self.site.weight;
        weight.block(block).wrapping_add(step * weight.panels(block) * LANES)
    }

    #[inline(always)]
    unsafe fn tile(&self, block: usize, span: Range<usize>, row: usize) -> Tile {
        let site = self.site;
        let outputs = site.weight.outputs();
        let last = span.end == site.weight.steps();
        let bias = if last && !site.changed { site.bias } else { None };
        Tile {
            x: site.x.get().add(row * site.x_stride + span.start),
            x_stride: site.x_stride,
            w: self.place(block, span.start),
            w_stride: site.weight.panels(block) * LANES,
            steps: span.len(),
            y: site.y.get().add(row * outputs + block * BLOCK),
            y_stride: outputs,
            outputs: (outputs - block * BLOCK).min(BLOCK),
            bias: bias.map_or(std::ptr::null(), |b| b[block * BLOCK..].as_ptr()),
            first: span.start == 0,
            ahead: std::ptr::null(),
            ahead_rate: 0,
            gather: std::ptr::null(),
            gather_rate: 0,
        }
    }
}

impl Tile {
    /// Gives the tile of `group` its share of the lines at `ahead`, which the next turn reads.
    #[inline(always)]
    fn look_ahead(&mut self, ahead: *const u32, group: usize, groups: usize) {
        let lines = self.w_stride / LANES * self.steps;
        self.ahead = ahead.wrapping_add(lines * group / groups * LANES);
        self.ahead_rate = (self.w_stride / LANES * RATE_ONE).div_ceil(groups);
    }

    #[inline(always)]
    unsafe fn rows<S: Simd, const BF16: bool, const GATHER: bool>(
        self,
        rows: usize,
        panels: usize,
    ) {
        match rows {
            1 => self.panels::<S, BF16, GATHER, 1>(panels),
            2 => self.panels::<S, BF16, GATHER, 2>(panels),
            3 => self.panels::<S, BF16, GATHER, 3>(panels),
            4 => self.panels::<S, BF16, GATHER, 4>(panels),
            5 => self.panels::<S, BF16, GATHER, 5>(panels),
            6 => self.panels::<S, BF16, GATHER, 6>(panels),
            _ => unreachable!("a tile of {rows} rows"),
        }
    }

    #[inline(always)]
    unsafe fn panels<S: Simd, const BF16: bool, const GATHER: bool, const ROWS: usize>(
        self,
        panels: usize,
    ) {
        if panels == BLOCK_PANELS && (S::WIDE || ROWS == 1) {
            if GATHER && self.gather_rate > 0 {
                return self.compute::<S, BF16, true, ROWS, BLOCK_PANELS>();
            }
            return self.compute::<S, BF16, false, ROWS, BLOCK_PANELS>();
        }
        for panel in 0..panels {
            let mut tile = self;
            tile.w = self.w.add(panel * LANES);
            tile.y = self.y.add(panel * LANES);
            tile.outputs = (self.outputs - panel * LANES).min(LANES);
            if !self.bias.is_null() {
                tile.bias = self.bias.add(panel * LANES);
            }
            tile.compute::<S, BF16, false, ROWS, 1>();
        }
    }

    #[inline(always)]
    unsafe fn compute<
        S: Simd,
        const BF16: bool,
        const GATHER: bool,
        const ROWS: usize,
        const PANELS: usize,
    >(
        self,
    ) {
        let lanes = |panel: usize| (self.outputs - panel * LANES).min(LANES);
        let mut acc = [[S::zero(); PANELS]; ROWS];
        if !self.first {
            for (r, row) in acc.iter_mut().enumerate() {
                for (p, sum) in row.iter_mut().enumerate() {
                    *sum = S::load_n(self.y.add(r * self.y_stride + p * LANES), lanes(p));
                }
            }
        }
        let mut w = self.w;
        for step in 0..self.steps {
            if self.ahead_rate > 0 {
                let line = self.ahead.wrapping_add(step * self.ahead_rate / RATE_ONE * LANES);
                S::prefetch(line.cast());
                if self.ahead_rate > RATE_ONE {
                    S::prefetch(line.wrapping_add(LANES).cast());
                }
            }
            if GATHER {
                S::prefetch(*self.gather.add(step * self.gather_rate / RATE_ONE));
            }
            for (r, row) in acc.iter_mut().enumerate() {
                let x = *self.x.add(r * self.x_stride + step);
                for (p, sum) in row.iter_mut().enumerate() {
                    *sum = if BF16 {
                        S::step_bf16(*sum, x, w.add(p * LANES))
                    } else {
                        S::step_f32(*sum, x, w.add(p * LANES))
                    };
                }
            }
            w = w.add(self.w_stride);
        }
        for (r, row) in acc.iter().enumerate() {
            for (p, &sum) in row.iter().enumerate() {
                let sum = if self.bias.is_null() {
                    sum
                } else {
                    S::add(sum, S::load_n(self.bias.add(p * LANES), lanes(p)))
                };
                S::store_n(self.y.add(r * self.y_stride + p * LANES), lanes(p), sum);
            }
        }
    }
}
