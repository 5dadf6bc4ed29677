//! One at a time per key.
//!
//! Owns the queue before each name and each digest. Never counts or limits across keys. The thing
//! to know: a key that nobody holds or waits for takes no memory.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

type Queues<K> = Arc<Mutex<HashMap<K, Arc<AsyncMutex<()>>>>>;

pub struct KeyedMutex<K> {
    queues: Queues<K>,
}

/// The turn of one key, until dropped.
pub struct KeyedGuard<K: Hash + Eq> {
    key: K,
    queues: Queues<K>,
    guard: Option<OwnedMutexGuard<()>>,
}

impl<K: Hash + Eq + Clone> KeyedMutex<K> {
    pub fn new() -> Self {
        Self { queues: Arc::default() }
    }

    /// Waits until nobody else holds the key's turn; first come, first served.
    pub async fn take(&self, key: K) -> KeyedGuard<K> {
        let queue = {
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            queues.entry(key.clone()).or_default().clone()
        };
        // Made before waiting, so that a caller that gives up cleans up as well.
        let mut turn = KeyedGuard { key, queues: self.queues.clone(), guard: None };
        turn.guard = Some(queue.lock_owned().await);
        turn
    }
}

impl<K: Hash + Eq> Drop for KeyedGuard<K> {
    fn drop(&mut self) {
        self.guard = None;
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's own is the last one: takers clone under the map's lock, as this looks.
        if queues.get(&self.key).is_some_and(|queue| Arc::strong_count(queue) == 1) {
            queues.remove(&self.key);
        }
    }
}
