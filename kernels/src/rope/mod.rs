//! q, k = rotate(norm(q)), rotate(norm(k)) at their positions; k and v go to the pages.
//!
//! q `[T, N, D]`   k, v `[T, K, D]`   "rotate half": with c, s of the position,
//!
//! out[d] = x[d]·c[d] − x[d + D/2]·s[d]   and   out[d + D/2] = x[d + D/2]·c[d] + x[d]·s[d].
//!
//! Per-head norms (Qwen3, Gemma 3) run before, over D. Numerics: angles are position · inv_freq in
//! f32, as in the models' reference code, their cosine in f64 rounded to f32; k and v are rounded
//! once to the cache's type. In int8 a value that is not finite makes the scale NaN, so that it
//! spoils what it would spoil unrounded.

mod backward;

use crate::buffer::{Buffer, Shared};
use crate::device::{Cpu, Device, Kind, Memory, part};
use crate::kv::{KvCache, Layout, Rows, Values};
use crate::norm::{NormWeight, inverse_rms};
use crate::segments::Segments;
use crate::simd::{Isa, Kernel, LANES, Simd, Stored};
use crate::{Error, Plane};
pub use backward::{HeadNorm, rope_backward};

/// cos and sin of every position, times the attention scale (1 but for yarn).
pub struct RopeTable {
    /// [positions_max, D/2] cosines, then as many sines.
    values: Buffer<f32>,
    positions_max: usize,
    half: usize,
}

impl RopeTable {
    /// `inv_freq` [D/2], already scaled as the model's `rope_scaling` says.
    ///
    /// # Errors
    /// On a GPU.
    ///
    /// # Panics
    /// Unless `inv_freq` has `head_dim / 2` values.
    pub fn new(
        memory: &Memory,
        positions_max: usize,
        head_dim: usize,
        inv_freq: &[f32],
        attention_scale: f32,
    ) -> Result<RopeTable, Error> {
        memory.only_cpu("a rope table")?;
        let half = head_dim / 2;
        assert!(head_dim.is_multiple_of(2), "an even head dim, not {head_dim}");
        assert_eq!(inv_freq.len(), half, "inv_freq has D/2 values");
        let mut values = Buffer::zeroed(2 * positions_max * half);
        let (cos, sin) = values.split_at_mut(positions_max * half);
        for position in 0..positions_max {
            for (d, freq) in inv_freq.iter().enumerate() {
                let angle = f64::from(position as f32 * freq);
                cos[position * half + d] = angle.cos() as f32 * attention_scale;
                sin[position * half + d] = angle.sin() as f32 * attention_scale;
            }
        }
        Ok(RopeTable { values, positions_max, half })
    }

    /// Positions there are angles for.
    pub fn positions_max(&self) -> usize {
        self.positions_max
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.values.bytes()
    }

    fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let (cos, sin) = self.values.split_at(self.positions_max * self.half);
        (&cos[position * self.half..][..self.half], &sin[position * self.half..][..self.half])
    }
}

/// Operands of [`rope_store`]: q `[T, N, D]`, k and v `[T, K, D]`.
pub struct RopeStore<'a> {
    pub q: &'a mut Plane,
    pub k: &'a mut Plane,
    pub v: &'a Plane,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub q_norm: Option<NormWeight<'a>>,
    pub k_norm: Option<NormWeight<'a>>,
    pub eps: f32,
    pub rope: &'a RopeTable,
    pub layer: usize,
}

/// See the module page. Rows of one call have distinct (sequence, position).
///
/// # Panics
/// On shapes that do not fit, or a position beyond the table or its pages.
pub fn rope_store(
    dev: &Device,
    args: RopeStore<'_>,
    rows: Rows<'_>,
    segments: Segments<'_>,
    kv: &mut KvCache,
) {
    let (count, dim, layout) = (rows.count(), args.head_dim, kv.layout());
    let (q_width, kv_width) = (args.heads * dim, args.kv_heads * dim);
    rows.check(layout);
    segments.check(count);
    assert!(args.q.holds(count, q_width), "q holds {count} rows of {q_width}");
    assert!(args.k.holds(count, kv_width), "k holds {count} rows of {kv_width}");
    assert!(args.v.holds(count, kv_width), "v holds {count} rows of {kv_width}");
    assert_eq!(args.rope.half * 2, dim, "a rope table of the head dim");
    assert!(layout.kv_heads == args.kv_heads && layout.head_dim == dim, "the cache's heads");
    assert!(args.layer < layout.layers, "layer {} of {}", args.layer, layout.layers);
    match &dev.kind {
        Kind::Cpu(cpu) => on_cpu(cpu, args, rows, segments, kv),
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("rope_store")),
    }
}

fn on_cpu(
    cpu: &Cpu,
    args: RopeStore<'_>,
    rows: Rows<'_>,
    segments: Segments<'_>,
    kv: &mut KvCache,
) {
    cpu.count_op();
    let (count, dim, layout) = (rows.count(), args.head_dim, kv.layout());
    let (q_width, kv_width) = (args.heads * dim, args.kv_heads * dim);
    let [q, k] = [args.q, args.k].map(|plane| Shared::of(plane.on_mut().cpu_mut()));
    let (v, values) = (args.v.on().cpu(), kv.writer());
    let (rope, eps, isa) = (args.rope, args.eps, cpu.isa());
    let pieces = cpu.pieces(count, (q_width + 4 * kv_width) / 2);
    cpu.fork(pieces, &|piece| {
        for t in part(count, pieces, piece) {
            let position = rows.positions[t] as usize;
            assert!(position < rope.positions_max, "position {position} beyond the rope table");
            let segment = segments.of_row(t);
            let norm = |weight: Option<NormWeight<'_>>| {
                weight.map_or(std::ptr::null(), |w| w.of(segments, segment, dim).as_ptr())
            };
            let page = rows.pages_of(t)[position / KvCache::PAGE] as usize;
            // SAFETY: bounds are asserted by the op; a row, and its slot of the page, belong to one
            // piece.
            unsafe {
                let (cos, sin) = rope.at(position);
                let rotate = |x, heads, norm| Rotate { x, heads, dim, norm, eps, cos, sin };
                let k = k.get().add(t * kv_width);
                let q = q.get().add(t * q_width);
                isa.run(rotate(q, args.heads, norm(args.q_norm)));
                isa.run(rotate(k, args.kv_heads, norm(args.k_norm)));
                let slot =
                    Slot { layout, layer: args.layer, page, token: position % KvCache::PAGE };
                let v = v.as_ptr().add(t * kv_width);
                match values {
                    Values::F32(pages) => slot.write(isa, k, v, pages),
                    Values::Bf16(pages) => slot.write(isa, k, v, pages),
                    Values::Int8(pages) => slot.write(isa, k, v, pages),
                }
            }
        }
    });
}

/// Heads of one row, normed and rotated in place.
struct Rotate<'a> {
    x: *mut f32,
    heads: usize,
    dim: usize,
    /// `[D]`, or null.
    norm: *const f32,
    eps: f32,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let half = self.dim / 2;
        for head in 0..self.heads {
            let x = self.x.add(head * self.dim);
            let factor = if self.norm.is_null() {
                S::zero()
            } else {
                S::splat(inverse_rms::<S>(x, self.dim, self.eps))
            };
            for d in (0..half).step_by(LANES) {
                let n = (half - d).min(LANES);
                let load = |d: usize| {
                    let x = S::load_n(x.add(d), n);
                    if self.norm.is_null() {
                        x
                    } else {
                        S::mul(S::mul(x, factor), S::load_n(self.norm.add(d), n))
                    }
                };
                let (low, high) = (load(d), load(d + half));
                let cos = S::load_n(self.cos.as_ptr().add(d), n);
                let sin = S::load_n(self.sin.as_ptr().add(d), n);
                let minus = S::sub(S::mul(low, cos), S::mul(high, sin));
                S::store_row_n(x.add(d), n, minus);
                S::store_row_n(x.add(d + half), n, S::add(S::mul(high, cos), S::mul(low, sin)));
            }
        }
    }
}

/// One token's place in the cache.
#[derive(Clone, Copy)]
struct Slot {
    layout: Layout,
    layer: usize,
    page: usize,
    token: usize,
}

impl Slot {
    unsafe fn write<E: Stored>(self, isa: Isa, k: *const f32, v: *const f32, pages: Shared<E>) {
        isa.run(WriteSlot { slot: self, k, v, pages: pages.get() });
    }
}

struct WriteSlot<E> {
    slot: Slot,
    k: *const f32,
    v: *const f32,
    pages: *mut E,
}

impl<E: Stored> Kernel for WriteSlot<E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Slot { layout, layer, page, token } = self.slot;
        let dim = layout.head_dim;
        for head in 0..layout.kv_heads {
            let start = self.pages.add(layout.at(layer, page, head));
            let [k_factor, v_factor] = [self.k, self.v].map(|x| steps::<E>(x.add(head * dim), dim));
            if E::SCALED {
                let scales = start.add(layout.scales_start()).cast::<f32>().add(token);
                *scales = k_factor.scale;
                *scales.add(KvCache::PAGE) = v_factor.scale;
            }
            for d in (0..dim).step_by(LANES) {
                let n = (dim - d).min(LANES);
                let mut values = [E::from_f32(0.0); LANES];
                E::store_n::<S>(
                    values.as_mut_ptr(),
                    n,
                    k_factor.of::<S, E>(self.k.add(head * dim + d), n),
                );
                for (i, &value) in values[..n].iter().enumerate() {
                    *start.add(E::place((d + i) * KvCache::PAGE + token)) = value;
                }
                E::store_n::<S>(
                    values.as_mut_ptr(),
                    n,
                    v_factor.of::<S, E>(self.v.add(head * dim + d), n),
                );
                let group = start.add(layout.v_group(token, d));
                for (i, &value) in values[..n].iter().enumerate() {
                    *group.add(E::place(token % 2 * LANES + i)) = value;
                }
            }
        }
    }
}

/// How values become multiples of a scale.
struct Steps {
    scale: f32,
    /// 1 / scale.
    factor: f32,
}

/// Those of 1/127 of the largest of `dim` values; of no use where `E` has no scale.
#[inline(always)]
unsafe fn steps<E: Stored>(x: *const f32, dim: usize) -> Steps {
    if !E::SCALED {
        return Steps { scale: 1.0, factor: 1.0 };
    }
    let (mut most, mut all) = (0.0f32, 0.0);
    for d in 0..dim {
        let x = *x.add(d);
        most = most.max(x.abs());
        // Zero, or NaN once a value is not finite.
        all += x * 0.0;
    }
    let scale = most / 127.0 + all;
    let factor = 127.0 / most;
    Steps { scale, factor: if factor.is_finite() { factor } else { 0.0 } }
}

impl Steps {
    #[inline(always)]
    unsafe fn of<S: Simd, E: Stored>(&self, x: *const f32, n: usize) -> S::F {
        let x = S::load_n(x, n);
        if E::SCALED { S::mul(x, S::splat(self.factor)) } else { x }
    }
}
