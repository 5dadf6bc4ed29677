//! Jobs over HTTP: today merges.
//!
//! Owns their routes and wire. Never carries one out: `crate::jobs` does.

pub mod merges;
