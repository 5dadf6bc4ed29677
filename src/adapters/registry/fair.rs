//! Whose idle adapters make room for whose.
//!
//! Owns the tenants' parts of the memory of residents. Never evicts. The thing to know: while
//! memory is full, a tenant within an equal part of it is not pushed out by one beyond; a resident
//! counts for the tenant that used it last, so what several use goes last.

use super::reservation::Size;
use super::state::RegistryState;
use crate::adapters::Digest;
use crate::adapters::actor::Tenant;
use crate::adapters::bank::Slot;
use std::collections::HashMap;
use std::sync::Arc;

/// What tenants hold of what is short, bytes or places, once one has got what it wants.
pub struct Parts {
    held: HashMap<Arc<str>, u64>,
    /// An equal part.
    part: u64,
}

impl Parts {
    /// Whether a tenant holds more than its part.
    pub fn is_over(&self, tenant: &str) -> bool {
        self.held.get(tenant).is_some_and(|held| *held > self.part)
    }

    /// Those that hold more, the one with most first.
    fn over(&self) -> Vec<Arc<str>> {
        let mut over: Vec<_> = self.held.iter().filter(|(_, held)| **held > self.part).collect();
        over.sort_by(|a, b| (b.1, a.0).cmp(&(a.1, b.0)));
        over.into_iter().map(|(tenant, _)| tenant.clone()).collect()
    }
}

impl RegistryState {
    /// Bytes in memory that a tenant used last.
    pub fn resident_bytes_of(&self, tenant: &str) -> u64 {
        let own = self.residents.values().filter(|r| *r.tenant == *tenant && !r.leaving);
        own.map(|r| r.bytes).sum()
    }

    /// The parts as they are when `tenant` has got `wanted` more.
    pub fn parts(&self, tenant: &Tenant, wanted: Size, (bytes_max, places_max): Size) -> Parts {
        let by_bytes = self.used_bytes() + wanted.0 > bytes_max;
        let mut held = HashMap::from([(
            tenant.name.clone(),
            if by_bytes { wanted.0 } else { wanted.1 as u64 },
        )]);
        for resident in self.residents.values().filter(|r| !r.leaving) {
            *held.entry(resident.tenant.clone()).or_default() +=
                if by_bytes { resident.bytes } else { 1 };
        }
        let all = if by_bytes { bytes_max } else { places_max as u64 };
        Parts { part: all / held.len() as u64, held }
    }

    /// Marks the idle resident that is to make room for `tenant` as leaving: the least recently
    /// used of the tenant that is most beyond its part; if nobody beyond has an idle one, of all,
    /// unless `tenant` is beyond itself and holds something already.
    pub fn choose_victim(
        &mut self,
        tenant: &Tenant,
        wanted: Size,
        max: Size,
        may: impl Fn(&Digest) -> bool,
    ) -> Option<(Digest, Slot)> {
        if self.is_bounded(tenant, wanted.0) {
            return self.evict_idle(|digest, of| may(digest) && *of == *tenant.name);
        }
        let parts = self.parts(tenant, wanted, max);
        for over in parts.over() {
            let victim = self.evict_idle(|digest, of| may(digest) && *of == *over);
            if victim.is_some() {
                return victim;
            }
        }
        let first = self.resident_bytes_of(&tenant.name) == 0;
        let entitled = tenant.is_operator() || first || !parts.is_over(&tenant.name);
        if entitled { self.evict_idle(|digest, _| may(digest)) } else { None }
    }

    /// Whether so many bytes more are beyond what the tenant's key allows it.
    pub fn is_bounded(&self, tenant: &Tenant, wanted: u64) -> bool {
        let most = tenant.bounds.resident_bytes.filter(|_| !tenant.is_operator());
        most.is_some_and(|most| self.resident_bytes_of(&tenant.name) + wanted > most)
    }
}
