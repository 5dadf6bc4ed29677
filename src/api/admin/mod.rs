//! Routes for whoever runs the server: keys, limits, the audit log, usage, health.
//!
//! Owns their answers. Never keeps a book itself: `access`, `usage` and `metrics` do.

pub mod audit;
pub mod health;
pub mod keys;
pub mod limits;
pub mod usage;
