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
use crate::cuda::{Act, Buffer, EXPAND_OUTPUTS, Error, FEW_OUTPUTS, Gpu, STEP};
use crate::segments::Segments;

/// Rows of B start at so many values.
const B_STEP: usize = 8;

/// What an adapter changes at one site, on a GPU. Immutable; the rank is exact.
pub struct Delta {
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
    /// multiplies B.
    ///
    /// # Panics
    /// On lengths that do not fit the shape, and on rank 0, which has no factors.
    pub fn new(
        gpu: &Gpu,
        rank: usize,
        inputs: usize,
        outputs: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
    ) -> Result<Delta, Error> {
        assert!(rank > 0 && inputs > 0 && outputs > 0, "a delta of [{outputs}, {rank}, {inputs}]");
        assert_eq!(a.len(), rank * inputs, "A is [{rank}, {inputs}]");
        assert_eq!(b.len(), outputs * rank, "B is [{outputs}, {rank}]");
        let columns = (0..rank).flat_map(|r| b[r..].iter().step_by(rank));
        let transposed: Vec<f32> = columns.map(|b| scale * b).collect();
        Ok(Delta {
            a: Buffer::from(gpu, &padded(a, inputs, inputs.next_multiple_of(STEP)))?,
            b: Buffer::from(gpu, &padded(&transposed, outputs, b_stride(outputs)))?,
            rank,
            inputs,
            outputs,
        })
    }

    /// R.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes()
    }
}

fn b_stride(outputs: usize) -> usize {
    outputs.next_multiple_of(B_STEP)
}

/// Takes a delta and its weight.
pub type Add<'c, 'd> = &'c mut dyn FnMut(&'d Delta, f32);

/// Memory of [`lora`], taken once.
pub struct LoraScratch {
    /// `[rows_max, rank_max]`
    u: Buffer<f32>,
    /// Its copy on the GPU, and as it is made here.
    words: Buffer<u32>,
    table: Table,
    rows_max: usize,
    rank_max: usize,
}

impl LoraScratch {
    /// For steps of at most `rows_max` rows, and ranks of a row's deltas of at most `rank_max` in
    /// sum.
    pub fn new(gpu: &Gpu, rows_max: usize, rank_max: usize) -> Result<LoraScratch, Error> {
        Ok(LoraScratch {
            u: Buffer::zeroed(gpu, rows_max * rank_max)?,
            words: Buffer::zeroed(gpu, Table::words_max(rows_max))?,
            table: Table::new(rows_max, FEW_OUTPUTS),
            rows_max,
            rank_max,
        })
    }
}

/// Adds to `y` `[T, O]` the deltas of the first `rows` rows of `x`: `deltas(g, add)` adds those of
/// segment `g` with their weights, in the order in which they are summed.
///
/// # Panics
/// On shapes that do not fit (x, y and a delta, more rows or ranks than the scratch has), on more
/// than [`crate::PARTS_MAX`] deltas of a segment, and on memory of another GPU.
#[expect(clippy::too_many_arguments, reason = "the parts of one op, named as in its formula")]
pub fn lora<'d>(
    gpu: &Gpu,
    x: &Act,
    rows: usize,
    segments: Segments<'_>,
    deltas: &dyn Fn(usize, Add<'_, 'd>),
    y: &mut Buffer<f32>,
    outputs: usize,
    scratch: &mut LoraScratch,
) -> Result<(), Error> {
    segments.check(rows);
    assert!(rows <= x.rows_max(), "{rows} rows of x's {}", x.rows_max());
    assert!(rows <= scratch.rows_max, "{rows} rows, scratch for {}", scratch.rows_max);
    assert!(y.len() >= rows * outputs, "y holds {rows} rows of {outputs}");
    let inputs = x.width();
    scratch.table.fill(segments, &mut |g, add| {
        deltas(g, &mut |delta, weight| {
            assert!(
                delta.outputs == outputs && delta.inputs == inputs,
                "segment {g}: a delta of [{}, {}] on W [{outputs}, {inputs}]",
                delta.outputs,
                delta.inputs,
            );
            let (a, b) = (delta.a.address(gpu), delta.b.address(gpu));
            add(Part { a, b, rank: delta.rank as u32, weight });
        });
    });
    let LoraScratch { u, words, table, rank_max, .. } = scratch;
    assert!(table.rank_max <= *rank_max, "rank {}, scratch for {rank_max}", table.rank_max);
    if table.chunks() == 0 {
        return Ok(());
    }
    words.write(0, table.words())?;
    let parts = words.address(gpu);
    let [firsts, chunks] = table.offsets().map(|bytes| Arg::Address(parts + bytes));
    let parts = Arg::Address(parts);
    let (x_at, u_at) = (Arg::Address(x.values.address(gpu)), Arg::Address(u.address(gpu)));
    let u_stride = Arg::count(*rank_max);
    let shrink = [parts, firsts, chunks, x_at, u_at, Arg::count(x.stride()), u_stride];
    let y_at = Arg::Address(y.address(gpu));
    let (outputs_at, b_stride) = (Arg::count(outputs), Arg::count(b_stride(outputs)));
    let expand = [parts, firsts, chunks, u_at, y_at, outputs_at, b_stride, u_stride];
    let blocks = outputs.div_ceil(EXPAND_OUTPUTS);
    // SAFETY: the table names rows below `rows` and live deltas of x's width and y's outputs, whose
    // ranks fit u; chunks are disjoint in rows, tiles in ranks and outputs.
    unsafe {
        gpu.launch(Entry::LoraShrink, [table.chunks(), table.tiles_max], &shrink)?;
        gpu.launch(Entry::LoraExpand, [table.chunks(), blocks], &expand)
    }
}
