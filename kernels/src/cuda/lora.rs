//! y += Σ w·((x·Aᵀ)·Bᵀ), the deltas of each row's own segment, on a GPU.
//!
//! x `[T, I]`   y `[T, O]` f32   and for every delta its own A `[R, I]`, B `[O, R]` (scale folded
//! in), kept as B transposed. One launch makes u of all segments and one adds them, whatever the
//! number of adapters and ranks; no delta at all is no launch. Rows outside every segment are
//! untouched. Numerics are in `kernels/cuda/lora.cu`: u stays f32, its weight multiplied in.

use half::bf16;

use crate::cuda::act::padded;
use crate::cuda::gpu::{Arg, Entry};
use crate::cuda::table::{Part, Table};
use crate::cuda::{Act, Buffer, EXPAND_OUTPUTS, Error, FEW_OUTPUTS, Gpu, Memory, STEP};
use crate::linear::{check_delta, check_ranks};
use crate::segments::Segments;

/// Rows of B start at so many values.
const B_STEP: usize = 8;

/// What an adapter changes at one site, on a GPU. Immutable; the rank is exact.
pub(crate) struct Delta {
    /// `[R, I]`, rows padded to whole steps.
    a: Buffer<bf16>,
    /// `[R, O]`, rows padded to 16 bytes.
    b: Buffer<bf16>,
    rank: usize,
    inputs: usize,
    outputs: usize,
}

impl Delta {
    /// `a` `[R, I]` and `b` `[O, R]`, row-major as in PEFT files, rounded to bf16. The scale
    /// multiplies B. The caller has checked the lengths.
    ///
    /// # Panics
    /// On rank 0, which has no factors.
    pub(crate) fn new(
        memory: &Memory,
        rank: usize,
        inputs: usize,
        outputs: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
    ) -> Result<Delta, Error> {
        assert!(rank > 0 && inputs > 0 && outputs > 0, "a delta of [{outputs}, {rank}, {inputs}]");
        let columns = (0..rank).flat_map(|r| b[r..].iter().step_by(rank));
        let transposed: Vec<f32> = columns.map(|b| scale * b).collect();
        Ok(Delta {
            a: Buffer::from(memory, &padded(a, inputs, inputs.next_multiple_of(STEP)))?,
            b: Buffer::from(memory, &padded(&transposed, outputs, b_stride(outputs)))?,
            rank,
            inputs,
            outputs,
        })
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }
}

fn b_stride(outputs: usize) -> usize {
    outputs.next_multiple_of(B_STEP)
}

/// Memory of [`lora`], taken once.
pub(crate) struct LoraScratch {
    /// `[rows_max, rank_max]`
    u: Buffer<f32>,
    /// Its copy on the GPU, and as it is made here.
    words: Buffer<u32>,
    table: Table,
    rank_max: usize,
}

/// One site of a call and the segments of its rows.
pub(super) struct Segmented<'a> {
    /// Its place in the call.
    pub(super) i: usize,
    /// Its index among a resident's deltas.
    pub(super) site: usize,
    pub(super) weight: &'a crate::Matrix,
    pub(super) segments: Segments<'a>,
}

impl LoraScratch {
    /// For steps of at most `rows_max` rows, and ranks of a row's deltas of at most `rank_max` in
    /// sum.
    pub(crate) fn new(
        memory: &Memory,
        rows_max: usize,
        rank_max: usize,
    ) -> Result<LoraScratch, Error> {
        Ok(LoraScratch {
            u: Buffer::zeroed(memory, rows_max * rank_max)?,
            words: Buffer::zeroed(memory, Table::words_max(rows_max))?,
            table: Table::new(rows_max, FEW_OUTPUTS),
            rank_max,
        })
    }

    /// Lists the deltas of a site.
    ///
    /// # Panics
    /// On a delta that does not fit the site, on more ranks than there is room for, and on memory
    /// of another GPU.
    pub(super) fn plan(&mut self, gpu: &Gpu, at: Segmented<'_>) {
        self.table.fill(at.segments, &mut |g, add| {
            for (delta, weight) in at.segments.deltas(g, at.site) {
                check_delta(delta, at.weight, at.i, g);
                let delta = delta.on().cuda();
                let (a, b) = (delta.a.address(gpu.memory()), delta.b.address(gpu.memory()));
                add(Part { a, b, rank: delta.rank as u32, weight });
            }
        });
        check_ranks(self.table.rank_max, self.rank_max);
    }
}

/// Adds to `y` `[T, O]` the deltas that the scratch's plan lists of the rows of `x`.
///
/// # Panics
/// On memory of another GPU.
pub(super) fn lora(
    gpu: &Gpu,
    x: &Act,
    y: &mut Buffer<f32>,
    outputs: usize,
    scratch: &mut LoraScratch,
) -> Result<(), Error> {
    let LoraScratch { u, words, table, rank_max } = scratch;
    if table.chunks() == 0 {
        return Ok(());
    }
    words.write(0, table.words())?;
    let parts = words.address(gpu.memory());
    let [firsts, chunks] = table.offsets().map(|bytes| Arg::Address(parts + bytes));
    let parts = Arg::Address(parts);
    let (x_at, u_at) =
        (Arg::Address(x.values.address(gpu.memory())), Arg::Address(u.address(gpu.memory())));
    let u_stride = Arg::count(*rank_max);
    let shrink = [parts, firsts, chunks, x_at, u_at, Arg::count(x.stride()), u_stride];
    let y_at = Arg::Address(y.address(gpu.memory()));
    let (outputs_at, b_stride) = (Arg::count(outputs), Arg::count(b_stride(outputs)));
    let expand = [parts, firsts, chunks, u_at, y_at, outputs_at, b_stride, u_stride];
    let blocks = outputs.div_ceil(EXPAND_OUTPUTS);
    // SAFETY: the table names rows of the call and live deltas of x's width and y's outputs, whose
    // ranks fit u; chunks are disjoint in rows, tiles in ranks and outputs.
    unsafe {
        gpu.launch(Entry::LoraShrink, [table.chunks(), table.tiles_max], &shrink)?;
        gpu.launch(Entry::LoraExpand, [table.chunks(), blocks], &expand)
    }
}
