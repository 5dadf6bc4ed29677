//! Training adapters on the one copy of the base: forward, backward, optimiser, order of examples.
//!
//! Owns what a training job computes. Never knows HTTP or the registry. The thing to know: a job is
//! a state machine stopped between ops, so that whoever owns the device decides when to go on.

mod adapter;
pub mod asked;
mod batch;
pub mod data;
mod norms;
mod optimiser;
mod order;
mod pass;
mod schedule;
mod spec;
mod steps;
mod trainer;

pub use adapter::{Adapter, Part, Tensor};
pub use asked::Asked;
pub use batch::{Example, MicroBatch};
pub use norms::Norms;
pub use optimiser::{Optimiser, OptimiserKind, OptimiserSettings};
pub use order::Order;
pub use pass::{Pass, PassOptions, Progress, Purpose, Sums};
pub use schedule::{Decay, Schedule};
pub use spec::{Init, Objective, TrainSpec};
pub use steps::{Steps, figures};
pub use trainer::{Advance, Evaluated, StepReport, Trainer};
