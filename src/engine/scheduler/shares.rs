//! Whose turn it is: tenants, and adapters within a tenant, take turns by tokens computed.
//!
//! Owns what each has had and who gives way to whom. Never moves a sequence. The thing to know:
//! this is start-time fair queueing with the real cost: a token is charged when it is computed for
//! the first time, divided by its request's weight; whoever comes back after a pause starts where
//! the least served of the present ones stands, so that nobody saves turns up or is owed any. A
//! composition is an adapter of its own here.

use crate::adapters::Digest;
use crate::engine::sequence::{Flow, Sequence};
use std::collections::VecDeque;

/// What a token costs at weight 1: room for fractions of heavier weights.
const TOKEN: u64 = 1 << 16;

#[derive(Debug, Clone, Copy, Default)]
struct Share {
    /// Tokens computed, weighted.
    served: u64,
    /// Known tokens of the running that are still to be computed, weighted.
    owed: u64,
    /// The running, each as one weighted token: how many places are held.
    load: u64,
    /// Sequences waiting or running.
    present: usize,
}

impl Share {
    fn ahead(&self) -> u64 {
        self.served + self.owed
    }
}

struct Tenant {
    name: String,
    share: Share,
    adapters: Vec<(Option<Digest>, Share)>,
}

/// What every tenant and adapter had so far.
#[derive(Default)]
pub struct Shares {
    tenants: Vec<Tenant>,
    /// How far ahead one may be of another that waits, when both hold as many places; weighted.
    quantum: u64,
}

fn cost(tokens: usize, sequence: &Sequence) -> u64 {
    tokens as u64 * TOKEN / u64::from(sequence.weight.max(1))
}

/// The least served of the present, or nothing where nobody is.
fn floor<'a>(shares: impl Iterator<Item = &'a Share>) -> u64 {
    shares.filter(|s| s.present > 0).map(|s| s.served).min().unwrap_or(0)
}

impl Shares {
    pub fn new(quantum_tokens: usize) -> Self {
        Self { tenants: Vec::new(), quantum: quantum_tokens as u64 * TOKEN }
    }

    /// Counts a new sequence in.
    pub fn enter(&mut self, sequence: &mut Sequence) {
        let least = floor(self.tenants.iter().map(|t| &t.share));
        let tenant = self.tenants.iter().position(|t| t.name == sequence.tenant);
        let tenant = tenant.unwrap_or_else(|| {
            let fresh = Tenant {
                name: sequence.tenant.clone(),
                share: Share::default(),
                adapters: Vec::new(),
            };
            // The place of one that left with no debt, so that the table stays as long as it must.
            let left = |t: &Tenant| t.share.present == 0 && t.share.served <= least;
            match self.tenants.iter().position(left) {
                Some(at) => {
                    self.tenants[at] = fresh;
                    at
                }
                None => {
                    self.tenants.push(fresh);
                    self.tenants.len() - 1
                }
            }
        });
        let of = &mut self.tenants[tenant];
        if of.share.present == 0 {
            of.share.served = of.share.served.max(least);
            of.adapters.clear();
        }
        of.share.present += 1;
        let least = floor(of.adapters.iter().map(|(_, s)| s));
        let digest = sequence.digest();
        let adapter = of.adapters.iter().position(|(d, _)| *d == digest).unwrap_or_else(|| {
            let fresh = (digest, Share::default());
            // As with tenants: there is no end of compositions.
            let left = |(_, s): &(Option<Digest>, Share)| s.present == 0 && s.served <= least;
            match of.adapters.iter().position(left) {
                Some(at) => {
                    of.adapters[at] = fresh;
                    at
                }
                None => {
                    of.adapters.push(fresh);
                    of.adapters.len() - 1
                }
            }
        });
        let share = &mut of.adapters[adapter].1;
        if share.present == 0 {
            share.served = share.served.max(least);
        }
        share.present += 1;
        sequence.flow = Flow { tenant, adapter };
    }

    fn of(&self, sequence: &Sequence) -> (&Share, &Share) {
        let tenant = &self.tenants[sequence.flow.tenant];
        (&tenant.share, &tenant.adapters[sequence.flow.adapter].1)
    }

    fn both(&mut self, sequence: &Sequence) -> [&mut Share; 2] {
        let tenant = &mut self.tenants[sequence.flow.tenant];
        [&mut tenant.share, &mut tenant.adapters[sequence.flow.adapter].1]
    }

    /// Counts a sequence out.
    pub fn leave(&mut self, sequence: &Sequence) {
        for share in self.both(sequence) {
            assert!(share.present > 0, "left its share twice");
            share.present -= 1;
        }
        if self.tenants.iter().all(|t| t.share.present == 0) {
            self.tenants.clear();
        }
    }

    /// Tokens of `sequence` were computed that never were before.
    pub fn charge(&mut self, sequence: &Sequence, tokens: usize) {
        for share in self.both(sequence) {
            share.served += cost(tokens, sequence);
        }
    }

    /// Counts places and debts of the running afresh.
    pub fn tally(&mut self, running: &[Sequence]) {
        for tenant in &mut self.tenants {
            (tenant.share.owed, tenant.share.load) = (0, 0);
            for (_, share) in &mut tenant.adapters {
                (share.owed, share.load) = (0, 0);
            }
        }
        running.iter().for_each(|s| self.begin(s));
    }

    /// `sequence` begins to run.
    pub fn begin(&mut self, sequence: &Sequence) {
        for share in self.both(sequence) {
            share.owed += cost(sequence.unpaid(), sequence);
            share.load += cost(1, sequence);
        }
    }

    /// `sequence`, which ran, has to wait.
    pub fn pause(&mut self, sequence: &Sequence) {
        for share in self.both(sequence) {
            share.owed -= cost(sequence.unpaid(), sequence);
            share.load -= cost(1, sequence);
        }
    }

    /// Whether the tenant of `one` comes before or with that of `other`.
    pub fn before(&self, one: &Sequence, other: &Sequence) -> bool {
        self.of(one).0.ahead() <= self.of(other).0.ahead()
    }

    /// What prompts are sorted by when they share a step's rows.
    pub fn rank(&self, sequence: &Sequence) -> u64 {
        self.of(sequence).0.ahead()
    }

    /// Whose turn it is among the waiting: the tenant that had least, in it the adapter that had
    /// least, of that whoever came first. Equals: who came first.
    pub fn next(&self, waiting: &VecDeque<Sequence>) -> Option<usize> {
        let first = waiting.iter().min_by_key(|s| self.of(s).0.ahead())?;
        let tenant = first.flow.tenant;
        let its = waiting.iter().enumerate().filter(|(_, s)| s.flow.tenant == tenant);
        its.min_by_key(|(_, s)| self.of(s).1.ahead()).map(|(at, _)| at)
    }

    /// Whose running sequence, the newest of its tenant (or of its adapter), has to wait for
    /// `comer`. Between tenants: one that would still hold as many places as the comer's, and is
    /// not behind it in tokens; with just as many places, one that is a quantum ahead. Between
    /// adapters of a tenant: one that is a quantum ahead. Nobody gives way before it has a token to
    /// show for its place, but for places its tenant has in excess; and none of those after the
    /// first `settled` does, which were taken in a moment ago.
    pub fn gives_way(
        &self,
        comer: &Sequence,
        running: &[Sequence],
        settled: usize,
    ) -> Option<usize> {
        let (tenant, adapter) = self.of(comer);
        let one = cost(1, comer);
        let mut best: Option<(u64, u64, usize)> = None;
        for (at, sequence) in running.iter().enumerate().take(settled) {
            let same_tenant = sequence.flow.tenant == comer.flow.tenant;
            if sequence.flow == comer.flow || !self.is_newest(at, running, same_tenant) {
                continue;
            }
            let (of_tenant, of_adapter) = self.of(sequence);
            let (its, ours) = if same_tenant { (of_adapter, adapter) } else { (of_tenant, tenant) };
            let excess = !same_tenant && its.load > ours.load + one && its.ahead() >= ours.ahead();
            let ahead = its.load >= ours.load + one
                && its.ahead() > ours.ahead() + self.quantum
                && sequence.has_gained;
            let key = (its.load, its.ahead(), at);
            if (excess || ahead) && best.is_none_or(|b| b < key) {
                best = Some(key);
            }
        }
        best.map(|(.., at)| at)
    }

    /// Whose newest running sequence gives its pages up when pages run out: the tenant's that holds
    /// most places; equals: the newest.
    pub fn heaviest(&self, running: &[Sequence]) -> Option<usize> {
        let load = |at: &usize| (self.of(&running[*at]).0.load, *at);
        (0..running.len()).max_by_key(load)
    }

    fn is_newest(&self, at: usize, running: &[Sequence], in_adapter: bool) -> bool {
        let flow = running[at].flow;
        !running[at + 1..].iter().any(|s| {
            s.flow.tenant == flow.tenant && (!in_adapter || s.flow.adapter == flow.adapter)
        })
    }
}
