//! Backward of [`super::attention`], of whole sequences packed one after the other.
//!
//! With P = exp(scale·q·k − lse) and D = Σ dO∘O of a row:   dv += Pᵀ·dO,   dS = scale·P∘(dO·v − D),
//! dq += dS·k,   dk += dSᵀ·q; dk and dv sum over the heads of a group.
//!
//! A task is a sequence and a kv head: it takes 64 tokens after the other, and through those the
//! rows that see them, 32 at a time, head by head; P is never stored beyond that. So there is one
//! order of every sum, whatever else is in the call. Numerics: f32, of keys and values as the pages
//! have them; q and P are not rounded, even where the forward pass multiplies pairs of bf16.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use crate::act::Act;
use crate::act::cpu::ActWriter;
use crate::attention::HEAD_DIM_MAX;
use crate::attention::unpack::{BothWays, Deltas, Put, Soften, TOKENS, Unpack};
use crate::buffer::{Buffer, Shared};
use crate::device::{Device, Kind, Memory};
use crate::kv::{KvCache, Layout, Rows, Values};
use crate::product::Product;
use crate::simd::{Isa, LANES, Stored};
use crate::{Error, Plane};

/// Rows that take a tile of tokens together.
const ROWS: usize = 32;

/// What [`super::attention_lse`] read and made, and the gradient of what it made.
#[derive(Clone, Copy)]
pub struct AttentionBackward<'a> {
    /// `[T, N·D]`
    pub q: &'a Plane,
    pub heads: usize,
    /// In f32 or bf16, with all positions of the sequences.
    pub kv: &'a KvCache,
    pub layer: usize,
    /// Sequence 0 first, then sequence 1, …, each at positions 0, 1, …
    pub rows: Rows<'a>,
    pub scale: f32,
    pub window: Option<u32>,
    /// `[T, N·D]`
    pub out: &'a Act,
    /// `[T, N]`
    pub lse: &'a Plane,
    /// `[T, N·D]`
    pub d_out: &'a Plane,
}

/// Memory of [`attention_backward`], taken once.
pub struct AttentionBackwardScratch {
    /// `[threads]` of what [`Tile`] has.
    tiles: Buffer<f32>,
    tile: usize,
    /// `[T, N]`
    delta: Buffer<f32>,
}

impl AttentionBackwardScratch {
    /// For calls of at most `rows_max` rows on a device of `threads`.
    ///
    /// # Errors
    /// On a GPU.
    pub fn new(
        memory: &Memory,
        threads: usize,
        rows_max: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<AttentionBackwardScratch, Error> {
        memory.only_cpu("the memory of attention's backward")?;
        let tile = tile_len(head_dim);
        let (tiles, delta) = (Buffer::zeroed(threads * tile), Buffer::zeroed(rows_max * heads));
        Ok(AttentionBackwardScratch { tiles, tile, delta })
    }

    /// Bytes that `new` takes.
    pub fn bytes(threads: usize, rows_max: usize, heads: usize, head_dim: usize) -> usize {
        (threads * tile_len(head_dim) + rows_max * heads) * size_of::<f32>()
    }
}

fn tile_len(head_dim: usize) -> usize {
    (5 * head_dim.next_multiple_of(LANES) + 2 * ROWS) * TOKENS
}

/// See the module page. `dq` `[T, N·D]` and `dk` `[T, K·D]` are those of rotated q and k; `dv`
/// `[T, K·D]` has its copies. What was in them is overwritten.
///
/// # Panics
/// On shapes that do not fit, rows in another order, and keys and values in int8.
pub fn attention_backward(
    dev: &Device,
    of: AttentionBackward<'_>,
    dq: &mut Plane,
    dk: &mut Plane,
    dv: &mut Act,
    scratch: &mut AttentionBackwardScratch,
) {
    check(&of, dq, dk, dv, scratch);
    match &dev.kind {
        Kind::Cpu(cpu) => {
            cpu.count_op();
            assert!(scratch.tiles.len() >= cpu.threads() * scratch.tile, "scratch of all threads");
            let [dq, dk] = [dq, dk].map(|plane| Shared::of(plane.on_mut().cpu_mut()));
            let job = Job {
                isa: cpu.isa(),
                values: of.kv.reader(),
                layout: of.kv.layout(),
                dq,
                dk,
                dv: dv.on_mut().cpu_mut().writer(),
                delta: Shared::of(&mut scratch.delta),
                of,
            };
            let (tiles, tile) = (Shared::of(&mut scratch.tiles), scratch.tile);
            let kv_heads = job.layout.kv_heads;
            let sequences = of.rows.sequences.last().map_or(0, |&last| last as usize + 1);
            cpu.fork_tasks(sequences * kv_heads, &|task, worker| {
                // SAFETY: bounds are asserted; a (sequence, kv head) belongs to one task, and a
                // worker's tile to it.
                unsafe {
                    let tile = Tile::new(tiles.get().add(worker * tile), job.layout);
                    job.run(task / kv_heads, task % kv_heads, tile);
                }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("attention_backward")),
    }
}

fn check(
    of: &AttentionBackward<'_>,
    dq: &Plane,
    dk: &Plane,
    dv: &Act,
    scratch: &AttentionBackwardScratch,
) {
    let (count, layout, heads) = (of.rows.count(), of.kv.layout(), of.heads);
    let dim = layout.head_dim;
    let (width, kv_width) = (heads * dim, layout.kv_heads * dim);
    of.rows.check(layout);
    let after = |t: usize| match t.checked_sub(1) {
        Some(before) if of.rows.sequences[before] == of.rows.sequences[t] => {
            (of.rows.sequences[t], of.rows.positions[before] + 1)
        }
        Some(before) => (of.rows.sequences[before] + 1, 0),
        None => (0, 0),
    };
    for t in 0..count {
        let is = (of.rows.sequences[t], of.rows.positions[t]);
        assert_eq!(is, after(t), "row {t}: sequence and position, in order");
    }
    assert!(heads.is_multiple_of(layout.kv_heads), "{heads} heads in {} groups", layout.kv_heads);
    assert!(dim <= HEAD_DIM_MAX && dim.is_multiple_of(2), "head dim {dim}");
    assert!(of.layer < layout.layers, "layer {} of {}", of.layer, layout.layers);
    assert!(of.window != Some(0), "a window of at least one position");
    for (name, plane, width) in [
        ("q", of.q, width),
        ("lse", of.lse, heads),
        ("dO", of.d_out, width),
        ("dq", dq, width),
        ("dk", dk, kv_width),
    ] {
        assert!(plane.holds(count, width), "{name} holds {count} rows of {width}");
    }
    assert!(of.out.width() == width && of.out.rows_max() >= count, "O is [T, N·D]");
    assert!(dv.width() == kv_width && dv.rows_max() >= count, "dv is [T, K·D]");
    assert!(!matches!(of.kv.reader(), Values::Int8(_)), "keys and values in f32 or bf16");
    assert!(scratch.tile >= tile_len(dim), "scratch of head dim {dim}");
    assert!(scratch.delta.len() >= count * heads, "scratch of {count} rows");
}

/// What all tasks read and write.
struct Job<'a> {
    isa: Isa,
    values: Values,
    layout: Layout,
    of: AttentionBackward<'a>,
    dq: Shared<f32>,
    dk: Shared<f32>,
    dv: ActWriter,
    delta: Shared<f32>,
}

/// A worker's memory: keys and values of 64 tokens, dv of them, P and dS of some rows.
#[derive(Clone, Copy)]
struct Tile {
    k: BothWays,
    v: BothWays,
    dv: *mut f32,
    p: *mut f32,
    ds: *mut f32,
}

/// Some rows of a head, and the tokens of a tile.
struct Block {
    /// The first row of the call, and the rows by position.
    row: usize,
    rows: Range<usize>,
    /// Position of the first token.
    start: usize,
    tokens: usize,
    head: usize,
    tile: Tile,
    /// dk of the first token.
    dk: *mut f32,
}

impl Tile {
    fn new(start: *mut f32, layout: Layout) -> Tile {
        let at = |index: usize| start.wrapping_add(index * TOKENS * layout.v_stride());
        let rows = at(5);
        Tile {
            k: BothWays { rows: at(0), turned: at(1) },
            v: BothWays { rows: at(2), turned: at(3) },
            dv: at(4),
            p: rows,
            ds: rows.wrapping_add(ROWS * TOKENS),
        }
    }
}

impl Job<'_> {
    /// Query heads of a kv head.
    fn group(&self, kv_head: usize) -> Range<usize> {
        let group = self.of.heads / self.layout.kv_heads;
        kv_head * group..(kv_head + 1) * group
    }

    unsafe fn run(&self, sequence: usize, kv_head: usize, tile: Tile) {
        let (sequences, dim) = (self.of.rows.sequences, self.layout.head_dim);
        let before = |end: usize| sequences.partition_point(|&s| (s as usize) < end);
        let rows = before(sequence)..before(sequence + 1);
        let width = self.of.heads * dim;
        let (out, out_row) = self.of.out.on().cpu().wide();
        for head in self.group(kv_head) {
            self.isa.run(Deltas {
                out: out.as_ptr().add(rows.start * out_row + head * dim),
                out_row,
                d_out: self.at(self.of.d_out, rows.start, head),
                d_out_row: width,
                rows: rows.len(),
                dim,
                delta: self.delta.get().add(rows.start * self.of.heads + head),
                heads: self.of.heads,
            });
            for row in rows.clone() {
                let dq = self.dq.get().add(row * width + head * dim);
                std::ptr::write_bytes(dq, 0, dim);
            }
        }
        for start in (0..rows.len()).step_by(TOKENS) {
            self.tokens(rows.clone(), start, kv_head, tile);
        }
    }

    /// A row of a head in a plane of `[T, N·D]`.
    fn at(&self, plane: &Plane, row: usize, head: usize) -> *const f32 {
        let dim = self.layout.head_dim;
        plane.on().cpu().as_ptr().wrapping_add((row * self.of.heads + head) * dim)
    }

    /// The tokens of a sequence from `start` on, as many as a tile has.
    unsafe fn tokens(&self, rows: Range<usize>, start: usize, kv_head: usize, tile: Tile) {
        let (dim, stride) = (self.layout.head_dim, self.layout.v_stride());
        let tokens = (rows.len() - start).min(TOKENS);
        match self.values {
            Values::F32(p) => self.unpack(p.get(), rows.start, start, tokens, kv_head, tile),
            Values::Bf16(p) => self.unpack(p.get(), rows.start, start, tokens, kv_head, tile),
            Values::Int8(_) => unreachable!("checked"),
        }
        let kv_width = self.layout.kv_heads * dim;
        let dk = self.dk.get().add((rows.start + start) * kv_width + kv_head * dim);
        for token in 0..tokens {
            std::ptr::write_bytes(dk.add(token * kv_width), 0, dim);
        }
        std::ptr::write_bytes(tile.dv, 0, TOKENS * stride);
        let window = self.of.window.map_or(rows.len(), |w| w as usize);
        let end = rows.len().min(start + tokens - 1 + window);
        for first in (start..end).step_by(ROWS) {
            let rows_of = first..end.min(first + ROWS);
            for head in self.group(kv_head) {
                let (row, rows) = (rows.start + first, rows_of.clone());
                let block = Block { row, rows, start, tokens, head, tile, dk };
                self.weights(&block);
                self.gradients(&block);
            }
        }
        self.isa.run(Put {
            from: tile.dv,
            stride,
            rows: tokens,
            dim,
            out: self.dv,
            row: rows.start + start,
            column: kv_head * dim,
        });
    }

    unsafe fn unpack<E: Stored>(
        &self,
        values: *const E,
        row: usize,
        start: usize,
        tokens: usize,
        kv_head: usize,
        tile: Tile,
    ) {
        let pages = &self.of.rows.pages_of(row)[start / KvCache::PAGE..];
        self.isa.run(Unpack {
            values,
            layout: self.layout,
            layer: self.of.layer,
            kv_head,
            pages: &pages[..tokens.div_ceil(KvCache::PAGE)],
            tokens,
            k: tile.k,
            v: tile.v,
        });
    }

    /// P and dS of a block.
    unsafe fn weights(&self, block: &Block) {
        let Block { row, ref rows, start, head, tile, .. } = *block;
        let heads = self.of.heads;
        // Rows of q or dO by what lies turned.
        let product = |rows_of: &Plane, b: *mut f32, c, factor| Product {
            a: self.at(rows_of, row, head),
            a_row: heads * self.layout.head_dim,
            a_step: 1,
            b,
            b_step: TOKENS,
            c,
            c_row: TOKENS,
            rows: rows.len(),
            steps: self.layout.head_dim,
            columns: TOKENS,
            factor,
            add: false,
        };
        self.isa.run(product(self.of.q, tile.k.turned, tile.p, self.of.scale * LOG2_E));
        self.isa.run(product(self.of.d_out, tile.v.turned, tile.ds, 1.0));
        self.isa.run(Soften {
            p: tile.p,
            ds: tile.ds,
            rows: rows.len(),
            position: rows.start,
            start,
            window: self.of.window.map_or(usize::MAX, |w| w as usize),
            scale: self.of.scale,
            lse: self.of.lse.on().cpu().as_ptr().add(row * heads + head),
            delta: self.delta.get().add(row * heads + head),
            heads,
        });
    }

    /// Adds what a block gives to dq, dv and dk.
    unsafe fn gradients(&self, block: &Block) {
        let Block { row, ref rows, tokens, head, tile, dk, .. } = *block;
        let (dim, stride) = (self.layout.head_dim, self.layout.v_stride());
        let width = self.of.heads * dim;
        self.isa.run(Product {
            a: tile.ds,
            a_row: TOKENS,
            a_step: 1,
            b: tile.k.rows,
            b_step: stride,
            c: self.dq.get().add(row * width + head * dim),
            c_row: width,
            rows: rows.len(),
            steps: tokens,
            columns: dim,
            factor: 1.0,
            add: true,
        });
        // Tokens by rows of dO or q.
        let product = |a: *mut f32, rows_of: &Plane, c, c_row| Product {
            a,
            a_row: 1,
            a_step: TOKENS,
            b: self.at(rows_of, row, head),
            b_step: width,
            c,
            c_row,
            rows: tokens,
            steps: rows.len(),
            columns: dim,
            factor: 1.0,
            add: true,
        };
        self.isa.run(product(tile.p, self.of.d_out, tile.dv, stride));
        self.isa.run(product(tile.ds, self.of.q, dk, self.layout.kv_heads * dim));
    }
}
