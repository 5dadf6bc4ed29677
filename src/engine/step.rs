//! The loop and the step: drain commands, plan, run, sample, commit.

use super::request::{EventStream, Request};
use crate::adapters::Digest;
use crate::adapters::bank::BankSender;
use crate::error::Result;
use crate::metrics::Metrics;
use crate::model::Model;
use std::sync::Arc;

/// Bounds of the engine; every queue and pool has one.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Rows of a step (T): the sum of prefill chunks and decode rows.
    pub rows_max: usize,
    /// Sequences running at once.
    pub sequences_max: usize,
    /// Sequences waiting, and their prompt tokens together.
    pub waiting_max: usize,
    pub waiting_tokens_max: usize,
    pub kv_pages: usize,
    /// Prompt plus output of one sequence.
    pub context: usize,
    /// Unread events of one stream before it is given up.
    pub stream_events_max: usize,
    pub slots_max: usize,
    pub prefix_cache: bool,
    /// Fixed prompts of the probe (token ids; at most 16 each).
    pub probe_prompts: Vec<Vec<u32>>,
}

/// The way to the engine thread. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct EngineHandle {
    _inner: Arc<()>,
}

impl EngineHandle {
    /// Starts the thread; the model moves into it.
    pub fn start(
        _model: Model,
        _base: Digest,
        _options: EngineOptions,
        _metrics: Arc<Metrics>,
    ) -> Result<Self> {
        unimplemented!()
    }
    /// Queues a sequence. Errors at once (`queue_full`, 429) when the queue is full by requests or by tokens, or (`shutting_down`, 503).
    pub fn submit(&self, _request: Request) -> Result<EventStream> {
        unimplemented!()
    }
    /// Queues `n` sequences of one prompt, all or none; sequence i samples with seed + i.
    pub fn submit_n(&self, _request: Request, _n: usize) -> Result<Vec<EventStream>> {
        unimplemented!()
    }
    /// For the registry: how `BankCommand`s get here.
    pub fn bank(&self) -> BankSender {
        unimplemented!()
    }
    /// No new requests; resolves when the last running sequence is done or the deadline passed (the rest then fails with `shutting_down`).
    pub async fn drain(&self, _deadline: std::time::Duration) {
        unimplemented!()
    }
    /// Seconds since the engine thread last finished a step or was idle: the truth behind `/live`.
    pub fn stalled_for(&self) -> std::time::Duration {
        unimplemented!()
    }
}
