//! What every request passes on its way to a route: connection, id, deadline, key, body, errors.
//!
//! Owns what routes share. Never knows a route.

pub mod audit;
pub mod auth;
pub mod body;
pub mod browsers;
pub mod connection;
pub mod errors;
pub mod intake;
mod json;
pub mod paced;
pub mod permits;
pub mod request;
pub mod scope;
mod sites;
pub mod socket;
pub mod sse;
pub mod touched;
mod unread;
