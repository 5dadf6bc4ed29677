//! The plan: a subtraction (known − computed tokens of each sequence) capped by budgets.
//!
//! Owns the choice of rows, admission and preemption. Never computes, samples or sends. The thing
//! to know: a sequence has pages for all its known tokens from admission on, so only a growing
//! output can run out of them; then the newest gives its pages back, and the oldest always goes on.

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
        self.plan_decode(pages, plan);
        self.plan_prefill(plan);
        self.admit(pages, now, plan);
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

    /// One row for each sequence with one token to go, oldest first: prefill never starves them.
    fn plan_decode(&mut self, pages: &mut Pages, plan: &mut Plan) {
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].pending() == 1 {
                while !has_page(&mut self.running[index], pages) {
                    self.preempt_newest(pages);
                    if index == self.running.len() {
                        return; // it was the newest itself
                    }
                }
                plan.push(index, &self.running[index], 1);
            }
            index += 1;
        }
    }

    /// The newest running sequence gives its pages back and waits, at the front, to be computed
    /// again. Its tokens stay: sampling depends on seed and index only, so that the stream goes on
    /// as if nothing had happened.
    fn preempt_newest(&mut self, pages: &mut Pages) {
        assert!(self.running.len() > 1, "a sequence alone always fits");
        let Some(mut sequence) = self.running.pop() else {
            return;
        };
        pages.release(&mut sequence.pages);
        sequence.computed = 0;
        self.waiting.push_front(sequence);
        self.notices.push(Notice::Preempted);
    }

    /// The next chunk of a prompt. Only the newest can be in the middle of one: as long as it is,
    /// it takes all that is left of some budget, and nobody is admitted after it.
    fn plan_prefill(&self, plan: &mut Plan) {
        if let Some(newest) = self.running.last()
            && newest.pending() > 1
        {
            plan.push(self.running.len() - 1, newest, self.chunk(newest, plan));
        }
    }

    /// Rows that the budgets leave for `sequence`. At least one: there are no more sequences than
    /// rows, or logit rows, and all others take one at most.
    fn chunk(&self, sequence: &Sequence, plan: &Plan) -> usize {
        let len = sequence.pending().min(self.budgets.rows_max - plan.rows);
        if sequence.wants_prompt_logits() {
            len.min(self.budgets.logit_rows_max - plan.logit_rows)
        } else {
            len
        }
    }

    /// Takes sequences in from the queue while there is room for their rows, logits and pages.
    /// First come, first served: nobody overtakes one that does not fit yet.
    fn admit(&mut self, pages: &mut Pages, now: Instant, plan: &mut Plan) {
        while self.running.len() < self.running_max
            && plan.rows < self.budgets.rows_max
            && plan.logit_rows < self.budgets.logit_rows_max
        {
            let Some(sequence) = self.waiting.front_mut() else {
                return;
            };
            sequence.prepare(pages.caches());
            let looks_up = pages.caches() && !sequence.wants_prompt_logits();
            let hits = if looks_up { prefix_hits(sequence, pages) } else { 0 };
            if looks_up && is_underway(sequence, hits, &self.running, plan) {
                return;
            }
            // One page of headroom for each running sequence, lest the next tokens throw the
            // newcomer out again.
            let fresh = pages_for(sequence.tokens.len()) - hits;
            let found = (0..hits).filter_map(|index| hit(sequence, index, pages));
            let revived = found.filter(|&page| pages.holders(page) == 0).count();
            if pages.free() < fresh + revived + self.running.len() {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else {
                return;
            };
            take_pages(&mut sequence, hits, pages);
            self.enter(&mut sequence, looks_up, now);
            let len = self.chunk(&sequence, plan);
            plan.push(self.running.len(), &sequence, len);
            self.running.push(sequence);
        }
    }

    /// Notes the first admission of a sequence; a preempted one has had its own.
    fn enter(&mut self, sequence: &mut Sequence, looked_up: bool, now: Instant) {
        if sequence.admitted.is_some() {
            return;
        }
        sequence.admitted = Some(now);
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
            let newest = planned.sequence + 1 == self.running.len();
            assert!(planned.samples || newest, "only the newest is in the middle");
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

/// Whether the first page that `sequence` does not find is being computed by this very plan, whose
/// sequences all come to the end of what they know when there is room to admit one more. A step
/// later it is there to be found, so that waiting ends, and nothing is computed twice.
fn is_underway(sequence: &Sequence, hits: usize, running: &[Sequence], plan: &Plan) -> bool {
    let end = (hits + 1) * PAGE;
    let hash = sequence.known_hash(hits);
    // Its last page is computed in any case.
    sequence.tokens.len() > end
        && plan.entries.iter().any(|planned| {
            planned.start < end && running[planned.sequence].known_hash(hits) == hash
        })
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
