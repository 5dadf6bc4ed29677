//! Training as a job, one kind of work.
//!
//! Owns what is special to it: the examples, the steps on the engine's thread, the figures. Never
//! queues or publishes: that is the same for every kind of work.

mod means;
mod quantum;
mod read;
mod report;
mod spec;
mod work;

pub use means::Means;
pub use report::Steps;
pub use spec::{Asked, FileUse, Promote, TrainingSpec};
pub use work::{Training, forget};
