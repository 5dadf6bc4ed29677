//! The ops on a GPU, through the driver's own interface, which is looked for at run time.
//!
//! Owns what lies on a GPU ([`Gpu`], [`Buffer`] and what is made of them) and the launches of the
//! kernels in `kernels/cuda`, whose PTX is part of this program. Never falls back: where there is
//! no driver or no such GPU, opening one is an [`Error`] of one line. Shapes are checked by the ops
//! whose arms these are; what the driver refuses (memory, a failed launch) is an [`Error`].
//! Launches only line up: a failure may show at the next [`Buffer::read`].
//!
//! Numerics: x, W, A and B are bf16, products exact, sums f32, u f32. A sum over inputs is four
//! chains of `mma` steps joined in one order, the same for every number of rows, so a row's bits do
//! not depend on its neighbours. (They are not the CPU's bits: that has one chain.)

mod act;
mod error;
mod gemm;
mod gpu;
mod linear;
mod lora;
mod matrix;
mod memory;
mod sizes;
mod table;

pub(crate) use act::Act;
pub use error::Error;
pub(crate) use gpu::Gpu;
pub use gpu::gpus;
pub(crate) use linear::linear;
pub(crate) use lora::{Delta, LoraScratch};
pub(crate) use matrix::Matrix;
use memory::Buffer;
pub use memory::Memory;
pub(crate) use memory::Plane;
use sizes::*;
