//! polylora serves one base model and many adapters in one batch.
//!
//! The map, in the direction of imports (each line may use the ones below it):
//!
//! - [`cli`]: arguments to configuration to one of the commands; no logic of its own
//! - [`assembly`]: a server out of a configuration
//! - [`api`]: HTTP; the only module that knows axum and the wire's types
//! - [`jobs`]: work carried out beside serving, tenants in turns
//! - [`engine`]: the thread that turns tokens into tokens: plan, run, commit
//! - [`train`]: adapters out of examples, without files
//! - [`text`]: text to tokens and back
//! - [`merge`]: adapters into one, without files
//! - [`model`]: the decoder and its weights
//! - [`checkpoint`]: the files of base models and where they come from
//! - [`adapters`]: formats, store, registry, bank
//! - [`access`]: keys, tenants and what they may do
//! - [`files`]: what clients upload to train on
//! - [`usage`]: what each request used, on disk
//! - [`clock`], [`config`], [`database`], [`ending`], [`error`], [`metrics`], [`shape`], [`share`],
//!   [`terminal`], [`tls`], headers of weight files, and reproducible random numbers: leaves
//!
//! The arithmetic is in the crate `polylora-kernels`.
#![forbid(unsafe_code)]

pub mod access;
pub mod adapters;
pub mod api;
pub mod assembly;
mod blocking;
pub mod checkpoint;
pub mod cli;
pub mod clock;
pub mod config;
pub mod database;
pub mod ending;
pub mod engine;
pub mod error;
pub mod files;
mod header;
pub mod jobs;
pub mod merge;
pub mod metrics;
pub mod model;
mod random;
pub mod shape;
pub mod share;
pub mod terminal;
pub mod text;
pub mod tls;
pub mod train;
pub mod usage;
