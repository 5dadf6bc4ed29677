//! What one request used, told once: to the metrics of its adapter and to the usage log.
//!
//! Owns the figures of a request from the moment it is queued to its end. Never changes an answer.
//! The thing to know: a meter is settled exactly once, by the end of its answer or, when the
//! client went away, by being dropped; its permit of the log's queue is taken before anything runs.

use super::in_flight::InFlightGuard;
use super::resolve::ResolvedModel;
use crate::access::Ticket;
use crate::adapters::composition::Composition;
use crate::api::Api;
use crate::api::http::errors;
use crate::api::http::request::Origin;
use crate::clock::Now;
use crate::ending::{EndReason, FinishReason};
use crate::engine::Admission;
use crate::error::{Error, Result};
use crate::metrics::AdapterSeries;
use crate::metrics::adapters::{BASE, COMPOSED};
use crate::usage::{LogPermit, Receipt, Record};
use http::StatusCode;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::Span;

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    pub prompt: u64,
    /// Of the prompt, found in the prefix cache.
    pub cached: u64,
    pub completion: u64,
}

/// One request's meter.
pub struct RequestMeter {
    series: Arc<AdapterSeries>,
    pub origin: Origin,
    /// By choice: when its newest token came.
    last: Vec<Option<Instant>>,
    /// From its arrival to the first token of any choice: measured here, and nowhere else.
    first_token: Option<Duration>,
    admissions: Vec<Admission>,
    queue_time_max: Duration,
    submitted: Instant,
    in_flight: InFlightGuard,
    /// `name@version`, or what the target is called.
    id: String,
    /// The request's.
    span: Span,
    /// What it took of its key's and its adapter's limits.
    ticket: Ticket,
    /// Taken by the settlement.
    record: Option<(LogPermit, Box<Record>)>,
    /// Whether answers wait for their record's commit, and the commit to wait for.
    waits: bool,
    receipt: Option<Receipt>,
}

impl RequestMeter {
    /// Opens the meter of a request for `target`, let in by `ticket`, whose answer will be called
    /// `id`. Errors: `usage_backlogged`.
    pub fn open(
        api: &Arc<Api>,
        target: &ResolvedModel,
        origin: Origin,
        id: &str,
        ticket: Ticket,
    ) -> Result<Self> {
        let version = target.lease.as_ref().and_then(Composition::alone);
        // A composition is in the books under what it is called, at version 0.
        let composed = target.lease.as_ref().filter(|_| version.is_none()).map(|_| target.id());
        let name = version.map(|v| v.name.as_str());
        let record = Record {
            id: id.to_owned(),
            request_id: origin.request_id.to_string(),
            ended_ms: 0,
            tenant: target.tenant().to_owned(),
            key_id: target.caller.id().to_owned(),
            adapter: name.or(composed).unwrap_or(BASE).to_owned(),
            version: version.map_or(0, |v| v.number),
            digest: target.digest().to_owned(),
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
            finish_reason: EndReason::Cancelled,
            route: origin.route.to_string(),
            status: 0,
        };
        Ok(Self {
            series: api.metrics.series(name.or(composed.map(|_| COMPOSED))),
            origin,
            last: Vec::new(),
            first_token: None,
            admissions: Vec::new(),
            queue_time_max: Duration::from_secs(api.config.queue_seconds_max),
            submitted: Instant::now(),
            in_flight: api.requests.in_flight.enter(names(target)),
            id: match target.lease {
                Some(_) => target.id().to_owned(),
                None => format!("{BASE}@0"),
            },
            span: Span::current(),
            ticket,
            record: Some((api.usage.reserve(api.config.usage_sync)?, Box::new(record))),
            waits: api.config.usage_sync,
            receipt: None,
        })
    }

    /// Reserves `tokens` of what key and adapter may use. Errors: those of [`Access::reserve`].
    ///
    /// [`Access::reserve`]: crate::access::Access::reserve
    pub fn admit(&mut self, api: &Api, target: &ResolvedModel, tokens: u64) -> Result<()> {
        let names = names(target);
        let names = names.iter().map(String::as_str);
        api.access.reserve(&mut self.ticket, names, tokens, Now::read())
    }

    /// The sequences are queued, in the order of choices.
    pub fn queued(&mut self, admissions: Vec<Admission>) {
        self.last = vec![None; admissions.len()];
        self.in_flight.queued(&admissions);
        self.admissions = admissions;
        self.submitted = Instant::now();
    }

    pub fn admissions(&self) -> &[Admission] {
        &self.admissions
    }

    /// Until when something must happen: the end of the queue's patience while no choice has been
    /// in a step, the request's deadline after that.
    pub fn until(&self) -> tokio::time::Instant {
        let end = tokio::time::Instant::from_std(self.submitted + self.queue_time_max);
        if self.waiting() { end.min(self.origin.deadline.at) } else { self.origin.deadline.at }
    }

    /// Whether no choice has been in a step.
    pub fn waiting(&self) -> bool {
        self.admissions.iter().all(|a| a.get().is_none())
    }

    /// What to say when [`until`](Self::until) has passed.
    pub fn late(&self) -> Error {
        if tokio::time::Instant::now() >= self.origin.deadline.at {
            return errors::timed_out(self.origin.deadline.seconds_max);
        }
        errors::queued_too_long(self.queue_time_max.as_secs())
    }

    /// A token of choice `index` came.
    pub fn token(&mut self, index: usize) {
        let now = Instant::now();
        if let Some(before) = self.last[index].replace(now) {
            self.series.next_token(now - before);
        }
        if self.first_token.is_none() {
            let since = now - self.origin.begun;
            self.first_token = Some(since);
            self.series.first_token(since);
        }
    }

    /// The request is over with this status. Only the first call counts, and only for one that was
    /// queued.
    pub fn settle(&mut self, used: Used, reason: EndReason, status: StatusCode) {
        let Some((permit, mut record)) = self.record.take() else {
            return;
        };
        if self.admissions.is_empty() {
            return;
        }
        self.ticket.used(used.prompt + used.completion);
        for admitted in self.admissions.iter().filter_map(Admission::get) {
            self.series.queued(admitted.waited);
        }
        self.series.ended(reason, used.prompt, used.cached, used.completion);
        self.span.record("adapter", self.id.as_str());
        self.span.record("prompt_tokens", used.prompt);
        self.span.record("completion_tokens", used.completion);
        let first_token_ms = self.first_token.map(|since| since.as_millis() as u64);
        self.span.in_scope(|| tracing::debug!(outcome = reason.name(), first_token_ms, "settled"));
        record.ended_ms = Now::read().wall.as_millis() as u64;
        record.prompt_tokens = used.prompt;
        record.cached_tokens = used.cached;
        record.completion_tokens = used.completion;
        record.finish_reason = reason;
        record.status = status.as_u16();
        self.receipt = Some(permit.write(*record));
    }

    /// Waits until the record is on disk, where the operator wants answers to wait for it. Errors:
    /// `usage_backlogged`.
    pub async fn recorded(&mut self) -> Result<()> {
        match self.receipt.take().filter(|_| self.waits) {
            Some(receipt) => receipt.committed().await,
            None => Ok(()),
        }
    }
}

/// The adapters that a request is at, each name once.
fn names(target: &ResolvedModel) -> BTreeSet<String> {
    target.versions().into_iter().map(|version| version.name.clone()).collect()
}

/// How a request ended whose choices all did: cut short if one of them was.
pub fn altogether(mut choices: impl Iterator<Item = FinishReason>) -> FinishReason {
    match choices.any(|reason| reason == FinishReason::Length) {
        true => FinishReason::Length,
        false => FinishReason::Stop,
    }
}
