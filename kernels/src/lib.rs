//! The arithmetic of serving and training, and the one page that fixes its layouts and letters.
//!
//! This crate owns buffers, threads and every op a step calls; it is the only place with `unsafe`.
//! It knows no model, no adapter names, no serving words and no tensor crate.
//!
//! # Devices
//!
//! An operand lies in the [`Memory`] of the device that made it: on the CPU, or on a GPU that is
//! found at run time. Each op checks shapes, then does what its [`Device`] does. A GPU has
//! [`linear`] so far, in bf16. Whatever else an op reads or writes cannot be made there: its
//! constructor says so. Ops never fail where they are called. A device remembers the first error,
//! and whoever reads results ([`Plane::read`]) gets it.
//!
//! # Letters
//!
//! `T` rows (tokens of one step, of all sequences) · `S` sequences · `H` hidden · `N` query heads ·
//! `K` kv heads · `D` head dim · `V` vocabulary · `P` pages · `L` page length · `R` rank · `I`/`O`
//! inputs/outputs of a site · `G` segments.
//!
//! # Ragged rows
//!
//! A step is a flat list of `T` rows; there is no batch dimension and no padding. Side tables say
//! whose row is whose: `positions [T]`, `sequences [T]`, and page tables in CSR form: the pages of
//! sequence `s` are `pages[page_indptr[s]..page_indptr[s + 1]]`.
//!
//! # Segments
//!
//! Rows are ordered so that rows of one adapter are neighbours and base rows come last. Segment `g`
//! is the rows `indptr[g]..indptr[g + 1]`, with `indptr[0] = 0`, strictly increasing. Its
//! [`AdapterMix`] names slots of [`Residents`] and their weights. Rows from `indptr[G]` on belong
//! to no adapter and cost nothing beyond the base model.
//!
//! # Backward
//!
//! An op's gradient is beside it (`backward.rs`), on the CPU; the base is frozen. A gradient that a
//! product reads next is an [`Act`] with a bf16 copy, every other a [`Plane`]. A sequence's rows,
//! and a job's gradient, have the same bits alone and beside others.
//!
//! # Numerics
//!
//! Sums are f32 and run over the reduction in one fixed order that depends neither on `T` nor on
//! the number of threads: a row's bits do not depend on its neighbours. With integer weights the
//! activation is rounded once to 8 bits in groups of 32, outliers excepted, before a base matmul;
//! with bf16 weights to bf16, on a CPU that multiplies bf16 itself. Adapters see the f32
//! activation, but for bf16 factors beside bf16 weights on such a CPU: they see what those weights
//! see.

// Inner loops are unsafe as a whole: a block around each intrinsic would say nothing.
#![allow(unsafe_op_in_unsafe_fn)]

mod act;
mod arena;
mod argmax;
mod attention;
mod buffer;
mod cuda;
mod delta;
mod device;
mod dora;
mod embed;
mod glu;
mod kv;
mod linear;
mod lora;
mod loss;
mod machine;
mod matrix;
mod memory;
mod norm;
mod plane;
mod priority;
mod product;
pub mod reference;
mod residents;
mod rope;
mod segments;
mod simd;
mod team;
mod vector;

pub use act::Act;
pub use argmax::argmax;
pub use attention::{
    AttentionBackward, AttentionBackwardScratch, AttentionScratch, HEAD_DIM_MAX, attention,
    attention_backward, attention_lse,
};
pub use cuda::{Error, gpus};
pub use delta::Delta;
pub use device::{Device, DeviceChoice, Memory};
pub use dora::{
    DoraFactors, DoraScratch, Magnitude, MagnitudeGradient, dora, dora_backward, dora_norms,
    weight_squares,
};
pub use embed::{EmbedDelta, embed};
pub use glu::{Gate, GluBackward, glu, glu_backward};
pub use kv::{KvCache, Rows};
pub use linear::{
    Accumulate, Linear, LinearBackward, LoraScratch, PARTS_MAX, SITES_MAX, linear, linear_backward,
};
pub use lora::{Factor, FactorGradient, expand, outer, shrink};
pub use loss::{Scored, cross_entropy_backward, score};
pub use machine::{Machine, State};
pub use matrix::{Block, Group, Grouped, Matrix, Panel};
pub use memory::{return_free_pages, return_large_blocks};
pub use norm::{
    NormBackward, NormWeight, Residual, ResidualBackward, add_norm, add_norm_backward,
    add_norm_rows, add_norm_rows_backward,
};
pub use plane::Plane;
pub use priority::give_way;
pub use residents::{AdapterMix, Resident, Residents, Slot};
pub use rope::{HeadNorm, RopeStore, RopeTable, rope_backward, rope_store};
pub use segments::Segments;
pub use simd::Isa;
pub use vector::Vector;

/// The floats that weights, factors and KV pages may be stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
}

/// What a weight matrix is stored as. The integers share an f16 scale in groups of an output's
/// inputs; in brackets the GGUF blocks they hold exactly, or with scales rounded to f16 (*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    F32,
    Bf16,
    /// 8 bits about zero, a scale for 32 (Q8_0, Q5_0).
    Int8,
    /// 8 bits about zero, a scale for 16 (Q6_K*).
    Int8By16,
    /// 8 bits up from a least value, both for 32 (Q5_1, Q5_K*).
    Int8Min,
    /// 4 bits about zero, a scale for 32 (Q4_0).
    Int4,
    /// 4 bits up from a least value, both for 32 (Q4_1, Q4_K*).
    Int4Min,
}

/// What the factors of an adapter are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactorDtype {
    F32,
    Bf16,
    /// Multiples of 1/127 of the largest value of a rank: of its row of A, of its column of B.
    Int8,
}

/// What keys and values are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    Bf16,
    /// Multiples of 1/127 of the largest of a token's key, or value, of a head; the scale in f32.
    Int8,
}

impl From<Dtype> for KvDtype {
    fn from(dtype: Dtype) -> KvDtype {
        match dtype {
            Dtype::F32 => KvDtype::F32,
            Dtype::Bf16 => KvDtype::Bf16,
        }
    }
}

impl From<Dtype> for WeightDtype {
    fn from(dtype: Dtype) -> WeightDtype {
        match dtype {
            Dtype::F32 => WeightDtype::F32,
            Dtype::Bf16 => WeightDtype::Bf16,
        }
    }
}

impl From<Dtype> for FactorDtype {
    fn from(dtype: Dtype) -> FactorDtype {
        match dtype {
            Dtype::F32 => FactorDtype::F32,
            Dtype::Bf16 => FactorDtype::Bf16,
        }
    }
}

impl Dtype {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}
