//! What chat and plain completions share: submit the sequences, then collect or stream what comes.
//!
//! Owns the life of a request from its tokens to its last piece. Never knows which of the two wire
//! formats is spoken: that is `Show`. The thing to know: a `Run` owns the event streams; dropping
//! it anywhere cancels every sequence in it.

use super::Api;
use super::choice::{Choice, Ended, Piece};
use super::errors::timed_out;
use super::limits::Deadline;
use super::sampling::{Checked, in_vocabulary};
use super::target::Target;
use super::wire::{PromptTokensDetails, Usage};
use crate::engine::{Event, EventStream, FinishReason, Request};
use crate::error::{Error, Result};
use futures::StreamExt;
use futures::stream::BoxStream;
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
    pub echo: Option<String>,
}

/// A wire format.
pub trait Show: Send + 'static {
    /// The event that opens a choice in a stream, as JSON.
    fn opening(&self, index: usize) -> Option<String>;
    /// The event for a piece of a choice.
    fn piece(&self, index: usize, piece: &Piece) -> String;
    /// The event that ends a choice.
    fn ending(&self, index: usize, reason: FinishReason) -> String;
    /// The event after the last choice.
    fn usage(&self, usage: Usage) -> String;
    /// The answer in one body.
    fn whole(&self, choices: Vec<(Piece, FinishReason)>, usage: Usage) -> String;
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
    /// Prompt tokens; choices per prompt.
    prompt_tokens: u64,
    n: usize,
    deadline: Deadline,
}

impl Run {
    /// Queues every sequence of the request, all or none.
    pub fn start(
        api: &Arc<Api>,
        target: &Target,
        checked: &Checked,
        prompts: Vec<Prompt>,
        tokens_default: Option<u32>,
        deadline: Deadline,
    ) -> Result<Self> {
        let mut run = Self {
            events: StreamMap::new(),
            choices: Vec::new(),
            ended: vec![None; prompts.len() * checked.n],
            prompt_tokens: prompts.iter().map(|p| p.tokens.len() as u64).sum(),
            n: checked.n,
            deadline,
        };
        for prompt in prompts {
            let tokens_max = room(api.app.context, checked, &prompt, tokens_default)?;
            // A tokenizer may know more tokens than the model has rows for (Gemma 3's image token).
            for &token in &prompt.tokens {
                in_vocabulary(&prompt.param, i64::from(token), api)?;
            }
            let before = prompt.continued.then_some(prompt.tokens.as_slice());
            let mut choices: Vec<Choice> = (0..checked.n)
                .map(|_| {
                    let choice = Choice::new(&api.app.text, checked, before);
                    match &prompt.echo {
                        None => choice,
                        Some(text) => choice.echo(&api.app.text, text.clone(), tokens_max == 0),
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
                tenant: String::new(),
            };
            for stream in api.app.engine.submit_n(request, checked.n)? {
                run.events.insert(run.events.len(), events(stream));
            }
        }
        Ok(run)
    }

    /// What a choice shows next, and its end; `None` when all are over.
    pub async fn next(&mut self) -> Result<Option<(usize, Piece, Option<FinishReason>)>> {
        let next = tokio::time::timeout_at(self.deadline.at, self.events.next());
        let next = next.await.map_err(|_| timed_out(self.deadline.seconds_max))?;
        let Some((index, event)) = next else {
            return Ok(None);
        };
        let (piece, ended) = self.choices[index].take(event)?;
        if ended.is_some() {
            self.events.remove(&index);
            self.ended[index] = ended;
        }
        Ok(Some((index, piece, ended.map(|e| e.reason))))
    }

    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    /// What the choices used so far.
    pub fn usage(&self) -> Usage {
        let completion_tokens = self.ended.iter().flatten().map(|e| e.completion_tokens).sum();
        // Later choices of a prompt find the pages of the first: the least is what the request
        // found.
        let cached = self
            .ended
            .chunks(self.n)
            .map(|prompt| prompt.iter().flatten().filter_map(|e| e.cached_tokens).min());
        let cached: Option<u64> = cached.sum();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            total_tokens: self.prompt_tokens + completion_tokens,
            prompt_tokens_details: cached
                .map(|cached_tokens| PromptTokensDetails { cached_tokens }),
        }
    }

    /// Runs to the end and answers in one body.
    pub async fn collect(mut self, show: impl Show) -> Result<String> {
        let mut whole = vec![(Piece::default(), FinishReason::Length); self.choices()];
        while let Some((index, piece, reason)) = self.next().await? {
            let (all, end) = &mut whole[index];
            all.text += &piece.text;
            all.scored.extend(piece.scored);
            *end = reason.unwrap_or(*end);
        }
        Ok(show.whole(whole, self.usage()))
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
        return Err(super::errors::invalid_value("min_tokens", message));
    }
    Ok(tokens_max)
}
