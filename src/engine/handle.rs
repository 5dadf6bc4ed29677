//! The way to the engine thread: bounded, never waiting, cheap to clone.
//!
//! Owns the command channel and the counters both sides see. Never touches model, pages or bank.

use super::request::{EventStream, Request, channel};
use super::sequence::Sequence;
use super::step::{Engine, EngineOptions};
use crate::adapters::Digest;
use crate::adapters::bank::{BankCommand, BankSender};
use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use crate::model::Model;
use crossbeam_channel::{Sender, TrySendError, bounded};
use dashmap::DashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Everything that can wake the engine.
pub enum Command {
    Submit(Box<Sequence>),
    Bank(BankCommand),
    /// Every sequence fails with `shutting_down`.
    AbortAll,
}

/// Commands in flight beyond the waiting queue's bound: bank work and aborts.
const COMMANDS_SPARE: usize = 64;

/// Sequences that wait, and their prompt tokens.
#[derive(Default)]
struct Line {
    sequences: AtomicUsize,
    tokens: AtomicUsize,
}

/// Places of one sequence in the queue: among all, and among its tenant's. Given back by its drop,
/// when it first runs or ends without.
pub struct Place {
    shared: Arc<Shared>,
    tenant: Option<Arc<Line>>,
    tokens: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        for line in [Some(&self.shared.queue), self.tenant.as_deref()].into_iter().flatten() {
            line.sequences.fetch_sub(1, Ordering::AcqRel);
            line.tokens.fetch_sub(self.tokens, Ordering::AcqRel);
        }
    }
}

/// Counters that both sides see.
pub struct Shared {
    accepting: AtomicBool,
    queue: Line,
    /// The part of each tenant in it.
    tenants: DashMap<String, Arc<Line>>,
    /// Sequences submitted and not yet ended.
    unfinished: AtomicUsize,
    next_id: AtomicU64,
    started: Instant,
    /// Milliseconds after `started` when the engine last woke up or finished a step; `u64::MAX`
    /// while it sleeps.
    heartbeat: AtomicU64,
}

impl Shared {
    fn new() -> Self {
        Self {
            accepting: AtomicBool::new(true),
            queue: Line::default(),
            tenants: DashMap::new(),
            unfinished: AtomicUsize::new(0),
            next_id: AtomicU64::new(0),
            started: Instant::now(),
            heartbeat: AtomicU64::new(u64::MAX),
        }
    }
    /// A sequence ended, however it did.
    pub fn end(&self) {
        self.unfinished.fetch_sub(1, Ordering::AcqRel);
    }
    /// The engine says that it got on with its work, or that it has none.
    pub fn beat(&self, asleep: bool) {
        let at = if asleep { u64::MAX } else { self.started.elapsed().as_millis() as u64 };
        self.heartbeat.store(at, Ordering::Release);
    }
    fn stalled_for(&self) -> Duration {
        match self.heartbeat.load(Ordering::Acquire) {
            u64::MAX => Duration::ZERO,
            at => self.started.elapsed().saturating_sub(Duration::from_millis(at)),
        }
    }
}

/// The way to the engine thread. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct EngineHandle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
    options: Arc<EngineOptions>,
    base: Digest,
}

impl EngineHandle {
    /// Starts the thread; the model moves into it. Errors when the options do not fit each other.
    pub fn start(
        model: Model,
        base: Digest,
        options: EngineOptions,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let (commands, received) = bounded(options.waiting_max + COMMANDS_SPARE);
        let shared = Arc::new(Shared::new());
        let engine = Engine::new(model, &options, metrics, shared.clone(), received)?;
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || engine.run())
            .map_err(|e| Error::fault(format!("the engine thread did not start: {e}")))?;
        Ok(Self { commands, shared, options: Arc::new(options), base })
    }

    /// Queues a sequence. Errors at once: `queue_full` (429) when the queue is full by requests or
    /// by tokens, `shutting_down` (503), `context_length_exceeded` when it could never fit.
    pub fn submit(&self, request: Request) -> Result<EventStream> {
        Ok(self.submit_n(request, 1)?.remove(0))
    }

    /// Queues `n` sequences of one prompt, all or none; sequence i samples with seed + i.
    pub fn submit_n(&self, request: Request, n: usize) -> Result<Vec<EventStream>> {
        assert!(!request.prompt.is_empty() && request.tokens_max > 0, "checked at the edge");
        self.check_length(&request)?;
        let tokens = request.prompt.len();
        let mut places = self.reserve(n, tokens, &request.tenant)?;
        let mut streams = Vec::with_capacity(n);
        for i in 0..n {
            let mut r = request.clone();
            r.sampling.seed = r.sampling.seed.wrapping_add(i as u64);
            // Prompt events all come before the first token: they need room of their own.
            let prompt_events = r.sampling.prompt_logprobs.map_or(0, |_| tokens);
            // No ring is longer than what can ever be in it: its tokens and its end.
            let events = self.options.stream_events_max.min(r.tokens_max as usize + 1);
            let (sender, stream) = channel(events + prompt_events);
            let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
            let (base, context) = (&self.base, self.options.context);
            let mut sequence = Sequence::new(id, r, base, context, sender, Instant::now());
            if self.options.prefix_share {
                sequence.share_prefix(base);
            }
            let place = places.pop().expect("a place for each");
            if let Err(e) = self.send(Command::Submit(Box::new(sequence.in_place(place)))) {
                // The ones already sent are cancelled by dropping their streams.
                (i..n).for_each(|_| self.shared.end());
                return Err(e);
            }
            streams.push(stream);
        }
        Ok(streams)
    }

    fn check_length(&self, request: &Request) -> Result<()> {
        let total = request.prompt.len() + request.tokens_max as usize;
        if total > self.options.context {
            let message = format!(
                "prompt of {} tokens and {} to generate exceed the context of {} tokens",
                request.prompt.len(),
                request.tokens_max,
                self.options.context
            );
            return Err(Error::invalid("context_length_exceeded", message));
        }
        Ok(())
    }

    /// Takes places in the queue for `n` sequences of `tokens` prompt tokens each. A named tenant
    /// may hold as many as are left free, and no more: so one that floods fills half of the queue,
    /// two fill two thirds, and somebody else's request always finds a place.
    fn reserve(&self, n: usize, tokens: usize, tenant: &str) -> Result<Vec<Place>> {
        if !self.shared.accepting.load(Ordering::Acquire) {
            return Err(shutting_down());
        }
        let (all, o) = (&self.shared.queue, &self.options);
        let own = (!tenant.is_empty()).then(|| {
            let lines = &self.shared.tenants;
            let known = lines.get(tenant).map(|line| line.value().clone());
            known.unwrap_or_else(|| lines.entry(tenant.to_owned()).or_default().clone())
        });
        let full = |whose: &str, what: &str, max: usize| {
            let message = format!("the waiting queue is full{whose} ({max} {what}); try again");
            Err(Error::new(Kind::Busy, "queue_full", message))
        };
        if let Some(own) = &own {
            let free = |max: usize, used: &AtomicUsize| {
                max.saturating_sub(used.load(Ordering::Acquire)).max(1)
            };
            let left = free(o.waiting_max, &all.sequences);
            if own.sequences.load(Ordering::Acquire) + n > left {
                return full(" for your tenant", "requests", o.waiting_max);
            }
            let left = free(o.waiting_tokens_max, &all.tokens);
            let held = own.tokens.load(Ordering::Acquire);
            if held > 0 && held + n * tokens > left {
                return full(" for your tenant", "prompt tokens", o.waiting_tokens_max);
            }
        }
        let add = |counter: &AtomicUsize, by: usize, max: usize| {
            counter
                .try_update(Ordering::AcqRel, Ordering::Acquire, |x| {
                    (x + by <= max).then_some(x + by)
                })
                .is_ok()
        };
        if !add(&all.sequences, n, o.waiting_max) {
            return full("", "requests", o.waiting_max);
        }
        if !add(&all.tokens, n * tokens, o.waiting_tokens_max) {
            all.sequences.fetch_sub(n, Ordering::AcqRel);
            return full("", "prompt tokens", o.waiting_tokens_max);
        }
        if let Some(own) = &own {
            own.sequences.fetch_add(n, Ordering::AcqRel);
            own.tokens.fetch_add(n * tokens, Ordering::AcqRel);
        }
        self.shared.unfinished.fetch_add(n, Ordering::AcqRel);
        let place = || Place { shared: self.shared.clone(), tenant: own.clone(), tokens };
        Ok((0..n).map(|_| place()).collect())
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.try_send(command).map_err(|e| match e {
            TrySendError::Full(_) => {
                Error::new(Kind::Busy, "engine_busy", "the engine's command queue is full")
            }
            TrySendError::Disconnected(_) => Error::fault("the engine has stopped"),
        })
    }

    /// For the registry: how `BankCommand`s get here.
    pub fn bank(&self) -> BankSender {
        let handle = self.clone();
        Arc::new(move |command| handle.send(Command::Bank(command)))
    }

    /// No new requests; resolves when the last sequence is done. What is left at the deadline fails
    /// with `shutting_down`.
    pub async fn drain(&self, deadline: Duration) {
        self.shared.accepting.store(false, Ordering::Release);
        let end = Instant::now() + deadline;
        while self.shared.unfinished.load(Ordering::Acquire) > 0 && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // A full command queue means a stopped engine: its sequences are dropped with it.
        let _ = self.send(Command::AbortAll);
    }

    /// How long the engine has had work without finishing a step; zero while it sleeps. The truth
    /// behind `/live`.
    pub fn stalled_for(&self) -> Duration {
        self.shared.stalled_for()
    }

    /// Whether no sequence waits or runs. Cheap: for work that gives way to requests.
    pub fn is_idle(&self) -> bool {
        self.shared.unfinished.load(Ordering::Acquire) == 0
    }

    /// Whether the next request would be refused for want of a place in the queue.
    pub fn is_full(&self) -> bool {
        let (queue, o) = (&self.shared.queue, &self.options);
        queue.sequences.load(Ordering::Acquire) >= o.waiting_max
            || queue.tokens.load(Ordering::Acquire) >= o.waiting_tokens_max
    }
}

/// The answer to whoever comes, or is still here, at the end.
pub fn shutting_down() -> Error {
    Error::new(Kind::Unavailable, "shutting_down", "the server is shutting down")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_sleeps_is_not_stalled_and_one_that_only_spins_is() {
        let long_ago = Instant::now().checked_sub(Duration::from_secs(100)).expect("an instant");
        let shared = Shared { started: long_ago, ..Shared::new() };
        assert_eq!(shared.stalled_for(), Duration::ZERO, "no work yet");
        shared.heartbeat.store(0, Ordering::Release);
        assert!(shared.stalled_for() >= Duration::from_secs(100));
        shared.beat(false);
        assert!(shared.stalled_for() < Duration::from_secs(10), "a step was finished");
        shared.beat(true);
        assert_eq!(shared.stalled_for(), Duration::ZERO);
    }
}
