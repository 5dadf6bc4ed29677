//! One adapter's change of one site, as it is kept on the CPU. Immutable; its two products are in
//! [`super::shrink`] and [`super::expand`].
//!
//! A is `[R, I]`, lanes over inputs, rows padded with zeros to 32 inputs; of each four ranks 32
//! inputs follow each other (`[R/4][I/32][4][32]`), what is left of R lies row by row. B is
//! transposed, in blocks of 64 outputs, each `[R][64]`, lanes over outputs, the last block padded
//! to 32: one row's products read both as one sequential stream. Within a row values lie in groups
//! of 32 (see [`Element`]); B in bf16 is `[R/2][64][2]` instead, two ranks of an output a word, an
//! odd rank beside a zero. Ranks are exact but for that. Factors have their own dtype: in int8 both
//! factors of a rank have one scale together, which multiplies its u.

use std::ops::Range;

use half::bf16;

use crate::FactorDtype;
use crate::buffer::{Buffer, Zeroed};
use crate::linear::shrink::{RANKS, Shrink, ShrinkRows};
use crate::matrix::BLOCK;
use crate::simd::{Element, GROUP, Isa};

/// What an adapter changes at one site: factors, gain, bias.
pub(crate) struct Delta {
    factors: Factors,
    rank: usize,
    inputs: usize,
    outputs: usize,
    gain: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

enum Factors {
    F32(Pair<f32>),
    Bf16(Pair<bf16>),
    /// With the scale of each rank.
    Int8(Pair<i8>, Box<[f32]>),
}

struct Pair<E: Zeroed> {
    a: Buffer<E>,
    b: Buffer<E>,
}

/// Shape and numbers of a delta to pack: `a` `[R, I]`, `b` `[O, R]`, row-major as in PEFT files.
/// The scale multiplies B.
pub(crate) struct Source<'a> {
    pub(crate) rank: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) a: &'a [f32],
    pub(crate) b: &'a [f32],
    pub(crate) scale: f32,
}

impl<E: Element + Zeroed> Pair<E> {
    fn pack(source: &Source<'_>) -> Pair<E> {
        let Source { rank, inputs, outputs, a, b, scale } = *source;
        let stride = inputs.next_multiple_of(GROUP);
        let ranks = ranks_b::<E>(rank);
        let mut pair = Pair {
            a: Buffer::untouched(rank * stride),
            b: Buffer::untouched(block_start(outputs, ranks, outputs.div_ceil(BLOCK))),
        };
        for r in 0..rank {
            for i in 0..inputs {
                pair.a[a_place::<E>(rank, stride, r, i)] = E::from_f32(a[r * inputs + i]);
            }
        }
        for o in 0..outputs {
            for r in 0..rank {
                pair.b[b_place::<E>(outputs, ranks, o, r)] = E::from_f32(scale * b[o * rank + r]);
            }
        }
        pair
    }
}

impl Source<'_> {
    /// Rank by rank a row of A and a column of B, each in steps of 1/127 of its largest value.
    fn quantised(&self) -> Factors {
        let (mut a, mut b) = (self.a.to_vec(), self.b.to_vec());
        let mut scales = vec![0.0; self.rank];
        for (r, scale) in scales.iter_mut().enumerate() {
            let of_a = to_steps(&mut a[r * self.inputs..][..self.inputs].iter_mut());
            let of_b = to_steps(&mut b.iter_mut().skip(r).step_by(self.rank));
            *scale = of_a * of_b * self.scale;
        }
        let steps = Source { a: &a, b: &b, scale: 1.0, ..*self };
        Factors::Int8(Pair::pack(&steps), scales.into())
    }
}

/// Divides values by 1/127 of the largest, which it returns.
fn to_steps(values: &mut dyn Iterator<Item = &mut f32>) -> f32 {
    let values: Vec<&mut f32> = values.collect();
    let most = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    if most == 0.0 {
        return 0.0;
    }
    for value in values {
        *value = *value / most * 127.0;
    }
    most / 127.0
}

/// Where a value of A is stored.
fn a_place<E: Element>(rank: usize, stride: usize, r: usize, i: usize) -> usize {
    let first = r / RANKS * RANKS;
    match first + RANKS <= rank {
        true => first * stride + (i / GROUP * RANKS + r % RANKS) * GROUP + E::place(i % GROUP),
        false => r * stride + E::place(i),
    }
}

/// Where a value of B is stored.
fn b_place<E: Element>(outputs: usize, ranks: usize, o: usize, r: usize) -> usize {
    let (block, at) = (o / BLOCK, o % BLOCK);
    let width = block_width(outputs, block);
    let within = match E::DEPTH {
        1 => r * width + E::place(at),
        depth => (r / depth * width + at) * depth + r % depth,
    };
    block_start(outputs, ranks, block) + within
}

/// Ranks of B as stored.
#[inline(always)]
pub(super) fn ranks_b<E: Element>(rank: usize) -> usize {
    rank.next_multiple_of(E::DEPTH)
}

/// First value of a block of B; the end of B for the block behind the last. `ranks` as stored.
#[inline(always)]
pub(super) fn block_start(outputs: usize, ranks: usize, block: usize) -> usize {
    (block * BLOCK).min(outputs.next_multiple_of(GROUP)) * ranks
}

/// Outputs of a block of B, padding included.
#[inline(always)]
pub(super) fn block_width(outputs: usize, block: usize) -> usize {
    (outputs.next_multiple_of(GROUP) - block * BLOCK).min(BLOCK)
}

impl Delta {
    /// Packs the factors; lengths are checked.
    pub(crate) fn new(
        dtype: FactorDtype,
        source: Source<'_>,
        gain: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> Delta {
        let Source { rank, inputs, outputs, .. } = source;
        let factors = match dtype {
            FactorDtype::F32 => Factors::F32(Pair::pack(&source)),
            FactorDtype::Bf16 => Factors::Bf16(Pair::pack(&source)),
            FactorDtype::Int8 => source.quantised(),
        };
        Delta { factors, rank, inputs, outputs, gain, bias }
    }

    /// Whether it multiplies what it is added to.
    pub(crate) fn has_gain(&self) -> bool {
        self.gain.is_some()
    }

    /// R.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// I.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// O.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        let factors = match &self.factors {
            Factors::F32(pair) => pair.a.bytes() + pair.b.bytes(),
            Factors::Bf16(pair) => pair.a.bytes() + pair.b.bytes(),
            Factors::Int8(pair, scales) => {
                pair.a.bytes() + pair.b.bytes() + size_of_val::<[f32]>(scales)
            }
        };
        let outputs = usize::from(self.gain.is_some()) + usize::from(self.bias.is_some());
        factors + outputs * self.outputs * size_of::<f32>()
    }

    /// Where the factors of a rank (of A) start.
    pub(super) fn place_a(&self, rank: usize) -> *const u8 {
        let at = rank * self.inputs.next_multiple_of(GROUP);
        match &self.factors {
            Factors::F32(pair) => pair.a.as_ptr().wrapping_add(at).cast(),
            Factors::Bf16(pair) => pair.a.as_ptr().wrapping_add(at).cast(),
            Factors::Int8(pair, _) => pair.a.as_ptr().wrapping_add(at).cast(),
        }
    }

    /// Where those of an output block (of B) start.
    pub(super) fn place_b(&self, block: usize) -> *const u8 {
        let at = block_start(self.outputs, self.ranks_b(), block);
        match &self.factors {
            Factors::F32(pair) => pair.b.as_ptr().wrapping_add(at).cast(),
            Factors::Bf16(pair) => pair.b.as_ptr().wrapping_add(at).cast(),
            Factors::Int8(pair, _) => pair.b.as_ptr().wrapping_add(at).cast(),
        }
    }

    #[inline(always)]
    fn ranks_b(&self) -> usize {
        match &self.factors {
            Factors::F32(_) => ranks_b::<f32>(self.rank),
            Factors::Bf16(_) => ranks_b::<bf16>(self.rank),
            Factors::Int8(..) => ranks_b::<i8>(self.rank),
        }
    }

    /// B in pairs of ranks, where there is nothing but factors; else null.
    pub(super) fn plain_words(&self) -> *const u32 {
        match &self.factors {
            Factors::Bf16(pair) if self.gain.is_none() && self.bias.is_none() => {
                pair.b.as_ptr().cast()
            }
            _ => std::ptr::null(),
        }
    }

    /// Whether its factors are pairs of bf16.
    pub(super) fn has_pairs(&self) -> bool {
        matches!(self.factors, Factors::Bf16(_))
    }

    /// Bytes of B of some output blocks.
    pub(super) fn b_bytes(&self, blocks: Range<usize>) -> usize {
        self.place_b(blocks.end).addr() - self.place_b(blocks.start).addr()
    }

    /// u = x·Aᵀ of some rows and ranks.
    ///
    /// # Safety
    /// Rows lie within x and u, ranks within `0..rank`; rows of x are padded with zeros to 32; no
    /// other task writes these u.
    pub(super) unsafe fn shrink(&self, isa: Isa, at: Shrink) {
        let inputs = self.inputs.next_multiple_of(GROUP);
        match &self.factors {
            Factors::F32(pair) => {
                isa.run(ShrinkRows { at, a: pair.a.as_ptr(), inputs, scales: None })
            }
            Factors::Bf16(pair) => {
                isa.run(ShrinkRows { at, a: pair.a.as_ptr(), inputs, scales: None })
            }
            Factors::Int8(pair, scales) => {
                isa.run(ShrinkRows { at, a: pair.a.as_ptr(), inputs, scales: Some(scales) })
            }
        }
    }

    /// B, gain and bias, as they are kept.
    #[inline(always)]
    pub(super) fn parts(&self) -> (FactorB<'_>, Option<&[f32]>, Option<&[f32]>) {
        let b = match &self.factors {
            Factors::F32(pair) => FactorB::F32(&pair.b),
            Factors::Bf16(pair) => FactorB::Bf16(&pair.b),
            Factors::Int8(pair, _) => FactorB::Int8(&pair.b),
        };
        (b, self.gain.as_deref(), self.bias.as_deref())
    }
}

/// B of a delta.
pub(super) enum FactorB<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    Int8(&'a [i8]),
}
