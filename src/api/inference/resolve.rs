//! Who answers: from what was asked to leased versions, and the headers that say so.
//!
//! Owns who may know of a name. Never falls back to the base: a name that nobody has is
//! `model_not_found`. The thing to know: the headers are taken from the lease itself, so they name
//! what computes, not what was asked.

use super::model_ref::{self, ModelPart, ModelRef};
use crate::access::Caller;
use crate::adapters::composition::{Composition, Part};
use crate::adapters::format::generation::Generation;
pub use crate::adapters::version::model_not_found as not_found;
use crate::adapters::version::{Entry, Version, VersionRef};
use crate::api::Api;
use crate::api::http::auth;
use crate::error::Result;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue};
use std::sync::Arc;

/// What a request runs on.
pub struct ResolvedModel {
    /// `None`: the base.
    pub lease: Option<Composition>,
    /// Whose it is.
    pub caller: Caller,
    /// As [`Composition::id`], or `base`.
    id: String,
    digest: String,
}

/// Refuses, as names that nobody has, those that `caller` may not know of.
fn check_seen(caller: &Caller, asked: &ModelRef) -> Result<()> {
    let hidden = |part: &&ModelPart| !caller.sees_version(&part.name);
    match asked.parts.iter().find(hidden) {
        Some(part) => Err(not_found(&part.shown)),
        None => Ok(()),
    }
}

impl Api {
    /// Leases all that is asked for, loading what is not resident. An alias leads the same `user`,
    /// else the same key, to the same version.
    pub async fn lease(
        &self,
        caller: &Caller,
        asked: ModelRef,
        user: Option<&str>,
    ) -> Result<ResolvedModel> {
        check_seen(caller, &asked)?;
        let caller = caller.clone();
        let sticky = user.or_else(|| caller.own_id());
        if asked.parts.is_empty() {
            let digest = self.base_digest.to_string();
            return Ok(ResolvedModel { lease: None, caller, id: "base".to_owned(), digest });
        }
        let names: Vec<&str> = asked.parts.iter().map(|part| part.name.as_str()).collect();
        let leases = self.registry.acquire_all(&names, sticky, &auth::tenant(&caller)).await;
        let leases = leases.map_err(|e| match (e.code, &asked.parts[..]) {
            ("model_not_found", [alone]) => not_found(&alone.shown),
            ("model_not_found", _) => e,
            _ => e.param(asked.param),
        })?;
        let weights = asked.parts.iter().map(|part| part.weight);
        let parts = leases.into_iter().zip(weights).map(|(lease, weight)| Part { lease, weight });
        let lease = Composition::new(parts.collect()).map_err(|e| e.param(asked.param))?;
        let (id, digest) = (lease.id(), lease.digest().to_string());
        Ok(ResolvedModel { lease: Some(lease), caller, id, digest })
    }

    /// Looks up what `model` names, without loading or leasing; none is the base.
    pub fn look_up_all(&self, caller: &Caller, model: &str) -> Result<Vec<Entry>> {
        let asked = model_ref::read(model, &self.base_name)?;
        check_seen(caller, &asked)?;
        asked.parts.iter().map(|part| self.entry(&part.name, &part.shown)).collect()
    }

    /// The same for one model that is in the lists; `None` is the base. A composition is none of
    /// these.
    pub fn look_up(&self, caller: &Caller, model: &str) -> Result<Option<Entry>> {
        let asked = model_ref::read(model, &self.base_name)?;
        check_seen(caller, &asked)?;
        match &asked.parts[..] {
            [] => Ok(None),
            [part] if part.weight == 1.0 => self.entry(&part.name, &part.shown).map(Some),
            _ => Err(not_found(model)),
        }
    }

    /// The version that `name` or `name@version` means.
    fn entry(&self, name: &str, shown: &str) -> Result<Entry> {
        let asked = VersionRef::parse(name).ok_or_else(|| not_found(shown))?;
        let (name, number) = match (asked.number, self.registry.alias(asked.name)) {
            // An alias is shown as the version that most of its requests get.
            (None, Ok(alias)) => {
                let most = alias.targets.into_iter().max_by_key(|t| t.weight);
                let most = most.ok_or_else(|| not_found(shown))?;
                (most.name, Some(most.number))
            }
            (number, _) => (asked.name.to_owned(), number),
        };
        let found =
            self.registry.versions(&name).into_iter().find(|entry| {
                number.map_or(entry.current, |number| entry.version.number == number)
            });
        found.ok_or_else(|| not_found(shown))
    }
}

impl ResolvedModel {
    /// What it is called, as the answer's header says it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whose share of the queue it takes; empty for whoever has no tenant.
    pub fn tenant(&self) -> &str {
        self.caller.tenant().unwrap_or_default()
    }

    /// The versions it runs on; none is the base.
    pub fn versions(&self) -> Vec<Arc<Version>> {
        self.lease.iter().flat_map(Composition::versions).cloned().collect()
    }

    /// The defaults that came with the adapter, or with all of several alike.
    pub fn generation(&self) -> Option<&Generation> {
        let mut all = self.lease.as_ref()?.versions().map(|version| &version.summary.generation);
        let first = all.next()?;
        all.all(|other| other == first).then_some(first)
    }

    /// The digest of the weights, as the answer's header says it.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Puts the identity on an answer, be it good or bad.
    pub fn sign(&self, answer: Result<Response>) -> Response {
        let mut response = answer.unwrap_or_else(IntoResponse::into_response);
        let headers = response.headers_mut();
        for (name, value) in [("x-polylora-adapter", &self.id), ("x-polylora-digest", &self.digest)]
        {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
        response
    }
}
