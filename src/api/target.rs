//! Who answers: from the client's `model` to a leased version, and the headers that say so.
//!
//! Owns how names are read. Never falls back to the base: a name that nobody has is
//! `model_not_found`. The thing to know: the headers are taken from the lease itself, so they name
//! what computes, not what was asked.

use super::Api;
use super::errors::invalid_value;
use super::wire::SamplingFields;
use crate::access::Caller;
use crate::adapters::registry::{Entry, Lease};
use crate::error::{Error, Result};
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue};

/// What a request runs on.
pub struct Target {
    /// `None`: the base.
    pub lease: Option<Lease>,
    /// Whose it is.
    pub caller: Caller,
    /// `name@version`, or `base`.
    id: String,
    digest: String,
}

/// What a `model` string means, before anything is leased.
enum Name<'a> {
    Base,
    /// `name` or `name@version`
    Adapter(&'a str),
}

/// The same, for `caller`: a name that it may not know of is a name that nobody has.
fn read_for<'a>(caller: &Caller, model: &'a str, base: &str) -> Result<Name<'a>> {
    let name = read(model, base)?;
    match name {
        Name::Adapter(id) if !caller.sees(id.split('@').next().unwrap_or_default()) => {
            Err(not_found(model))
        }
        _ => Ok(name),
    }
}

fn read<'a>(model: &'a str, base: &str) -> Result<Name<'a>> {
    if model == base {
        return Ok(Name::Base);
    }
    // The base's name may hold a colon itself, so it is taken off as a whole.
    let name = model.strip_prefix(base).and_then(|rest| rest.strip_prefix(':')).unwrap_or(model);
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
    if name.is_empty() || name.len() > 160 || !name.chars().all(plain) {
        return Err(not_found(model));
    }
    Ok(Name::Adapter(name))
}

/// 404 for a name that nobody has.
pub fn not_found(model: &str) -> Error {
    let shown: String = model.chars().take(160).collect();
    Error::not_found("model_not_found", format!("the model `{shown}` does not exist"))
        .param("model")
}

/// The name that a completion asks for: `model`, or LoRAX's `adapter_id` beside the base's name.
pub fn asked<'a>(fields: &'a SamplingFields, base: &str) -> Result<&'a str> {
    if fields.adapter_source.as_deref().is_some_and(|source| source != "local") {
        let message = "`adapter_source` may only be `local`: adapters are uploaded, never fetched";
        return Err(Error::invalid("unsupported_parameter", message).param("adapter_source"));
    }
    match fields.adapter_id.as_deref() {
        None | Some("") => Ok(&fields.model),
        Some(id) if fields.model == base || fields.model == id || fields.model.is_empty() => Ok(id),
        Some(_) => Err(invalid_value("adapter_id", "`model` and `adapter_id` name two adapters")),
    }
}

impl Api {
    /// Leases what `model` names, loading it when it is not resident. An alias leads the same
    /// `user`, else the same key, to the same version.
    pub async fn lease(&self, caller: &Caller, model: &str, user: Option<&str>) -> Result<Target> {
        let caller = caller.clone();
        let sticky = user.or_else(|| caller.own_id());
        match read_for(&caller, model, &self.app.base_name)? {
            Name::Base => Ok(Target {
                lease: None,
                caller,
                id: "base".to_owned(),
                digest: self.app.base_digest.to_string(),
            }),
            Name::Adapter(name) => {
                let leased = self.app.registry.acquire_for(name, sticky).await;
                let lease = leased.map_err(|e| match e.code {
                    "model_not_found" => not_found(model),
                    _ => e.param("model"),
                })?;
                Ok(Target {
                    id: lease.version().id(),
                    digest: lease.version().digest.to_string(),
                    lease: Some(lease),
                    caller,
                })
            }
        }
    }

    /// Looks `model` up without loading or leasing; `None` is the base.
    pub fn look_up(&self, caller: &Caller, model: &str) -> Result<Option<Entry>> {
        let name = match read_for(caller, model, &self.app.base_name)? {
            Name::Base => return Ok(None),
            Name::Adapter(name) => name,
        };
        let (name, number) = match name.split_once('@') {
            // An alias is shown as the version that most of its requests get.
            None => match self.app.registry.alias(name) {
                Ok(alias) => {
                    let most = alias.targets.into_iter().max_by_key(|t| t.weight);
                    let most = most.ok_or_else(|| not_found(model))?;
                    (most.name, Some(most.number))
                }
                Err(_) => (name.to_owned(), None),
            },
            Some((name, number)) => {
                let number = number.parse::<u64>().map_err(|_| not_found(model))?;
                (name.to_owned(), Some(number))
            }
        };
        let found =
            self.app.registry.versions(&name).into_iter().find(|entry| {
                number.map_or(entry.current, |number| entry.version.number == number)
            });
        found.map(Some).ok_or_else(|| not_found(model))
    }
}

impl Target {
    /// The adapter's name; `None` for the base.
    pub fn adapter(&self) -> Option<&str> {
        self.lease.as_ref().map(|lease| lease.version().name.as_str())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter<'a>(model: &'a str, base: &str) -> Option<&'a str> {
        match read(model, base) {
            Ok(Name::Adapter(name)) => Some(name),
            _ => None,
        }
    }

    #[test]
    fn the_base_is_only_meant_by_its_own_name() {
        assert!(matches!(read("org/base:7b", "org/base:7b"), Ok(Name::Base)));
        assert_eq!(adapter("org/base:7b:sql@2", "org/base:7b"), Some("sql@2"));
        assert_eq!(adapter("sql", "base"), Some("sql"));
        for attack in ["", "other:sql", "base:", "../sql", "sqⅼ", "a b", "base:base:sql"] {
            let e = read(attack, "base").err().expect("refused");
            assert_eq!((e.code, e.param.as_deref()), ("model_not_found", Some("model")));
        }
        let long = "a".repeat(4096);
        assert!(read(&long, "base").err().unwrap().message.len() < 300);
    }
}
