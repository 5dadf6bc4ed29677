//! An adapter's change of the embedding table, packed.
//!
//! Owns the factors. Never adds them: [`super::embed`] does.

use half::bf16;

use crate::buffer::{Buffer, Zeroed};
use crate::device::Memory;
use crate::simd::{GROUP, Stored};
use crate::{Error, FactorDtype};

/// An adapter's change of the embedding table: `h += At[token]·Bᵀ`, scale folded in.
pub struct EmbedDelta {
    pub(super) factors: Factors,
    pub(super) rank: usize,
    pub(super) vocab: usize,
    pub(super) hidden: usize,
}

pub(super) enum Factors {
    F32(Pair<f32>),
    Bf16(Pair<bf16>),
}

pub(super) struct Pair<E: Zeroed> {
    /// `[V, R]`
    pub(super) a: Buffer<E>,
    /// `[R, H padded to 32]`, in groups
    pub(super) b: Buffer<E>,
}

impl<E: Stored + Zeroed> Pair<E> {
    fn pack(rank: usize, vocab: usize, hidden: usize, a: &[f32], b: &[f32], scale: f32) -> Pair<E> {
        let stride = hidden.next_multiple_of(GROUP);
        let mut pair =
            Pair { a: Buffer::untouched(vocab * rank), b: Buffer::untouched(rank * stride) };
        for r in 0..rank {
            for v in 0..vocab {
                pair.a[v * rank + r] = E::from_f32(a[r * vocab + v]);
            }
            for h in 0..hidden {
                pair.b[r * stride + E::place(h)] = E::from_f32(scale * b[h * rank + r]);
            }
        }
        pair
    }
}

impl EmbedDelta {
    /// `a` `[R, V]` and `b` `[H, R]`, row-major as in PEFT files. The scale multiplies B. A token
    /// reads so little of it that int8 would save nothing: it is kept as bf16 then.
    ///
    /// # Errors
    /// On a GPU.
    ///
    /// # Panics
    /// On lengths that do not fit the shape.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one delta, named as in its formula"
    )]
    pub fn new(
        memory: &Memory,
        dtype: impl Into<FactorDtype>,
        rank: usize,
        vocab: usize,
        hidden: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
    ) -> Result<EmbedDelta, Error> {
        memory.only_cpu("an adapter's change of the embedding table")?;
        assert_eq!(a.len(), rank * vocab, "A is [{rank}, {vocab}]");
        assert_eq!(b.len(), hidden * rank, "B is [{hidden}, {rank}]");
        let factors = match dtype.into() {
            FactorDtype::F32 => Factors::F32(Pair::pack(rank, vocab, hidden, a, b, scale)),
            FactorDtype::Bf16 | FactorDtype::Int8 => {
                Factors::Bf16(Pair::pack(rank, vocab, hidden, a, b, scale))
            }
        };
        Ok(EmbedDelta { factors, rank, vocab, hidden })
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.factors {
            Factors::F32(pair) => pair.a.bytes() + pair.b.bytes(),
            Factors::Bf16(pair) => pair.a.bytes() + pair.b.bytes(),
        }
    }
}
