//! The one place to compute at: who is there, and whose turn is next.
//!
//! Owns how long each tenant under way has computed. Never computes. The thing to know: the tenant
//! that has computed least goes first, so one with long pieces of work makes another wait for one
//! of them at most; a newcomer starts where the least served stands.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So long a free place is kept for one that has computed less and is between two pieces.
const GRACE: Duration = Duration::from_millis(20);

#[derive(Default)]
pub struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    busy: bool,
    /// Since when it is not.
    free: Option<Instant>,
    tenants: BTreeMap<String, Account>,
}

/// Of a tenant under way.
#[derive(Default)]
struct Account {
    jobs: u32,
    waiting: u32,
    worked: Duration,
}

impl Desk {
    /// Counts a job of the tenant in.
    pub fn enter(&self, tenant: &str) {
        let mut state = self.lock();
        let least = state.tenants.values().map(|account| account.worked).min();
        let account = state
            .tenants
            .entry(tenant.to_owned())
            .or_insert_with(|| Account { worked: least.unwrap_or_default(), ..Account::default() });
        account.jobs += 1;
    }

    /// Counts it out.
    pub fn leave(&self, tenant: &str) {
        let mut state = self.lock();
        if let Some(account) = state.tenants.get_mut(tenant) {
            account.jobs = account.jobs.saturating_sub(1);
            if account.jobs == 0 {
                state.tenants.remove(tenant);
            }
        }
        self.changed.notify_all();
    }

    /// Jobs that are counted in.
    pub fn jobs(&self) -> u32 {
        self.lock().tenants.values().map(|account| account.jobs).sum()
    }

    /// Waits for the tenant's turn, works, and says how long that took.
    pub fn compute<T>(&self, tenant: &str, work: impl FnOnce() -> T) -> (T, Duration) {
        self.take(tenant);
        let turn = Turn { desk: self, tenant, begun: Instant::now() };
        let done = work();
        (done, turn.begun.elapsed())
    }

    fn take(&self, tenant: &str) {
        let mut state = self.lock();
        state.account(tenant, |account| account.waiting += 1);
        while !state.is_next(tenant) {
            let waited = self.changed.wait_timeout(state, GRACE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.account(tenant, |account| account.waiting -= 1);
        state.busy = true;
    }

    /// Also after a panic elsewhere: each change is a few map operations.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn account(&mut self, tenant: &str, change: impl FnOnce(&mut Account)) {
        change(self.tenants.entry(tenant.to_owned()).or_default());
    }

    fn is_next(&self, tenant: &str) -> bool {
        let worked = self.tenants.get(tenant).map_or(Duration::ZERO, |own| own.worked);
        let fresh = self.free.is_some_and(|since| since.elapsed() < GRACE);
        let before = |(name, other): (&String, &Account)| {
            name != tenant && other.worked < worked && (other.waiting > 0 || fresh)
        };
        !self.busy && !self.tenants.iter().any(before)
    }
}

/// The place, taken; given back also by a panic.
struct Turn<'a> {
    desk: &'a Desk,
    tenant: &'a str,
    begun: Instant,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.desk.lock();
        let worked = self.begun.elapsed();
        if let Some(account) = state.tenants.get_mut(self.tenant) {
            account.worked += worked;
        }
        (state.busy, state.free) = (false, Some(Instant::now()));
        self.desk.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn small_pieces_wait_for_one_large_piece_at_most() {
        let desk = Arc::new(Desk::default());
        let order = Arc::new(Mutex::new(Vec::new()));
        desk.enter("large");
        let large = |desk: &Desk| {
            desk.compute("large", || std::thread::sleep(Duration::from_millis(200)));
            order.lock().unwrap().push("large");
        };
        large(&desk);
        desk.enter("small");
        std::thread::scope(|scope| {
            scope.spawn(|| (0..3).for_each(|_| large(&desk)));
            scope.spawn(|| {
                for _ in 0..20 {
                    desk.compute("small", || std::thread::sleep(Duration::from_millis(1)));
                    order.lock().unwrap().push("small");
                }
            });
        });
        let order = order.lock().unwrap();
        let last = order.iter().rposition(|who| *who == "small").expect("it worked");
        let before = order[..last].iter().filter(|who| **who == "large").count();
        assert!(before <= 2, "the first, and one more: {order:?}");
        assert_eq!(desk.jobs(), 2);
        desk.leave("small");
        desk.leave("large");
        assert_eq!(desk.jobs(), 0);
    }
}
