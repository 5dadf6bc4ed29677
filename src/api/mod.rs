//! HTTP: routes, wire types, streams. The only module that knows axum.

use crate::adapters::registry::Registry;
use crate::config::Config;
use crate::engine::EngineHandle;
use crate::metrics::Metrics;
use crate::text::Text;
use std::sync::Arc;

/// What every route can reach. Cheap to clone.
#[derive(Clone)]
pub struct App {
    pub config: Arc<Config>,
    /// Served name of the base model, the context in tokens, and its digest as text.
    pub base_name: Arc<str>,
    pub base_digest: Arc<str>,
    pub context: usize,
    pub vocab: usize,
    pub text: Text,
    pub engine: EngineHandle,
    pub registry: Registry,
    pub metrics: Arc<Metrics>,
}

/// Every route, with its scope; see the table in `routes.rs`.
pub fn router(_app: App) -> axum::Router {
    unimplemented!()
}
