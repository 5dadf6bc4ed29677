//! Who may change a name, and how much of the whole a tenant may hold: names, disk, pins.
//!
//! Owns what a name's owner means. Never knows a key: who calls says which right it has. The thing
//! to know: a name belongs to the tenant that first published it, or to the operator (no tenant);
//! the operator's stay the operator's when they are deleted, a tenant's are then anybody's again.

use super::state::RegistryState;
use super::{Inner, Registry};
use crate::adapters::actor::{Actor, Right, Tenant};
use crate::adapters::version::{Lineage, Version};
use crate::error::{Error, Kind, Result, brief};
use crate::share::fair;
use std::collections::HashMap;
use std::sync::Arc;

/// Of a file system, this part stays free for the databases, up to [`RESERVE_BYTES_MAX`].
const RESERVE_PART: u64 = 16;
const RESERVE_BYTES_MAX: u64 = 64 << 20;

impl Registry {
    /// Whether `actor` may change the adapter or alias `name`, there or not. Errors:
    /// `name_not_allowed`.
    pub async fn check_right(&self, name: &str, actor: &Actor) -> Result<()> {
        self.inner.check_right(name, actor).await
    }

    /// Whether there is room on disk for an upload of `bytes`. Errors: `disk_nearly_full`,
    /// `tenant_share_exceeded`.
    pub fn check_disk(&self, name: &str, actor: &Actor, bytes: u64) -> Result<()> {
        self.inner.check_disk(name, &actor.tenant, bytes, 0)
    }

    /// Whether the disk has more left than is kept for the databases. Errors: `disk_nearly_full`.
    pub fn check_reserve(&self) -> Result<()> {
        self.inner.check_room(0, 0).map(drop)
    }

    /// Whether `tenant` may have `bytes` on disk that are no adapter's, of which `staged` lie there
    /// and are counted already. Errors: `disk_nearly_full`, `tenant_share_exceeded`.
    pub fn check_bytes(&self, tenant: &Tenant, bytes: u64, staged: u64) -> Result<()> {
        self.inner.check_bytes(&tenant.name, tenant, bytes, staged, staged)
    }

    /// Gives names from before names had owners to the tenant that `of` says a version's lineage
    /// leads to, or else to the operator; an alias to the tenant that owns all that it leads to.
    pub async fn settle_owners(&self, of: impl Fn(&Lineage) -> Option<String>) -> Result<()> {
        let names = self.inner.store.ownerless().await?;
        if names.is_empty() {
            return Ok(());
        }
        let mut settled = Vec::with_capacity(names.len());
        {
            let mut state = self.inner.state();
            let (aliases, adapters): (Vec<_>, Vec<_>) =
                names.into_iter().partition(|name| state.aliases.contains_key(name));
            for name in adapters {
                let versions = state.names.get(&name);
                let first = versions.and_then(|v| v.held.values().next());
                let owner = first.and_then(|held| of(&held.version.lineage)).unwrap_or_default();
                state.set_owner(&name, owner.as_str().into());
                settled.push((name, owner));
            }
            for name in aliases {
                let owner = state.owner_of_targets(&name);
                state.set_owner(&name, owner.clone());
                settled.push((name, owner.to_string()));
            }
        }
        tracing::info!(names = settled.len(), "names have got owners");
        self.inner.store.set_owners(&settled).await
    }
}

impl Inner {
    /// See [`Registry::check_right`]. The caller holds the name's lock where that matters.
    pub async fn check_right(&self, name: &str, actor: &Actor) -> Result<()> {
        let allowed = match actor.right {
            Right::Given => true,
            Right::Nothing => false,
            Right::Own => self.owner(name).await?.is_none_or(|owner| owner == actor.tenant.name),
        };
        if allowed {
            return Ok(());
        }
        let shown = brief(name);
        let message =
            format!("your key may not change `{shown}`: another than your tenant owns it");
        Err(Error::new(Kind::Forbidden, "name_not_allowed", message).param("name"))
    }

    /// Whose a name is; `None`: nobody's.
    async fn owner(&self, name: &str) -> Result<Option<Arc<str>>> {
        let living = self.state().owner_of(name);
        match living {
            Some(owner) => Ok(Some(owner)),
            None => Ok(self.store.owner(name).await?.map(Into::into)),
        }
    }

    /// Refuses a new name when there are as many as may be, or as the tenant may have. Errors:
    /// `adapter_limit_reached`, `tenant_share_exceeded`.
    pub fn check_names(&self, name: &str, tenant: &Tenant) -> Result<()> {
        let state = self.state();
        let (all, max) = (state.names.len() + state.aliases.len(), self.options.adapters_max);
        if state.owner_of(name).is_some() {
            return Ok(());
        }
        if all >= max {
            let message =
                format!("{max} adapters and aliases exist, which is the limit; delete one first");
            return Err(Error::new(Kind::Capacity, "adapter_limit_reached", message));
        }
        let (own, free) = (state.names_of(&tenant.name), (max - all) as u64);
        let what = "adapters and aliases";
        tenant.check(what, own, 1, free, tenant.bounds.names)
    }

    /// Bytes that are free for uploads, if `bytes` are, of which `staged` are on disk already.
    fn check_room(&self, bytes: u64, staged: u64) -> Result<u64> {
        let (free, total) = self.store.space()?;
        let reserve = (total / RESERVE_PART).min(RESERVE_BYTES_MAX);
        let free = (free + staged).saturating_sub(reserve);
        if bytes > free || free == 0 {
            let message = match free {
                0 => format!("the disk has only the {reserve} bytes left that databases need"),
                _ => format!("the upload has {bytes} bytes; {free} are free for uploads"),
            };
            return Err(Error::new(Kind::Capacity, "disk_nearly_full", message));
        }
        Ok(free)
    }

    /// Refuses an upload of `bytes`, of which `staged` are on disk already, when the disk has no
    /// room for it or the tenant's share of it has not.
    pub fn check_disk(&self, name: &str, tenant: &Tenant, bytes: u64, staged: u64) -> Result<()> {
        let owner = self.state().owner_of(name).unwrap_or_else(|| tenant.name.clone());
        self.check_bytes(&owner, tenant, bytes, staged, 0)
    }

    /// The same of `owner`'s bytes, adapters or not, of which `counted` are among its own already.
    fn check_bytes(
        &self,
        owner: &str,
        tenant: &Tenant,
        bytes: u64,
        staged: u64,
        counted: u64,
    ) -> Result<()> {
        let free = self.check_room(bytes, staged)?;
        let own = self.state().disk_bytes_of(owner) + (self.options.other_bytes)(owner);
        let own = own.saturating_sub(counted);
        tenant.check("bytes on disk", own, bytes, free, tenant.bounds.disk_bytes)
    }

    /// Refuses a pin beyond the share of the tenant that owns the name; one that is there is none.
    pub fn check_pin(&self, version: &Version, tenant: &Tenant) -> Result<()> {
        let (name, bytes) = (&version.name, version.resident_bytes);
        let state = self.state();
        if state.entry(name, version.number).is_none_or(|entry| entry.pinned) {
            return Ok(());
        }
        let owner = state.owner_of(name).unwrap_or_else(|| tenant.name.clone());
        let (own, all) = state.pinned_bytes(&owner);
        let free = self.options.resident_bytes_max.saturating_sub(all);
        tenant.check("pinned bytes", own, bytes, free, tenant.bounds.resident_bytes)
    }
}

impl Tenant {
    /// Whether a tenant that holds `own` may take `amount` of what has `free` left. Errors:
    /// `tenant_share_exceeded`.
    fn check(
        &self,
        what: &str,
        own: u64,
        amount: u64,
        free: u64,
        bound: Option<u64>,
    ) -> Result<()> {
        if self.is_operator() {
            return Ok(());
        }
        let most = match bound {
            Some(bound) if own.saturating_add(amount) > bound => format!("its key allows {bound}"),
            _ if !fair(own, amount, free) => {
                format!("it may have as many as it leaves free, {free}")
            }
            _ => return Ok(()),
        };
        Err(share_exceeded(format!(
            "your tenant has {own} {what} and would have {}; {most}",
            own.saturating_add(amount)
        )))
    }
}

/// A tenant's share is used up, not the whole.
pub fn share_exceeded(message: String) -> Error {
    Error::new(Kind::Capacity, "tenant_share_exceeded", message)
}

impl RegistryState {
    /// Whose a living adapter or alias is.
    pub fn owner_of(&self, name: &str) -> Option<Arc<str>> {
        let adapter = self.names.get(name).and_then(|v| v.held.values().next());
        let adapter = adapter.map(|held| held.owner.clone());
        adapter.or_else(|| self.aliases.get(name).map(|alias| alias.owner.clone()))
    }

    fn set_owner(&mut self, name: &str, owner: Arc<str>) {
        if let Some(versions) = self.names.get_mut(name) {
            versions.held.values_mut().for_each(|held| held.owner = owner.clone());
        }
        if let Some(alias) = self.aliases.get_mut(name) {
            alias.owner = owner;
        }
    }

    /// The one owner of all that an alias leads to, or else the operator.
    fn owner_of_targets(&self, alias: &str) -> Arc<str> {
        let targets = self.aliases.get(alias).into_iter().flat_map(|a| &a.targets);
        let mut owners = targets.map(|t| self.owner_of(&t.name).unwrap_or_default());
        let first = owners.next().unwrap_or_default();
        if owners.all(|owner| owner == first) { first } else { Arc::default() }
    }

    /// Names of adapters and aliases of one owner.
    fn names_of(&self, owner: &str) -> u64 {
        let adapters = self.names.values().filter_map(|v| v.held.values().next());
        let adapters = adapters.filter(|held| *held.owner == *owner).count();
        let aliases = self.aliases.values().filter(|alias| *alias.owner == *owner);
        (adapters + aliases.count()) as u64
    }

    /// Bytes of the files of one owner's versions, deleted ones in use included; each content once.
    fn disk_bytes_of(&self, owner: &str) -> u64 {
        let all = self.living().chain(&self.departing).filter(|held| *held.owner == *owner);
        let contents: HashMap<_, _> =
            all.map(|held| (held.version.digest, held.version.file_bytes)).collect();
        contents.values().sum()
    }

    /// Bytes that are pinned: one owner's, and all. A content that two have pinned counts for each.
    fn pinned_bytes(&self, owner: &str) -> (u64, u64) {
        let pinned: Vec<_> = self.living().filter(|held| held.pinned).collect();
        let bytes = |of: &dyn Fn(&str) -> bool| -> u64 {
            let contents = pinned.iter().filter(|held| of(&held.owner));
            let contents: HashMap<_, _> =
                contents.map(|h| (h.version.digest, h.version.resident_bytes)).collect();
            contents.values().sum()
        };
        (bytes(&|of| of == owner), bytes(&|_| true))
    }
}
