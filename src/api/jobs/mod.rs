//! Jobs over HTTP, merges and training; and the files that they read.
//!
//! Owns their routes and wire. Never carries one out: `crate::jobs` does.

pub mod deletion;
pub mod files;
pub mod fine_tuning;
mod form;
pub mod merges;
mod report;
pub mod uploads;
mod watching;
