//! Changes to a name that bring no new files: rollback, pin, unpin, and what a change may expect.
//!
//! Owns their order: load first, record, then move. Never reads files itself. The thing to know:
//! each runs under the name's lock, so what it expected still holds when it acts.

use super::Inner;
use super::guards::Guard;
use crate::adapters::actor::{Actor, Tenant};
use crate::adapters::version::model_not_found;
use crate::adapters::version::{Entry, Expected, Version};
use crate::error::{Error, Kind, Result};
use std::sync::Arc;
use tokio::time::Instant;

impl Inner {
    /// Whether the name is what the caller takes it for. The caller holds its lock.
    pub fn expect(&self, name: &str, expected: &[Expected]) -> Result<()> {
        let current = self.state().current(name);
        let now = match &current {
            None => "there is no such adapter".to_owned(),
            Some(v) => format!("its current version is {} ({})", v.number, v.digest),
        };
        for expected in expected {
            let (holds, wanted) = match (expected, &current) {
                (Expected::Absent, now) => (now.is_none(), "no adapter of that name".to_owned()),
                (Expected::Present, now) => (now.is_some(), "an adapter of that name".to_owned()),
                (Expected::Version(n), now) => {
                    (now.as_ref().is_some_and(|v| v.number == *n), format!("version {n}"))
                }
                (Expected::Content(all), now) => {
                    let listed: Vec<String> = all.iter().map(|d| d.to_string()).collect();
                    let listed = match listed.is_empty() {
                        true => "a content that no version has".to_owned(),
                        false => listed.join(" or "),
                    };
                    (now.as_ref().is_some_and(|v| all.contains(&v.digest)), listed)
                }
            };
            if !holds {
                let message = format!("`{name}` is not as expected ({wanted}): {now}");
                return Err(Error::new(Kind::Precondition, "version_conflict", message));
            }
        }
        Ok(())
    }

    /// See `Registry::roll_back`.
    pub async fn roll_back(
        self: &Arc<Self>,
        name: String,
        number: Option<u64>,
        expected: Vec<Expected>,
        by: Actor,
    ) -> Result<Entry> {
        let _turn = self.name_locks.take(name.clone()).await;
        let (version, _kept) = {
            if !self.state().has(&name) {
                return Err(model_not_found(&name));
            }
            self.check_right(&name, &by).await?;
            self.expect(&name, &expected)?;
            let state = self.state();
            let number = match number {
                Some(number) => number,
                None => state.before_current(&name).ok_or_else(|| {
                    let message = format!("adapter `{name}` has no servable version before this");
                    Error::new(Kind::Conflict, "nothing_to_roll_back", message)
                })?,
            };
            state.keep(&name, number)?
        };
        // Warm before the name moves. Without room it is loaded by the first request instead: a
        // rollback is the last thing that should fail because the server is busy.
        let loaded = self.bring(&version, Instant::now(), &by.tenant).await;
        match &loaded {
            Err(e) if e.kind == Kind::Capacity => {
                tracing::warn!(adapter = %version.id(), error = %e, "rolled back to what is cold");
            }
            Err(e) => return Err(e.clone()),
            Ok(_) => {}
        }
        self.store.set_current(&name, version.number).await?;
        tracing::info!(adapter = %version.id(), digest = %version.digest, "rolled back");
        let mut state = self.state();
        state.set_current(&name, version.number);
        let entry = state.entry(&name, version.number);
        drop(state);
        self.wake_reaper();
        entry.ok_or_else(|| model_not_found(&name))
    }

    /// See `Registry::pin`.
    pub async fn pin(
        self: &Arc<Self>,
        name: String,
        number: Option<u64>,
        by: Actor,
    ) -> Result<Entry> {
        let _turn = self.name_locks.take(name.clone()).await;
        let (version, _kept) = self.named(&name, number)?;
        self.check_right(&name, &by).await?;
        self.check_pin(&version, &by.tenant)?;
        let hold = self.bring(&version, Instant::now(), &by.tenant).await?;
        // Looked at again where no other claim comes between.
        let _claim = self.claims.lock().await;
        self.check_pin(&version, &by.tenant)?;
        self.store.set_pinned(&name, version.number, true).await?;
        tracing::info!(adapter = %version.id(), "pinned");
        self.enter_pin(&name, version.number, Some(hold))
    }

    /// See `Registry::unpin`.
    pub async fn unpin(&self, name: String, number: Option<u64>, by: Actor) -> Result<Entry> {
        let _turn = self.name_locks.take(name.clone()).await;
        let (version, _kept) = self.named(&name, number)?;
        self.check_right(&name, &by).await?;
        self.store.set_pinned(&name, version.number, false).await?;
        tracing::info!(adapter = %version.id(), "unpinned");
        self.enter_pin(&name, version.number, None)
    }

    fn enter_pin(&self, name: &str, number: u64, pin: Option<Guard>) -> Result<Entry> {
        let mut state = self.state();
        state.set_pin(name, number, pin);
        let entry = state.entry(name, number);
        drop(state);
        self.wake_reaper();
        entry.ok_or_else(|| model_not_found(name))
    }

    /// The version meant by an admin: `number`, or the current one; kept from pruning meanwhile.
    fn named(&self, name: &str, number: Option<u64>) -> Result<(Arc<Version>, Guard)> {
        let state = self.state();
        let current = state.current(name).map(|version| version.number);
        let number = number.or(current).ok_or_else(|| model_not_found(name))?;
        state.keep(name, number)
    }

    /// Makes what the catalogue says is pinned resident again. What cannot be loaded stays pinned
    /// and cold: a damaged adapter must not keep the others from starting.
    pub async fn load_pinned(self: &Arc<Self>) {
        let pinned = self.state().pinned();
        for version in pinned {
            match self.bring(&version, Instant::now(), &Tenant::default()).await {
                Ok(hold) => self.state().set_pin(&version.name, version.number, Some(hold)),
                Err(e) => {
                    let id = version.id();
                    tracing::error!(adapter = %id, error = %e, "cannot load a pinned adapter");
                }
            }
        }
    }
}
