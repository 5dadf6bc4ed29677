//! The way to the engine thread: bounded, never waiting, cheap to clone.
//!
//! Owns the command channel. Never touches model, pages or bank.

use super::background::Background;
use super::command::Command;
use super::options::EngineOptions;
use super::queue::Shared;
use super::request::{EventStream, Request, channel};
use super::sequence::Sequence;
use super::step::Engine;
use crate::adapters::Digest;
use crate::adapters::bank::BankSender;
use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use crate::model::Model;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Commands in flight beyond the waiting queue's bound: bank work and aborts.
const COMMANDS_SPARE: usize = 64;

/// The way to the engine thread. Cheap to clone; usable from any thread.
#[derive(Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
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
        let (commands, received) = sync_channel(options.waiting_max + COMMANDS_SPARE);
        let shared = Arc::new(Shared::default());
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
        let mut permits = self.shared.reserve(n, tokens, &request.tenant, &self.options)?;
        let mut streams = Vec::with_capacity(n);
        for i in 0..n {
            let mut r = request.clone();
            r.sampling.seed = r.sampling.seed.wrapping_add(i as u64);
            // Prompt events all come before the first token: they need room of their own.
            let prompt_events = r.sampling.prompt_logprobs.map_or(0, |_| tokens);
            // No ring is longer than what can ever be in it: its tokens and its end.
            let events = self.options.stream_events_max.min(r.tokens_max as usize + 1);
            let (sender, stream) = channel(events + prompt_events);
            let id = self.shared.number();
            let (base, context) = (&self.base, self.options.context);
            let mut sequence = Sequence::new(id, r, base, context, sender, Instant::now());
            if self.options.prefix_share {
                sequence.share_prefix(base);
            }
            let permit = permits.pop().expect("a permit for each");
            if let Err(e) = self.send(Command::Submit(Box::new(sequence.permitted(permit)))) {
                // The ones already sent are cancelled by dropping their streams.
                (i..n).for_each(|_| self.shared.end());
                return Err(e);
            }
            streams.push(stream);
        }
        Ok(streams)
    }

    /// Whether `n` sequences of `tenant` would be refused now, however short they are: asked before
    /// there is work for them. Errors: `queue_full`, `shutting_down`.
    pub fn check_room(&self, n: usize, tenant: &str) -> Result<()> {
        self.shared.check_room(n, 1, tenant, &self.options)
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

    fn send(&self, command: Command) -> Result<()> {
        self.commands.try_send(command).map_err(|e| match e {
            TrySendError::Full(_) => {
                Error::new(Kind::Busy, "engine_busy", "the engine's command queue is full")
            }
            TrySendError::Disconnected(_) => Error::fault("the engine has stopped"),
        })
    }

    /// Has work done when requests leave time for it, after what was given before. Errors:
    /// `engine_busy`; `internal_error` when the engine has stopped.
    pub fn background(&self, work: Box<dyn Background>) -> Result<()> {
        self.send(Command::Background(work))
    }

    /// Has every prefix forgotten that was kept for later requests: what it was computed of is
    /// deleted. Running requests keep theirs. Errors: as [`EngineHandle::background`].
    pub fn forget_prefixes(&self) -> Result<()> {
        self.send(Command::ForgetPrefixes)
    }

    /// For the registry: how `BankCommand`s get here.
    pub fn bank(&self) -> BankSender {
        let handle = self.clone();
        Arc::new(move |command| handle.send(Command::Bank(command)))
    }

    /// No new requests; resolves when the last sequence is done. What is left at the deadline fails
    /// with `shutting_down`.
    pub async fn drain(&self, deadline: Duration) {
        self.shared.close();
        let end = Instant::now() + deadline;
        while self.shared.unfinished() > 0 && Instant::now() < end {
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
        self.shared.unfinished() == 0
    }

    /// Whether the next request would be refused for want of a place in the queue.
    pub fn is_full(&self) -> bool {
        self.shared.is_full(&self.options)
    }
}
