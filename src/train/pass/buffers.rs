//! The memory of a pass, taken once: what the forward half keeps for the backward half, and what
//! each half needs while it runs.
//!
//! Owns every plane. Never allocates after `Buffers::new`. The thing to know: layers below the
//! lowest adapted one keep nothing, so they share the memory of that layer, which comes after them.

use crate::model::weights::Weights;
use crate::shape::{Projection, Site};
use crate::train::batch::pages_max;
use polylora_kernels::{
    Act, AttentionBackwardScratch, AttentionScratch, Device, Dtype, Error, KvCache, LoraScratch,
    Memory, Plane, WeightDtype,
};

/// Rows whose logits exist at a time.
pub(super) const HEAD_ROWS: usize = 16;

/// Sizes that are fixed when a pass is made.
#[derive(Debug, Clone, Copy)]
pub struct PassOptions {
    /// Most rows of a micro-batch (T).
    pub rows_max: usize,
    /// Most examples of a micro-batch.
    pub sequences_max: usize,
    /// Most adapters of a micro-batch.
    pub adapters_max: usize,
}

/// What the size of the memory depends on, besides the base.
#[derive(Debug, Clone, Copy)]
pub(in crate::train) struct Sizes {
    pub options: PassOptions,
    pub threads: usize,
    /// Layers that are kept.
    pub layers: usize,
    /// The largest.
    pub rank: usize,
    /// Projections with magnitudes.
    pub z: [bool; Projection::ALL.len()],
}

/// What backward reads of a layer.
pub(super) struct Kept {
    /// h as the layer's first norm read it. `[T, H]`
    pub h: Plane,
    /// q and k before their norms, where the family has some. `[T, N·D]`, `[T, K·D]`
    pub unnormed: Option<[Plane; 2]>,
    /// q as attention read it. `[T, N·D]`
    pub q: Plane,
    /// `[T, N]`
    pub lse: Plane,
    /// What attention found. `[T, N·D]`
    pub found: Act,
    /// h as the norm before the MLP read it. `[T, H]`
    pub h_mlp: Plane,
    /// `[T, F]` each
    pub gate: Plane,
    pub up: Plane,
    /// What attention and the MLP made, where the family norms it. `[T, H]` each
    pub made: Option<[Plane; 2]>,
    /// By projection, where it has magnitudes: what they scale. `[T, O]`
    pub z: [Option<Plane>; Projection::ALL.len()],
}

/// See the file's head. R: the largest rank.
pub(super) struct Buffers {
    pub layers: Vec<Kept>,
    /// Keys and values of the layers kept.
    pub kv: KvCache,
    /// The residual stream. `[T, H]`
    pub h: Plane,
    /// What a block reads: `h`, normed. `[T, H]`
    pub x: Act,
    pub k: Plane, // [T, K·D]
    pub v: Plane, // [T, K·D]
    /// What a block made, where it need not be kept. `[T, H]`
    pub y: Plane,
    pub gated: Act, // [T, F]
    /// x·Aᵀ, and s·dy·Bᵀ. `[T, R]`
    pub u: Plane,
    pub v_rank: Plane,
    pub scratch: LoraScratch,
    pub parts: AttentionScratch,
    /// Of some supervised rows: the last norm, logits, and the gradients of both.
    pub last: Act, // [C, H]
    pub logits: Plane, // [C, V]
    pub d_logits: Act, // [C, V]
    pub d_last: Plane, // [C, H]
    /// The gradients of what the fields above name.
    pub dh: Plane, // [T, H]
    pub dx: Plane,     // [T, H]
    pub dy: Act,       // [T, H]
    pub d_gated: Plane, // [T, F]
    pub d_gate: Act,   // [T, F]
    pub d_up: Act,     // [T, F]
    pub d_found: Plane, // [T, N·D]
    /// Of q and k as attention read them, and as their sites made them.
    pub d_rotated: [Plane; 2],
    pub dq: Act, // [T, N·D]
    pub dk: Act, // [T, K·D]
    pub dv: Act, // [T, K·D]
    pub attention: AttentionBackwardScratch,
}

impl Buffers {
    pub fn new(dev: &Device, weights: &Weights, sizes: Sizes) -> Result<Self, Error> {
        let Sizes { options: o, threads, layers, rank, z } = sizes;
        let (memory, shape, rows) = (dev.memory(), &weights.shape, o.rows_max);
        let (hidden, ffn, vocab) = (shape.hidden, shape.ffn, shape.vocab);
        let (q, kv) = (shape.q_width(), shape.kv_width());
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        let plane = |width: usize| Plane::new(memory, rows, width);
        let read = |width: usize| weights.activation(memory, rows, width);
        let gradient = |rows: usize, width: usize| gradient(memory, weights, rows, width);
        let pages = pages_max(rows, o.sequences_max);
        Ok(Self {
            layers: (0..layers)
                .map(|_| Kept::new(memory, weights, rows, z))
                .collect::<Result<_, _>>()?,
            kv: KvCache::new(memory, weights.dtype, layers, pages, kv_heads, dim)?.touched(dev),
            h: plane(hidden)?,
            x: read(hidden)?,
            k: plane(kv)?,
            v: plane(kv)?,
            y: plane(hidden)?,
            gated: read(ffn)?,
            u: plane(rank)?,
            v_rank: plane(rank)?,
            scratch: LoraScratch::new(memory, rows.max(HEAD_ROWS), 0)?,
            parts: AttentionScratch::new(memory, threads, heads, kv_heads, dim, rows)?,
            last: weights.activation(memory, HEAD_ROWS, hidden)?,
            logits: Plane::new(memory, HEAD_ROWS, vocab)?,
            d_logits: gradient(HEAD_ROWS, vocab)?,
            d_last: Plane::new(memory, HEAD_ROWS, hidden)?,
            dh: plane(hidden)?,
            dx: plane(hidden)?,
            dy: gradient(rows, hidden)?,
            d_gated: plane(ffn)?,
            d_gate: gradient(rows, ffn)?,
            d_up: gradient(rows, ffn)?,
            d_found: plane(q)?,
            d_rotated: [plane(q)?, plane(kv)?],
            dq: gradient(rows, q)?,
            dk: gradient(rows, kv)?,
            dv: gradient(rows, kv)?,
            attention: AttentionBackwardScratch::new(memory, threads, rows, heads, dim)?,
        })
    }

    /// Bytes that `new` takes, line by line. Errors: as `new`.
    pub fn bytes(weights: &Weights, sizes: Sizes) -> Result<usize, Error> {
        let Sizes { options: o, threads, layers, rank, .. } = sizes;
        let (shape, rows) = (&weights.shape, o.rows_max);
        let (hidden, ffn, vocab) = (shape.hidden, shape.ffn, shape.vocab);
        let (q, kv) = (shape.q_width(), shape.kv_width());
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        // What rows of such a width take is seen from one.
        let read = |width| -> Result<usize, Error> {
            Ok(weights.activation(&Memory::Cpu, 1, width)?.bytes())
        };
        let gradient = |width| -> Result<usize, Error> {
            Ok(gradient(&Memory::Cpu, weights, 1, width)?.bytes())
        };
        let acts = [read(hidden), read(ffn)].into_iter();
        let gradients = [hidden, ffn, ffn, q, kv, kv].map(gradient);
        let acts: usize = acts.chain(gradients).sum::<Result<usize, Error>>()?;
        let planes = 4 * hidden + 3 * kv + 2 * rank + ffn + 2 * q;
        let chunk = read(hidden)? + gradient(vocab)? + 4 * (vocab + hidden);
        let pages = pages_max(rows, o.sequences_max);
        Ok(layers * rows * Kept::row_bytes(weights, sizes)?
            + pages * KvCache::page_bytes(weights.dtype, layers, kv_heads, dim)
            + rows * (acts + 4 * planes)
            + rows.max(HEAD_ROWS) * LoraScratch::row_bytes(0)
            + AttentionScratch::bytes(threads, heads, kv_heads, dim, rows)
            + HEAD_ROWS * chunk
            + AttentionBackwardScratch::bytes(threads, rows, heads, dim))
    }
}

impl Kept {
    fn new(
        memory: &Memory,
        weights: &Weights,
        rows: usize,
        z: [bool; Projection::ALL.len()],
    ) -> Result<Self, Error> {
        let shape = &weights.shape;
        let (q, kv) = (shape.q_width(), shape.kv_width());
        let plane = |width: usize| Plane::new(memory, rows, width);
        let two = |has: bool, [a, b]: [usize; 2]| -> Result<Option<[Plane; 2]>, Error> {
            has.then(|| Ok([plane(a)?, plane(b)?])).transpose()
        };
        Ok(Self {
            h: plane(shape.hidden)?,
            unnormed: two(shape.qk_norm, [q, kv])?,
            q: plane(q)?,
            lse: plane(shape.heads)?,
            found: weights.activation(memory, rows, q)?,
            h_mlp: plane(shape.hidden)?,
            gate: plane(shape.ffn)?,
            up: plane(shape.ffn)?,
            made: two(shape.post_norms, [shape.hidden; 2])?,
            z: scaled(weights, z, |width| Ok(Some(plane(width)?)))?,
        })
    }

    /// Bytes of a row.
    fn row_bytes(weights: &Weights, sizes: Sizes) -> Result<usize, Error> {
        let shape = &weights.shape;
        let (q, kv) = (shape.q_width(), shape.kv_width());
        let unnormed = if shape.qk_norm { q + kv } else { 0 };
        let made = if shape.post_norms { 2 * shape.hidden } else { 0 };
        let planes = 2 * shape.hidden + unnormed + q + shape.heads + 2 * shape.ffn + made;
        let z: [usize; Projection::ALL.len()] = scaled(weights, sizes.z, Ok)?;
        let found = weights.activation(&Memory::Cpu, 1, q)?.bytes();
        Ok(4 * (planes + z.iter().sum::<usize>()) + found)
    }
}

/// By projection: `make` of the outputs, where it has magnitudes.
fn scaled<T: Default>(
    weights: &Weights,
    z: [bool; Projection::ALL.len()],
    make: impl Fn(usize) -> Result<T, Error>,
) -> Result<[T; Projection::ALL.len()], Error> {
    let mut all: [T; Projection::ALL.len()] = std::array::from_fn(|_| T::default());
    for (of, projection) in all.iter_mut().zip(Projection::ALL) {
        if z[projection as usize] {
            *of = make(weights.shape.site_dims(Site::Layer(0, projection)).1)?;
        }
    }
    Ok(all)
}

/// Zeros for the gradient of what a site made: with a bf16 copy, unless all weights are f32.
fn gradient(memory: &Memory, weights: &Weights, rows: usize, width: usize) -> Result<Act, Error> {
    let all_f32 = weights.dtypes().iter().all(|dtype| *dtype == WeightDtype::F32);
    Act::new(memory, if all_f32 { Dtype::F32 } else { Dtype::Bf16 }, rows, width)
}

/// The first `rows` rows of one plane into another.
pub(super) fn copy(
    dev: &Device,
    from: &mut Plane,
    rows: usize,
    to: &mut Plane,
) -> Result<(), Error> {
    to.write(0, from.read(dev, rows)?)
}
