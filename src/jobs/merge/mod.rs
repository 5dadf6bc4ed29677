//! Merges as jobs, one kind of work.
//!
//! Owns what is special to them: the sources, the report without a job, the steps. Never queues or
//! publishes: that is the same for every kind of work.

mod check;
mod plan;
mod spec;

pub use plan::Plan;
pub use spec::MergeSpec;
