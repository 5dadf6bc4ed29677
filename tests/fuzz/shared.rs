//! What the fuzz targets and the ordinary test of their bodies share, borrowed from other tests.
#![allow(dead_code, reason = "each of the two crates that include it uses its own part")]

#[path = "../adapter_files/mod.rs"]
pub mod adapter_files;
#[path = "app.rs"]
pub mod app;
#[path = "bodies.rs"]
pub mod bodies;
#[path = "../adapter_files/gguf.rs"]
pub mod gguf_files;
