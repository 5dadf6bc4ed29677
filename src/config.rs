//! Every limit in the program: what was asked (file, environment, flags) and what was checked.

use serde::Serialize;
use std::path::PathBuf;

/// The checked configuration of `serve`.
#[derive(Debug, Clone, Serialize)]
pub struct Config {
    pub model: String,
    pub served_name: Option<String>,
    /// `None` is auto.
    pub dtype: Option<String>,
    pub host: String,
    pub port: u16,
    pub data_dir: PathBuf,
    /// (name, directory) loaded at start
    pub adapters: Vec<(String, PathBuf)>,
    /// When set, every route but /live, /ready and /health wants `Authorization: Bearer <key>`.
    pub api_key: Option<String>,
    pub threads: usize,
    /// Prompt plus output of one request, in tokens; 0: the model's own context (bounded by KV memory).
    pub context: usize,
    pub kv_bytes: u64,
    pub kv_dtype: Option<String>,
    pub rows_max: usize,
    pub sequences_max: usize,
    pub waiting_max: usize,
    pub waiting_tokens_max: usize,
    pub stream_events_max: usize,
    pub prefix_cache: bool,
    pub adapter_bytes_max: u64,
    pub upload_bytes_max: u64,
    pub body_bytes_max: usize,
    pub adapters_max: usize,
    pub versions_kept: usize,
    /// n, stop strings, logit_bias entries, messages per request
    pub choices_max: usize,
    pub stops_max: usize,
    pub messages_max: usize,
    pub logit_bias_max: usize,
    /// Connections open at once; more wait in the listener's backlog.
    pub connections_max: usize,
    /// Uploads received at once; more are told 429.
    pub uploads_max: usize,
    pub request_seconds_max: u64,
    pub drain_seconds: u64,
    pub log_format: String,
}
