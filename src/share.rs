//! A bounded resource that tenants share: places to work in, or bytes.
//!
//! Owns who holds how much and whose turn is next. Never knows what the resource is. The thing to
//! know: a tenant may hold as much as it leaves free, so that one alone gets half and a newcomer
//! always finds something; requests without a tenant are an operator's and only bound by the whole.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// Whether one that holds `own` may take `amount` more of something of which `free` is left: as
/// much as it leaves free.
pub fn fair(own: u64, amount: u64, free: u64) -> bool {
    own.saturating_add(amount) <= free
}

/// The resource. Usable from any thread; no call blocks.
pub struct Pool {
    size: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: u64,
    by_tenant: HashMap<Arc<str>, u64>,
    /// Tenants with someone waiting, the one whose turn is next first.
    waiting: VecDeque<(Arc<str>, VecDeque<oneshot::Sender<Permit>>)>,
}

/// A part of the resource, given back when dropped.
pub struct Permit {
    pool: Arc<Pool>,
    /// Empty for an operator.
    tenant: Arc<str>,
    amount: u64,
}

impl Pool {
    pub fn new(size: u64) -> Arc<Self> {
        Arc::new(Self { size, state: Mutex::default() })
    }

    /// What there is in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What is held now, by all together.
    pub fn held(&self) -> u64 {
        self.state().held
    }

    /// What `tenant` holds now.
    pub fn held_by(&self, tenant: &str) -> u64 {
        self.state().by_tenant.get(tenant).copied().unwrap_or(0)
    }

    /// Whether somebody waits.
    pub fn contended(&self) -> bool {
        let mut state = self.state();
        state.forget_gone();
        !state.waiting.is_empty()
    }

    /// Takes `amount` for `tenant` (empty: an operator) now, or not at all.
    pub fn try_take(self: &Arc<Self>, tenant: &str, amount: u64) -> Option<Permit> {
        let mut state = self.state();
        let fits = state.fits(self.size, tenant, amount);
        fits.then(|| state.give(self, tenant.into(), amount))
    }

    /// Takes one unit once it is `tenant`'s turn: tenants that wait are served in rotation, the
    /// requests of one tenant in order. Dropping the future gives the turn up.
    pub async fn take(self: &Arc<Self>, tenant: &str) -> Permit {
        let turn = {
            let mut state = self.state();
            state.forget_gone();
            let first = state.waiting.iter().all(|(t, _)| **t != *tenant);
            if first && state.fits(self.size, tenant, 1) {
                return state.give(self, tenant.into(), 1);
            }
            let (sender, turn) = oneshot::channel();
            match state.waiting.iter_mut().find(|(t, _)| **t == *tenant) {
                Some((_, queue)) => queue.push_back(sender),
                None => state.waiting.push_back((tenant.into(), VecDeque::from([sender]))),
            }
            turn
        };
        // The pool outlives this call and never drops a sender that somebody waits for.
        turn.await.expect("a waiting tenant is served")
    }

    /// Also after a panic elsewhere: each change is a few map operations.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(self: &Arc<Self>, tenant: &str, amount: u64) {
        let mut state = self.state();
        state.take_back(tenant, amount);
        state.serve(self);
    }
}

impl Permit {
    /// Takes `amount` more of the same for the same tenant, or nothing.
    pub fn try_grow(&mut self, amount: u64) -> bool {
        match self.pool.try_take(&self.tenant, amount) {
            Some(mut more) => {
                self.amount += std::mem::take(&mut more.amount);
                true
            }
            None => false,
        }
    }

    /// Whose it is; empty for an operator.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Gives back all but `amount`.
    pub fn shrink_to(&mut self, amount: u64) {
        if amount < self.amount {
            let surplus = self.amount - amount;
            self.amount = amount;
            self.pool.give_back(&self.tenant, surplus);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.amount > 0 {
            self.pool.give_back(&self.tenant, self.amount);
        }
    }
}

impl State {
    fn fits(&self, size: u64, tenant: &str, amount: u64) -> bool {
        let free = size - self.held;
        let own = self.by_tenant.get(tenant).copied().unwrap_or(0);
        amount <= free && (tenant.is_empty() || fair(own, amount, free))
    }

    fn give(&mut self, pool: &Arc<Pool>, tenant: Arc<str>, amount: u64) -> Permit {
        self.held += amount;
        *self.by_tenant.entry(tenant.clone()).or_default() += amount;
        Permit { pool: pool.clone(), tenant, amount }
    }

    fn take_back(&mut self, tenant: &str, amount: u64) {
        self.held -= amount;
        if let Some(own) = self.by_tenant.get_mut(tenant) {
            *own -= amount;
            if *own == 0 {
                self.by_tenant.remove(tenant);
            }
        }
    }

    /// Takes out those that hung up while they waited.
    fn forget_gone(&mut self) {
        self.waiting.retain_mut(|(_, queue)| {
            queue.retain(|sender| !sender.is_closed());
            !queue.is_empty()
        });
    }

    /// Serves those that can be, one of a tenant at a time: a tenant that was served goes to the
    /// end of the queue.
    fn serve(&mut self, pool: &Arc<Pool>) {
        let mut at = 0;
        while let Some((tenant, _)) = self.waiting.get(at) {
            if !self.fits(pool.size, tenant, 1) {
                at += 1;
                continue;
            }
            let (tenant, mut queue) = self.waiting.remove(at).expect("it was there");
            while let Some(sender) = queue.pop_front() {
                let permit = self.give(pool, tenant.clone(), 1);
                match sender.send(permit) {
                    Ok(()) => break,
                    // It hung up meanwhile. Dropping the permit as it is would lock again.
                    Err(mut permit) => self.take_back(&tenant, std::mem::take(&mut permit.amount)),
                }
            }
            if !queue.is_empty() {
                self.waiting.push_back((tenant, queue));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn a_tenant_may_hold_as_much_as_it_leaves_free() {
        let pool = Pool::new(100);
        let mut a = pool.try_take("a", 40).expect("40 of 100");
        assert!(a.try_grow(10) && !a.try_grow(1), "half is a's");
        let b = pool.try_take("b", 25).expect("half of the rest");
        assert!(pool.try_take("b", 1).is_none() && pool.try_take("a", 1).is_none());
        let operator = pool.try_take("", 25).expect("an operator may take it all");
        assert_eq!(pool.held(), 100);
        drop((a, operator));
        assert!(pool.try_take("b", 26).is_some(), "what others gave back is free for b");
        drop(b);
        assert_eq!(pool.held(), 0);
    }

    #[test]
    fn one_place_is_anyones() {
        let pool = Pool::new(1);
        let one = pool.try_take("a", 1).expect("the only place");
        assert!(pool.try_take("b", 1).is_none());
        drop(one);
        assert!(pool.try_take("b", 1).is_some());
    }

    #[test]
    fn tenants_that_wait_are_served_in_rotation() {
        let pool = Pool::new(2);
        let first = pool.try_take("a", 1).expect("free");
        // The other place is not a's, however many it asks for.
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(pool.take("a"))).collect();
        assert!(waiting.iter_mut().all(|w| w.now_or_never().is_none()));
        let b = pool.take("b").now_or_never().expect("b does not wait behind a");
        let mut more = Box::pin(pool.take("b"));
        assert!((&mut more).now_or_never().is_none());
        // The first of a's is served, and then it is b's turn.
        drop(first);
        let second = (&mut waiting[0]).now_or_never().expect("a's turn");
        drop(second);
        drop(b);
        assert!((&mut more).now_or_never().is_some(), "b's turn");
    }

    #[test]
    fn who_hangs_up_while_waiting_leaves_no_trace() {
        let pool = Pool::new(2);
        let held = pool.try_take("a", 1).expect("free");
        let mut waiting = Box::pin(pool.take("a"));
        assert!((&mut waiting).now_or_never().is_none());
        drop(waiting);
        drop(held);
        let again = pool.take("a").now_or_never().expect("nobody is before it");
        // Served and not yet looked at when it hangs up.
        let mut late = Box::pin(pool.take("a"));
        assert!((&mut late).now_or_never().is_none());
        drop(again);
        drop(late);
        assert_eq!(pool.held(), 0);
    }
}
