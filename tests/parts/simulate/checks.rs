//! What must hold after each event and of each plan, looked up from scratch.
//!
//! Owns no state. Never trusts a count that it can make itself. The thing to know: invariants 2 to
//! 5 of the engine, and that a lease goes with its sequence.

use crate::simulate::client::Place;
use crate::simulate::world::World;
use polylora::engine::pages::PAGE;
use polylora::engine::scheduler::Planned;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

impl World {
    /// A plan is a subtraction within the budgets, and starves nobody.
    pub fn check_plan(&mut self) {
        let running = self.scheduler.running();
        let entries = self.plan.entries();
        let rows: usize = entries.iter().map(|p| p.len).sum();
        let logits = |p: &Planned| {
            if p.prompt_logits { p.len } else { usize::from(p.samples) }
        };
        let logit_rows: usize = entries.iter().map(logits).sum();
        assert_eq!((rows, logit_rows), (self.plan.rows(), self.plan.logit_rows()));
        assert!(rows <= self.budgets.rows_max && logit_rows <= self.budgets.logit_rows_max);
        assert!(running.len() <= self.budgets.sequences_max);
        assert!(rows > 0 || self.scheduler.is_empty(), "work and no plan");
        let planned: BTreeSet<usize> = entries.iter().map(|p| p.sequence).collect();
        assert_eq!(planned.len(), entries.len(), "a sequence is planned once");
        assert_eq!(planned.len(), running.len(), "a running sequence is starved");
        for p in entries {
            let sequence = &running[p.sequence];
            assert_eq!(p.start, sequence.computed);
            assert!(p.len > 0 && p.start + p.len <= sequence.tokens.len());
            assert_eq!(p.samples, p.start + p.len == sequence.tokens.len());
            let client = self.clients.get_mut(&sequence.id).unwrap();
            let told = client.prompt_told == client.request.prompt.len();
            let wanted = client.request.sampling.prompt_logprobs.is_some() && !told;
            assert_eq!(p.prompt_logits, wanted);
            client.place = Place::Admitted;
        }
        for (id, client) in self.clients.iter().filter(|(_, c)| c.alive()) {
            assert!(self.seen.steps <= client.deadline, "sequence {id} waits for ever");
        }
        self.check_turns();
    }

    /// While one waits for its first step, no other tenant gets far ahead of its own.
    fn check_turns(&mut self) {
        let most = self.overtaking_max();
        for (id, client) in self.clients.iter().filter(|(_, c)| c.place == Place::Queue) {
            let since = |tenant: &String| self.done[tenant] - client.before[tenant];
            let own = since(&client.request.tenant);
            for other in self.done.keys() {
                let ahead = since(other).saturating_sub(own);
                self.seen.overtaken_percent_max =
                    self.seen.overtaken_percent_max.max((100 * ahead / most) as usize);
                assert!(ahead <= most, "{other:?} is {ahead} ahead while sequence {id} waits");
            }
        }
    }

    /// Everything that holds between any two events.
    pub fn check(&mut self) {
        let (running, waiting) = (self.scheduler.running(), self.scheduler.waiting());
        // In exactly one place; and nobody overtakes of one tenant and adapter: running, then
        // waiting, in the order in which they came.
        let mut ids: Vec<u64> = running.iter().chain(waiting).map(|s| s.id).collect();
        let mut last = BTreeMap::new();
        for sequence in running.iter().chain(waiting) {
            let flow = (sequence.tenant.clone(), sequence.digest());
            let before = last.insert(flow, sequence.id);
            assert!(before < Some(sequence.id), "{} was overtaken", sequence.id);
        }
        ids.sort_unstable();
        let alive = self.clients.iter().filter(|(_, c)| c.alive()).map(|(id, _)| *id);
        assert_eq!(ids, alive.collect::<Vec<_>>(), "waiting, running or gone");
        let queued = || self.clients.values().filter(|c| c.place == Place::Queue);
        let queued_tokens = queued().map(|c| c.request.prompt.len()).sum();
        assert_eq!(self.scheduler.queued(), (queued().count(), queued_tokens));
        for sequence in waiting {
            assert!(sequence.pages.is_empty() && sequence.computed == 0, "waiting holds nothing");
        }
        for sequence in running.iter().chain(waiting) {
            let client = &self.clients[&sequence.id];
            assert!(sequence.computed <= sequence.tokens.len(), "computed <= known");
            assert!(client.tokens.starts_with(&sequence.tokens), "tokens change with neighbours");
            assert!(sequence.tokens.len() < client.len_max, "an ended sequence lives on");
            assert!(sequence.cached < sequence.prompt_len);
            assert!(sequence.cached == 0 || sequence.sampling.prompt_logprobs.is_none());
            for (position, kv) in client.kv[..sequence.computed].iter().enumerate() {
                let page = sequence.pages[position / PAGE] as usize;
                assert_eq!(self.kv[page][position % PAGE], *kv, "KV of another prefix or identity");
            }
        }
        self.check_pages();
        for client in self.clients.values().filter(|c| !c.alive()) {
            let leases = client.version.as_ref().map_or(1, Arc::strong_count);
            assert_eq!(leases, 1, "a lease outlives its sequence");
        }
    }

    /// Who holds what, counted from scratch.
    fn check_pages(&mut self) {
        let mut holders = vec![0; self.budgets.pages];
        for sequence in self.scheduler.running() {
            let (least, most) = (sequence.tokens.len() - 1, sequence.tokens.len());
            let fits = least.div_ceil(PAGE)..=most.div_ceil(PAGE);
            assert!(fits.contains(&sequence.pages.len()), "a page too many or too few");
            for (index, &page) in sequence.pages.iter().enumerate() {
                holders[page as usize] += 1;
                assert!(!sequence.pages[..index].contains(&page), "a page twice in a sequence");
            }
        }
        for sequence in self.scheduler.running() {
            for &page in &sequence.pages[sequence.computed / PAGE..] {
                assert_eq!(holders[page as usize], 1, "shared before it is computed");
            }
        }
        let held = holders.iter().filter(|&&h| h > 0).count();
        self.seen.shared_pages += holders.iter().filter(|&&h| h > 1).count();
        assert_eq!(self.book.used(), held);
        assert_eq!(self.book.free() + held, self.book.total());
        for (page, &count) in holders.iter().enumerate() {
            assert_eq!(self.book.holders(page as u32), count, "holders of page {page}");
        }
        self.book.check(self.scheduler.running().iter().map(|s| &s.pages[..]));
    }
}
