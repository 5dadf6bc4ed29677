//! Merges as jobs.
//!
//! Owns what is special to them: the sources, the survey without a job, the steps. Never queues or
//! publishes: that is the same for every kind of work.

mod check;
mod plan;
mod spec;

pub use plan::Plan;
pub use spec::MergeSpec;
