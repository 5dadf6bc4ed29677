//! Bodies in: bytes under a limit, then JSON, then typed fields; every failure names its place.
//!
//! Owns reading and parsing. Never judges a value beyond its type. The thing to know: `null` means
//! absent everywhere, and a field nobody knows is an error, because a parameter that is silently
//! ignored changes answers silently.

use super::Api;
use super::errors::UNSUPPORTED_MEDIA_TYPE;
use super::wire::known;
use crate::error::{Error, Kind, Result};
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;
use utoipa::PartialSchema;
use utoipa::openapi::{RefOr, Schema};

/// A JSON object, nulls left out.
pub struct JsonObject(pub Map<String, Value>);

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
        let bytes = read(request, api.app.config.body_bytes_max).await?;
        object(&bytes).map(Self)
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

/// The whole body, at most `bytes_max`.
async fn read(request: Request, bytes_max: usize) -> Result<Bytes> {
    let too_large = || {
        Error::new(
            Kind::TooLarge,
            "body_too_large",
            format!("the body is larger than body_bytes_max = {bytes_max}"),
        )
    };
    let declared = declared_length(&request);
    let mut chunks = request.into_body().into_data_stream();
    if declared.is_some_and(|n| n > bytes_max as u64) {
        discard(chunks).await;
        return Err(too_large());
    }
    let mut all = bytes::BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|e| {
            Error::invalid("incomplete_body", format!("the body could not be read: {e}"))
        })?;
        if all.len() + chunk.len() > bytes_max {
            discard(chunks).await;
            return Err(too_large());
        }
        all.extend_from_slice(&chunk);
    }
    Ok(all.freeze())
}

/// Reads on for a moment and throws away: a client that is still sending when we answer and close
/// would lose the answer to a connection reset.
pub async fn discard<E>(mut chunks: impl Stream<Item = Result<Bytes, E>> + Unpin) {
    const BYTES_MAX: usize = 64 << 20;
    const TIME_MAX: Duration = Duration::from_secs(2);
    let mut left = BYTES_MAX;
    let reading = async {
        while let Some(Ok(chunk)) = chunks.next().await {
            left = left.saturating_sub(chunk.len());
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(TIME_MAX, reading).await;
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| Error::invalid("invalid_json", format!("the body is not valid JSON: {e}")))?;
    match value {
        Value::Object(mut map) => {
            map.retain(|_, v| !v.is_null());
            Ok(map)
        }
        other => Err(Error::invalid(
            "invalid_json",
            format!("the body must be a JSON object, not {}", kind(&other)),
        )),
    }
}

/// The fields of `T` out of `map`, the rest stays. Names are those of T's schema, so that there is
/// one list.
pub fn take<T: DeserializeOwned + PartialSchema>(map: &mut Map<String, Value>) -> Result<T> {
    let mut own = Map::new();
    for name in fields::<T>() {
        if let Some(value) = map.remove(&name) {
            own.insert(name, value);
        }
    }
    typed(own)
}

/// All that is left, as `T`: what `T` does not know is refused by name.
pub fn rest<T: DeserializeOwned + PartialSchema>(mut map: Map<String, Value>) -> Result<T> {
    known::settle(&mut map)?;
    let fields = fields::<T>();
    if let Some(name) = map.keys().find(|name| !fields.contains(name)) {
        let shown: String = name.chars().take(64).collect();
        return Err(Error::invalid("unknown_parameter", format!("unknown parameter `{shown}`"))
            .param(shown));
    }
    typed(map)
}

fn fields<T: PartialSchema>() -> Vec<String> {
    match T::schema() {
        RefOr::T(Schema::Object(object)) => object.properties.keys().cloned().collect(),
        _ => unreachable!("bodies are objects"),
    }
}

/// Reads one value; the error's `param` is the path to the part that does not fit.
pub fn typed<T: DeserializeOwned>(map: Map<String, Value>) -> Result<T> {
    serde_path_to_error::deserialize(Value::Object(map)).map_err(|e| {
        let path = e.path().to_string();
        let reason = e.inner().to_string();
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

/// What a JSON value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{ChatFields, SamplingFields};
    use super::*;

    fn refusal<T: DeserializeOwned + PartialSchema>(json: &str) -> Error {
        let mut map = object(json.as_bytes()).unwrap();
        match take::<SamplingFields>(&mut map) {
            Err(e) => e,
            Ok(_) => rest::<T>(map).err().expect("refused"),
        }
    }

    #[test]
    fn a_syntax_error_names_line_and_column() {
        let e = object(b"{\n  \"model\": }").unwrap_err();
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
        assert!(map.is_empty());
    }
}
