//! Merges as jobs.
//!
//! Owns what is special to them: the sources, the survey without a job, the steps. Never queues or
//! publishes: that is the same for every kind of work.

mod plan;
mod spec;
mod survey;

pub use plan::Plan;
pub use spec::MergeSpec;
