//! Every figure the server exports, under one prefix, in Prometheus form.
//!
//! Owns names, help texts and buckets. Never decides anything. The thing to know: the engine thread
//! only adds to atomics.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

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
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    pub queue_time: Histogram,
    /// by `finished_reason`: stop, length, cancelled, failed
    pub requests_finished: IntCounterVec,
    /// by `route`, `status`
    pub http_requests: IntCounterVec,
    pub adapters_resident: IntGauge,
    pub adapter_resident_bytes: IntGauge,
    pub adapter_loads: IntCounter,
    /// by `code`
    pub adapters_refused: IntCounterVec,
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| {
            let g = IntGauge::new(format!("polylora_{name}"), help).expect("metric name");
            registry.register(Box::new(g.clone())).expect("metric registered once");
            g
        };
        let counter = |name: &str, help: &str| {
            let c = IntCounter::new(format!("polylora_{name}"), help).expect("metric name");
            registry.register(Box::new(c.clone())).expect("metric registered once");
            c
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let c = IntCounterVec::new(Opts::new(format!("polylora_{name}"), help), labels)
                .expect("metric name");
            registry.register(Box::new(c.clone())).expect("metric registered once");
            c
        };
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| {
            let o = HistogramOpts::new(format!("polylora_{name}"), help).buckets(buckets);
            let h = Histogram::with_opts(o).expect("metric name");
            registry.register(Box::new(h.clone())).expect("metric registered once");
            h
        };
        let seconds = || {
            vec![
                0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
                60.0,
            ]
        };
        let rows = || vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
        Self {
            requests_running: gauge("requests_running", "Sequences computed in the current step."),
            requests_waiting: gauge("requests_waiting", "Sequences waiting for their first step."),
            waiting_tokens: gauge("waiting_tokens", "Prompt tokens of waiting sequences."),
            kv_pages_used: gauge("kv_pages_used", "KV pages held by sequences."),
            kv_pages_total: gauge("kv_pages_total", "KV pages taken at start."),
            prefix_cache_queries: counter(
                "prefix_cache_queries_tokens_total",
                "Prompt tokens looked up in the prefix cache.",
            ),
            prefix_cache_hits: counter(
                "prefix_cache_hits_tokens_total",
                "Prompt tokens found in the prefix cache.",
            ),
            preemptions: counter("preemptions_total", "Sequences sent back to be recomputed."),
            prompt_tokens: counter("prompt_tokens_total", "Prompt tokens of finished requests."),
            generation_tokens: counter("generation_tokens_total", "Tokens generated."),
            steps: counter("steps_total", "Steps run."),
            ops: counter("ops_total", "Kernel ops called by steps."),
            step_rows: histogram("step_rows", "Rows of a step.", rows()),
            step_seconds: histogram("step_seconds", "Duration of a step.", seconds()),
            step_failures: counter(
                "step_failures_total",
                "Steps that failed; only their own requests did.",
            ),
            time_to_first_token: histogram(
                "time_to_first_token_seconds",
                "From submission to the first token.",
                seconds(),
            ),
            inter_token_latency: histogram(
                "inter_token_latency_seconds",
                "Between two tokens of a sequence.",
                seconds(),
            ),
            queue_time: histogram(
                "request_queue_time_seconds",
                "From submission to the first step.",
                seconds(),
            ),
            requests_finished: counters(
                "requests_finished_total",
                "Sequences that ended, by reason.",
                &["finished_reason"],
            ),
            http_requests: counters(
                "http_requests_total",
                "HTTP requests by route and status.",
                &["route", "status"],
            ),
            adapters_resident: gauge("adapters_resident", "Adapters in the bank."),
            adapter_resident_bytes: gauge("adapter_resident_bytes", "Bytes of resident adapters."),
            adapter_loads: counter("adapter_loads_total", "Adapters loaded into the bank."),
            adapters_refused: counters(
                "adapters_refused_total",
                "Uploads refused, by error code.",
                &["code"],
            ),
            registry,
        }
    }

    /// The page for `/metrics`, Prometheus text format 0.0.4.
    pub fn render(&self) -> String {
        prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
