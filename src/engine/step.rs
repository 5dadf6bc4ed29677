//! The engine's thread: the loop, and the step that is its whole life.
//!
//! Owns the model, the bank, the pages and the scheduler as plain fields. Never waits on a client,
//! a file or another lock: it sleeps only when there is nothing to do. The thing to know: a step
//! that fails fails its own sequences, and the thread lives.

use super::background::{Pacing, Waiting};
use super::batch::Builder;
use super::command::Command;
use super::options::EngineOptions;
use super::pages::{PAGE, Pages};
use super::probe;
use super::queue::{Shared, shutting_down};
use super::request::TokenEvent;
use super::sampler::{History, Sampler};
use super::scheduler::{Budgets, Notice, Plan, Scheduler};
use crate::adapters::Digest;
use crate::adapters::bank::{Bank, BankCommand, Prepared, Probe, Slot};
use crate::ending::EndReason;
use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use crate::model::Model;
use polylora_kernels::KvCache;
use prometheus::IntCounter;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;
use tokio::sync::oneshot;

/// A slot that is to be freed once no sequence uses it.
struct Removal {
    slot: Slot,
    digest: Digest,
    reply: oneshot::Sender<Result<()>>,
}

/// The engine thread's state.
pub struct Engine {
    model: Model,
    bank: Bank,
    pages: Pages,
    scheduler: Scheduler,
    sampler: Sampler,
    plan: Plan,
    builder: Builder,
    /// One entry per planned sequence.
    sampled: Vec<Option<Result<TokenEvent>>>,
    removals: Vec<Removal>,
    background: Waiting,
    pacing: Pacing,
    probe_prompts: Vec<Vec<u32>>,
    probe_page: u32,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    /// By the index of the reason.
    ended: [IntCounter; EndReason::ALL.len()],
}

impl Engine {
    /// Takes every pool at its full size. Errors when options contradict each other.
    pub fn new(
        model: Model,
        o: &EngineOptions,
        metrics: Arc<Metrics>,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
    ) -> Result<Self> {
        assert_eq!(PAGE, KvCache::PAGE, "one page length for book and memory");
        if o.kv_pages * KvCache::PAGE < o.context {
            let message = format!(
                "{} KV pages of {} tokens cannot hold one context of {}",
                o.kv_pages,
                KvCache::PAGE,
                o.context
            );
            return Err(Error::new(Kind::Capacity, "kv_memory_too_small", message));
        }
        let budgets = Budgets {
            rows_max: o.rows_max,
            logit_rows_max: o.logit_rows_max,
            sequences_max: o.sequences_max,
            quantum_tokens: o.quantum_tokens,
            waiting_max: o.waiting_max,
            waiting_tokens_max: o.waiting_tokens_max,
            pages: o.kv_pages,
        };
        metrics.kv_pages_total.set(o.kv_pages as i64);
        Ok(Self {
            sampler: Sampler::new(model.shape().vocab),
            bank: Bank::new(o.slots_max),
            pages: Pages::new(o.kv_pages, o.prefix_cache),
            scheduler: Scheduler::new(budgets),
            plan: Plan::new(o.sequences_max),
            builder: Builder::new(o.rows_max, o.logit_rows_max, o.sequences_max, o.kv_pages),
            sampled: Vec::with_capacity(o.sequences_max),
            removals: Vec::new(),
            background: Waiting::default(),
            pacing: Pacing::new(o.background_share),
            probe_prompts: o.probe_prompts.clone(),
            probe_page: o.kv_pages as u32,
            model,
            commands,
            shared,
            ended: EndReason::ALL.map(|r| metrics.requests_finished.with_label_values(&[r.name()])),
            metrics,
        })
    }

    /// The loop. Ends when every handle is gone.
    pub fn run(mut self) {
        loop {
            if self.scheduler.is_empty() {
                self.finish_removals();
                self.pages.check(std::iter::empty());
                self.report();
                let Some(command) = self.idle() else { return };
                self.take(command);
            }
            while let Ok(command) = self.commands.try_recv() {
                self.take(command);
            }
            self.step(Instant::now());
        }
    }

    /// Works in the background until a command comes; `None` when every handle is gone.
    fn idle(&mut self) -> Option<Command> {
        while !self.background.is_empty() {
            match self.commands.try_recv() {
                Ok(command) => return Some(command),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => self.work(false),
            }
        }
        self.shared.beat(true);
        let command = self.commands.recv().ok();
        self.shared.beat(false);
        command
    }

    /// One piece of the background's work; `beside`: while requests run. A panic in it is loud and
    /// ends that work, nothing else.
    fn work(&mut self, beside: bool) {
        let (background, device) = (&mut self.background, self.model.device());
        let begun = Instant::now();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| background.advance(device))) {
            tracing::error!(reason = said(&*panic), "work in the background failed");
        }
        let took = begun.elapsed();
        self.metrics.background_seconds.inc_by(took.as_secs_f64());
        self.pacing.ran(took, beside);
        self.shared.beat(false);
    }

    /// Plan, run, commit.
    fn step(&mut self, now: Instant) {
        self.scheduler.plan(&mut self.pages, now, &mut self.plan);
        self.report();
        self.finish_removals();
        if self.plan.is_empty() {
            return;
        }
        let ops = self.model.device().op_calls();
        match catch_unwind(AssertUnwindSafe(|| self.compute())) {
            Ok(Ok(())) => self.commit(now, self.model.device().op_calls() - ops),
            Ok(Err(error)) => self.fail(&error.message),
            Err(panic) => self.fail(said(&*panic)),
        }
        self.shared.beat(false);
        self.report();
        if !self.background.is_empty() && self.pacing.may_follow(now.elapsed()) {
            self.work(true);
        }
    }

    /// Runs the model on the plan's rows and samples; fills `sampled`. Errors: what the device
    /// failed at.
    fn compute(&mut self) -> Result<()> {
        self.builder.build(&self.plan, self.scheduler.running(), &self.bank);
        let vocab = self.model.shape().vocab;
        let logits = self.model.forward(&self.builder.batch, &self.bank)?;
        self.sampled.clear();
        self.sampled.resize_with(self.plan.entries().len(), || None);
        for (row, at) in logits.chunks_exact_mut(vocab).zip(&self.builder.logit_rows) {
            let planned = self.plan.entries()[at.planned as usize];
            let sequence = &self.scheduler.running()[planned.sequence];
            if at.samples {
                let history = History {
                    tokens: &sequence.tokens,
                    prompt_len: sequence.prompt_len,
                    banned: sequence.banned(),
                };
                let token = self.sampler.sample(row, &sequence.sampling, history);
                self.sampled[at.planned as usize] = Some(token);
            } else if let Some(&next) = sequence.tokens.get(at.position as usize + 1) {
                let top = sequence.sampling.prompt_logprobs.unwrap_or(0);
                // A row without a distribution has no logprob to tell; the row that samples fails
                // the sequence.
                let score = self.sampler.score(row, next, top);
                let event = score.unwrap_or_else(|_| TokenEvent::unscored(next));
                self.scheduler.prompt_scored(&planned, at.position as usize, event);
            }
        }
        Ok(())
    }

    fn commit(&mut self, begun: Instant, ops: u64) {
        let now = Instant::now();
        self.metrics.ops.inc_by(ops);
        self.metrics.steps.inc();
        self.metrics.step_rows.observe(self.plan.rows() as f64);
        self.metrics.step_seconds.observe((now - begun).as_secs_f64());
        self.scheduler.commit(&self.plan, &mut self.sampled, &mut self.pages, now);
    }

    /// A panic in a step is a bug, and a device that fails is no better: it is loud, the step's
    /// sequences fail, everybody else goes on.
    fn fail(&mut self, reason: &str) {
        tracing::error!(reason, rows = self.plan.rows(), "a step failed");
        self.metrics.step_failures.inc();
        let error = Error::new(Kind::Fault, "step_failed", "the step that ran this request failed");
        self.scheduler.abort_planned(&self.plan, &mut self.pages, &error);
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(sequence) => self.scheduler.submit(*sequence),
            Command::Bank(BankCommand::Install { prepared, probe, reply }) => {
                let answer = self.install(*prepared, probe);
                // A registry that went away does not want the adapter: it is freed again.
                if let Err(Ok((slot, _))) = reply.send(answer) {
                    self.bank.remove(slot);
                }
            }
            Command::Bank(BankCommand::Remove { slot, digest, reply }) => {
                self.removals.push(Removal { slot, digest, reply });
            }
            Command::ForgetPrefixes => self.pages.forget_prefixes(),
            Command::Background(work) => self.background.push(work),
            Command::AbortAll => {
                self.background.clear();
                self.scheduler.abort_all(&mut self.pages, &shutting_down());
                self.report();
            }
        }
    }

    fn install(&mut self, prepared: Prepared, probe: bool) -> Result<(Slot, Option<Probe>)> {
        let slot = self.bank.install(prepared).map_err(|_| {
            Error::new(Kind::Capacity, "insufficient_capacity", "every adapter slot is taken")
        })?;
        if !probe {
            return Ok((slot, None));
        }
        let (model, bank) = (&mut self.model, &self.bank);
        let (prompts, page) = (&self.probe_prompts, self.probe_page);
        let seen = catch_unwind(AssertUnwindSafe(|| probe::run(model, bank, slot, prompts, page)))
            .unwrap_or_else(|_| Err(Error::fault("the probe of the adapter failed")));
        match seen {
            Ok(p) => Ok((slot, Some(p))),
            Err(e) => {
                self.bank.remove(slot);
                Err(e)
            }
        }
    }

    /// Frees slots that nobody computes with any more.
    fn finish_removals(&mut self) {
        let mut at = 0;
        while at < self.removals.len() {
            let slot = self.removals[at].slot;
            let users = self.scheduler.running().iter().chain(self.scheduler.waiting());
            if users.into_iter().any(|s| s.mix().is_some_and(|b| b.has(slot))) {
                at += 1;
                continue;
            }
            let removal = self.removals.swap_remove(at);
            assert_eq!(self.bank.digest(slot), Some(removal.digest), "freeing another adapter");
            self.bank.remove(slot);
            // Nobody waits for the answer any more: the slot is free all the same.
            let _ = removal.reply.send(Ok(()));
        }
    }

    /// Tells metrics and the queue's counters what the scheduler did.
    fn report(&mut self) {
        let m = &self.metrics;
        for notice in self.scheduler.notices() {
            match notice {
                Notice::Admitted { prompt_tokens, waited, cached_tokens } => {
                    m.queue_time.observe(waited.as_secs_f64());
                    if let Some(cached) = cached_tokens {
                        m.prefix_cache_queries.inc_by(prompt_tokens as u64);
                        m.prefix_cache_hits.inc_by(cached as u64);
                    }
                }
                Notice::Preempted => m.preemptions.inc(),
                Notice::Token { since } => {
                    m.generation_tokens.inc();
                    if let Some(since) = since {
                        m.inter_token_latency.observe(since.as_secs_f64());
                    }
                }
                Notice::Ended { reason, prompt_tokens } => {
                    self.shared.end();
                    m.prompt_tokens.inc_by(prompt_tokens as u64);
                    self.ended[reason.index()].inc();
                }
            }
        }
        let (waiting, waiting_tokens) = self.scheduler.queued();
        m.requests_waiting.set(waiting as i64);
        m.waiting_tokens.set(waiting_tokens as i64);
        m.requests_running.set(self.scheduler.running().len() as i64);
        m.kv_pages_used.set(self.pages.used() as i64);
    }
}

/// The message of a panic.
fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}
