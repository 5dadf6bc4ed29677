//! The keys that requests are judged by, found by the hash of their secret.
//!
//! Owns secrets for as long as they are shown once. Never stores or prints one. The thing to know:
//! a secret is 256 random bits, so its SHA-256 tells nothing and need not be slow; slow hashes are
//! for passwords that people choose.

use super::key::{Caller, Held, Key};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use subtle::ConstantTimeEq;

/// What a client sends as its key. Shown once, by [`Secret::reveal`].
pub struct Secret(String);

impl Secret {
    /// `pl-` and 64 hex digits.
    pub fn random() -> Self {
        Self(format!("pl-{}", hex::encode(rand::random::<[u8; 32]>())))
    }
    pub fn reveal(&self) -> &str {
        &self.0
    }
    pub(super) fn hash(&self) -> [u8; 32] {
        hash(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("pl-…")
    }
}

pub fn hash(secret: &str) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// What the store holds.
pub struct Rows {
    pub keys: Vec<Key>,
    pub secrets: Vec<SecretRow>,
}

/// One secret of a key; a rotated key has two for a while.
pub struct SecretRow {
    pub hash: [u8; 32],
    pub key: String,
    /// Unix seconds; `None` until it is rotated away.
    pub expires: Option<u64>,
}

struct Entry {
    hash: [u8; 32],
    expires: Option<u64>,
    held: Arc<Held>,
}

/// All keys at one moment.
pub struct Keyring {
    /// In the order in which they were made.
    keys: Vec<Arc<Held>>,
    /// By the first bytes of the hash: they only find candidates, all bytes are then compared.
    secrets: HashMap<[u8; 8], Vec<Entry>>,
    required: bool,
}

impl Keyring {
    pub fn new(rows: Rows, bootstrap: Option<[u8; 32]>) -> Self {
        let required = bootstrap.is_some() || !rows.keys.is_empty();
        let held = |key: Key| {
            let used = AtomicU64::new(key.last_used.unwrap_or(0));
            Arc::new(Held { key, used })
        };
        let keys: Vec<Arc<Held>> = rows.keys.into_iter().map(held).collect();
        let by_id: HashMap<&str, &Arc<Held>> =
            keys.iter().map(|held| (held.key.id.as_str(), held)).collect();
        let mut secrets: HashMap<[u8; 8], Vec<Entry>> = HashMap::new();
        let mut enter = |entry: Entry| {
            secrets.entry(prefix(&entry.hash)).or_default().push(entry);
        };
        for row in rows.secrets {
            if let Some(held) = by_id.get(row.key.as_str()) {
                let held = Arc::clone(held);
                enter(Entry { hash: row.hash, expires: row.expires, held });
            }
        }
        if let Some(hash) = bootstrap {
            enter(Entry { hash, expires: None, held: held(Key::whole("api_key")) });
        }
        Self { keys, secrets, required }
    }

    pub fn required(&self) -> bool {
        self.required
    }

    /// Whose secret this is, if it is good now; notes the use.
    pub fn find(&self, secret: &str, now: Duration) -> Option<Caller> {
        let hash = hash(secret);
        let candidates = self.secrets.get(&prefix(&hash))?;
        let equal = |entry: &&Entry| bool::from(entry.hash.as_slice().ct_eq(hash.as_slice()));
        let entry = candidates.iter().find(equal)?;
        let fresh = entry.expires.is_none_or(|end| now.as_secs() < end);
        (fresh && entry.held.key.is_good(now)).then(|| {
            let caller = Caller::new(entry.held.clone());
            caller.note_use(now);
            caller
        })
    }

    pub fn keys(&self) -> Vec<Key> {
        let shown = |held: &Arc<Held>| {
            let used = held.used.load(Ordering::Relaxed);
            Key { last_used: (used > 0).then_some(used), ..held.key.clone() }
        };
        self.keys.iter().map(shown).collect()
    }

    /// (id, last use) of keys that were used since they were read.
    pub fn take_used(&self) -> Vec<(String, u64)> {
        let used = self.keys.iter().map(|h| (&h.key, h.used.load(Ordering::Relaxed)));
        let newer = used.filter(|(key, used)| key.last_used.unwrap_or(0) < *used);
        newer.map(|(key, used)| (key.id.clone(), used)).collect()
    }
}

fn prefix(hash: &[u8; 32]) -> [u8; 8] {
    std::array::from_fn(|i| hash[i])
}
