//! The HTTP API over real sockets: the real program on a tiny random model, answers compared as
//! bytes and as JSON.

mod adapters;
mod answers;
mod bundles;
mod compat;
mod compose;
mod crash;
mod cycles;
mod file_uploads;
mod files;
mod fine_tuning;
mod fine_tuning_data;
mod fine_tuning_gate;
mod keys;
mod lifetime;
mod limits;
mod log;
mod logprobs;
mod merge_restarts;
mod merges;
mod metrics;
mod noisy;
mod refusals;
mod routes;
mod streams;
mod tenants;
mod usage;
mod versions;
