//! Jobs over HTTP: merges and training.
//!
//! Owns their routes and wire. Never carries one out: `crate::jobs` does.

pub mod fine_tuning;
pub mod merges;
