//! Who may what and how much: keys, tenants, limits, and the record of what was done with them.
//!
//! Owns its rows of `polylora.db`. Never sees HTTP, a model or an adapter's content, and
//! has no clock: every call brings `now`, the time since 1970, or [`Now`] where a rate runs. The
//! thing to know: a request is judged by its [`Caller`], made of its key when it came in; revoking
//! stops new requests, not running ones.

pub mod audit;
pub mod key;
mod keyring;
pub mod meters;
mod store;
mod ticket;

pub use key::{Caller, Key, Limits, NewKey, Reach, Scope};
use keyring::Keyring;
pub use keyring::Secret;
pub use meters::{Left, Standing};
use store::Store;
pub use ticket::Ticket;

use crate::clock::Now;
use crate::database::Storage;
use crate::error::{Error, Kind, Result, brief};
use audit::{Archived, Cut, Query, Record, Refusals};
use meters::Meters;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

/// Keys that are kept, revoked ones included.
const KEYS_MAX: usize = 100_000;
/// Audit records that wait for room on the disk; what is done then is refused long before.
const LATE_MAX: usize = 10_000;
/// Longest time that the secret before a rotation stays good: 30 days.
const OVERLAP_SECONDS_MAX: u64 = 30 * 86_400;

/// All that is known of keys. Cheap to clone.
#[derive(Clone)]
pub struct Access {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    /// What requests are judged by: a copy of the store's rows, replaced whole after each change.
    ring: RwLock<Keyring>,
    meters: Arc<Meters>,
    /// Limits of adapters, by name.
    adapters: RwLock<BTreeMap<String, Limits>>,
    /// Refused changes, which a key must not flood the audit log with.
    refusals: Refusals,
    /// The key of the configuration, hashed.
    bootstrap: Option<[u8; 32]>,
    /// Records of deeds that were done when the disk took no more.
    late: Mutex<Vec<Record>>,
    /// One change at a time.
    changes: tokio::sync::Mutex<()>,
}

impl Access {
    /// Opens or creates `polylora.db` in `dir`. `api_key` of the configuration opens everything.
    /// Errors: `data_dir_unsupported` (a newer format).
    pub async fn open(dir: &Path, api_key: Option<&str>) -> Result<Self> {
        Self::open_in(&Storage::of(dir), api_key).await
    }

    /// The same in a directory whose state others share.
    pub async fn open_in(storage: &Storage, api_key: Option<&str>) -> Result<Self> {
        let store = Store::open(storage).await?;
        let bootstrap = api_key.map(keyring::hash);
        let ring = Keyring::new(store.read().await?, bootstrap);
        let inner = Inner {
            meters: Arc::new(Meters::new(store.usage().await?)),
            adapters: RwLock::new(store.limits().await?),
            store,
            ring: RwLock::new(ring),
            refusals: Refusals::default(),
            bootstrap,
            late: Mutex::default(),
            changes: tokio::sync::Mutex::new(()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Whether requests need a key: one is configured, or one was ever made. The last one's end
    /// opens nothing.
    pub fn required(&self) -> bool {
        self.ring(Keyring::required)
    }

    /// Who sends `secret`. Errors: `invalid_api_key`, the same for an unknown, an expired and a
    /// revoked one.
    pub fn authenticate(&self, secret: Option<&str>, now: Duration) -> Result<Caller> {
        if !self.required() {
            return Ok(Caller::anonymous());
        }
        let found = secret.and_then(|secret| self.ring(|ring| ring.find(secret, now)));
        found.ok_or_else(|| {
            let message = "this server wants `authorization: Bearer <key>` with a key of its own";
            Error::new(Kind::Unauthorized, "invalid_api_key", message)
        })
    }

    /// Every key, revoked ones too, in the order in which they were made.
    pub fn keys(&self) -> Vec<Key> {
        self.ring(Keyring::keys)
    }

    /// Errors: `key_not_found`.
    pub fn key(&self, id: &str) -> Result<Key> {
        self.keys().into_iter().find(|key| key.id == id).ok_or_else(|| not_found(id))
    }

    /// Makes a key. Its secret is in the answer and nowhere else. Errors: `invalid_value`,
    /// `operator_key_missing`, `key_limit_reached`.
    pub async fn create(&self, new: NewKey, now: Duration) -> Result<(Key, Secret)> {
        let key = new.check(now)?;
        let _change = self.inner.changes.lock().await;
        let keys = self.keys();
        if keys.len() >= KEYS_MAX {
            let message = format!("{KEYS_MAX} keys are kept, which is the limit");
            return Err(Error::new(Kind::Capacity, "key_limit_reached", message));
        }
        // From the first key on, requests need one: it must be one that can make others.
        let opens = |k: &Key| k.is_operator() && k.is_good(now) && k.expires.is_none();
        if self.inner.bootstrap.is_none() && !opens(&key) && !keys.iter().any(opens) {
            let message = "the first key must be an operator's: scope admin, no tenant, no end";
            return Err(Error::new(Kind::Conflict, "operator_key_missing", message));
        }
        let secret = Secret::random();
        let rows = self.inner.store.add(&key, &secret.hash(), &self.used()).await?;
        self.replace(rows);
        Ok((key, secret))
    }

    /// Gives a key a new secret; the one before stays good for `overlap_seconds`. Errors:
    /// `key_not_found`, `key_revoked`, `invalid_value`.
    pub async fn rotate(
        &self,
        id: &str,
        overlap_seconds: u64,
        now: Duration,
    ) -> Result<(Key, Secret)> {
        if overlap_seconds > OVERLAP_SECONDS_MAX {
            let message = format!("`overlap_seconds` must be from 0 to {OVERLAP_SECONDS_MAX}");
            return Err(Error::invalid("invalid_value", message).param("overlap_seconds"));
        }
        let _change = self.inner.changes.lock().await;
        let key = self.key(id)?;
        if key.revoked.is_some() {
            let message = format!("the key `{id}` is revoked; make a new one");
            return Err(Error::new(Kind::Conflict, "key_revoked", message));
        }
        let secret = Secret::random();
        let until = now.as_secs() + overlap_seconds;
        let (hash, now, used) = (secret.hash(), now.as_secs(), self.used());
        let rows = self.inner.store.rotate(id, &hash, until, now, &used).await?;
        self.replace(rows);
        Ok((key, secret))
    }

    /// Ends a key at once; a second time changes nothing. Errors: `key_not_found`.
    pub async fn revoke(&self, id: &str, now: Duration) -> Result<Key> {
        let _change = self.inner.changes.lock().await;
        if self.key(id)?.revoked.is_none() {
            let rows = self.inner.store.revoke(id, now.as_secs(), &self.used()).await?;
            self.replace(rows);
        }
        self.key(id)
    }

    /// Writes down when keys were last used, what they used of their quotas, and how many refusals
    /// were only counted. To be called now and then: a crash loses what is newer.
    pub async fn flush(&self) -> Result<()> {
        let _change = self.inner.changes.lock().await;
        self.record_late().await?;
        let sums = self.inner.refusals.take_sums();
        if let Err(e) = self.inner.store.record(&sums).await {
            self.inner.refusals.put_back(sums);
            return Err(e);
        }
        self.inner.store.used(&self.used()).await?;
        let rows = self.inner.meters.take_unwritten();
        let written = self.inner.store.write_usage(&rows).await;
        if written.is_err() {
            self.inner.meters.not_written(&rows);
        }
        written
    }

    /// Takes a place for a request, before any work is done for it. Errors: `rate_limit_exceeded`.
    pub fn enter(&self, caller: &Caller, now: Now) -> Result<Ticket> {
        Ticket::take(&self.inner.meters, caller, now)
    }

    /// Lets a request that has its place reserve `tokens` of prompt and answer: by the limits of
    /// its key and of its adapters (each name once), or nothing is taken. Errors:
    /// `rate_limit_exceeded`, `quota_exceeded`, `request_exceeds_limit`.
    pub fn reserve<'a>(
        &self,
        ticket: &mut Ticket,
        adapters: impl IntoIterator<Item = &'a str>,
        tokens: u64,
        now: Now,
    ) -> Result<()> {
        let limits = adapters.into_iter().filter_map(|name| Some((name, self.limits(name)?)));
        let limits: Vec<(&str, Limits)> = limits.collect();
        ticket.admit(limits.iter().map(|(name, limits)| (*name, limits)), tokens, now)
    }

    /// Both at once. Errors: those of both.
    pub fn admit<'a>(
        &self,
        caller: &Caller,
        adapters: impl IntoIterator<Item = &'a str>,
        tokens: u64,
        now: Now,
    ) -> Result<Ticket> {
        let mut ticket = self.enter(caller, now)?;
        self.reserve(&mut ticket, adapters, tokens, now)?;
        Ok(ticket)
    }

    /// What is left to the caller's key in this minute.
    pub fn standing(&self, caller: &Caller, now: Now) -> Standing {
        self.inner.meters.standing(caller, now)
    }

    /// The limits of an adapter's name, if it has any.
    pub fn limits(&self, name: &str) -> Option<Limits> {
        let limits = self.inner.adapters.read().unwrap_or_else(PoisonError::into_inner);
        limits.get(name).cloned()
    }

    /// Sets the limits of an adapter's name, there or not yet; empty ones are none. Errors:
    /// `invalid_value`, `key_limit_reached`.
    pub async fn set_limits(&self, name: &str, limits: Limits) -> Result<()> {
        limits.check()?;
        if let Some(bound) = limits.tenant_bound() {
            let message = format!("`{bound}` bounds a tenant and goes with a key, not with a name");
            return Err(Error::invalid("invalid_value", message).param(bound));
        }
        let _change = self.inner.changes.lock().await;
        let write = || self.inner.adapters.write().unwrap_or_else(PoisonError::into_inner);
        if limits.is_empty() {
            self.inner.store.remove_limits(name).await?;
            write().remove(name);
            return Ok(());
        }
        if self.limits(name).is_none() && write().len() >= KEYS_MAX {
            let message = format!("{KEYS_MAX} adapters have limits, which is the limit");
            return Err(Error::new(Kind::Capacity, "key_limit_reached", message));
        }
        self.inner.store.set_limits(name, &limits).await?;
        write().insert(name.to_owned(), limits);
        Ok(())
    }

    /// Whether `caller` may try to change something: not while its refusals are a flood. Errors:
    /// `rate_limit_exceeded`.
    pub fn check_refusals(&self, caller: &Caller, now: Duration) -> Result<()> {
        self.inner.refusals.check(caller, now)
    }

    /// The record, if it is to be written down by [`record`](Self::record); refusals too many in a
    /// minute are summed and written by [`flush`](Self::flush).
    pub fn sift(&self, caller: &Caller, record: Record, now: Duration) -> Option<Record> {
        self.inner.refusals.sift(caller, record, now)
    }

    /// Appends to the audit log; synced when it returns. What cannot be written is kept and tried
    /// again by `flush`.
    pub async fn record(&self, record: &Record) -> Result<()> {
        let written = self.inner.store.record(std::slice::from_ref(record)).await;
        if written.is_err() {
            let mut late = self.late();
            if late.len() < LATE_MAX {
                late.push(record.clone());
            }
        }
        written
    }

    /// Writes records that could not be written when they were made.
    async fn record_late(&self) -> Result<()> {
        let late = std::mem::take(&mut *self.late());
        if late.is_empty() {
            return Ok(());
        }
        let written = self.inner.store.record(&late).await;
        if written.is_err() {
            self.late().splice(..0, late);
        }
        written
    }

    /// Records of the audit log that wait to be written.
    pub fn records_late(&self) -> usize {
        self.late().len()
    }

    fn late(&self) -> MutexGuard<'_, Vec<Record>> {
        self.inner.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves records out of the audit log into a file; `None` when there are none to move.
    pub async fn rotate_audit(&self, cut: Cut, now: Duration) -> Result<Option<Archived>> {
        let _change = self.inner.changes.lock().await;
        let before = match cut {
            Cut::Before(id) => id,
            Cut::Older(age) => {
                let since = now.saturating_sub(age).as_millis() as u64;
                self.inner.store.first_since(since).await?
            }
        };
        self.inner.store.archive(before).await
    }

    /// Records of the audit log, newest first.
    pub async fn records(&self, query: &Query) -> Result<Vec<Record>> {
        self.inner.store.records(query).await
    }

    fn ring<T>(&self, look: impl FnOnce(&Keyring) -> T) -> T {
        look(&self.inner.ring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Last uses that the store was not told of.
    fn used(&self) -> Vec<(String, u64)> {
        self.ring(Keyring::take_used)
    }

    /// After a change; the caller holds `changes`.
    fn replace(&self, rows: keyring::Rows) {
        let ring = Keyring::new(rows, self.inner.bootstrap);
        *self.inner.ring.write().unwrap_or_else(PoisonError::into_inner) = ring;
    }
}

fn not_found(id: &str) -> Error {
    let shown = brief(id);
    Error::not_found("key_not_found", format!("there is no key `{shown}`")).param("id")
}
