//! What every route can reach.
//!
//! Owns the parts of a server as the HTTP side sees them, and what that side itself counts. Never
//! acts: it is a record.

use super::http::intake::Intake;
use super::inference::in_flight::InFlight;
use super::inference::templates::Templates;
use crate::access::Access;
use crate::adapters::registry::Registry;
use crate::clock;
use crate::config::Config;
use crate::database::Storage;
use crate::engine::EngineHandle;
use crate::files::Files;
use crate::jobs::Jobs;
use crate::metrics::Metrics;
use crate::text::Text;
use crate::text::sandbox::Sandbox;
use crate::usage::UsageLog;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A server: made by `assembly`, shared by all routes.
pub struct Api {
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
    pub files: Files,
    pub access: Access,
    pub metrics: Arc<Metrics>,
    pub usage: UsageLog,
    pub requests: Requests,
}

/// What the HTTP side counts and keeps for its requests.
pub struct Requests {
    /// Unix seconds at which this server came up: `created` of the base model.
    pub(super) started: u64,
    /// Set once shutdown began: `/ready` says so.
    pub(super) draining: AtomicBool,
    /// What requests may hold before they are queued.
    pub(super) intake: Intake,
    /// Templates of adapters that are in use.
    pub(super) templates: Templates,
    /// Adapters that requests are at.
    pub(super) in_flight: Arc<InFlight>,
}

impl Requests {
    /// None yet, and bounds as `config` gives them.
    pub fn new(config: &Config, context: usize, text: &Text) -> Self {
        Self {
            started: clock::unix_seconds(),
            draining: AtomicBool::new(false),
            intake: Intake::new(config, context, text),
            templates: Templates::new(),
            in_flight: Arc::default(),
        }
    }
}

impl Api {
    /// The first digits of the base's digest, as OpenAI's `system_fingerprint`.
    pub fn fingerprint(&self) -> String {
        let hex = self.base_digest.trim_start_matches("sha256:");
        format!("fp_{}", hex.chars().take(12).collect::<String>())
    }
}
