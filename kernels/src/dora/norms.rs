//! DoRA's norms c `[O]`, those of the rows of W + s·Bᵀ·A, without that matrix:
//!
//! c² = ‖W_o‖² + 2s·B_o·(A·W_oᵀ) + s²·B_o·(A·Aᵀ)·B_oᵀ.
//!
//! W `[O, I]` packed   A `[R, I]`   B `[R, O]`, rank by rank. ‖W_o‖² is of the base, made once;
//! A·Wᵀ is 64 outputs at a time, R rows through W, of which it makes f32. Numerics: f32, the root
//! in f64.

use crate::buffer::{Buffer, Shared};
use crate::device::{Device, Kind, Memory};
use crate::lora::{Dots, Factor};
use crate::matrix::columns::{Columns, Integers, Pairs, Singles};
use crate::matrix::{BLOCK, Matrix, cpu};
use crate::product::Product;
use crate::simd::{GROUP, Isa, Kernel, LANES, Simd};
use crate::{Error, WeightDtype};

/// An adapter's factors at one site: A `[R, I]`, B `[R, O]`, s.
#[derive(Debug, Clone, Copy)]
pub struct DoraFactors<'a> {
    pub rank: usize,
    pub a: &'a [f32],
    pub b: &'a [f32],
    pub scale: f32,
}

/// Memory of [`dora_norms`], taken once.
pub struct DoraScratch {
    /// A·Aᵀ `[R, R]`
    gram: Buffer<f32>,
    /// `[threads]` of columns of W, A·Wᵀ and (A·Aᵀ)·B, of 64 outputs each.
    tiles: Buffer<f32>,
    rank_max: usize,
}

impl DoraScratch {
    /// For ranks of at most `rank_max` on a device of `threads`.
    ///
    /// # Errors
    /// On a GPU.
    pub fn new(memory: &Memory, threads: usize, rank_max: usize) -> Result<DoraScratch, Error> {
        memory.only_cpu("the memory of DoRA's norms")?;
        let tiles = Buffer::zeroed(threads * tile_len(rank_max));
        Ok(DoraScratch { gram: Buffer::zeroed(rank_max * rank_max), tiles, rank_max })
    }

    /// Bytes that `new` takes.
    pub fn bytes(threads: usize, rank_max: usize) -> usize {
        (threads * tile_len(rank_max) + rank_max * rank_max) * size_of::<f32>()
    }
}

fn tile_len(rank_max: usize) -> usize {
    (GROUP + 2 * rank_max) * BLOCK
}

/// ‖W_o‖² of every output, `[O]`.
///
/// # Panics
/// Unless there are so many.
pub fn weight_squares(dev: &Device, weight: &Matrix, squares: &mut [f32]) {
    assert_eq!(squares.len(), weight.outputs(), "a square an output");
    match &dev.kind {
        Kind::Cpu(cpu) => {
            cpu.count_op();
            let (weight, isa, squares) = (weight.on().cpu(), cpu.isa(), Shared::of(squares));
            cpu.fork(weight.blocks(), &|block| {
                let (mut of_block, mut tile) = ([0.0; BLOCK], [0.0; GROUP * BLOCK]);
                let outputs = (weight.outputs() - block * BLOCK).min(BLOCK);
                // SAFETY: a block, and its outputs, belong to one task.
                unsafe {
                    for group in 0..weight.inputs().div_ceil(GROUP) {
                        isa.run(Widen { weight, block, group, to: tile.as_mut_ptr() });
                        let columns = (weight.inputs() - group * GROUP).min(GROUP);
                        isa.run(Squares { tile: &tile, columns, sums: &mut of_block });
                    }
                    let to = squares.get().add(block * BLOCK);
                    std::ptr::copy_nonoverlapping(of_block.as_ptr(), to, outputs);
                }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("weight_squares")),
    }
}

/// c of every output, `[O]`, of a base whose `squares` are made.
///
/// # Panics
/// On shapes that do not fit.
pub fn dora_norms(
    dev: &Device,
    weight: &Matrix,
    squares: &[f32],
    factors: DoraFactors<'_>,
    norms: &mut [f32],
    scratch: &mut DoraScratch,
) {
    let (outputs, inputs, rank) = (weight.outputs(), weight.inputs(), factors.rank);
    assert!(squares.len() == outputs && norms.len() == outputs, "{outputs} squares and norms");
    assert_eq!(factors.a.len(), rank * inputs, "A is [{rank}, {inputs}]");
    assert_eq!(factors.b.len(), rank * outputs, "B is [{rank}, {outputs}]");
    assert!(rank <= scratch.rank_max, "rank {rank}, scratch for {}", scratch.rank_max);
    match &dev.kind {
        Kind::Cpu(cpu) => {
            cpu.count_op();
            let tile = tile_len(scratch.rank_max);
            assert!(scratch.tiles.len() >= cpu.threads() * tile, "scratch of all threads");
            let (isa, weight) = (cpu.isa(), weight.on().cpu());
            let a = Factor { rows: 0..rank, rank, values: factors.a, scale: 1.0 };
            let gram = scratch.gram.as_mut_ptr();
            let x = factors.a.as_ptr();
            let dots = Dots {
                x,
                x_row: inputs,
                segment: &a,
                width: inputs,
                rows: rank,
                u: gram,
                u_row: rank,
            };
            // SAFETY: A is its own rows; `gram` has room for rank times rank.
            unsafe { isa.run(dots) };
            let (gram, tiles) = (&scratch.gram[..], Shared::of(&mut scratch.tiles));
            let norms = Shared::of(norms);
            cpu.fork_tasks(weight.blocks(), &|block, worker| {
                // SAFETY: a block, and its outputs, belong to one task; a worker's tile to it.
                unsafe {
                    let (tile, to) = (tiles.get().add(worker * tile), norms.get());
                    let task = Task { isa, weight, squares, factors, gram, block };
                    task.run(tile, to.add(block * BLOCK));
                }
            });
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("dora_norms")),
    }
}

/// 64 outputs.
struct Task<'a> {
    isa: Isa,
    weight: &'a cpu::Matrix,
    squares: &'a [f32],
    factors: DoraFactors<'a>,
    gram: &'a [f32],
    block: usize,
}

impl Task<'_> {
    unsafe fn run(&self, tile: *mut f32, norms: *mut f32) {
        let Task { isa, weight, factors: DoraFactors { rank, a, b, scale }, block, .. } = *self;
        let (inputs, first) = (weight.inputs(), block * BLOCK);
        let outputs = (weight.outputs() - first).min(BLOCK);
        let (of_w, of_b) = (tile.add(GROUP * BLOCK), tile.add((GROUP + rank) * BLOCK));
        for group in 0..inputs.div_ceil(GROUP) {
            isa.run(Widen { weight, block, group, to: tile });
            isa.run(Product {
                a: a.as_ptr().add(group * GROUP),
                a_row: inputs,
                a_step: 1,
                b: tile,
                b_step: BLOCK,
                c: of_w,
                c_row: BLOCK,
                rows: rank,
                steps: (inputs - group * GROUP).min(GROUP),
                columns: outputs,
                factor: 1.0,
                add: group > 0,
            });
        }
        isa.run(Product {
            a: self.gram.as_ptr(),
            a_row: rank,
            a_step: 1,
            b: b.as_ptr().add(first),
            b_step: weight.outputs(),
            c: of_b,
            c_row: BLOCK,
            rows: rank,
            steps: rank,
            columns: outputs,
            factor: 1.0,
            add: false,
        });
        for o in 0..outputs {
            let sum = |of: *const f32| {
                let term = |r: usize| b[r * weight.outputs() + first + o] * *of.add(r * BLOCK + o);
                (0..rank).map(term).sum::<f32>()
            };
            let more = 2.0 * f64::from(scale) * f64::from(sum(of_w))
                + f64::from(scale).powi(2) * f64::from(sum(of_b));
            *norms.add(o) = (f64::from(self.squares[first + o]) + more).max(0.0).sqrt() as f32;
        }
    }
}

/// Widens 32 columns of a block of outputs: `[32][64]`; outputs beyond O are zero.
struct Widen<'a> {
    weight: &'a cpu::Matrix,
    block: usize,
    group: usize,
    to: *mut f32,
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.weight.dtype() {
            WeightDtype::F32 => self.of::<S, Singles>(),
            WeightDtype::Bf16 => self.of::<S, Pairs>(),
            WeightDtype::Int8 => self.of::<S, Integers<8, 32, false>>(),
            WeightDtype::Int8By16 => self.of::<S, Integers<8, 16, false>>(),
            WeightDtype::Int8Min => self.of::<S, Integers<8, 32, true>>(),
            WeightDtype::Int4 => self.of::<S, Integers<4, 32, false>>(),
            WeightDtype::Int4Min => self.of::<S, Integers<4, 32, true>>(),
        }
    }
}

impl Widen<'_> {
    #[inline(always)]
    unsafe fn of<S: Simd, C: Columns>(self) {
        for panel in 0..self.weight.panels(self.block) {
            let first = self.block * (BLOCK / LANES) + panel;
            C::read::<S>(self.weight, first, self.group, |i, two| {
                for (half, column) in two.into_iter().enumerate() {
                    let at = (half * LANES + i) * BLOCK + panel * LANES;
                    S::store(self.to.add(at), column);
                }
            });
        }
    }
}

/// Adds the squares of some columns.
struct Squares<'a> {
    tile: &'a [f32; GROUP * BLOCK],
    columns: usize,
    sums: &'a mut [f32; BLOCK],
}

impl Kernel for Squares<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for at in (0..BLOCK).step_by(LANES) {
            let to = self.sums.as_mut_ptr().add(at);
            let mut sum = S::load(to);
            for column in 0..self.columns {
                let w = S::load(self.tile.as_ptr().add(column * BLOCK + at));
                sum = S::fma(w, w, sum);
            }
            S::store(to, sum);
        }
    }
}
