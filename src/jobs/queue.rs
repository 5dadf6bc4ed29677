//! Whose job is next: tenants take turns, the jobs of one tenant come in their order.
//!
//! Owns the places of jobs under way and when each tenant was last served. Never sees a job. The
//! thing to know: a tenant has one job under way at most, so a second tenant's begins at once, and
//! a third one's when the first that had its turn is set aside.

use std::collections::HashMap;

/// Jobs under way at once: each holds its half-made result in memory.
const PLACES: usize = 2;

/// `None`: operators.
type Tenant = Option<String>;

#[derive(Default)]
pub struct Queue {
    under_way: Vec<Tenant>,
    /// Number of the last turn of each tenant.
    served: HashMap<Tenant, u64>,
    given: u64,
}

impl Queue {
    /// The next of the jobs that wait, as (number, tenant), and a place for it: that of the tenant
    /// which was served longest ago.
    pub fn take(&mut self, waiting: impl Iterator<Item = (u64, Tenant)>) -> Option<u64> {
        if self.under_way.len() >= PLACES {
            return None;
        }
        let free = waiting.filter(|(_, tenant)| !self.under_way.contains(tenant));
        let last = |tenant: &Tenant| self.served.get(tenant).copied().unwrap_or(0);
        let (number, tenant) = free.min_by_key(|(number, tenant)| (last(tenant), *number))?;
        self.given += 1;
        self.served.insert(tenant.clone(), self.given);
        self.under_way.push(tenant);
        Some(number)
    }

    /// The tenant's job is over, or set aside.
    pub fn give_back(&mut self, tenant: &Tenant) {
        if let Some(at) = self.under_way.iter().position(|t| t == tenant) {
            self.under_way.remove(at);
        }
        if self.under_way.is_empty() && self.served.len() > 1000 {
            self.served.clear();
        }
    }

    /// Whether a tenant waits for a place while none is free.
    pub fn is_wanted(&self, mut waiting: impl Iterator<Item = (u64, Tenant)>) -> bool {
        let full = self.under_way.len() >= PLACES;
        full && waiting.any(|(_, tenant)| !self.under_way.contains(&tenant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs<'a>(all: &'a [(u64, &str)]) -> impl Iterator<Item = (u64, Tenant)> + use<'a> {
        all.iter().map(|(number, tenant)| (*number, Some(tenant.to_string())))
    }

    #[test]
    fn tenants_take_turns_and_each_has_one_job_under_way() {
        let mut queue = Queue::default();
        let of = |tenant: &str| Some(tenant.to_owned());
        let waiting = [(1, "a"), (2, "a"), (3, "a"), (4, "b"), (5, "c")];
        assert_eq!(queue.take(jobs(&waiting)), Some(1));
        assert_eq!(queue.take(jobs(&waiting[1..])), Some(4), "not a second one of a");
        assert_eq!(queue.take(jobs(&waiting[1..])), None);
        assert!(!queue.is_wanted(jobs(&waiting[1..3])), "a waits for nobody but itself");
        assert!(queue.is_wanted(jobs(&waiting[1..])));
        queue.give_back(&of("a"));
        assert_eq!(queue.take(jobs(&[(2, "a"), (3, "a"), (5, "c")])), Some(5), "c had none yet");
        queue.give_back(&of("b"));
        assert_eq!(queue.take(jobs(&[(2, "a"), (3, "a"), (6, "b")])), Some(2), "b was after a");
    }

    #[test]
    fn one_tenant_alone_has_one_job_at_a_time() {
        let mut queue = Queue::default();
        assert_eq!(queue.take([(1, None), (2, None)].into_iter()), Some(1));
        assert_eq!(queue.take([(2, None)].into_iter()), None);
        queue.give_back(&None);
        assert_eq!(queue.take([(2, None)].into_iter()), Some(2));
    }
}
