//! The plan: a subtraction (known − computed tokens of each sequence) capped by budgets.
//!
//! Owns the choice of rows, admission and preemption. Never computes, samples or sends. The thing
//! to know: a sequence has pages for all its known tokens from admission on, so only a growing
//! output can run out of them. Whose turn it is and who gives way is `shares`' to say: the newest
//! of whoever has most.

use super::{Notice, Scheduler};
use crate::engine::pages::{PAGE, Pages, pages_for};
use crate::engine::sequence::Sequence;
use std::time::Instant;

/// Rows of one sequence in a step: positions `start..start + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Index in [`Scheduler::running`], until the commit.
    pub sequence: usize,
    pub start: usize,
    pub len: usize,
    /// The last row is its last known token: the next one is sampled from it.
    pub samples: bool,
    /// All rows need logits, for [`Scheduler::prompt_scored`].
    pub prompt_logits: bool,
}

impl Planned {
    /// Rows whose logits are needed: the last ones.
    pub fn logit_rows(&self) -> usize {
        if self.prompt_logits { self.len } else { usize::from(self.samples) }
    }
}

/// What a step computes; at most one entry a sequence, in no order that means anything. Made once,
/// filled every step.
#[derive(Debug, Default)]
pub struct Plan {
    entries: Vec<Planned>,
    rows: usize,
    logit_rows: usize,
}

impl Plan {
    /// An empty plan with room for `sequences_max` sequences.
    pub fn new(sequences_max: usize) -> Self {
        Self { entries: Vec::with_capacity(sequences_max), rows: 0, logit_rows: 0 }
    }
    pub fn entries(&self) -> &[Planned] {
        &self.entries
    }
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
    pub fn rows(&self) -> usize {
        self.rows
    }
    pub fn logit_rows(&self) -> usize {
        self.logit_rows
    }

    fn clear(&mut self) {
        self.entries.clear();
        (self.rows, self.logit_rows) = (0, 0);
    }

    fn push(&mut self, index: usize, sequence: &Sequence, len: usize) {
        let planned = Planned {
            sequence: index,
            start: sequence.computed,
            len,
            samples: len == sequence.pending(),
            prompt_logits: sequence.wants_prompt_logits(),
        };
        self.rows += len;
        self.logit_rows += planned.logit_rows();
        self.entries.push(planned);
    }
}

impl Scheduler {
    /// Fills `plan` with the rows of the next step. First lets go of whoever was cancelled or cut.
    /// The plan is empty only when nothing is left; it is to be committed or aborted before the
    /// next one.
    pub fn plan(&mut self, pages: &mut Pages, now: Instant, plan: &mut Plan) {
        plan.clear();
        self.drop_given_up(pages);
        self.shares.tally(&self.running);
        self.secure_pages(pages);
        self.admit(pages, now);
        self.lay_out(plan);
        self.check(plan);
    }

    fn drop_given_up(&mut self, pages: &mut Pages) {
        let mut ended = 0;
        for sequence in &mut self.running {
            sequence.end = sequence.given_up();
            ended += usize::from(sequence.end.is_some());
        }
        if ended > 0 {
            self.remove_ended(pages);
        }
        for index in (0..self.waiting.len()).rev() {
            if let Some(end) = self.waiting[index].given_up()
                && let Some(sequence) = self.waiting.remove(index)
            {
                self.end(sequence, end, pages);
            }
        }
    }

    /// Sees that every sequence with one token to go has a page for it. Where none is free, the
    /// tenant that holds most places gives up its newest sequence.
    fn secure_pages(&mut self, pages: &mut Pages) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].pending() > 1 || has_page(&mut self.running[index], pages) {
                index += 1;
                continue;
            }
            assert!(self.running.len() > 1, "a sequence alone always fits");
            let heaviest = self.shares.heaviest(&self.running).expect("somebody runs");
            self.preempt(heaviest, pages);
            index -= usize::from(heaviest < index);
        }
    }

    /// A running sequence gives its pages back and waits, at the front, to be computed again. Its
    /// tokens stay: sampling depends on seed and index only, so that the stream goes on as if
    /// nothing had happened.
    fn preempt(&mut self, index: usize, pages: &mut Pages) {
        let mut sequence = self.running.remove(index);
        self.shares.pause(&sequence);
        pages.release(&mut sequence.pages);
        sequence.computed = 0;
        self.waiting.push_front(sequence);
        self.notices.push(Notice::Preempted);
    }

    /// Takes sequences in from the queue, in turn, while there is room for their rows, logits and
    /// pages; whoever holds more than its share gives way. Nobody overtakes one whose turn it is
    /// and that does not fit yet.
    fn admit(&mut self, pages: &mut Pages, now: Instant) {
        let mut settled = self.running.len();
        while let Some(mut at) = self.shares.next(&self.waiting) {
            if !self.has_rows(&self.waiting[at]) {
                return;
            }
            self.waiting[at].prepare(pages.caches());
            let hits = loop {
                let sequence = &self.waiting[at];
                let looks_up = pages.caches() && !sequence.wants_prompt_logits();
                let hits = if looks_up { prefix_hits(sequence, pages) } else { 0 };
                if looks_up && is_underway(sequence, hits, &self.running) {
                    return;
                }
                if self.running.len() < self.running_max
                    && fits(sequence, hits, pages, self.running.len())
                {
                    break hits;
                }
                let Some(index) = self.shares.gives_way(sequence, &self.running, settled) else {
                    return;
                };
                self.preempt(index, pages);
                settled -= 1;
                at += 1; // what gave way stands in front
            };
            let Some(mut sequence) = self.waiting.remove(at) else {
                return;
            };
            take_pages(&mut sequence, hits, pages);
            sequence.paid = sequence.paid.max(sequence.computed);
            sequence.has_gained = false;
            self.enter(&mut sequence, pages.caches(), now);
            self.shares.begin(&sequence);
            self.running.push(sequence);
        }
    }

    /// Whether rows are left for `comer` when each of the running has one, and prompts whose turn
    /// is not after its own have all they want.
    fn has_rows(&self, comer: &Sequence) -> bool {
        let each = self.running.len().min(self.running_max - 1) + 1;
        let mut rows = self.budgets.rows_max - each;
        let mut logit_rows = self.budgets.logit_rows_max - each;
        for prompt in self.running.iter().filter(|s| s.pending() > 1) {
            if !self.shares.before(prompt, comer) {
                continue;
            }
            let more = prompt.pending() - 1;
            let more_logits = if prompt.wants_prompt_logits() { more } else { 0 };
            if more > rows || more_logits > logit_rows {
                return false;
            }
            rows -= more;
            logit_rows -= more_logits;
        }
        true
    }

    /// Deals out the rows: one for each sequence, so that prefill never starves decode; what is
    /// left to the prompts, in turn.
    fn lay_out(&mut self, plan: &mut Plan) {
        self.prompts.clear();
        for (index, sequence) in self.running.iter().enumerate() {
            match sequence.pending() {
                1 => plan.push(index, sequence, 1),
                _ => self.prompts.push(index),
            }
        }
        let (shares, running) = (&self.shares, &self.running);
        self.prompts.sort_unstable_by_key(|&index| (shares.rank(&running[index]), index));
        for (behind, &index) in (0..self.prompts.len()).rev().zip(&self.prompts) {
            let sequence = &self.running[index];
            let rows = self.budgets.rows_max - plan.rows - behind;
            let logit_rows = self.budgets.logit_rows_max - plan.logit_rows - behind;
            let len = sequence.pending().min(rows);
            let len = if sequence.wants_prompt_logits() { len.min(logit_rows) } else { len };
            plan.push(index, sequence, len);
        }
    }

    /// Notes the first admission of a sequence; a preempted one has had its own.
    fn enter(&mut self, sequence: &mut Sequence, caches: bool, now: Instant) {
        if sequence.admitted.is_some() {
            return;
        }
        let looked_up = caches && !sequence.wants_prompt_logits();
        sequence.admitted = Some(now);
        sequence.permit = None;
        sequence.cached = sequence.computed;
        self.leave_queue(sequence.prompt_len);
        let waited = now.saturating_duration_since(sequence.submitted);
        sequence.tell_admitted(waited);
        self.notices.push(Notice::Admitted {
            prompt_tokens: sequence.prompt_len,
            waited,
            cached_tokens: looked_up.then_some(sequence.cached),
        });
    }

    /// What every plan keeps to.
    fn check(&self, plan: &Plan) {
        assert!(plan.rows <= self.budgets.rows_max, "rows");
        assert!(plan.logit_rows <= self.budgets.logit_rows_max, "logit rows");
        assert!(self.running.len() <= self.running_max, "running sequences");
        assert!(!plan.is_empty() || self.is_empty(), "there is work and no plan");
        assert_eq!(plan.entries.len(), self.running.len(), "whoever runs gets rows");
        for planned in &plan.entries {
            let sequence = &self.running[planned.sequence];
            let end = planned.start + planned.len;
            assert!(planned.len > 0 && end <= sequence.tokens.len(), "rows of unknown tokens");
            assert!(end <= sequence.pages.len() * PAGE, "rows without a page");
        }
    }
}

/// Makes sure that there is a page for the next row. False: no page is free.
fn has_page(sequence: &mut Sequence, pages: &mut Pages) -> bool {
    if sequence.computed < sequence.pages.len() * PAGE {
        return true;
    }
    match pages.take() {
        Some(page) => sequence.pages.push(page),
        None => return false,
    }
    true
}

/// Leading full pages of `sequence` that are in the book. The last known token is never among them:
/// its row is what the next token is sampled from, and a page that is shared is never written.
fn prefix_hits(sequence: &Sequence, pages: &Pages) -> usize {
    let pages_max = (sequence.tokens.len() - 1) / PAGE;
    (0..pages_max).take_while(|&index| hit(sequence, index, pages).is_some()).count()
}

/// Whether its own tenant is about to compute the first page that `sequence` does not find: then it
/// waits for that, and nothing is computed twice. The wait ends: who computes gets rows in every
/// step, and all it wants before `sequence` gets any.
fn is_underway(sequence: &Sequence, hits: usize, running: &[Sequence]) -> bool {
    let end = (hits + 1) * PAGE;
    let hash = sequence.known_hash(hits);
    // Its last page is computed in any case.
    sequence.tokens.len() > end
        && running.iter().any(|s| {
            s.flow.tenant == sequence.flow.tenant && s.computed < end && s.known_hash(hits) == hash
        })
}

/// Whether there are pages for `sequence`, of which it finds `hits`, and one of headroom for each
/// of the running, lest the next tokens throw the newcomer out again.
fn fits(sequence: &Sequence, hits: usize, pages: &Pages, running: usize) -> bool {
    let fresh = pages_for(sequence.tokens.len()) - hits;
    let found = (0..hits).filter_map(|index| hit(sequence, index, pages));
    let revived = found.filter(|&page| pages.holders(page) == 0).count();
    pages.free() >= fresh + revived + running
}

/// The page that holds full page `index` of `sequence` and all before it.
fn hit(sequence: &Sequence, index: usize, pages: &Pages) -> Option<u32> {
    pages.find(sequence.known_hash(index)?)
}

/// Gives `sequence` a page for every known token: `hits` found ones, then fresh ones.
fn take_pages(sequence: &mut Sequence, hits: usize, pages: &mut Pages) {
    assert!(sequence.pages.is_empty() && sequence.computed == 0, "it holds nothing yet");
    // The found ones first: taking a fresh page may forget a free one.
    for index in 0..hits {
        let page = hit(sequence, index, pages).expect("found a moment ago");
        pages.share(page);
        sequence.pages.push(page);
    }
    for _ in hits..pages_for(sequence.tokens.len()) {
        sequence.pages.push(pages.take().expect("counted a moment ago"));
    }
    sequence.computed = hits * PAGE;
}
