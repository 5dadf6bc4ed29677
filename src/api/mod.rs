//! HTTP: routes, wire types, streams. The only module that knows axum.
//!
//! Owns the wire: what a body may say, what an answer looks like, which status an error gets. Never
//! computes: text becomes tokens here, tokens become text here, all between is the engine's. The
//! thing to know: dropping the response (or its body) drops the event streams, and that is the
//! cancellation; so no request's work is ever spawned.

mod adapters;
mod admin;
mod app;
mod http;
mod inference;
mod jobs;
mod listener;
mod openapi;
mod routes;
mod wire;

pub use app::{Api, Requests};
pub use http::intake::RENDERS_MAX;
pub use http::scope::Scope;
pub use listener::serve;
pub use openapi::document;
pub use routes::{ROUTES, Route, router};
