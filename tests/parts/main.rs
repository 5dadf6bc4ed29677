//! The parts of the server, one at a time: no model computes, and the program does not run.
//!
//! Owns what a part promises by itself. Never what they promise together: that is in `model` and
//! `program`.

mod adapters;
mod files;
mod ledger;
mod merge;
mod meters;
mod pages;
mod registry;
mod sampler;
mod scheduler;
mod simulate;
mod source;
mod text;
mod training_data;
mod turns;
