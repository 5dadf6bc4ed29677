//! Reads a list of examples, or of pairs, through a pass, micro-batch by micro-batch: to train on
//! them, or to evaluate.
//!
//! Owns the place in the list and the sums. Never updates a factor. The thing to know:
//! micro-batches are cut by a job's own sizes, so it has the same bits whatever runs beside it.

use super::preference::{References, slope_and_loss};
use crate::error::Result;
use crate::train::adapter::Adapter;
use crate::train::batch::MicroBatch;
use crate::train::data::Examples;
use crate::train::pass::{Pass, PassOptions, Progress, Purpose};
use crate::train::spec::Objective;
use polylora_kernels::Device;
use std::ops::Range;

/// What a list gave.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Totals {
    /// The mean over supervised weight, or over pairs.
    pub loss: f64,
    /// Tokens, or pairs, that came out right, and of how many.
    pub correct: usize,
    pub counted: usize,
    /// Supervised tokens, and all that were read.
    pub supervised: u64,
    pub tokens: u64,
}

/// What the micro-batch at hand is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leg {
    /// It is not made yet.
    Fill,
    /// The reference reads pairs: the second adapter, or the base.
    Reference,
    /// The adapter reads.
    Policy,
}

/// What a list is read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading {
    Train,
    Evaluate,
    Calibrate,
}

/// See the file's head.
pub(super) struct Reader {
    objective: Objective,
    options: PassOptions,
    /// Of examples, or of pairs.
    list: Vec<u32>,
    /// The micro-batch at hand, as a range of the list.
    at: Range<usize>,
    leg: Leg,
    reading: Reading,
    /// What a loss is divided by: Σ w, or pairs.
    divisor: f64,
    /// By example of the micro-batch: how fast its pair's loss falls with its log-probability.
    slopes: Vec<f64>,
    pub totals: Totals,
}

impl Reader {
    /// For lists of at most `longest`.
    pub fn new(objective: Objective, options: PassOptions, longest: usize) -> Self {
        Self {
            objective,
            options,
            list: Vec::with_capacity(longest),
            at: 0..0,
            leg: Leg::Fill,
            reading: Reading::Evaluate,
            divisor: 1.0,
            slopes: Vec::with_capacity(options.sequences_max.min(2 * longest)),
            totals: Totals::default(),
        }
    }

    /// Begins a list.
    pub fn begin(&mut self, list: impl Iterator<Item = u32>, data: &Examples, reading: Reading) {
        self.list.clear();
        self.list.extend(list);
        (self.at, self.leg, self.reading) = (0..0, Leg::Fill, reading);
        let examples = self.list.iter().flat_map(|&entry| self.examples_of(entry));
        let of = |index: usize| data.get(index).weights[1..].iter().map(|w| f64::from(*w));
        let weight: f64 = examples.flat_map(of).sum();
        self.divisor = match self.objective {
            // Where nothing is supervised there is no row to divide for.
            Objective::Supervised => weight,
            Objective::Dpo { .. } | Objective::LnDpo { .. } => self.list.len() as f64,
        };
        self.totals = Totals::default();
    }

    /// Examples of an entry of the list.
    fn examples_of(&self, entry: u32) -> Range<usize> {
        let group = self.objective.group();
        entry as usize * group..(entry as usize + 1) * group
    }

    /// One op. Returns whether the list is read.
    pub fn advance(
        &mut self,
        dev: &Device,
        pass: &mut Pass,
        adapters: &mut [Adapter],
        data: &Examples,
        references: &mut References,
    ) -> Result<bool> {
        if self.leg == Leg::Fill && !self.fill(pass, data, references) {
            return Ok(true);
        }
        match (pass.step(dev, adapters)?, self.leg) {
            (Progress::Running, _) => {}
            (_, Leg::Reference) => {
                for (i, &pair) in self.list[self.at.clone()].iter().enumerate() {
                    references.keep(pair, [2 * i, 2 * i + 1].map(|e| pass.log_prob(e)));
                }
                self.begin_policy(pass, data);
            }
            (Progress::Scored, _) => {
                self.count_pairs(pass, references);
                let (slopes, divisor) = (&self.slopes, self.divisor);
                pass.resume(|example| slopes[example] / divisor);
            }
            (Progress::Done, _) => {
                match (self.reading, self.objective.group()) {
                    (Reading::Calibrate, _) => {}
                    (_, 1) => self.count_tokens(pass),
                    // They are counted when they are scored.
                    (Reading::Train, _) => {}
                    (Reading::Evaluate, _) => self.count_pairs(pass, references),
                }
                self.leg = Leg::Fill;
            }
        }
        Ok(false)
    }

    /// Makes the next micro-batch: entries in order until the rows are many. An entry with more
    /// rows than that is alone. Returns whether there is one.
    fn fill(&mut self, pass: &mut Pass, data: &Examples, references: &References) -> bool {
        let (start, group) = (self.at.end, self.objective.group());
        let (mut end, mut rows) = (start, 0);
        while let Some(&entry) = self.list.get(end) {
            let examples = self.examples_of(entry);
            rows += examples.map(|i| data.get(i).ids.len() - 1).sum::<usize>();
            let sequences = (end + 1 - start) * group;
            if end > start
                && (rows > self.options.rows_max || sequences > self.options.sequences_max)
            {
                break;
            }
            end += 1;
        }
        self.at = start..end;
        let entries = &self.list[self.at.clone()];
        let needs_reference = group == 2 && self.reading != Reading::Calibrate;
        let lacks_reference = needs_reference && entries.iter().any(|p| references.lack(*p));
        if lacks_reference {
            self.leg = Leg::Reference;
            let batch = pass.begin(Purpose::Evaluate);
            batch.next_adapter();
            self.push(batch, data, 1.0);
        } else if start < end {
            self.begin_policy(pass, data);
        }
        start < end
    }

    fn begin_policy(&mut self, pass: &mut Pass, data: &Examples) {
        self.leg = Leg::Policy;
        let is_pairs = self.objective.group() == 2;
        let purpose = match self.reading {
            Reading::Train if is_pairs => Purpose::Score,
            Reading::Train => Purpose::Train,
            Reading::Evaluate => Purpose::Evaluate,
            Reading::Calibrate => Purpose::Calibrate,
        };
        let divisor = if is_pairs { 1.0 } else { self.divisor };
        self.push(pass.begin(purpose), data, divisor);
        let examples = self.list[self.at.clone()].iter().flat_map(|&e| self.examples_of(e));
        let tokens: usize = examples.map(|example| data.get(example).ids.len()).sum();
        self.totals.tokens += tokens as u64;
    }

    fn push(&self, batch: &mut MicroBatch, data: &Examples, divisor: f64) {
        for example in self.list[self.at.clone()].iter().flat_map(|&e| self.examples_of(e)) {
            batch.push(data.get(example), divisor);
        }
    }

    fn count_tokens(&mut self, pass: &Pass) {
        let sums = pass.sums(0);
        self.totals.loss += sums.loss;
        self.totals.correct += sums.correct;
        self.totals.counted += sums.rows;
        self.totals.supervised += sums.rows as u64;
    }

    fn count_pairs(&mut self, pass: &Pass, references: &References) {
        let (beta, by_length) = match self.objective {
            Objective::Supervised => return,
            Objective::Dpo { beta } => (beta, false),
            Objective::LnDpo { beta } => (beta, true),
        };
        self.slopes.clear();
        for (i, &pair) in self.list[self.at.clone()].iter().enumerate() {
            let of_example = |e| if by_length { pass.supervised(e).max(1) as f64 } else { 1.0 };
            let both = [2 * i, 2 * i + 1];
            let lengths = both.map(of_example);
            let over = |[a, b]: [f64; 2]| [a / lengths[0], b / lengths[1]];
            let (policy, reference) = (both.map(|e| pass.log_prob(e)), references.of(pair));
            let (slope, loss) = slope_and_loss(beta, over(policy), over(reference));
            self.totals.loss += loss / self.divisor;
            // σ(−z) is below a half where the preferred answer is the likelier one.
            self.totals.correct += usize::from(slope < 0.5);
            self.totals.counted += 1;
            self.slopes.extend(over([beta * slope, -beta * slope]));
        }
        self.totals.supervised += pass.sums(0).rows as u64;
    }
}
