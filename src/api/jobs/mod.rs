//! Jobs over HTTP, today merges; and the files that they read.
//!
//! Owns their routes and wire. Never carries one out: `crate::jobs` does.

pub mod files;
mod form;
pub mod merges;
pub mod uploads;
