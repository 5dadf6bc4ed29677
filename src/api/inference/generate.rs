//! What chat and plain completions share: submit the sequences, then collect or stream what comes.
//!
//! Owns the life of a request from its tokens to its last piece. Never knows which of the two wire
//! formats is spoken: that is `ResponseFormat`. The thing to know: a `Run` owns the event streams;
//! dropping it anywhere cancels every sequence in it.

use super::accounting::{RequestMeter, Used, altogether};
use super::choice::{Choice, Echoed, Ended, TextDelta};
use super::resolve::ResolvedModel;
use super::sampling::{Checked, in_vocabulary};
use crate::api::Api;
use crate::api::http::errors::status;
use crate::api::http::request::{client_closed, random_id};
use crate::api::wire::{PromptTokensDetails, Usage};
use crate::clock::unix_seconds;
use crate::ending::{EndReason, FinishReason};
use crate::engine::{Event, EventStream, Request};
use crate::error::{Error, Result};
use crate::text::Text;
use crate::text::stop::Stops;
use futures::StreamExt;
use futures::stream::BoxStream;
use http::StatusCode;
use std::sync::Arc;
use tokio_stream::StreamMap;

/// A prompt, ready to run.
pub struct Prompt {
    /// Request field to blame.
    pub param: String,
    pub tokens: Vec<u32>,
    /// Whether the answer is the same text going on, or a new one.
    pub continued: bool,
    /// Its text, when it is to be echoed.
    pub echo: Option<Echoed>,
}

/// A wire format.
pub trait ResponseFormat: Send + 'static {
    /// The event that opens a choice in a stream, as JSON.
    fn opening(&self, index: usize) -> Option<String>;
    /// The event for a piece of a choice.
    fn piece(&self, index: usize, piece: &TextDelta) -> String;
    /// The event that ends a choice.
    fn ending(&self, index: usize, reason: FinishReason) -> String;
    /// The event after the last choice.
    fn usage(&self, usage: Usage) -> String;
    /// The answer in one body.
    fn whole(&self, choices: Vec<(TextDelta, FinishReason)>, usage: Usage) -> String;
}

/// What an answer says of itself in every format.
pub struct AnswerHead {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub fingerprint: String,
    /// Whether scores are shown, and what tokens are called in them.
    pub scores: bool,
    pub text: Text,
    pub include_usage: bool,
}

impl AnswerHead {
    /// `kind`: what its id begins with.
    pub fn new(api: &Api, kind: &str, model: String, checked: &Checked) -> Self {
        Self {
            id: random_id(kind),
            created: unix_seconds(),
            model,
            fingerprint: api.fingerprint(),
            scores: checked.sampling.logprobs.is_some(),
            text: api.text.clone(),
            include_usage: checked.include_usage,
        }
    }
}

/// OpenAI's word for how a choice ended.
pub fn reason_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Sequences on their way.
pub struct Run {
    /// By choice. A stream leaves when its choice is over, which cancels what the engine might
    /// still do.
    events: StreamMap<usize, BoxStream<'static, Event>>,
    choices: Vec<Choice>,
    ended: Vec<Option<Ended>>,
    /// Tokens of each prompt; choices per prompt.
    prompts: Vec<u64>,
    n: usize,
    meter: RequestMeter,
}

impl Run {
    /// Queues every sequence of the request, all or none.
    pub fn start(
        api: &Arc<Api>,
        target: &ResolvedModel,
        checked: &Checked,
        prompts: Vec<Prompt>,
        tokens_default: Option<u32>,
        meter: RequestMeter,
    ) -> Result<Self> {
        let (mut requests, mut tokens) = (Vec::new(), 0);
        let stops = Stops::new(checked.stops.clone());
        let mut run = Self {
            events: StreamMap::new(),
            choices: Vec::new(),
            ended: vec![None; prompts.len() * checked.n],
            prompts: prompts.iter().map(|p| p.tokens.len() as u64).collect(),
            n: checked.n,
            meter,
        };
        for prompt in prompts {
            let tokens_max = room(api.context, checked, &prompt, tokens_default)?;
            // A tokenizer may know more tokens than the model has rows for (Gemma 3's image token).
            for &token in &prompt.tokens {
                in_vocabulary(&prompt.param, i64::from(token), api)?;
            }
            let before = prompt.continued.then_some(prompt.tokens.as_slice());
            let mut choices: Vec<Choice> = (0..checked.n)
                .map(|_| {
                    let choice = Choice::new(&api.text, checked, &stops, before);
                    match &prompt.echo {
                        None => choice,
                        Some(text) => choice.echo(&api.text, text.clone(), tokens_max == 0),
                    }
                })
                .collect();
            run.choices.append(&mut choices);
            let request = Request {
                prompt: prompt.tokens,
                sampling: checked.sampling.clone(),
                tokens_max: tokens_max.max(1),
                tokens_min: checked.tokens_min,
                stop_tokens: checked.stop_tokens.clone(),
                lease: target.lease.clone(),
                tenant: target.tenant().to_owned(),
                weight: target.caller.weight(),
            };
            let each = request.prompt.len() as u64 + checked.n as u64 * u64::from(tokens_max);
            tokens += each;
            requests.push(request);
        }
        run.meter.admit(api, target, tokens)?;
        let mut admissions = Vec::new();
        for request in requests {
            for stream in api.engine.submit_n(request, checked.n)? {
                admissions.push(stream.admission());
                run.events.insert(run.events.len(), events(stream));
            }
        }
        run.meter.queued(admissions);
        Ok(run)
    }

    /// Waits until the first choice is in a step: what happens before that still has a status of
    /// its own.
    pub async fn admitted(&mut self) -> Result<()> {
        let Some(first) = self.meter.admissions().first().cloned() else {
            return Ok(());
        };
        if tokio::time::timeout_at(self.meter.until(), first.wait()).await.is_err() {
            return Err(self.failed(self.meter.late()));
        }
        if first.get().is_none() {
            // Over before it began: its only event says why.
            self.next().await?;
        }
        Ok(())
    }

    /// What a choice shows next, and its end; `None` when all are over.
    pub async fn next(&mut self) -> Result<Option<(usize, TextDelta, Option<FinishReason>)>> {
        let (index, event) = loop {
            let until = self.meter.until();
            match tokio::time::timeout_at(until, self.events.next()).await {
                Ok(Some(next)) => break next,
                Ok(None) => {
                    let reasons = self.ended.iter().flatten().map(|e| e.reason);
                    let end = EndReason::Finished(altogether(reasons));
                    self.meter.settle(self.used(), end, StatusCode::OK);
                    self.meter.recorded().await?;
                    return Ok(None);
                }
                // It came into a step in the last moment of its time in the queue.
                Err(_) if until < self.meter.until() => {}
                Err(_) => return Err(self.failed(self.meter.late())),
            }
        };
        if matches!(event, Event::Token(_)) {
            self.meter.token(index);
        }
        let (piece, ended) = self.choices[index].take(event).map_err(|e| self.failed(e))?;
        if ended.is_some() {
            self.events.remove(&index);
            self.ended[index] = ended;
        }
        Ok(Some((index, piece, ended.map(|e| e.reason))))
    }

    fn failed(&mut self, error: Error) -> Error {
        self.meter.settle(self.used(), EndReason::Failed, status(&error));
        error
    }

    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    /// What the choices used so far: prompts that have been in a step, and tokens handed on.
    fn used(&self) -> Used {
        let mut used = Used::default();
        for (prompt, admissions) in self.prompts.iter().zip(self.meter.admissions().chunks(self.n))
        {
            // Later choices of a prompt find the pages of the first: the least is what the request
            // found.
            let cached = admissions.iter().filter_map(|a| Some(a.get()?.cached_tokens)).min();
            used.prompt += cached.map_or(0, |_| *prompt);
            used.cached += cached.map_or(0, u64::from);
        }
        let choices = self.ended.iter().zip(&self.choices);
        used.completion = choices
            .map(|(ended, choice)| ended.map_or(choice.tokens(), |e| e.completion_tokens))
            .sum();
        used
    }

    /// The same, as the answer tells it.
    pub fn usage(&self) -> Usage {
        let Used { prompt, cached, completion } = self.used();
        Usage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt + completion,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: cached },
        }
    }

    /// Runs to the end and answers in one body.
    pub async fn collect(mut self, show: impl ResponseFormat) -> Result<String> {
        let mut whole = vec![(TextDelta::default(), FinishReason::Length); self.choices()];
        while let Some((index, piece, reason)) = self.next().await? {
            let (all, end) = &mut whole[index];
            all.text += &piece.text;
            all.scored.extend(piece.scored);
            *end = reason.unwrap_or(*end);
        }
        Ok(show.whole(whole, self.usage()))
    }
}

impl Drop for Run {
    /// Whoever let go of it before its end cancelled it.
    fn drop(&mut self) {
        self.meter.settle(self.used(), EndReason::Cancelled, client_closed());
    }
}

/// The events of one sequence, always ending in `Finished` or `Failed`.
fn events(stream: EventStream) -> BoxStream<'static, Event> {
    let next = |state: Option<EventStream>| async move {
        let mut stream = state?;
        let event = stream.next().await.unwrap_or_else(|| {
            Event::Failed(Error::fault("the engine gave up the sequence without a word"))
        });
        let over = matches!(event, Event::Finished { .. } | Event::Failed(_));
        Some((event, (!over).then_some(stream)))
    };
    futures::stream::unfold(Some(stream), next).boxed()
}

/// Tokens that the answer to `prompt` may have; 0 only where the prompt alone is wanted.
fn room(
    context: usize,
    checked: &Checked,
    prompt: &Prompt,
    tokens_default: Option<u32>,
) -> Result<u32> {
    let used = prompt.tokens.len();
    if used == 0 {
        return Err(
            Error::invalid("empty_prompt", "the prompt has no tokens").param(&*prompt.param)
        );
    }
    let left = context.saturating_sub(used);
    let asked = checked.tokens_max.map_or(1, |n| n.max(1)) as usize;
    if left < asked {
        let message = format!(
            "the context is {context} tokens; the prompt has {used} and the answer was to have \
             {asked}: {} too many",
            used + asked - context
        );
        return Err(Error::invalid("context_length_exceeded", message).param(&*prompt.param));
    }
    let left = u32::try_from(left).unwrap_or(u32::MAX);
    let tokens_max =
        checked.tokens_max.unwrap_or_else(|| tokens_default.map_or(left, |n| n.min(left)));
    if checked.tokens_min > tokens_max {
        let message = format!(
            "`min_tokens` = {} is more than the answer may have ({tokens_max})",
            checked.tokens_min
        );
        return Err(crate::api::http::errors::invalid_value("min_tokens", message));
    }
    Ok(tokens_max)
}
