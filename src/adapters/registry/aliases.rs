//! Weighted aliases: one name over several versions, each caller always led to the same one.
//!
//! Owns what an alias is, how it chooses, and how it changes. Never leases. The thing to know: the
//! choice is weighted rendezvous hashing: every target draws a number from (alias, caller, target)
//! and its weight, the highest wins; so a shift of weights moves only callers towards what gained.

use super::guards::Guard;
use super::keyed_mutex::KeyedGuard;
use super::state::RegistryState;
use super::{Inner, Registry, detached};
use crate::adapters::actor::Actor;
use crate::adapters::alias::{Alias, Target, check_targets, invalid};
use crate::adapters::version::{Entry, Version};
use crate::clock::unix_seconds;
use crate::error::{Error, Kind, Result, brief};
use std::collections::BTreeSet;
use std::sync::Arc;

impl Registry {
    /// Makes an alias, or gives one new weights; true when it is new. Errors: `invalid_name`,
    /// `invalid_alias`, `name_taken`, `model_not_found`, `adapter_ineffective`,
    /// `adapter_limit_reached`, `name_not_allowed`, `tenant_share_exceeded`.
    pub async fn put_alias(
        &self,
        name: &str,
        targets: Vec<Target>,
        by: &Actor,
    ) -> Result<(Alias, bool)> {
        let (inner, name, by) = (self.inner.clone(), name.to_owned(), by.clone());
        detached(async move { inner.put_alias(name, targets, by).await }).await
    }

    /// Gives one of the alias's targets everything. Errors: `adapter_not_found`, `invalid_alias`,
    /// `name_not_allowed`.
    pub async fn promote_alias(&self, name: &str, to: &str, by: &Actor) -> Result<Alias> {
        let (inner, name, to) = (self.inner.clone(), name.to_owned(), to.to_owned());
        let by = by.clone();
        let change = async move {
            inner
                .change_alias(name, by, |alias| {
                    let fits = |t: &&Target| t.id() == to || t.number.to_string() == to;
                    let mut fitting = alias.targets.iter().filter(fits);
                    match (fitting.next(), fitting.next()) {
                        (Some(target), None) => Ok(vec![Target { weight: 100, ..target.clone() }]),
                        (Some(_), Some(_)) => Err(invalid(format!(
                            "`{}` leads to several versions {to}; say which as name@version",
                            alias.name
                        ))),
                        (None, _) => {
                            let shown = brief(&to);
                            Err(invalid(format!("`{}` does not lead to `{shown}`", alias.name)))
                        }
                    }
                })
                .await
        };
        detached(change).await
    }

    /// Gives the alias the weights it had before the last change. Errors: `adapter_not_found`,
    /// `nothing_to_roll_back`, `model_not_found` (a version that it led to is no longer kept),
    /// `name_not_allowed`.
    pub async fn roll_back_alias(&self, name: &str, by: &Actor) -> Result<Alias> {
        let (inner, name, by) = (self.inner.clone(), name.to_owned(), by.clone());
        let change = async move {
            inner
                .change_alias(name, by, |alias| {
                    alias.previous.clone().ok_or_else(|| {
                        let message = format!("alias `{}` has had no other weights", alias.name);
                        Error::new(Kind::Conflict, "nothing_to_roll_back", message)
                    })
                })
                .await
        };
        detached(change).await
    }

    /// Errors: `adapter_not_found`, `name_not_allowed`.
    pub async fn delete_alias(&self, name: &str, by: &Actor) -> Result<Alias> {
        let (inner, name, by) = (self.inner.clone(), name.to_owned(), by.clone());
        detached(async move {
            let _turn = inner.name_locks.take(name.clone()).await;
            inner.alias(&name)?;
            inner.check_right(&name, &by).await?;
            inner.store.remove_alias(&name).await?;
            tracing::info!(alias = %name, "alias removed");
            let removed = inner.state().aliases.remove(&name);
            // Versions that only it kept may go now.
            inner.wake_reaper();
            removed.ok_or_else(|| alias_not_found(&name))
        })
        .await
    }

    /// By name.
    pub fn aliases(&self) -> Vec<Alias> {
        self.inner.state().aliases.values().cloned().collect()
    }

    /// Errors: `adapter_not_found`.
    pub fn alias(&self, name: &str) -> Result<Alias> {
        self.inner.alias(name)
    }
}

impl Inner {
    fn alias(&self, name: &str) -> Result<Alias> {
        self.state().aliases.get(name).cloned().ok_or_else(|| alias_not_found(name))
    }

    async fn put_alias(
        &self,
        name: String,
        mut targets: Vec<Target>,
        by: Actor,
    ) -> Result<(Alias, bool)> {
        self.check_name(&name)?;
        check_targets(&mut targets)?;
        let _locks = self.locks_of(names_of(&name, &targets, None)).await;
        self.check_right(&name, &by).await?;
        let before = self.state().aliases.get(&name).cloned();
        let _claim = self.claims.lock().await;
        if before.is_none() {
            if self.state().names.contains_key(&name) {
                return Err(name_taken(&name, "an adapter"));
            }
            self.check_names(&name, &by.tenant)?;
        }
        let owner = before.as_ref().map_or(by.tenant.name, |before| before.owner.clone());
        let alias = self.set_alias(name, owner, before.as_ref(), targets).await?;
        Ok((alias, before.is_none()))
    }

    async fn change_alias(
        &self,
        name: String,
        by: Actor,
        change: impl FnOnce(&Alias) -> Result<Vec<Target>> + Send,
    ) -> Result<Alias> {
        loop {
            let names = |a: &Alias| names_of(&a.name, &a.targets, a.previous.as_deref());
            let seen = names(&self.alias(&name)?);
            let _locks = self.locks_of(seen.clone()).await;
            let before = self.alias(&name)?;
            // Changed while waiting: other names may now be at stake.
            if names(&before) == seen {
                self.check_right(&name, &by).await?;
                let targets = change(&before)?;
                return self.set_alias(name, before.owner.clone(), Some(&before), targets).await;
            }
        }
    }

    /// The locks of several names, taken in one order everywhere, so that two of these never wait
    /// for each other.
    async fn locks_of(&self, names: BTreeSet<String>) -> Vec<KeyedGuard<String>> {
        let mut locks = Vec::new();
        for name in names {
            locks.push(self.name_locks.take(name).await);
        }
        locks
    }

    /// Records and enters an alias. The caller holds the locks of its name and of its targets'.
    async fn set_alias(
        &self,
        name: String,
        owner: Arc<str>,
        before: Option<&Alias>,
        targets: Vec<Target>,
    ) -> Result<Alias> {
        // Guarded until the alias itself keeps them from being pruned.
        let _holds = self.state().hold_targets(&targets)?;
        let now = unix_seconds();
        let previous = match before {
            Some(before) if before.targets != targets => Some(before.targets.clone()),
            Some(before) => before.previous.clone(),
            None => None,
        };
        let created = before.map_or(now, |b| b.created);
        let alias = Alias { name: name.clone(), owner, targets, previous, created, updated: now };
        self.store.put_alias(&alias).await?;
        tracing::info!(alias = %name, targets = ?alias.targets, "alias set");
        self.state().aliases.insert(name, alias.clone());
        self.wake_reaper();
        Ok(alias)
    }
}

impl RegistryState {
    /// Keeps the versions that an alias is to lead to. Errors: `model_not_found`,
    /// `adapter_ineffective`.
    fn hold_targets(&self, targets: &[Target]) -> Result<Vec<Guard>> {
        targets.iter().map(|t| Ok(self.keep(&t.name, t.number)?.1)).collect()
    }

    /// Name of the alias that keeps this version, if one does.
    pub fn alias_of_version(&self, entry: &Entry) -> Option<String> {
        let Version { name, number, .. } = &*entry.version;
        let counts = |a: &&Alias| a.keeps(&entry.owner) && a.leads_to(name, *number);
        self.aliases.values().find(counts).map(|alias| alias.name.clone())
    }

    /// The alias that leads to this name, if one does.
    pub fn alias_of(&self, name: &str) -> Option<&Alias> {
        let owner = self.owner_of(name).unwrap_or_default();
        let counts = |a: &&Alias| a.keeps(&owner) && a.targets.iter().any(|t| t.name == name);
        self.aliases.values().find(counts)
    }
}

/// Every name that a change of an alias is about.
fn names_of(alias: &str, targets: &[Target], previous: Option<&[Target]>) -> BTreeSet<String> {
    let targets = targets.iter().chain(previous.unwrap_or_default());
    targets.map(|t| t.name.clone()).chain([alias.to_owned()]).collect()
}

fn alias_not_found(name: &str) -> Error {
    let shown = brief(name);
    // In the words of a missing adapter: they share their names, and who may not know of a name
    // gets these.
    Error::not_found("adapter_not_found", format!("there is no adapter or alias `{shown}`"))
        .param("name")
}

/// The name is somebody else's.
pub fn name_taken(name: &str, by: &str) -> Error {
    let message = format!("the name `{name}` is taken by {by}");
    Error::new(Kind::Conflict, "name_taken", message).param("name")
}
