//! Bounds of the engine.
//!
//! Owns their names and units. Never checks one: `config` and the engine's start do.

/// Bounds of the engine; every queue and pool has one.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Rows of a step (T): the sum of prefill chunks and decode rows.
    pub rows_max: usize,
    /// Rows of a step with logits; at least `sequences_max`.
    pub logit_rows_max: usize,
    /// Sequences running at once.
    pub sequences_max: usize,
    /// Tokens that a tenant or adapter may be ahead of one that waits, places being equal.
    pub quantum_tokens: usize,
    /// Sequences waiting, and their prompt tokens together.
    pub waiting_max: usize,
    pub waiting_tokens_max: usize,
    /// Pages of the page book; the model has `probe::pages_needed` more behind them.
    pub kv_pages: usize,
    /// Prompt plus output of one sequence.
    pub context: usize,
    /// Unread events of one stream before it is given up.
    pub stream_events_max: usize,
    pub slots_max: usize,
    pub prefix_cache: bool,
    /// Tenants may find each other's prefixes.
    pub prefix_share: bool,
    /// Of the device's time, for work in the background while requests run; below 1.
    pub background_share: f64,
    /// Fixed prompts of the probe (token ids; at most one page each).
    pub probe_prompts: Vec<Vec<u32>>,
}
