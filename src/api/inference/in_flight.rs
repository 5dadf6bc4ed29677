//! The requests for adapters that are in flight, for the gauges of gateways.
//!
//! Owns who runs and who waits, by adapter. Never holds a request: an entry leaves with its guard.

use crate::engine::Admission;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All of them.
#[derive(Default)]
pub struct InFlight {
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    /// Numbers given out.
    given: u64,
    by_number: HashMap<u64, Entry>,
}

struct Entry {
    adapters: BTreeSet<String>,
    admissions: Vec<Admission>,
}

impl InFlight {
    /// Also after a panic elsewhere: each change is one map operation.
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names with a sequence in the steps, and names with one in the queue; sorted.
    pub fn adapters(&self) -> (Vec<String>, Vec<String>) {
        let entries = self.lock();
        let (mut running, mut waiting) = (BTreeSet::new(), BTreeSet::new());
        for entry in entries.by_number.values() {
            for admission in &entry.admissions {
                let names = if admission.get().is_some() { &mut running } else { &mut waiting };
                names.extend(entry.adapters.iter().cloned());
            }
        }
        (running.into_iter().collect(), waiting.into_iter().collect())
    }

    /// Enters a request for `adapters`; none is the base, which is not counted here.
    pub fn enter(self: &Arc<Self>, adapters: BTreeSet<String>) -> InFlightGuard {
        let id = (!adapters.is_empty()).then(|| {
            let mut entries = self.lock();
            entries.given += 1;
            let id = entries.given;
            entries.by_number.insert(id, Entry { adapters, admissions: Vec::new() });
            id
        });
        InFlightGuard { all: self.clone(), id }
    }
}

/// A request's entry; dropping it takes it out.
pub struct InFlightGuard {
    all: Arc<InFlight>,
    id: Option<u64>,
}

impl InFlightGuard {
    /// Its sequences are queued.
    pub fn queued(&self, admissions: &[Admission]) {
        let mut entries = self.all.lock();
        if let Some(entry) = self.id.and_then(|id| entries.by_number.get_mut(&id)) {
            entry.admissions = admissions.to_vec();
        }
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.all.lock().by_number.remove(&id);
        }
    }
}
