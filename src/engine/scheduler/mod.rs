//! The scheduler: who waits, who runs, and what becomes of sampled tokens.
//!
//! Owns every sequence from submission to its last event. A function of its state, its calls and
//! the `now` they carry: no clock, no randomness, no tensor. The thing to know:
//! [`plan`](Scheduler::plan) only promises rows; what they compute counts, and is shared with
//! others, from [`commit`](Scheduler::commit) on.

mod plan;
mod shares;

pub use plan::{Plan, Planned};
use shares::Shares;

use super::pages::{PAGE, Pages};
use super::request::{Event, TokenEvent};
use super::sequence::{End, Sequence};
use crate::ending::{EndReason, FinishReason};
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What the scheduler must never exceed.
#[derive(Debug, Clone)]
pub struct Budgets {
    /// Rows of a step.
    pub rows_max: usize,
    /// Rows of a step whose logits are computed.
    pub logit_rows_max: usize,
    /// Sequences running at once. Never more run than there are rows, or logit rows, so that each
    /// gets its row.
    pub sequences_max: usize,
    /// Tokens that a tenant or adapter may be ahead of one that waits, places being equal.
    pub quantum_tokens: usize,
    /// Sequences that wait for their first step, and their prompt tokens together. Whoever submits
    /// has counted.
    pub waiting_max: usize,
    pub waiting_tokens_max: usize,
    /// Pages of the book.
    pub pages: usize,
}

/// What happened, for metrics and for those who counted a sequence into the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// Runs for the first time: its place in the queue is free again.
    Admitted {
        prompt_tokens: usize,
        waited: Duration,
        /// Prompt tokens found in the prefix cache; `None` when nothing was looked up.
        cached_tokens: Option<usize>,
    },
    /// Gave its pages back, to be recomputed.
    Preempted,
    /// A token was sampled; `since` the one before, if it is not the first.
    Token { since: Option<Duration> },
    /// Gone. One that was never admitted leaves its place in the queue now.
    Ended { reason: EndReason, prompt_tokens: usize },
}

/// All sequences that have not ended.
pub struct Scheduler {
    budgets: Budgets,
    running_max: usize,
    /// In the order in which they came, the preempted at the front: first come, first served among
    /// those of one tenant and adapter; `shares` says whose turn it is.
    waiting: VecDeque<Sequence>,
    /// In the order of admission: the newest, last, is the first to be preempted.
    running: Vec<Sequence>,
    /// Of the waiting, those never admitted, and their prompt tokens.
    queued: usize,
    queued_tokens: usize,
    shares: Shares,
    /// Prompts that share the rows of a plan; kept for its memory.
    prompts: Vec<usize>,
    notices: Vec<Notice>,
}

impl Scheduler {
    pub fn new(budgets: Budgets) -> Self {
        let b = &budgets;
        let running_max = b.sequences_max.min(b.rows_max).min(b.logit_rows_max);
        assert!(running_max > 0 && b.pages > 0, "budgets allow no sequence: {b:?}");
        Self {
            running_max,
            waiting: VecDeque::with_capacity(b.waiting_max + running_max),
            running: Vec::with_capacity(running_max),
            queued: 0,
            queued_tokens: 0,
            shares: Shares::new(b.quantum_tokens),
            prompts: Vec::with_capacity(running_max),
            // In a step a place among the running sees a sequence cancelled or preempted, one
            // admitted, perhaps preempted again, another in its stead, sampled and ended.
            notices: Vec::with_capacity(b.waiting_max + 8 * running_max),
            budgets,
        }
    }

    /// Puts a sequence at the end of the queue. It was counted against the bounds of the queue and
    /// can fit the pages: both checked at the edge, asserted here.
    pub fn submit(&mut self, mut sequence: Sequence) {
        self.queued += 1;
        self.queued_tokens += sequence.prompt_len;
        assert!(self.queued <= self.budgets.waiting_max, "queue overflow by sequences");
        assert!(self.queued_tokens <= self.budgets.waiting_tokens_max, "queue overflow by tokens");
        let pages_max = sequence.pages_max();
        assert!(pages_max <= self.budgets.pages, "{pages_max} pages can never be had");
        self.shares.enter(&mut sequence);
        self.waiting.push_back(sequence);
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }
    /// Running sequences, as [`Planned::sequence`] counts them.
    pub fn running(&self) -> &[Sequence] {
        &self.running
    }
    pub fn waiting(&self) -> &VecDeque<Sequence> {
        &self.waiting
    }
    /// Sequences never admitted yet, and their prompt tokens.
    pub fn queued(&self) -> (usize, usize) {
        (self.queued, self.queued_tokens)
    }
    /// What happened since the last call. To be taken after every call that may end, admit or
    /// preempt: it is bounded by one step's worth.
    pub fn notices(&mut self) -> std::vec::Drain<'_, Notice> {
        self.notices.drain(..)
    }

    /// Tells the reader of `planned` what the row at position `row` says of the prompt token after
    /// it, while its chunk has prompt logits. Rows in order, the prompt's last row left out, before
    /// the commit. A row told before a preemption is not told again.
    pub fn prompt_scored(&mut self, planned: &Planned, row: usize, event: TokenEvent) {
        assert!(planned.prompt_logits, "a chunk without prompt logits");
        assert!(
            (planned.start..planned.start + planned.len).contains(&row),
            "row of another chunk"
        );
        self.running[planned.sequence].send_prompt(row, Some(event));
    }

    /// Takes what the step computed: one entry of `sampled` per entry of the plan, in its order;
    /// `Some` where it samples. Sends the tokens, ends what is at its end, and makes full pages
    /// findable. Leaves `sampled` empty.
    pub fn commit(
        &mut self,
        plan: &Plan,
        sampled: &mut Vec<Option<Result<TokenEvent>>>,
        pages: &mut Pages,
        now: Instant,
    ) {
        assert_eq!(sampled.len(), plan.entries().len(), "one sample per planned sequence");
        let mut ended = 0;
        for (planned, sample) in plan.entries().iter().zip(sampled.drain(..)) {
            self.advance(planned, pages);
            assert_eq!(sample.is_some(), planned.samples, "samples where the plan says so");
            let end = sample.and_then(|sample| self.append(planned.sequence, sample, now));
            let sequence = &mut self.running[planned.sequence];
            sequence.end = end.or_else(|| sequence.given_up());
            ended += usize::from(sequence.end.is_some());
        }
        if ended > 0 {
            self.remove_ended(pages);
        }
    }

    /// The planned rows are computed: the pages they complete may be found by others.
    fn advance(&mut self, planned: &Planned, pages: &mut Pages) {
        let sequence = &mut self.running[planned.sequence];
        assert_eq!(sequence.computed, planned.start, "a plan is committed once");
        sequence.computed += planned.len;
        let fresh = sequence.computed.saturating_sub(sequence.paid);
        self.shares.charge(sequence, fresh);
        sequence.paid += fresh;
        assert!(sequence.computed <= sequence.tokens.len(), "computed <= known");
        if pages.caches() {
            for index in planned.start / PAGE..sequence.computed / PAGE {
                let hash = sequence.hash(index);
                pages.register(sequence.pages[index], hash);
            }
        }
        if planned.prompt_logits {
            sequence.send_prompt(planned.start, None);
            let told = sequence.prompt_len.min(sequence.computed + 1);
            assert!(sequence.prompt_sent() >= told, "every prompt row is told");
        }
    }

    /// The next token of a sequence whose known tokens are all computed. Says whether it was the
    /// last.
    fn append(&mut self, index: usize, sample: Result<TokenEvent>, now: Instant) -> Option<End> {
        let sequence = &mut self.running[index];
        assert_eq!(sequence.pending(), 0, "a sample follows the last known token");
        let event = match sample {
            Ok(event) => event,
            Err(error) => return Some(End::Failed(error)),
        };
        let before = sequence.last_token.replace(now);
        self.notices.push(Notice::Token {
            since: before.map(|before| now.saturating_duration_since(before)),
        });
        sequence.tokens.push(event.token);
        sequence.has_gained = true;
        sequence.send(Event::Token(event));
        if sequence.is_abandoned() {
            Some(End::Abandoned)
        } else if sequence.stop_tokens.contains(&event.token) {
            Some(End::Finished(FinishReason::Stop))
        } else if sequence.tokens.len() == sequence.len_max {
            Some(End::Finished(FinishReason::Length))
        } else {
            None
        }
    }

    /// A step failed: its own sequences end with `error`, nobody else's do. Their pages were never
    /// made findable.
    pub fn abort_planned(&mut self, plan: &Plan, pages: &mut Pages, error: &Error) {
        for planned in plan.entries() {
            self.running[planned.sequence].end = Some(End::Failed(error.clone()));
        }
        self.remove_ended(pages);
    }

    /// Everything ends with `error`.
    pub fn abort_all(&mut self, pages: &mut Pages, error: &Error) {
        for sequence in &mut self.running {
            sequence.end = Some(End::Failed(error.clone()));
        }
        self.remove_ended(pages);
        while let Some(sequence) = self.waiting.pop_front() {
            self.end(sequence, End::Failed(error.clone()), pages);
        }
    }

    /// Takes out of the running whoever is at its end; the others keep their order.
    fn remove_ended(&mut self, pages: &mut Pages) {
        for index in (0..self.running.len()).rev() {
            if let Some(end) = self.running[index].end.take() {
                let sequence = self.running.remove(index);
                self.end(sequence, end, pages);
            }
        }
    }

    /// Gives everything back that `sequence` holds, its lease included, and sends its last event.
    fn end(&mut self, mut sequence: Sequence, end: End, pages: &mut Pages) {
        pages.release(&mut sequence.pages);
        self.shares.leave(&sequence);
        if sequence.admitted.is_none() {
            self.leave_queue(sequence.prompt_len);
        }
        let prompt_tokens = sequence.prompt_len;
        let reason = sequence.finish(end);
        self.notices.push(Notice::Ended { reason, prompt_tokens });
    }

    fn leave_queue(&mut self, prompt_tokens: usize) {
        assert!(self.queued > 0 && self.queued_tokens >= prompt_tokens, "left the queue twice");
        self.queued -= 1;
        self.queued_tokens -= prompt_tokens;
    }
}
