//! Bodies in: bytes under a limit, then JSON, then typed fields; every failure names its place.
//!
//! Owns reading and parsing. Never judges a value beyond its type. The thing to know: `null` means
//! absent everywhere, and a field nobody knows is an error, because a parameter that is silently
//! ignored changes answers silently; a body is read field by field, never into a tree of the whole.

use super::errors::UNSUPPORTED_MEDIA_TYPE;
use super::intake::{Bounds, Held, LONG_BODY_BYTES, SHORT_BODY_BYTES, apart, parsing};
use super::json::{self, Field};
use super::paced::Paced;
use crate::access::{Caller, Ticket};
use crate::api::Api;
use crate::api::wire::known;
use crate::error::{Error, Kind, Result, brief};
use axum::extract::{FromRequest, Request};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use serde::de::DeserializeOwned;
use std::sync::Arc;
use utoipa::PartialSchema;
use utoipa::openapi::{RefOr, Schema};

/// A JSON object, its values still as they came.
pub struct JsonObject(pub Fields);

/// What a body consists of beside its one type.
#[derive(serde::Deserialize, utoipa::ToSchema)]
pub struct Nothing {}

/// The fields of a body, nulls left out, and what the request holds for them.
pub struct Fields {
    body: Bytes,
    fields: Vec<Field>,
    held: Held,
}

impl FromRequest<Arc<Api>> for JsonObject {
    type Rejection = Error;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self> {
        // Strict on purpose: a web page can send a form or plain text here without asking, but not
        // JSON.
        if !is_json(&request) {
            return Err(Error::invalid(
                UNSUPPORTED_MEDIA_TYPE,
                "the body must be JSON: send `content-type: application/json`",
            ));
        }
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.unwrap_or_else(Caller::anonymous);
        let (body, held) = read(request, api, &caller).await?;
        let bounds = api.requests.intake.bounds;
        if body.len() <= SHORT_BODY_BYTES {
            return Fields::cut(body, held, &bounds).map(Self);
        }
        let permit = api.requests.intake.permit(&caller, true).await;
        apart(permit, true, move || Fields::cut(body, held, &bounds)).await.map(Self)
    }
}

impl Fields {
    fn cut(body: Bytes, mut held: Held, bounds: &Bounds) -> Result<Self> {
        let fields = json::fields(&body, bounds)?;
        let count = |ids: bool| -> u64 {
            fields.iter().filter(|f| f.holds_ids() == ids).map(|f| f.values).sum()
        };
        let (trees, ids) = (count(false), count(true));
        if trees > bounds.tree_values {
            return Err(json::too_many("the body", bounds.tree_values));
        }
        held.resize(body.len() as u64 + parsing(body.len(), trees, ids))?;
        Ok(Self { body, fields, held })
    }

    /// Reading a large body is work that counts against its key.
    pub fn count(&self, ticket: &mut Ticket) {
        if self.body.len() > SHORT_BODY_BYTES {
            ticket.worked(0);
        }
    }

    /// Takes a field out; whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        let before = self.fields.len();
        self.fields.retain(|f| f.name != name);
        self.fields.len() < before
    }

    /// The two types that a body consists of, and what is held for them from then on. A large body
    /// is read off the threads that answer everybody.
    pub async fn read<A, B>(self, api: &Api, caller: &Caller) -> Result<(A, B, Held)>
    where
        A: DeserializeOwned + PartialSchema + Send + 'static,
        B: DeserializeOwned + PartialSchema + Send + 'static,
    {
        if self.body.len() <= SHORT_BODY_BYTES {
            return self.both();
        }
        let permit = api.requests.intake.permit(caller, true).await;
        apart(permit, true, move || self.both()).await
    }

    fn both<A, B>(mut self) -> Result<(A, B, Held)>
    where
        A: DeserializeOwned + PartialSchema,
        B: DeserializeOwned + PartialSchema,
    {
        let first = take(&mut self)?;
        let body = self.body.len() as u64;
        let (second, mut held) = rest_held(self)?;
        // The body is gone, and the copy of its fields; what was read from them is left.
        held.resize(held.bytes().saturating_sub(2 * body))?;
        Ok((first, second, held))
    }

    /// The text of a field.
    fn text(&self, field: &Field) -> &str {
        // It was UTF-8 when it was cut.
        std::str::from_utf8(&self.body[field.value.clone()]).unwrap_or_default()
    }

    /// The named fields as an object of their own.
    fn object(&self, named: impl Fn(&str) -> bool) -> String {
        let mut object = String::from("{");
        for field in self.fields.iter().filter(|f| named(&f.name)) {
            if object.len() > 1 {
                object.push(',');
            }
            object.push_str(&serde_json::Value::from(field.name.as_str()).to_string());
            object.push(':');
            object.push_str(self.text(field));
        }
        object.push('}');
        object
    }
}

fn is_json(request: &Request) -> bool {
    request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split(';').next())
        .is_some_and(|v| v.trim().eq_ignore_ascii_case("application/json"))
}

/// The declared length of a body, if it declares one.
pub fn declared_length(request: &Request) -> Option<u64> {
    let value = request.headers().get(CONTENT_LENGTH)?;
    value.to_str().ok()?.parse().ok()
}

/// The whole body, and what is held for it.
async fn read(request: Request, api: &Api, caller: &Caller) -> Result<(Bytes, Held)> {
    let bytes_max = api.requests.intake.bounds.body_bytes;
    let too_large = || {
        let config = &api.config;
        let held_down = (bytes_max as u64) < config.body_bytes_max(api.context);
        let why = match held_down {
            true => {
                format!(", which request_bytes_max = {} allows", config.request_bytes_max.0)
            }
            false => String::new(),
        };
        let message = format!("the body is larger than {bytes_max} bytes{why}");
        Error::new(Kind::TooLarge, "body_too_large", message)
    };
    let declared = declared_length(&request);
    let mut chunks = Paced::new(request.into_body(), api.config.body_seconds_max);
    if declared.is_some_and(|n| n > bytes_max as u64) {
        return Err(too_large());
    }
    let mut held = api.requests.intake.hold(caller, declared.unwrap_or(0))?;
    let mut all = BytesMut::with_capacity(declared.unwrap_or(0) as usize);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        let length = all.len() + chunk.len();
        if length > bytes_max {
            return Err(too_large());
        }
        if length > all.capacity() {
            let capacity = (2 * length).min(bytes_max);
            held.resize(capacity as u64)?;
            all.reserve(capacity - all.len());
        }
        all.extend_from_slice(&chunk);
        if length > LONG_BODY_BYTES {
            api.requests.intake.read_turns(caller, chunk.len()).await;
        }
    }
    Ok((all.freeze(), held))
}

/// The fields of `T` out of a body, the rest stays. Names are those of T's schema, so that there is
/// one list.
pub fn take<T: DeserializeOwned + PartialSchema>(body: &mut Fields) -> Result<T> {
    let own = fields::<T>();
    let is_own = |name: &str| own.iter().any(|n| n == name);
    let object = body.object(is_own);
    body.fields.retain(|f| !is_own(&f.name));
    from_text(&object)
}

/// All that is left, as `T`: what `T` does not know is refused by name.
pub fn rest<T: DeserializeOwned + PartialSchema>(body: Fields) -> Result<T> {
    rest_held(body).map(|(rest, _)| rest)
}

fn rest_held<T: DeserializeOwned + PartialSchema>(mut body: Fields) -> Result<(T, Held)> {
    let fields = fields::<T>();
    // What this body has itself is nobody else's.
    let others = body.fields.iter().filter(|f| !fields.contains(&f.name));
    let known = known::settle(others.map(|f| (f.name.as_str(), body.text(f))))?;
    body.fields.retain(|f| fields.contains(&f.name) || !known.contains(&f.name.as_str()));
    if let Some(field) = body.fields.iter().find(|f| !fields.contains(&f.name)) {
        let shown = brief(&field.name);
        return Err(Error::invalid("unknown_parameter", format!("unknown parameter `{shown}`"))
            .param(shown));
    }
    let object = body.object(|_| true);
    Ok((from_text(&object)?, body.held))
}

fn fields<T: PartialSchema>() -> Vec<String> {
    match T::schema() {
        RefOr::T(Schema::Object(object)) => object.properties.keys().cloned().collect(),
        _ => unreachable!("bodies are objects"),
    }
}

/// All fields as `T`, which says itself what it does not know.
pub fn typed<T: DeserializeOwned>(body: Fields) -> Result<T> {
    from_text(&body.object(|_| true))
}

/// Reads one value; the error's `param` is the path to the part that does not fit.
fn from_text<T: DeserializeOwned>(text: &str) -> Result<T> {
    let mut reader = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut reader).map_err(|e| {
        let path = e.path().to_string();
        let reason = e.inner().to_string();
        // Where it is in `text` is nothing that the client has seen.
        let reason = match reason.rfind(" at line ") {
            Some(end) if e.inner().line() > 0 => &reason[..end],
            _ => &reason,
        };
        if !e.inner().is_data() {
            let message = format!("the body is not valid JSON: `{path}`: {reason}");
            return Error::invalid("invalid_json", message);
        }
        match reason.strip_prefix("missing field `").and_then(|r| r.split('`').next()) {
            Some(name) => missing(name),
            None => Error::invalid("invalid_type", format!("`{path}`: {reason}")).param(path),
        }
    })
}

/// A parameter that must be there is not.
pub fn missing(name: &str) -> Error {
    Error::invalid("missing_parameter", format!("`{name}` is required")).param(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::wire::{ChatFields, SamplingFields};
    use crate::config::{Config, Given};
    use crate::share::Pool;

    fn object(json: &[u8]) -> Result<Fields> {
        let config = Config::load(None, Given::default()).unwrap();
        let pool = Pool::new(config.request_bytes_max.0);
        let held = Held::of(&pool, "", json.len() as u64)?;
        Fields::cut(Bytes::copy_from_slice(json), held, &Bounds::new(&config, 512, 16))
    }

    fn refusal<T: DeserializeOwned + PartialSchema>(json: &str) -> Error {
        let mut map = object(json.as_bytes()).unwrap();
        match take::<SamplingFields>(&mut map) {
            Err(e) => e,
            Ok(_) => rest::<T>(map).err().expect("refused"),
        }
    }

    #[test]
    fn a_syntax_error_names_line_and_column() {
        let e = object(b"{\n  \"model\": }").err().expect("refused");
        assert_eq!(e.code, "invalid_json");
        assert!(e.message.contains("line 2 column"), "{}", e.message);
    }

    #[test]
    fn a_wrong_type_names_the_path() {
        let e = refusal::<ChatFields>(r#"{"model":"m","temperature":"hot"}"#);
        assert_eq!((e.code, e.param.as_deref()), ("invalid_type", Some("temperature")));
        let e = refusal::<ChatFields>(r#"{"model":"m","messages":[],"stream_options":{"x":1}}"#);
        assert_eq!(e.param.as_deref(), Some("stream_options.x"));
    }

    #[test]
    fn an_unknown_parameter_is_refused_by_name() {
        let e = refusal::<ChatFields>(r#"{"model":"m","messages":[],"temprature":1}"#);
        assert_eq!((e.code, e.param.as_deref()), ("unknown_parameter", Some("temprature")));
    }

    #[test]
    fn a_missing_parameter_is_named() {
        let e = refusal::<ChatFields>(r#"{"model":"m"}"#);
        assert_eq!((e.code, e.param.as_deref()), ("missing_parameter", Some("messages")));
    }

    #[test]
    fn null_means_absent() {
        let mut map = object(br#"{"model":"m","temperature":null,"whatever":null}"#).unwrap();
        assert_eq!(take::<SamplingFields>(&mut map).unwrap().temperature, None);
        assert!(map.fields.is_empty());
    }

    #[test]
    fn what_the_syntax_allows_and_no_value_can_be_is_invalid_json() {
        for value in ["\"\\ud800\"", "1e999"] {
            let e = refusal::<ChatFields>(&format!(r#"{{"model":"m","temperature":{value}}}"#));
            assert_eq!(e.code, "invalid_json", "{value}: {e}");
            assert!(e.message.contains("`temperature`") && !e.message.contains("line"), "{e}");
        }
        let e = object(b"{\"model\":\"\xff\"}").err().expect("refused");
        assert!(e.message.contains("line 1 column 11"), "{e}");
    }
}
