//! The slow obvious model: what is in memory, one plain record each, and the rules as told.
//!
//! Owns no total and no order: both are made anew for every question. Never asks the ledger. The
//! thing to know: a rule that picks one of several is a sort here, and a loop there.

use polylora::adapters::Digest;
use polylora::adapters::actor::Tenant;
use polylora::adapters::ledger::{Answer, Ledger, LoadRequest, Promise, Size};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use tokio::time::Instant;

/// A content in memory.
pub struct There {
    pub bytes: u64,
    /// Who used it last, and when, by a number that only grows.
    pub user: Arc<str>,
    used: usize,
    came: (Instant, usize),
    pub holders: usize,
    pub leaving: bool,
    pub closing: bool,
}

impl There {
    fn open(&self) -> bool {
        !self.leaving && !self.closing
    }
    fn busy(&self) -> bool {
        self.leaving || self.holders > 0
    }
}

/// What each tenant would hold of what is short, and an equal part of it.
struct Shares {
    held: BTreeMap<Arc<str>, u64>,
    part: u64,
}

impl Shares {
    fn over(&self, tenant: &str) -> bool {
        self.held.get(tenant).is_some_and(|held| *held > self.part)
    }
}

pub struct Model {
    pub max: Size,
    pub there: BTreeMap<Digest, There>,
    /// Promised: contents and their bytes.
    pub coming: BTreeMap<Digest, u64>,
    pub claimed: bool,
    moments: usize,
}

/// Of contents by their bytes.
fn total(bytes: impl Iterator<Item = u64>) -> Size {
    let all: Vec<u64> = bytes.collect();
    Size { bytes: all.iter().sum(), slots: all.len() }
}

impl Model {
    pub fn new(max: Size) -> Self {
        let (there, coming) = (BTreeMap::new(), BTreeMap::new());
        Self { max, there, coming, claimed: false, moments: 0 }
    }

    fn moment(&mut self) -> usize {
        self.moments += 1;
        self.moments
    }

    /// Everything there of which this is so, and everything promised.
    fn with_coming(&self, so: impl Fn(&Digest, &There) -> bool) -> Size {
        let there = self.there.iter().filter(|(d, t)| so(d, t)).map(|(_, t)| t.bytes);
        total(there.chain(self.coming.values().copied()))
    }

    pub fn bytes_of(&self, tenant: &str) -> u64 {
        let own = self.there.values().filter(|t| *t.user == *tenant && !t.leaving);
        own.map(|t| t.bytes).sum()
    }

    /// Whether it holds something that this does not need.
    fn holds_more(&self, need: &LoadRequest) -> bool {
        let needed = |digest: &Digest| need.contents.iter().any(|(own, _)| own == digest);
        let own = |t: &There| t.user == need.tenant.name && !t.leaving;
        self.there.iter().any(|(digest, t)| own(t) && !needed(digest))
    }

    fn bounded(&self, tenant: &Tenant, bytes: u64) -> bool {
        let most = tenant.bounds.resident_bytes.unwrap_or(u64::MAX);
        !tenant.is_operator() && self.bytes_of(&tenant.name) + bytes > most
    }

    fn shares(&self, tenant: &Tenant, wanted: Size) -> Shares {
        let bytes = self.with_coming(|_, _| true).bytes + wanted.bytes > self.max.bytes;
        let mut tenants: BTreeSet<Arc<str>> = BTreeSet::from([tenant.name.clone()]);
        tenants.extend(self.there.values().filter(|t| !t.leaving).map(|t| t.user.clone()));
        let held = |of: &Arc<str>| {
            let own = self.there.values().filter(|t| t.user == *of && !t.leaving);
            let mut size = total(own.map(|t| t.bytes));
            if *of == tenant.name {
                size = size + wanted;
            }
            if bytes { size.bytes } else { size.slots as u64 }
        };
        let all = if bytes { self.max.bytes } else { self.max.slots as u64 };
        let part = all / tenants.len() as u64;
        Shares { held: tenants.iter().map(|t| (t.clone(), held(t))).collect(), part }
    }

    fn missing(&self, need: &LoadRequest) -> Vec<(Digest, u64)> {
        let open = |digest: &Digest| self.there.get(digest).is_some_and(There::open);
        need.contents.iter().copied().filter(|(digest, _)| !open(digest)).collect()
    }

    pub fn beyond(&self, need: &LoadRequest) -> bool {
        let wanted = total(self.missing(need).iter().map(|(_, bytes)| *bytes));
        let over = self.shares(&need.tenant, wanted).over(&need.tenant.name);
        self.bounded(&need.tenant, wanted.bytes) || (over && !need.tenant.is_operator())
    }

    /// What the ledger must say.
    pub fn answer(&self, need: &LoadRequest, first: bool) -> Answer {
        let missing = self.missing(need);
        let all = || need.contents.iter();
        let present = all().filter(|c| !missing.contains(c)).map(|(digest, _)| *digest).collect();
        let tenant = &need.tenant.name;
        let promise = |&(digest, bytes)| Promise { digest, bytes, tenant: tenant.clone() };
        let reserved =
            || Answer::Reserved { present, promised: missing.iter().map(promise).collect() };
        if missing.is_empty() {
            return reserved();
        }
        // Two copies of one content there shall not be.
        let old = missing.iter().any(|(digest, _)| self.there.contains_key(digest));
        if old || (self.claimed && !first) {
            return Answer::Wait;
        }
        let wanted = total(missing.iter().map(|(_, bytes)| *bytes));
        let needed = |digest: &Digest| all().any(|(own, _)| own == digest);
        let stays = self.with_coming(|d, t| t.busy() || (needed(d) && t.open()));
        if !(stays + wanted).fits(self.max) {
            return Answer::Wait;
        }
        let fits = (self.with_coming(|_, _| true) + wanted).fits(self.max);
        if fits && !self.bounded(&need.tenant, wanted.bytes) {
            return reserved();
        }
        self.victim(need, wanted).map_or(Answer::Wait, Answer::Evict)
    }

    /// Who goes first: whose tenant is most beyond its part, then who was used least recently. A
    /// tenant at its key's bound only pushes out its own; others' that are within their part go
    /// only for who is within its own, or has nothing but what it needs, or is the operator.
    fn victim(&self, need: &LoadRequest, wanted: Size) -> Option<Digest> {
        let own = &need.tenant;
        let shares = self.shares(own, wanted);
        let mut over: Vec<_> = shares.held.iter().filter(|(t, _)| shares.over(t)).collect();
        over.sort_by_key(|(tenant, held)| (std::cmp::Reverse(**held), (*tenant).clone()));
        let modest = !shares.over(&own.name) || !self.holds_more(need);
        let rank = |user: &Arc<str>| {
            if self.bounded(own, wanted.bytes) {
                return (*user == own.name).then_some(0);
            }
            let place = over.iter().position(|(tenant, _)| *tenant == user);
            place.or((own.is_operator() || modest).then_some(usize::MAX))
        };
        let may = |d: &Digest, t: &There| !t.busy() && !need.contents.iter().any(|(n, _)| n == d);
        let idle = self.there.iter().filter(|(d, t)| may(d, t));
        let ranked = idle.filter_map(|(d, t)| Some((rank(&t.user)?, t.used, *d)));
        ranked.min().map(|(_, _, digest)| digest)
    }

    /// Whether making room by this one is fair, as the documents say it.
    pub fn fair(&self, need: &LoadRequest, victim: Digest) -> bool {
        let own = &need.tenant;
        let wanted = total(self.missing(need).iter().map(|(_, bytes)| *bytes));
        let (shares, theirs) = (self.shares(own, wanted), &self.there[&victim].user);
        let greedy = shares.over(&own.name) && self.holds_more(need) && !own.is_operator();
        *theirs == own.name || !greedy || shares.over(theirs)
    }

    pub fn claim(&mut self, need: &LoadRequest, before: Instant, pinned: &HashSet<Digest>) {
        self.claimed = true;
        let wanted = total(self.missing(need).iter().map(|(_, bytes)| *bytes));
        let (shares, beyond) = (self.shares(&need.tenant, wanted), self.beyond(need));
        let needed = |digest: &Digest| need.contents.iter().any(|(own, _)| own == digest);
        let may = |digest: &Digest, t: &There| {
            let theirs = t.user != need.tenant.name && !shares.over(&t.user);
            let spared = pinned.contains(digest) || needed(digest) || (beyond && theirs);
            t.busy() && !t.closing && t.came.0 <= before && !spared
        };
        let order = |t: &There| (!shares.over(&t.user), t.came);
        let candidates = self.there.iter().filter(|(d, t)| may(d, t));
        let mut candidates: Vec<_> = candidates.map(|(d, t)| (order(t), *d)).collect();
        candidates.sort();
        for (_, digest) in candidates {
            let stays = self.with_coming(|d, t| !t.closing && (t.busy() || needed(d)));
            if (stays + wanted).fits(self.max) {
                return;
            }
            self.there.get_mut(&digest).expect("a candidate").closing = true;
        }
    }

    pub fn end_claim(&mut self) {
        self.claimed = false;
        self.there.values_mut().for_each(|t| t.closing = false);
    }

    pub fn admit(&mut self, promise: &Promise, now: Instant) {
        let bytes = self.coming.remove(&promise.digest).expect("promised");
        let (used, user) = (self.moment(), promise.tenant.clone());
        let (holders, leaving, closing) = (0, false, false);
        let there = There { bytes, user, used, came: (now, used), holders, leaving, closing };
        self.there.insert(promise.digest, there);
    }

    pub fn lend(&mut self, digest: Digest, brought: bool, tenant: &Arc<str>) -> bool {
        let moment = self.moment();
        let there = self.there.get_mut(&digest);
        let Some(t) = there.filter(|t| t.open() || (brought && !t.leaving)) else { return false };
        (t.used, t.user) = (moment, tenant.clone());
        true
    }

    /// Everything that the ledger shows is what it is here.
    pub fn compare(&self, ledger: &Ledger<Digest>) {
        assert_eq!(ledger.used(), self.with_coming(|_, _| true), "used");
        assert_eq!(ledger.unavailable(), self.with_coming(|_, t| t.busy()), "unavailable");
        assert_eq!(ledger.digests().collect::<BTreeSet<_>>(), self.there.keys().copied().collect());
        let idle = self.there.iter().filter(|(_, t)| !t.busy()).map(|(d, _)| *d);
        assert_eq!(ledger.idle().collect::<BTreeSet<_>>(), idle.collect(), "idle");
        for (digest, t) in &self.there {
            let resident = ledger.get(*digest).expect("resident");
            assert_eq!((resident.what, resident.bytes), (*digest, t.bytes));
            assert_eq!(resident.leaving(), t.leaving, "{digest} leaves");
            assert_eq!(ledger.holders(*digest).is_some(), t.open(), "{digest} is open");
        }
    }
}
