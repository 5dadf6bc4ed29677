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

/// Counters that both sides see.
pub struct Shared {
    accepting: AtomicBool,
    waiting: AtomicUsize,
    waiting_tokens: AtomicUsize,
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
            waiting: AtomicUsize::new(0),
            waiting_tokens: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(0),
            next_id: AtomicU64::new(0),
            started: Instant::now(),
            heartbeat: AtomicU64::new(u64::MAX),
        }
    }
    /// A sequence of `tokens` prompt tokens left the waiting queue.
    pub fn leave_queue(&self, tokens: usize) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        self.waiting_tokens.fetch_sub(tokens, Ordering::AcqRel);
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
    /// by tokens, `shutting_down` (503), `request_too_long` when its pages could never fit.
    pub fn submit(&self, request: Request) -> Result<EventStream> {
        Ok(self.submit_n(request, 1)?.remove(0))
    }

    /// Queues `n` sequences of one prompt, all or none; sequence i samples with seed + i.
    pub fn submit_n(&self, request: Request, n: usize) -> Result<Vec<EventStream>> {
        assert!(!request.prompt.is_empty() && request.tokens_max > 0, "checked at the edge");
        self.check_length(&request)?;
        let tokens = request.prompt.len();
        self.reserve(n, tokens)?;
        let mut streams = Vec::with_capacity(n);
        for i in 0..n {
            let mut r = request.clone();
            r.sampling.seed = r.sampling.seed.wrapping_add(i as u64);
            // Prompt events all come before the first token: they need room of their own.
            let prompt_events = r.sampling.prompt_logprobs.map_or(0, |_| tokens);
            let (sender, stream) = channel(self.options.stream_events_max + prompt_events);
            let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
            let (base, context) = (&self.base, self.options.context);
            let sequence = Sequence::new(id, r, base, context, sender, Instant::now());
            if let Err(e) = self.send(Command::Submit(Box::new(sequence))) {
                // The ones already sent are cancelled by dropping their streams.
                (i..n).for_each(|_| {
                    self.shared.leave_queue(tokens);
                    self.shared.end();
                });
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

    /// Takes places in the queue for `n` sequences of `tokens` prompt tokens each; the engine gives
    /// them back.
    fn reserve(&self, n: usize, tokens: usize) -> Result<()> {
        if !self.shared.accepting.load(Ordering::Acquire) {
            return Err(shutting_down());
        }
        let full = |what: &str, max: usize| {
            let message = format!("the waiting queue is full ({max} {what}); try again shortly");
            Err(Error::new(Kind::Busy, "queue_full", message))
        };
        let add = |counter: &AtomicUsize, by: usize, max: usize| {
            counter
                .try_update(Ordering::AcqRel, Ordering::Acquire, |x| {
                    (x + by <= max).then_some(x + by)
                })
                .is_ok()
        };
        if !add(&self.shared.waiting, n, self.options.waiting_max) {
            return full("requests", self.options.waiting_max);
        }
        if !add(&self.shared.waiting_tokens, n * tokens, self.options.waiting_tokens_max) {
            self.shared.waiting.fetch_sub(n, Ordering::AcqRel);
            return full("prompt tokens", self.options.waiting_tokens_max);
        }
        self.shared.unfinished.fetch_add(n, Ordering::AcqRel);
        Ok(())
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

    /// Whether the next request would be refused for want of a place in the queue.
    pub fn is_full(&self) -> bool {
        self.shared.waiting.load(Ordering::Acquire) >= self.options.waiting_max
            || self.shared.waiting_tokens.load(Ordering::Acquire) >= self.options.waiting_tokens_max
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
