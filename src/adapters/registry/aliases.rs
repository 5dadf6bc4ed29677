//! Weighted aliases: one name over several versions, each caller always led to the same one.
//!
//! Owns what an alias is, how it chooses, and how it changes. Never leases. The thing to know: the
//! choice is weighted rendezvous hashing: every target draws a number from (alias, caller, target)
//! and its weight, the highest wins; so a shift of weights moves only callers towards what gained.

use super::book::Book;
use super::holds::Hold;
use super::turns::Turn;
use super::{Actor, Inner, Registry, detached};
use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Versions that one alias may lead to: each request hashes once per target.
const TARGETS_MAX: usize = 16;
const WEIGHT_MAX: u32 = 1_000_000;

/// A version and its share of an alias.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    pub name: String,
    pub number: u64,
    /// Against the sum of all weights.
    pub weight: u32,
}

impl Target {
    /// `name@number`
    pub fn id(&self) -> String {
        format!("{}@{}", self.name, self.number)
    }
}

/// A name over versions. It shares the namespace of adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    pub name: String,
    /// The tenant that made it; empty: the operator.
    pub owner: Arc<str>,
    /// By name then number; never empty.
    pub targets: Vec<Target>,
    /// What it was before the last change, for a rollback.
    pub previous: Option<Vec<Target>>,
    /// Unix seconds.
    pub created: u64,
    pub updated: u64,
}

impl Alias {
    /// Whether what it leads to, of a name that is `owner`'s, stays for its sake: another tenant
    /// may only use the name.
    pub fn keeps(&self, owner: &str) -> bool {
        self.owner.is_empty() || *self.owner == *owner
    }

    /// The target of this caller: the same as long as the weights are.
    pub fn choose(&self, sticky: &str) -> &Target {
        let best = self.targets.iter().max_by(|a, b| {
            let (a, b) = (self.draw(a, sticky), self.draw(b, sticky));
            a.total_cmp(&b)
        });
        best.expect("an alias has a target")
    }

    /// Whether it leads to this version, by whatever share.
    pub fn leads_to(&self, name: &str, number: u64) -> bool {
        self.targets.iter().any(|t| t.number == number && t.name == name)
    }

    /// `weight / -ln(u)` with u in (0, 1) from the hash: the largest of these falls on each target
    /// in proportion to its weight.
    fn draw(&self, target: &Target, sticky: &str) -> f64 {
        let mut hash = Sha256::new();
        for part in [self.name.as_str(), sticky, &target.id()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let hash = hash.finalize();
        let bits = u64::from_le_bytes(hash[..8].try_into().expect("a hash has 32 bytes")) >> 11;
        let u = (bits as f64 + 0.5) / (1u64 << 53) as f64;
        f64::from(target.weight) / -u.ln()
    }
}

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
                            let shown: String = to.chars().take(160).collect();
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
            let _turn = inner.name_turns.take(name.clone()).await;
            inner.alias(&name)?;
            inner.check_right(&name, &by).await?;
            inner.store.remove_alias(&name).await?;
            tracing::info!(alias = %name, "alias removed");
            let removed = inner.book().aliases.remove(&name);
            // Versions that only it kept may go now.
            inner.wake_reaper();
            removed.ok_or_else(|| alias_not_found(&name))
        })
        .await
    }

    /// By name.
    pub fn aliases(&self) -> Vec<Alias> {
        self.inner.book().aliases.values().cloned().collect()
    }

    /// Errors: `adapter_not_found`.
    pub fn alias(&self, name: &str) -> Result<Alias> {
        self.inner.alias(name)
    }
}

impl Inner {
    fn alias(&self, name: &str) -> Result<Alias> {
        self.book().aliases.get(name).cloned().ok_or_else(|| alias_not_found(name))
    }

    async fn put_alias(
        &self,
        name: String,
        mut targets: Vec<Target>,
        by: Actor,
    ) -> Result<(Alias, bool)> {
        self.check_name(&name)?;
        check_targets(&mut targets)?;
        let _turns = self.turns_of(names_of(&name, &targets, None)).await;
        self.check_right(&name, &by).await?;
        let before = self.book().aliases.get(&name).cloned();
        let _claim = self.claims.lock().await;
        if before.is_none() {
            if self.book().names.contains_key(&name) {
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
            let _turns = self.turns_of(seen.clone()).await;
            let before = self.alias(&name)?;
            // Changed while waiting: other names may now be at stake.
            if names(&before) == seen {
                self.check_right(&name, &by).await?;
                let targets = change(&before)?;
                return self.set_alias(name, before.owner.clone(), Some(&before), targets).await;
            }
        }
    }

    /// The turns of several names, taken in one order everywhere, so that two of these never wait
    /// for each other.
    async fn turns_of(&self, names: BTreeSet<String>) -> Vec<Turn<String>> {
        let mut turns = Vec::new();
        for name in names {
            turns.push(self.name_turns.take(name).await);
        }
        turns
    }

    /// Records and enters an alias. The caller holds the turns of its name and of its targets'.
    async fn set_alias(
        &self,
        name: String,
        owner: Arc<str>,
        before: Option<&Alias>,
        targets: Vec<Target>,
    ) -> Result<Alias> {
        // Held until the alias itself keeps them from being pruned.
        let _holds = self.book().hold_targets(&targets)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let previous = match before {
            Some(before) if before.targets != targets => Some(before.targets.clone()),
            Some(before) => before.previous.clone(),
            None => None,
        };
        let created = before.map_or(now, |b| b.created);
        let alias = Alias { name: name.clone(), owner, targets, previous, created, updated: now };
        self.store.put_alias(&alias).await?;
        tracing::info!(alias = %name, targets = ?alias.targets, "alias set");
        self.book().aliases.insert(name, alias.clone());
        self.wake_reaper();
        Ok(alias)
    }
}

impl Book {
    /// Keeps the versions that an alias is to lead to. Errors: `model_not_found`,
    /// `adapter_ineffective`.
    fn hold_targets(&self, targets: &[Target]) -> Result<Vec<Hold>> {
        targets.iter().map(|t| Ok(self.keep(&t.name, t.number)?.1)).collect()
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

fn check_targets(targets: &mut [Target]) -> Result<()> {
    if targets.is_empty() || targets.len() > TARGETS_MAX {
        return Err(invalid(format!("an alias leads to 1 to {TARGETS_MAX} versions")));
    }
    targets.sort();
    if let Some(t) = targets.iter().find(|t| !(1..=WEIGHT_MAX).contains(&t.weight)) {
        let id: String = t.id().chars().take(160).collect();
        return Err(invalid(format!("the weight of `{id}` is not from 1 to {WEIGHT_MAX}")));
    }
    if let Some(twice) = targets.windows(2).find(|w| w[0].id() == w[1].id()) {
        let id: String = twice[0].id().chars().take(160).collect();
        return Err(invalid(format!("`{id}` is there twice")));
    }
    Ok(())
}

fn invalid(message: String) -> Error {
    Error::invalid("invalid_alias", message).param("weights")
}

fn alias_not_found(name: &str) -> Error {
    let shown: String = name.chars().take(160).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(weights: &[u32]) -> Alias {
        let target = |(i, w): (usize, &u32)| Target {
            name: "acme".into(),
            number: i as u64 + 1,
            weight: *w,
        };
        let targets = weights.iter().enumerate().map(target).filter(|t| t.weight > 0).collect();
        let owner = Arc::default();
        Alias { name: "prod".into(), owner, targets, previous: None, created: 0, updated: 0 }
    }

    const CALLERS: usize = 20_000;

    fn chosen(alias: &Alias) -> Vec<u64> {
        (0..CALLERS).map(|i| alias.choose(&format!("user-{i}")).number).collect()
    }

    #[test]
    fn callers_fall_on_versions_in_proportion_to_the_weights() {
        for weights in [&[95, 5][..], &[1, 1], &[90, 9, 1], &[100]] {
            let chosen = chosen(&alias(weights));
            let sum: u32 = weights.iter().sum();
            for (i, weight) in weights.iter().enumerate() {
                let share = f64::from(*weight) / f64::from(sum);
                let got = chosen.iter().filter(|n| **n == i as u64 + 1).count() as f64;
                // Four standard deviations of a binomial.
                let spread = 4.0 * (CALLERS as f64 * share * (1.0 - share)).sqrt();
                let expected = CALLERS as f64 * share;
                assert!((got - expected).abs() <= spread, "{weights:?} {i}: {got} of {expected}");
            }
        }
    }

    #[test]
    fn a_shift_of_weights_moves_only_callers_that_it_must() {
        let cases: [(&[u32], &[u32]); 4] = [
            (&[95, 5], &[90, 10]),
            (&[90, 10], &[0, 10]),
            (&[50, 50], &[50, 0]),
            (&[2, 1], &[20, 10]),
        ];
        for (before, after) in cases {
            let (a, b) = (chosen(&alias(before)), chosen(&alias(after)));
            let moved: Vec<_> = a.iter().zip(&b).filter(|(a, b)| a != b).collect();
            let share = |w: &[u32]| f64::from(w[1]) / f64::from(w[0] + w[1]);
            let must = (share(after) - share(before)).abs() * CALLERS as f64;
            assert!((moved.len() as f64 - must).abs() < 0.02 * CALLERS as f64, "{before:?}");
            // All in one direction: towards what gained.
            let gains = if share(after) > share(before) { 2 } else { 1 };
            assert!(moved.iter().all(|(_, b)| **b == gains), "{before:?} to {after:?}");
        }
        // A third version takes from both and moves nobody between them.
        let (a, b) = (chosen(&alias(&[50, 50])), chosen(&alias(&[50, 50, 25])));
        assert!(a.iter().zip(&b).all(|(a, b)| a == b || *b == 3));
    }

    #[test]
    fn targets_that_make_no_alias_are_refused() {
        let target = |number, weight| Target { name: "a".into(), number, weight };
        let refused = |mut targets: Vec<Target>| check_targets(&mut targets).unwrap_err().code;
        let many = (1..=17).map(|n| target(n, 1)).collect();
        let cases = [vec![], many, vec![target(1, 0)], vec![target(1, 5), target(1, 6)]];
        for case in cases {
            assert_eq!(refused(case), "invalid_alias");
        }
        assert_eq!(refused(vec![target(1, WEIGHT_MAX + 1)]), "invalid_alias");
    }
}
