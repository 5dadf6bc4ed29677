//! The HTTP API over real sockets: the real program on a tiny random model, answers compared as
//! bytes and as JSON.

#[path = "../common/mod.rs"]
mod common;

mod adapters;
mod answers;
mod bundles;
mod keys;
mod lifetime;
mod live;
mod logprobs;
mod metrics;
mod refusals;
mod routes;
mod streams;
