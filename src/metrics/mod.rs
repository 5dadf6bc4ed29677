//! Every figure the server exports, under one prefix, in Prometheus form.
//!
//! Owns names, help texts and buckets. Never decides anything. The thing to know: the engine thread
//! only adds to atomics that were made at start; whatever needs a label that comes and goes is
//! counted by the HTTP side, in [`adapters`].

pub mod adapters;
mod gateway;
mod make;

pub use adapters::AdapterSeries;
pub use gateway::{Gateway, Loaded};

use adapters::AdapterTable;
use make::Make;
use prometheus::{Counter, Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use std::sync::Arc;

/// Adapters with series of their own unless the operator says otherwise.
pub const METRIC_ADAPTERS_MAX: usize = 64;

/// All series. Fields are public: whoever sees the event counts it.
pub struct Metrics {
    registry: Registry,
    pub requests_running: IntGauge,
    pub requests_waiting: IntGauge,
    pub waiting_tokens: IntGauge,
    pub kv_pages_used: IntGauge,
    pub kv_pages_total: IntGauge,
    pub prefix_cache_queries: IntCounter,
    pub prefix_cache_hits: IntCounter,
    pub preemptions: IntCounter,
    pub prompt_tokens: IntCounter,
    pub generation_tokens: IntCounter,
    pub steps: IntCounter,
    pub ops: IntCounter,
    pub step_rows: Histogram,
    pub step_seconds: Histogram,
    pub step_failures: IntCounter,
    pub background_seconds: Counter,
    pub inter_token_latency: Histogram,
    pub queue_time: Histogram,
    /// by `finished_reason`: stop, length, cancelled, failed
    pub requests_finished: IntCounterVec,
    /// by `route`, `status`
    pub http_requests: IntCounterVec,
    /// by `tier`: device is the bank, disk the store
    pub adapters_resident: IntGaugeVec,
    pub adapter_resident_bytes: IntGaugeVec,
    pub adapter_loads: IntCounter,
    pub adapter_evictions: IntCounter,
    /// by `reason`: evicted, or start when it was not in memory since the server came up
    pub cold_starts: IntCounterVec,
    pub load_seconds: Histogram,
    /// by `code`
    pub adapters_refused: IntCounterVec,
    pub storage_read_only: IntGauge,
    pub usage_records: IntCounter,
    pub usage_commit_failures: IntCounter,
    adapters: AdapterTable,
}

impl Metrics {
    pub fn new() -> Self {
        Self::bounded(METRIC_ADAPTERS_MAX)
    }

    /// With series for at most `adapters_max` adapters; the rest is counted together.
    pub fn bounded(adapters_max: usize) -> Self {
        let registry = Registry::new();
        let m = Make(&registry);
        Self {
            requests_running: m.gauge("requests_running", "Sequences computed in this step."),
            requests_waiting: m
                .gauge("requests_waiting", "Sequences waiting for their first step."),
            waiting_tokens: m.gauge("waiting_tokens", "Prompt tokens of waiting sequences."),
            kv_pages_used: m.gauge("kv_pages_used", "KV pages held by sequences."),
            kv_pages_total: m.gauge("kv_pages_total", "KV pages taken at start."),
            prefix_cache_queries: m.counter(
                "prefix_cache_queries_tokens_total",
                "Prompt tokens looked up in the prefix cache.",
            ),
            prefix_cache_hits: m.counter(
                "prefix_cache_hits_tokens_total",
                "Prompt tokens found in the prefix cache.",
            ),
            preemptions: m.counter("preemptions_total", "Sequences sent back to be recomputed."),
            prompt_tokens: m.counter("prompt_tokens_total", "Prompt tokens of ended sequences."),
            generation_tokens: m.counter("generation_tokens_total", "Tokens generated."),
            steps: m.counter("steps_total", "Steps run."),
            ops: m.counter("ops_total", "Kernel ops called by steps."),
            step_rows: m.rows("step_rows", "Rows of a step."),
            step_seconds: m.seconds("step_seconds", "Duration of a step."),
            step_failures: m
                .counter("step_failures_total", "Steps that failed; only their own requests did."),
            background_seconds: m.float_counter(
                "background_seconds_total",
                "Time of the engine that went into training.",
            ),
            inter_token_latency: m
                .seconds("inter_token_latency_seconds", "Between two tokens of a sequence."),
            queue_time: m
                .seconds("request_queue_time_seconds", "From submission to the first step."),
            requests_finished: m.counters(
                "requests_finished_total",
                "Sequences that ended, by reason.",
                &["finished_reason"],
            ),
            http_requests: m.counters(
                "http_requests_total",
                "HTTP requests by route and status.",
                &["route", "status"],
            ),
            adapters_resident: m.gauges("adapters_resident", "Adapter versions held.", &["tier"]),
            adapter_resident_bytes: m.gauges("adapter_resident_bytes", "Their bytes.", &["tier"]),
            adapter_loads: m.counter("adapter_loads_total", "Adapters loaded into the bank."),
            adapter_evictions: m
                .counter("adapter_evictions_total", "Adapters taken out to make room."),
            cold_starts: m.counters(
                "adapter_cold_starts_total",
                "Loads of stored adapters by why: restart, evicted, replaced.",
                &["reason"],
            ),
            load_seconds: m.seconds(
                "adapter_load_seconds",
                "From the decision to load an adapter until it could serve.",
            ),
            adapters_refused: m.counters(
                "adapters_refused_total",
                "Uploads refused, by error code.",
                &["code"],
            ),
            storage_read_only: m
                .gauge("storage_read_only", "1 while changes are refused: nothing can be written."),
            usage_records: m.counter("usage_records_total", "Usage records committed."),
            usage_commit_failures: m
                .counter("usage_commit_failures_total", "Commits of usage that were tried again."),
            adapters: AdapterTable::new(&m, adapters_max),
            registry,
        }
    }

    /// Where the requests of `adapter` are counted; `None` is the base, `adapters::COMPOSED` any
    /// composition.
    pub fn series(&self, adapter: Option<&str>) -> Arc<AdapterSeries> {
        self.adapters.series(adapter)
    }

    /// Takes adapters off the page whose name is gone.
    pub fn forget_adapters(&self, exists: impl Fn(&str) -> bool) {
        self.adapters.retain(exists);
    }

    /// The page for `/metrics`, Prometheus text format 0.0.4.
    pub fn render(&self, gateway: &Gateway) -> String {
        let mut families = self.registry.gather();
        families.extend(gateway.families(&families));
        prometheus::TextEncoder::new().encode_to_string(&families).unwrap_or_default()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
