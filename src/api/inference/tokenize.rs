//! `/tokenize` and `/detokenize`, in vLLM's shapes.
//!
//! Owns the two routes. Never leases or loads: of an adapter only the chat template matters here.

use super::encode::Rendered;
use super::entry::Entry;
use super::templates::Conversation;
use super::{messages, sampling};
use crate::access::Caller;
use crate::api::Api;
use crate::api::http::body::{JsonObject, Nothing, missing};
use crate::api::http::errors::invalid_value;
use crate::api::http::intake::{Held, SHORT_TEXT_BYTES};
use crate::api::wire::{DetokenizeRequest, Detokenized, ErrorBody, TokenizeRequest, Tokenized};
use crate::error::Result;
use crate::text::Text;
use axum::Json;
use axum::extract::{Extension, State};
use std::sync::Arc;

/// Tokens of a prompt or of a rendered conversation.
#[utoipa::path(
    post,
    path = "/tokenize",
    request_body = TokenizeRequest,
    responses((status = 200, body = Tokenized), (status = "4XX", body = ErrorBody))
)]
pub async fn tokenize(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Entry(mut ticket): Entry,
    JsonObject(body): JsonObject,
) -> Result<Json<Tokenized>> {
    ticket.worked(0);
    let (Nothing {}, asked, held) = body.read::<_, TokenizeRequest>(&api, &caller).await?;
    let entries = match &asked.model {
        Some(model) => api.look_up_all(&caller, model)?,
        None => Vec::new(),
    };
    let special = asked.add_special_tokens.unwrap_or(true);
    let start = asked.add_generation_prompt.unwrap_or(true);
    let tokens = match (asked.prompt, asked.messages) {
        (Some(prompt), None) => {
            let (bytes, context) = (prompt.len(), api.context);
            api.requests.intake.bounds.fits(bytes, "prompt")?;
            let work = move |text: &Text, _: &mut Held| {
                let _held = held;
                text.encode_within(&prompt, special, context).map_err(|e| e.param("prompt"))
            };
            api.on_text(&caller, bytes, bytes > SHORT_TEXT_BYTES, work).await?
        }
        (None, Some(list)) => {
            let list = messages::check(list)?;
            let tools = messages::tools(asked.tools, None)?;
            let conversation = Conversation { messages: list, tools, add_generation_prompt: start };
            let versions = entries.into_iter().map(|entry| entry.version).collect();
            let ticket = Some(&mut ticket);
            let rendered = Rendered { caller: &caller, versions, held, ticket };
            api.encode_chat(rendered, conversation).await?
        }
        (None, None) => return Err(missing("prompt")),
        (Some(_), Some(_)) => {
            return Err(invalid_value("messages", "send either `prompt` or `messages`, not both"));
        }
    };
    let shown = asked.return_token_strs.unwrap_or(false);
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: api.context,
        token_strs: shown.then(|| {
            let text = &api.text;
            tokens.iter().map(|&t| text.token_text(t).0).collect()
        }),
        tokens,
    }))
}

/// Text of tokens, special tokens included.
#[utoipa::path(
    post,
    path = "/detokenize",
    request_body = DetokenizeRequest,
    responses((status = 200, body = Detokenized), (status = "4XX", body = ErrorBody))
)]
pub async fn detokenize(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Entry(mut ticket): Entry,
    JsonObject(body): JsonObject,
) -> Result<Json<Detokenized>> {
    ticket.worked(0);
    let (Nothing {}, asked, held) = body.read::<_, DetokenizeRequest>(&api, &caller).await?;
    api.requests.intake.bounds.fit(asked.tokens.len(), "tokens")?;
    if let Some(model) = &asked.model {
        api.look_up_all(&caller, model)?;
    }
    let vocab = api.vocab;
    if let Some(i) = asked.tokens.iter().position(|&t| t as usize >= vocab) {
        sampling::in_vocabulary(&format!("tokens[{i}]"), i64::from(asked.tokens[i]), &api)?;
    }
    let work = move |text: &Text, _: &mut Held| {
        let _held = held;
        text.decode(&asked.tokens, false)
    };
    let prompt = api.on_text(&caller, 0, false, work).await?;
    Ok(Json(Detokenized { prompt }))
}
