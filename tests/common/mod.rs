//! What several test binaries share. Each binary uses a part of it.
#![allow(dead_code, reason = "each test binary uses its own part of this module")]

pub mod adapters;
pub mod runner;
pub mod server;
pub mod tiny;
