//! `POST /v1/completions`.
//!
//! Owns the plain format: prompts in, text out. Never generates: `generate` does. The thing to
//! know: it has the same skeleton as `chat`: check, lease, encode, run, show; choices are numbered
//! prompt by prompt.

use super::accounting::RequestMeter;
use super::choice::{Echoed, TextDelta};
use super::entry::Entry;
use super::generate::{AnswerHead, Prompt, ResponseFormat, Run, reason_word};
use super::sampling::{self, Checked};
use super::{logprobs, model_ref, stream};
use crate::access::Caller;
use crate::api::Api;
use crate::api::http::body::JsonObject;
use crate::api::http::errors::invalid_value;
use crate::api::http::intake::{Held, SHORT_TEXT_BYTES};
use crate::api::http::request::Origin;
use crate::api::wire::{
    self, Completion, CompletionChoice, CompletionFields, CompletionRequest, ErrorBody,
    SamplingFields, Usage,
};
use crate::config::limits::CHOICES_MAX;
use crate::ending::FinishReason;
use crate::error::Result;
use crate::text::Text;
use axum::extract::{Extension, State};
use axum::response::Response;
use std::sync::Arc;

/// Tokens of an answer whose length nobody chose, as at OpenAI.
const TOKENS_DEFAULT: u32 = 16;

/// Continues text.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer, or with `stream` its chunks", content(
            (Completion = "application/json"),
            (Completion = "text/event-stream"),
        )),
        (status = "4XX", description = "Refused", body = ErrorBody),
        (status = "5XX", description = "Failed", body = ErrorBody),
    )
)]
pub async fn post(
    State(api): State<Arc<Api>>,
    Extension(origin): Extension<Origin>,
    Extension(caller): Extension<Caller>,
    Entry(mut ticket): Entry,
    JsonObject(body): JsonObject,
) -> Result<Response> {
    body.count(&mut ticket);
    let (shared, own, held) = body.read(&api, &caller).await?;
    let CompletionRequest { shared, own } = CompletionRequest { shared, own };
    let echo = own.echo.unwrap_or(false);
    let mut checked = check(&api, &shared, &own)?;
    let prompts = inputs(&api, own.prompt, checked.n)?;
    let asked = model_ref::asked(&shared, &api.base_name)?;
    let target = api.lease(&caller, asked, shared.user.as_deref()).await?;
    let default = checked.fill(&shared, &target, &api).or(Some(TOKENS_DEFAULT));
    let answer = async {
        // What would be refused is not encoded first.
        api.engine.check_room(checked.n * prompts.len(), target.tenant())?;
        let skip_special = checked.skip_special;
        let (longest, all) = text_bytes(&prompts);
        ticket.worked((all / 4).min(api.context) as u64);
        let context = api.context;
        let work = move |text: &Text, _: &mut Held| {
            let _held = held;
            encode(text, prompts, context, echo.then_some(skip_special))
        };
        let prompts = api.on_text(&caller, longest, all > SHORT_TEXT_BYTES, work).await?;
        ticket.worked(prompts.iter().map(|p| p.tokens.len() as u64).sum());
        let head = AnswerHead::new(&api, "cmpl-", shared.model, &checked);
        let meter = RequestMeter::open(&api, &target, origin, &head.id, ticket)?;
        let run = Run::start(&api, &target, &checked, prompts, default, meter)?;
        stream::respond(run, CompletionShow(head), &checked).await
    };
    Ok(target.sign(answer.await))
}

fn check(api: &Api, shared: &SamplingFields, own: &CompletionFields) -> Result<Checked> {
    let echo = own.echo.unwrap_or(false);
    let mut checked = sampling::check(shared, api)?;
    if checked.tokens_max == Some(0) && !echo {
        return Err(invalid_value(
            "max_tokens",
            "`max_tokens` must be at least 1, or 0 with `echo`",
        ));
    }
    checked.sampling.logprobs = sampling::alternatives("logprobs", own.logprobs)?;
    checked.sampling.prompt_logprobs = checked.sampling.logprobs.filter(|_| echo);
    Ok(checked)
}

/// A prompt as it came.
enum Input {
    Text(String),
    Tokens(Vec<u32>),
}

/// The prompts with their places in the body.
fn inputs(api: &Api, prompt: wire::Prompt, n: usize) -> Result<Vec<(String, Input)>> {
    let at = |i: usize| format!("prompt[{i}]");
    let inputs: Vec<(String, Input)> = match prompt {
        wire::Prompt::Text(text) => vec![("prompt".to_owned(), Input::Text(text))],
        wire::Prompt::Tokens(tokens) => vec![("prompt".to_owned(), Input::Tokens(tokens))],
        wire::Prompt::Texts(texts) => {
            let texts = texts.into_iter().map(Input::Text).enumerate();
            texts.map(|(i, input)| (at(i), input)).collect()
        }
        wire::Prompt::TokenLists(lists) => {
            let lists = lists.into_iter().map(Input::Tokens).enumerate();
            lists.map(|(i, input)| (at(i), input)).collect()
        }
    };
    if inputs.is_empty() {
        return Err(invalid_value("prompt", "`prompt` must not be empty"));
    }
    if inputs.len() * n > CHOICES_MAX {
        let prompts = inputs.len();
        let message =
            format!("{prompts} prompts with {n} choices each are more than {CHOICES_MAX} choices");
        return Err(invalid_value("prompt", message));
    }
    for (path, input) in &inputs {
        match input {
            Input::Text(text) => api.requests.intake.bounds.fits(text.len(), path)?,
            Input::Tokens(tokens) => {
                let vocab = api.vocab;
                if let Some(i) = tokens.iter().position(|&t| t as usize >= vocab) {
                    sampling::in_vocabulary(&format!("{path}[{i}]"), i64::from(tokens[i]), api)?;
                }
                api.requests.intake.bounds.fit(tokens.len(), path)?;
            }
        }
    }
    Ok(inputs)
}

/// Bytes of the longest text, and of all.
fn text_bytes(inputs: &[(String, Input)]) -> (usize, usize) {
    let bytes = inputs.iter().map(|(_, input)| match input {
        Input::Text(text) => text.len(),
        Input::Tokens(_) => 0,
    });
    bytes.fold((0, 0), |(longest, all), bytes| (longest.max(bytes), all + bytes))
}

/// `echo`: whether special tokens of an echoed prompt are skipped; none is echoed without.
fn encode(
    text: &Text,
    inputs: Vec<(String, Input)>,
    context: usize,
    echo: Option<bool>,
) -> Result<Vec<Prompt>> {
    inputs
        .into_iter()
        .map(|(param, input)| {
            let (tokens, shown) = match input {
                Input::Text(prompt) => {
                    let tokens = text.encode_within(&prompt, true, context);
                    (tokens.map_err(|e| e.param(&*param))?, Some(prompt))
                }
                Input::Tokens(tokens) => (tokens, None),
            };
            let echo = echo.map(|skip_special| echoed(text, &tokens, shown, skip_special));
            let echo = echo.transpose()?;
            Ok(Prompt { param, tokens, continued: true, echo })
        })
        .collect()
}

/// How a prompt is echoed: tokens as the answer's are, text (`shown`) as it came. Special tokens
/// that it spells out are part of it; one that the tokenizer put in front is not.
fn echoed(
    text: &Text,
    tokens: &[u32],
    shown: Option<String>,
    skip_special: bool,
) -> Result<Echoed> {
    let Some(shown) = shown else {
        let text = text.decode(tokens, skip_special)?.into();
        return Ok(Echoed { text, skip_special, front: 0 });
    };
    for front in 0..tokens.len().min(2) {
        if text.decode(&tokens[front..], false)? == shown {
            return Ok(Echoed { text: shown.into(), skip_special: false, front });
        }
    }
    Ok(Echoed { text: shown.into(), skip_special: true, front: 0 })
}

/// The plain format.
struct CompletionShow(AnswerHead);

impl CompletionShow {
    fn body(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> String {
        let completion = Completion {
            id: self.0.id.clone(),
            object: "text_completion",
            created: self.0.created,
            model: self.0.model.clone(),
            system_fingerprint: self.0.fingerprint.clone(),
            choices,
            usage,
        };
        serde_json::to_string(&completion).expect("answers are plain data")
    }

    fn chunk(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> String {
        self.body(choices, self.0.include_usage.then_some(usage))
    }

    fn choice(&self, index: usize, piece: &TextDelta) -> CompletionChoice {
        CompletionChoice {
            index,
            text: piece.text.clone(),
            logprobs: self.0.scores.then(|| logprobs::completion(&self.0.text, &piece.scored)),
            finish_reason: None,
        }
    }
}

impl ResponseFormat for CompletionShow {
    fn opening(&self, _index: usize) -> Option<String> {
        None
    }

    fn piece(&self, index: usize, piece: &TextDelta) -> String {
        self.chunk(vec![self.choice(index, piece)], None)
    }

    fn ending(&self, index: usize, reason: FinishReason) -> String {
        let choice = CompletionChoice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: Some(reason_word(reason)),
        };
        self.chunk(vec![choice], None)
    }

    fn usage(&self, usage: Usage) -> String {
        self.chunk(Vec::new(), Some(usage))
    }

    fn whole(&self, choices: Vec<(TextDelta, FinishReason)>, usage: Usage) -> String {
        let choices = choices.iter().enumerate().map(|(index, (piece, reason))| {
            let mut choice = self.choice(index, piece);
            choice.finish_reason = Some(reason_word(*reason));
            choice
        });
        self.body(choices.collect(), Some(Some(usage)))
    }
}
