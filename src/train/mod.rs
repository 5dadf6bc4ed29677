//! Training adapters on the one copy of the base: forward, backward, optimiser, order of examples.
//!
//! Owns what a training job computes. Never knows HTTP, the registry or a file. The thing to know:
//! a pass is a state machine stopped between ops, so that whoever owns the device decides when to
//! go on.

mod adapter;
mod batch;
pub mod data;
mod optimiser;
mod order;
mod pass;
mod schedule;

pub use adapter::{Adapter, Part, Tensor};
pub use batch::{Example, MicroBatch};
pub use optimiser::{AdamW, Optimiser};
pub use order::Order;
pub use pass::{Pass, PassOptions, Progress, Purpose, Sums};
pub use schedule::{Decay, Schedule};
