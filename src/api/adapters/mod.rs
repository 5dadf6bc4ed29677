//! Adapters over HTTP: uploads, versions, aliases, and the lists of models.
//!
//! Owns what the wire says of an adapter. Never decides about one: the registry does.

pub mod aliases;
mod archive;
pub mod models;
mod received;
pub mod routes;
mod shown;
mod upload;
pub mod versions;
pub mod vllm;
