//! HTTP: routes, wire types, streams. The only module that knows axum.
//!
//! Owns the wire: what a body may say, what an answer looks like, which status an error gets. Never
//! computes: text becomes tokens here, tokens become text here, all between is the engine's. The
//! thing to know: dropping the response (or its body) drops the event streams, and that is the
//! cancellation; so no request's work is ever spawned.

mod account;
mod adapters;
mod aliases;
mod archive;
mod asked;
mod audit;
mod auth;
mod body;
mod browsers;
mod chat;
mod choice;
mod compat;
mod completions;
mod entry;
mod errors;
mod generate;
mod health;
mod intake;
mod json;
mod keys;
mod limits;
mod line;
mod logprobs;
mod merges;
mod messages;
mod models;
mod openapi;
mod paced;
mod places;
mod routes;
mod sampling;
mod serve;
mod sites;
mod socket;
mod stream;
mod target;
mod templates;
mod tokenize;
mod unread;
pub(crate) mod upload;
mod usage;
mod versions;
mod wire;

use crate::access::Access;
use crate::adapters::registry::Registry;
use crate::clock::Now;
use crate::config::Config;
use crate::database::Storage;
use crate::engine::EngineHandle;
use crate::jobs::Jobs;
use crate::metrics::Metrics;
use crate::text::Text;
use crate::text::sandbox::Sandbox;
use crate::usage::UsageLog;
pub use intake::RENDERS_MAX;
pub use openapi::document;
pub use routes::{ROUTES, Route, Scope};
pub use serve::serve;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// What every route can reach. Cheap to clone.
#[derive(Clone)]
pub struct App {
    pub config: Arc<Config>,
    /// Served name of the base model, the context in tokens, and its digest as text.
    pub base_name: Arc<str>,
    pub base_digest: Arc<str>,
    /// What computes, in words for `/version`, e.g. `cpu (avx512)`.
    pub device: Arc<str>,
    pub context: usize,
    pub vocab: usize,
    pub text: Text,
    /// Renders chat templates that came with adapters.
    pub sandbox: Arc<Sandbox>,
    pub engine: EngineHandle,
    pub storage: Storage,
    pub registry: Registry,
    pub jobs: Jobs,
    pub access: Access,
    pub metrics: Arc<Metrics>,
    pub usage: UsageLog,
}

/// Every route, with its scope; see the table in `routes.rs`.
pub fn router(app: App) -> axum::Router {
    routes::router(Arc::new(Api::new(app)))
}

/// The `App` and what the HTTP side itself counts.
struct Api {
    app: App,
    /// Unix seconds at which this server came up: `created` of the base model.
    started: u64,
    /// Set once shutdown began: `/ready` says so.
    draining: AtomicBool,
    /// What requests may hold before they are queued.
    intake: intake::Intake,
    /// Templates of adapters that are in use.
    templates: templates::Templates,
    /// Adapters that requests are at.
    under_way: account::UnderWay,
}

impl Api {
    fn new(app: App) -> Self {
        Self {
            started: now(),
            draining: AtomicBool::new(false),
            intake: intake::Intake::new(&app.config, app.context, &app.text),
            templates: templates::Templates::new(),
            under_way: account::UnderWay::default(),
            app,
        }
    }

    /// The first digits of the base's digest, as OpenAI's `system_fingerprint`.
    fn fingerprint(&self) -> String {
        let hex = self.app.base_digest.trim_start_matches("sha256:");
        format!("fp_{}", hex.chars().take(12).collect::<String>())
    }
}

/// Time since 1970.
fn clock() -> Duration {
    Now::read().wall
}

/// Unix seconds.
fn now() -> u64 {
    clock().as_secs()
}

/// A fresh id such as `chatcmpl-0f3c…`.
fn random_id(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}
