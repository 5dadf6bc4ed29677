//! What is in use and must not go: files that jobs read, uploads that are being put together.
//!
//! Owns the count for each id. Never looks whether an id exists.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The counts. Cheap to clone.
#[derive(Clone, Default)]
pub struct Guards {
    counts: Arc<Mutex<HashMap<String, usize>>>,
}

/// Keeps what it was taken for, until it is dropped.
pub struct Guard {
    guards: Guards,
    id: String,
}

impl Guards {
    pub fn take(&self, id: &str) -> Guard {
        *self.counts().entry(id.to_owned()).or_default() += 1;
        Guard { guards: self.clone(), id: id.to_owned() }
    }

    /// A guard, if nobody else has one.
    pub fn take_alone(&self, id: &str) -> Option<Guard> {
        let mut counts = self.counts();
        if counts.contains_key(id) {
            return None;
        }
        counts.insert(id.to_owned(), 1);
        Some(Guard { guards: self.clone(), id: id.to_owned() })
    }

    pub fn hold(&self, id: &str) -> bool {
        self.counts().contains_key(id)
    }

    /// Also after a panic elsewhere: each change is one map operation.
    fn counts(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut counts = self.guards.counts();
        if let Some(count) = counts.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.id);
            }
        }
    }
}
