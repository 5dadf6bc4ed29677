//! One at a time per key.
//!
//! Owns the queue before each name and each digest. Never counts or limits across keys. The thing
//! to know: a key that nobody holds or waits for takes no memory.

use dashmap::DashMap;
use std::hash::Hash;
use std::sync::Arc;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

type Queues<K> = Arc<DashMap<K, Arc<AsyncMutex<()>>>>;

pub struct KeyedMutex<K> {
    queues: Queues<K>,
}

/// The lock of one key, until dropped.
pub struct KeyedGuard<K: Hash + Eq> {
    key: K,
    queues: Queues<K>,
    guard: Option<OwnedMutexGuard<()>>,
}

impl<K: Hash + Eq + Clone> KeyedMutex<K> {
    pub fn new() -> Self {
        Self { queues: Arc::new(DashMap::new()) }
    }

    /// Waits until nobody else holds the key's lock; first come, first served.
    pub async fn take(&self, key: K) -> KeyedGuard<K> {
        let queue = self.queues.entry(key.clone()).or_default().clone();
        // Made before waiting, so that a caller that gives up cleans up as well.
        let mut guard = KeyedGuard { key, queues: self.queues.clone(), guard: None };
        guard.guard = Some(queue.lock_owned().await);
        guard
    }
}

impl<K: Hash + Eq> Drop for KeyedGuard<K> {
    fn drop(&mut self) {
        self.guard = None;
        // The map's own is the last one: takers clone under the entry's lock, as this looks.
        self.queues.remove_if(&self.key, |_, queue| Arc::strong_count(queue) == 1);
    }
}
