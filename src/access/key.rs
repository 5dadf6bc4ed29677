//! A key: its scopes, tenant, names and limits; and the caller that a request's key makes.
//!
//! Owns what a key may say and the meaning of its patterns. Never holds a secret. The thing to
//! know: a key without a tenant is an operator's and sees every name; one with a tenant sees the
//! names that its patterns match, whether they exist or not.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Patterns of one key, and characters of one.
const PATTERNS_MAX: usize = 256;
const PATTERN_CHARS_MAX: usize = 128;
const NAME_CHARS_MAX: usize = 64;
/// Largest share of a tenant against one of weight 1.
pub const WEIGHT_MAX: u32 = 1000;

/// What a key opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    Inference,
    /// Uploads, lists and removes adapters; without a tenant also keys.
    Admin,
    Metrics,
}

impl Scope {
    pub const ALL: [Self; 3] = [Self::Inference, Self::Admin, Self::Metrics];

    pub fn name(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Admin => "admin",
            Self::Metrics => "metrics",
        }
    }
}

/// How much a key, or all keys together on one adapter, may use. `None` is without bound.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    pub requests_per_minute: Option<u64>,
    /// Prompt and answer together, reserved with `max_tokens` when a request comes in.
    pub tokens_per_minute: Option<u64>,
    /// Requests being answered at once.
    pub concurrent_max: Option<u64>,
    /// Tokens from midnight to midnight UTC.
    pub tokens_per_day: Option<u64>,
    /// Tokens of a calendar month UTC.
    pub tokens_per_month: Option<u64>,
    /// The rest is compared with what the key's tenant holds in all, by whichever key.
    /// Names of adapters and aliases.
    pub adapters_max: Option<u64>,
    /// Bytes on disk: adapters, all versions together, and files.
    pub disk_bytes_max: Option<u64>,
    /// Bytes in memory; of these, what is pinned.
    pub resident_bytes_max: Option<u64>,
    /// Uploads being received at once.
    pub uploads_max: Option<u64>,
    /// Merges that are not over.
    pub merges_max: Option<u64>,
}

impl Limits {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The first of the bounds that are a tenant's and not a name's.
    pub fn tenant_bound(&self) -> Option<&'static str> {
        let set = self.bounds().into_iter().skip(5).find(|(_, value)| value.is_some());
        set.map(|(name, _)| name)
    }

    fn bounds(&self) -> [(&'static str, Option<u64>); 10] {
        [
            ("requests_per_minute", self.requests_per_minute),
            ("tokens_per_minute", self.tokens_per_minute),
            ("concurrent_max", self.concurrent_max),
            ("tokens_per_day", self.tokens_per_day),
            ("tokens_per_month", self.tokens_per_month),
            ("adapters_max", self.adapters_max),
            ("disk_bytes_max", self.disk_bytes_max),
            ("resident_bytes_max", self.resident_bytes_max),
            ("uploads_max", self.uploads_max),
            ("merges_max", self.merges_max),
        ]
    }

    /// Errors: `invalid_value`: zero would be a key that is good for nothing.
    pub fn check(&self) -> Result<()> {
        for (name, value) in self.bounds() {
            if value.is_some_and(|n| n == 0 || n > 1 << 40) {
                let message = format!("`{name}` must be from 1 to 2^40, or left out");
                return Err(Error::invalid("invalid_value", message).param(name));
            }
        }
        Ok(())
    }
}

/// What a key is to be.
#[derive(Debug, Clone, Default)]
pub struct NewKey {
    /// For people.
    pub label: String,
    pub scopes: Vec<Scope>,
    /// `None` makes an operator's key.
    pub tenant: Option<String>,
    /// Patterns of names that it may use; `*` stands for any characters, `?` for one.
    pub adapters: Vec<String>,
    /// Patterns of names that it may create and change, whosever they are. `None`: the names that
    /// its tenant owns, and those that match `adapters` and nobody has.
    pub manage: Option<Vec<String>>,
    /// Share of the engine against other tenants, 1 to [`WEIGHT_MAX`].
    pub weight: u32,
    pub limits: Limits,
    /// Seconds from now; `None` is without end.
    pub lifetime_seconds: Option<u64>,
}

/// A key as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// `key-` and 16 hex digits; it stays through rotations.
    pub id: String,
    pub label: String,
    pub scopes: Vec<Scope>,
    pub tenant: Option<String>,
    pub adapters: Vec<String>,
    /// See [`NewKey::manage`].
    pub manage: Option<Vec<String>>,
    pub weight: u32,
    pub limits: Limits,
    /// Unix seconds.
    pub created: u64,
    pub expires: Option<u64>,
    pub revoked: Option<u64>,
    /// To a minute.
    pub last_used: Option<u64>,
}

impl NewKey {
    /// The key that it makes. Errors: `invalid_value`.
    pub fn check(self, now: Duration) -> Result<Key> {
        let wrong = |param: &str, message: String| {
            Err(Error::invalid("invalid_value", message).param(param))
        };
        if self.label.chars().count() > NAME_CHARS_MAX || self.label.contains(char::is_control) {
            return wrong("label", format!("`label` has at most {NAME_CHARS_MAX} characters"));
        }
        if self.scopes.is_empty() {
            return wrong("scopes", "`scopes` needs inference, admin or metrics".to_owned());
        }
        if !(1..=WEIGHT_MAX).contains(&self.weight) {
            return wrong("weight", format!("`weight` must be from 1 to {WEIGHT_MAX}"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        match &self.tenant {
            Some(t) if t.is_empty() || t.len() > NAME_CHARS_MAX || !t.chars().all(plain) => {
                let message = "`tenant` is 1 to 64 of A-Z a-z 0-9 . _ -".to_owned();
                return wrong("tenant", message);
            }
            None if !self.adapters.is_empty() => {
                let message = "a key without `tenant` sees every adapter; leave `adapters` out";
                return wrong("adapters", message.to_owned());
            }
            None if self.manage.is_some() => {
                let message = "a key without `tenant` changes every adapter; leave `manage` out";
                return wrong("manage", message.to_owned());
            }
            _ => {}
        }
        check_patterns("adapters", &self.adapters)?;
        check_patterns("manage", self.manage.as_deref().unwrap_or_default())?;
        if self.lifetime_seconds.is_some_and(|s| s == 0 || s > 100 * 366 * 86_400) {
            return wrong("lifetime_seconds", "a key lives 1 second to 100 years".to_owned());
        }
        self.limits.check()?;
        let mut scopes = self.scopes;
        scopes.sort_by_key(|s| Scope::ALL.iter().position(|of| of == s));
        scopes.dedup();
        Ok(Key {
            id: format!("key-{:016x}", rand::random::<u64>()),
            label: self.label,
            scopes,
            tenant: self.tenant,
            adapters: self.adapters,
            manage: self.manage,
            weight: self.weight,
            limits: self.limits,
            created: now.as_secs(),
            expires: self.lifetime_seconds.map(|s| now.as_secs() + s),
            revoked: None,
            last_used: None,
        })
    }
}

/// Errors: `invalid_value`, naming the pattern of `field` at fault.
fn check_patterns(field: &str, patterns: &[String]) -> Result<()> {
    let wrong =
        |param: String, message: String| Err(Error::invalid("invalid_value", message).param(param));
    if patterns.len() > PATTERNS_MAX {
        return wrong(field.to_owned(), format!("at most {PATTERNS_MAX} patterns"));
    }
    let sane = |c: char| c.is_ascii_alphanumeric() || "._-*?".contains(c);
    let good = |p: &String| (1..=PATTERN_CHARS_MAX).contains(&p.len()) && p.chars().all(sane);
    match patterns.iter().position(|pattern| !good(pattern)) {
        None => Ok(()),
        Some(i) => {
            let message = "a pattern is 1 to 128 of A-Z a-z 0-9 . _ - * ?".to_owned();
            wrong(format!("{field}[{i}]"), message)
        }
    }
}

impl Key {
    /// Neither revoked nor expired.
    pub fn is_good(&self, now: Duration) -> bool {
        self.revoked.is_none() && self.expires.is_none_or(|end| now.as_secs() < end)
    }

    /// Whether it can make keys.
    pub fn is_operator(&self) -> bool {
        self.tenant.is_none() && self.scopes.contains(&Scope::Admin)
    }

    /// A key with every scope and no tenant.
    pub(super) fn whole(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            label: String::new(),
            scopes: Scope::ALL.to_vec(),
            tenant: None,
            adapters: Vec::new(),
            manage: None,
            weight: 1,
            limits: Limits::default(),
            created: 0,
            expires: None,
            revoked: None,
            last_used: None,
        }
    }
}

/// A key in use.
pub(super) struct Held {
    pub key: Key,
    /// Unix seconds; 0 is never.
    pub used: AtomicU64,
}

/// Which changes a key may make to a name, decided by its patterns and the name alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Whosever the name is: an operator's key, or one that was given the name by `manage`.
    Given,
    /// While its tenant owns the name, or nobody does.
    Own,
    /// None.
    Nothing,
}

/// Who sent a request. Cheap to clone.
#[derive(Clone)]
pub struct Caller {
    held: Arc<Held>,
}

impl Caller {
    pub(super) fn new(held: Arc<Held>) -> Self {
        Self { held }
    }

    /// Who comes where no key is needed: everything is allowed.
    pub fn anonymous() -> Self {
        Self::of(Key::whole("anonymous"))
    }

    /// Who would send `key`.
    pub fn of(key: Key) -> Self {
        Self { held: Arc::new(Held { key, used: AtomicU64::new(0) }) }
    }

    /// The id of the key: `key-…`, `api_key` for the configured one, `anonymous` without any.
    pub fn id(&self) -> &str {
        &self.held.key.id
    }
    /// The same, where it tells one caller from another: not for the key that all share.
    pub fn own_id(&self) -> Option<&str> {
        Some(self.id()).filter(|id| id.starts_with("key-"))
    }
    pub fn tenant(&self) -> Option<&str> {
        self.held.key.tenant.as_deref()
    }
    pub fn has(&self, scope: Scope) -> bool {
        self.held.key.scopes.contains(&scope)
    }
    pub fn weight(&self) -> u32 {
        self.held.key.weight
    }
    pub fn limits(&self) -> &Limits {
        &self.held.key.limits
    }

    /// Whether it may know of the adapter `name`: decided by the name alone, not by what exists.
    /// Takes the same time for any name of a length.
    pub fn sees(&self, name: &str) -> bool {
        let key = &self.held.key;
        let given = key.manage.iter().flatten();
        self.tenant().is_none() || key.adapters.iter().chain(given).any(|p| matches(p, name))
    }

    /// The same of `name` or `name@version`.
    pub fn sees_version(&self, id: &str) -> bool {
        self.sees(id.split('@').next().unwrap_or_default())
    }

    /// What it may do to the adapter or alias `name`.
    pub fn reach(&self, name: &str) -> Reach {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| matches(pattern, name));
        match (self.tenant(), &self.held.key.manage) {
            (None, _) => Reach::Given,
            (_, Some(given)) if any(given) => Reach::Given,
            (_, None) if any(&self.held.key.adapters) => Reach::Own,
            _ => Reach::Nothing,
        }
    }

    /// Notes a use, to a minute.
    pub(super) fn note_use(&self, now: Duration) {
        let minute = now.as_secs() / 60 * 60;
        self.held.used.fetch_max(minute, Ordering::Relaxed);
    }
}

/// Whether `name` fits `pattern`, in which `*` stands for any characters and `?` for one.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where the last `*` stands, and how far into the name it reaches.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((at, reach)) = star else {
                    return false;
                };
                star = Some((at, reach + 1));
                (p, n) = (at + 1, reach + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, fits) in [
            ("acme-*", "acme-sql", true),
            ("acme-*", "acme-", true),
            ("acme-*", "acme", false),
            ("acme-*", "xacme-sql", false),
            ("*", "", true),
            ("*", "anything", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*-v?", "sql-v1", true),
            ("*-v?", "sql-v10", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("sql", "sql", true),
            ("sql", "sq", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
        // Many stars against a long name that does not fit: no explosion.
        assert!(!matches(&"*a".repeat(60), &"a".repeat(59)));
    }

    fn new() -> NewKey {
        NewKey { scopes: vec![Scope::Inference], weight: 1, ..NewKey::default() }
    }

    #[test]
    fn a_key_that_cannot_be_is_refused_by_the_field_at_fault() {
        let now = Duration::from_secs(1000);
        let tenant = || Some("acme".to_owned());
        let limits = Limits { concurrent_max: Some(0), ..Limits::default() };
        for (bad, param) in [
            (NewKey { scopes: vec![], ..new() }, "scopes"),
            (NewKey { weight: 0, ..new() }, "weight"),
            (NewKey { tenant: Some(String::new()), ..new() }, "tenant"),
            (NewKey { tenant: Some("a/b".into()), ..new() }, "tenant"),
            (NewKey { adapters: vec!["a".into()], ..new() }, "adapters"),
            (NewKey { tenant: tenant(), adapters: vec!["a/b".into()], ..new() }, "adapters[0]"),
            (NewKey { manage: Some(vec![]), ..new() }, "manage"),
            (NewKey { tenant: tenant(), manage: Some(vec!["".into()]), ..new() }, "manage[0]"),
            (NewKey { label: "x".repeat(65), ..new() }, "label"),
            (NewKey { lifetime_seconds: Some(0), ..new() }, "lifetime_seconds"),
            (NewKey { limits, ..new() }, "concurrent_max"),
        ] {
            let e = bad.check(now).unwrap_err();
            assert_eq!((e.code, e.param.as_deref()), ("invalid_value", Some(param)));
        }
        let key = NewKey { lifetime_seconds: Some(10), ..new() }.check(now).unwrap();
        assert!(key.is_good(Duration::from_secs(1009)) && !key.is_good(Duration::from_secs(1010)));
    }

    #[test]
    fn a_tenant_sees_its_patterns_and_an_operator_everything() {
        let now = Duration::ZERO;
        let of = |new: NewKey| Caller::of(new.check(now).unwrap());
        let adapters = vec!["acme-*".to_owned(), "shared".to_owned()];
        let acme = of(NewKey { tenant: Some("acme".into()), adapters, ..new() });
        assert!(acme.sees("acme-sql") && acme.sees("shared") && !acme.sees("globex-sql"));
        let blind = of(NewKey { tenant: Some("acme".into()), ..new() });
        assert!(!blind.sees("acme-sql"));
        assert!(of(new()).sees("globex-sql"));
    }

    #[test]
    fn what_a_key_may_change_is_what_it_was_given_or_else_what_is_its_own() {
        let of = |new: NewKey| Caller::of(new.check(Duration::ZERO).unwrap());
        let tenant = || Some("acme".to_owned());
        let adapters = || vec!["acme-*".to_owned(), "shared".to_owned()];
        let reach = |caller: &Caller| ["acme-sql", "shared", "x"].map(|name| caller.reach(name));
        let plain = of(NewKey { tenant: tenant(), adapters: adapters(), ..new() });
        assert_eq!(reach(&plain), [Reach::Own, Reach::Own, Reach::Nothing]);
        let manage = Some(vec!["acme-*".to_owned(), "x".to_owned()]);
        let given = of(NewKey { tenant: tenant(), adapters: adapters(), manage, ..new() });
        assert_eq!(reach(&given), [Reach::Given, Reach::Nothing, Reach::Given]);
        assert!(given.sees("x") && given.sees("shared"), "what it may change it also sees");
        let manage = Some(vec![]);
        let none = of(NewKey { tenant: tenant(), adapters: adapters(), manage, ..new() });
        assert_eq!(reach(&none), [Reach::Nothing; 3]);
        assert_eq!(reach(&of(new())), [Reach::Given; 3]);
    }
}
