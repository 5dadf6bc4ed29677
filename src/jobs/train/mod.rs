//! Training as a job, one kind of work.
//!
//! Owns what is special to it: the examples, the steps on the engine's thread, the figures. Never
//! queues or publishes: that is the same for every kind of work.

mod change;
mod gate;
mod held_out;
mod means;
mod quantum;
mod read;
mod spec;
mod work;

pub use change::Change;
pub use gate::{Gate, Verdict};
pub use means::Means;
pub use read::{Job as Reading, Preview, preview};
pub use spec::{FileUse, Promote, TrainingSpec};
pub use work::{Start, Training, forget, sweep};
