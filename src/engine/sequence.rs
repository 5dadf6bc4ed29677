//! A sequence: the tokens known of one stream, how many of them are computed, and the pages they
//! are computed into.
//!
//! Owns one stream's state from submission to its last event. Never decides when it runs. The thing
//! to know: `computed <= known`; all that is left to do for a sequence is the difference.

use super::pages::{PAGE, PageHash, Seed, page_hash, pages_for, seed};
use super::queue::QueuePermit;
use super::request::{Admitted, Event, EventSender, Request, Sampling, TokenEvent};
use super::sampler::History;
use crate::adapters::Digest;
use crate::adapters::bank::AdapterMix;
use crate::adapters::composition::Composition;
use crate::ending::{EndReason, FinishReason};
use crate::error::{Error, Kind};
use std::time::{Duration, Instant};

/// Names a sequence for as long as the engine lives.
pub type SequenceId = u64;

/// Why a sequence ends, before its last event is made of it.
pub(super) enum End {
    Finished(FinishReason),
    /// Nobody reads it: cancelled, or too slow.
    Abandoned,
    Failed(Error),
}

/// Where a sequence is counted: tenant and adapter, as indices of their tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flow {
    pub tenant: usize,
    pub adapter: usize,
}

/// One stream of tokens. The engine reads it; only the scheduler changes it.
pub struct Sequence {
    pub id: SequenceId,
    /// All known tokens: prompt, then output.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Tokens whose keys and values are in the pages.
    pub computed: usize,
    /// Where they are: position p is in `pages[p / PAGE]`.
    pub pages: Vec<u32>,
    /// Prompt tokens found in the prefix cache when it was first admitted.
    pub cached: usize,
    pub sampling: Sampling,
    /// Most tokens known at the end: prompt + output, within the engine's context.
    pub len_max: usize,
    pub tokens_min: usize,
    pub stop_tokens: Vec<u32>,
    /// Whose turn it takes, and that one's share against others.
    pub tenant: String,
    pub weight: u32,
    /// What it is computed with, from submission to the end; `None` is the base model.
    pub lease: Option<Composition>,
    pub submitted: Instant,
    /// When it was first admitted; `None` while it has never run.
    pub admitted: Option<Instant>,
    /// When its newest token was sampled.
    pub last_token: Option<Instant>,

    /// Where its turns are counted, from submission on.
    pub(super) flow: Flow,
    /// Tokens whose computation was charged, or was found done: none is charged twice.
    pub(super) paid: usize,
    /// It sampled a token since it was last taken in.
    pub(super) has_gained: bool,
    /// Its permit to wait, until it first runs.
    pub(super) permit: Option<QueuePermit>,
    /// Set while the scheduler is about to take it out.
    pub(super) end: Option<End>,
    sender: EventSender,
    /// Prompt events sent so far; they are never sent twice, even when the prompt is computed
    /// twice.
    prompt_sent: usize,
    /// The reader did not keep up, or is gone.
    unread: bool,
    seed: Seed,
    /// Hashes of the full pages of `tokens`, as far as somebody asked.
    hashes: Vec<PageHash>,
}

impl Sequence {
    /// A sequence that has never run. `base` is the digest of the base model and `context` the most
    /// tokens a sequence may have.
    pub fn new(
        id: SequenceId,
        request: Request,
        base: &Digest,
        context: usize,
        sender: EventSender,
        submitted: Instant,
    ) -> Self {
        let adapter = request.lease.as_ref().map(Composition::digest);
        let prompt_len = request.prompt.len();
        assert!(prompt_len > 0 && request.tokens_max > 0, "checked at the edge");
        assert!(prompt_len < context, "a prompt leaves room for one token: checked at the edge");
        Self {
            id,
            prompt_len,
            computed: 0,
            pages: Vec::new(),
            cached: 0,
            sampling: request.sampling,
            len_max: context.min(prompt_len + request.tokens_max as usize),
            tokens_min: request.tokens_min as usize,
            stop_tokens: request.stop_tokens,
            seed: seed(base, adapter.as_ref(), 1.0, &request.tenant),
            tokens: request.prompt,
            tenant: request.tenant,
            weight: request.weight,
            lease: request.lease,
            submitted,
            admitted: None,
            last_token: None,
            flow: Flow::default(),
            paid: 0,
            has_gained: false,
            permit: None,
            end: None,
            sender,
            prompt_sent: 0,
            unread: false,
            hashes: Vec::new(),
        }
    }

    /// Lets every tenant find its pages, and it theirs. Only before it first runs.
    pub fn share_prefix(&mut self, base: &Digest) {
        self.seed = seed(base, self.digest().as_ref(), 1.0, "");
    }

    /// Where its adapters must be in the bank; `None` is the base model.
    pub fn mix(&self) -> Option<AdapterMix> {
        self.lease.as_ref().map(Composition::mix)
    }
    /// The identity of what it is computed with.
    pub fn digest(&self) -> Option<Digest> {
        self.lease.as_ref().map(Composition::digest)
    }
    /// Identity of its keys and values.
    pub fn seed(&self) -> Seed {
        self.seed
    }
    /// Tokens sampled so far; the index of the next one.
    pub fn output_len(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }
    /// Known tokens that are not computed yet.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }
    /// Known tokens whose computation was not charged yet.
    pub(super) fn unpaid(&self) -> usize {
        self.tokens.len() - self.paid.min(self.tokens.len())
    }
    /// Gives it its permit to wait, which goes with it.
    pub(super) fn permitted(mut self, permit: QueuePermit) -> Self {
        self.permit = Some(permit);
        self
    }
    /// Pages it may come to hold.
    pub fn pages_max(&self) -> usize {
        pages_for(self.len_max)
    }
    /// Tokens that must not be sampled next: its stop tokens, until there are `tokens_min`.
    pub fn banned(&self) -> &[u32] {
        if self.output_len() < self.tokens_min { &self.stop_tokens } else { &[] }
    }
    /// What the sampler must know of it.
    pub fn history(&self) -> History<'_> {
        History { tokens: &self.tokens, prompt_len: self.prompt_len, banned: self.banned() }
    }
    /// Whether prompt rows computed now still owe their reader logprobs.
    pub fn wants_prompt_logits(&self) -> bool {
        self.sampling.prompt_logprobs.is_some() && self.prompt_sent < self.prompt_len
    }
    /// Whether it is to be given up because nobody reads it.
    pub fn is_abandoned(&self) -> bool {
        self.unread || self.sender.is_cancelled()
    }

    /// Why it is to end before it is done, if it is: nobody reads it, or its lease is revoked.
    pub(super) fn given_up(&self) -> Option<End> {
        if self.is_abandoned() {
            return Some(End::Abandoned);
        }
        self.lease.as_ref()?.revoked().map(End::Failed)
    }

    /// Takes all memory it will ever need, so that no step does, and hashes its full pages if they
    /// are to be found.
    pub(super) fn prepare(&mut self, hashes: bool) {
        self.tokens.reserve_exact(self.len_max - self.tokens.len());
        self.pages.reserve_exact(self.pages_max());
        self.hashes.reserve_exact(self.pages_max() - self.hashes.len());
        if hashes && self.tokens.len() >= PAGE {
            self.hash(self.tokens.len() / PAGE - 1);
        }
    }

    /// The hash of its page `index`, which its known tokens must fill.
    pub(super) fn hash(&mut self, index: usize) -> PageHash {
        while self.hashes.len() <= index {
            let start = self.hashes.len() * PAGE;
            let before = self.hashes.last().copied().unwrap_or(self.seed);
            self.hashes.push(page_hash(before, &self.tokens[start..start + PAGE]));
        }
        self.hashes[index]
    }

    /// The same for a page hashed before.
    pub(super) fn known_hash(&self, index: usize) -> Option<PageHash> {
        self.hashes.get(index).copied()
    }

    /// Tells the reader that it is admitted, `waited` after it was submitted.
    pub(super) fn tell_admitted(&self, waited: Duration) {
        self.sender.admit(Admitted { cached_tokens: self.cached as u32, waited });
    }

    /// Sends `event`, unless one was lost before it: a stream has no holes.
    pub(super) fn send(&mut self, event: Event) {
        self.unread = self.unread || !self.sender.send(event);
    }

    /// Sends the events of prompt tokens up to the one that `row` predicts. `scored` tells of that
    /// one, if `row` is not the prompt's last. The first prompt token has no row before it: its
    /// event says NaN.
    pub(super) fn send_prompt(&mut self, row: usize, scored: Option<TokenEvent>) {
        if self.prompt_sent == 0 {
            self.prompt_sent = 1;
            self.send(Event::Prompt(TokenEvent::unscored(self.tokens[0])));
        }
        let Some(event) = scored else { return };
        let token = row + 1;
        assert!(token < self.prompt_len, "row {row} predicts no prompt token");
        if token < self.prompt_sent {
            return; // told before a preemption
        }
        assert_eq!(token, self.prompt_sent, "prompt events go out in order");
        assert_eq!(event.token, self.tokens[token], "the event of another token");
        self.prompt_sent += 1;
        self.send(Event::Prompt(event));
    }

    /// The prompt events sent so far.
    pub(super) fn prompt_sent(&self) -> usize {
        self.prompt_sent
    }

    /// Ends the stream with its last event. A reader with no room left for the good news gets the
    /// bad: pushing an unread token out would leave a hole in a stream that says it is whole.
    pub(super) fn finish(mut self, end: End) -> EndReason {
        match end {
            End::Finished(reason) => {
                self.send(Event::Finished {
                    reason,
                    prompt_tokens: self.prompt_len as u32,
                    cached_tokens: self.cached as u32,
                    completion_tokens: self.output_len() as u32,
                });
                if self.unread {
                    return self.finish(End::Abandoned);
                }
                EndReason::Finished(reason)
            }
            End::Abandoned if self.sender.is_cancelled() => EndReason::Cancelled,
            End::Abandoned => {
                let message = "the stream was given up: its reader did not keep up with its tokens";
                self.finish(End::Failed(Error::new(Kind::Unavailable, "stream_too_slow", message)))
            }
            End::Failed(error) => {
                self.sender.finish(Event::Failed(error));
                EndReason::Failed
            }
        }
    }
}
