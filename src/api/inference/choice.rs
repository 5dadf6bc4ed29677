//! One choice: events of one sequence become pieces of text, with stop strings and scores.
//!
//! Owns the order in which tokens turn into text and when a choice is over. Never writes JSON. The
//! thing to know: text may lag behind tokens (half a character, the start of a stop string), scores
//! never do.

use super::sampling::Checked;
use crate::ending::FinishReason;
use crate::engine::{Event, TokenEvent};
use crate::error::Result;
use crate::text::Text;
use crate::text::detokenizer::Detokenizer;
use crate::text::stop::{StopStrings, Stopped, Stops};
use std::sync::Arc;

/// A token with its score.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    pub token: u32,
    /// NaN where there is none (the first token of a prompt).
    pub logprob: f32,
    /// Alternatives, likeliest first.
    pub top: Vec<(u32, f32)>,
    /// Characters of the choice's text before this token.
    pub offset: usize,
}

/// What became visible.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct TextDelta {
    pub text: String,
    /// Empty unless scores were asked for.
    pub scored: Vec<Scored>,
}

impl TextDelta {
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.scored.is_empty()
    }
}

/// How a choice ended and what it used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ended {
    pub reason: FinishReason,
    pub completion_tokens: u64,
}

/// A prompt as it is echoed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Echoed {
    pub text: Arc<str>,
    /// Its special tokens are not in `text`.
    pub skip_special: bool,
    /// Tokens that were put before it and are not in `text`.
    pub front: usize,
}

/// The prompt in front of the answer.
struct Echo {
    text: Arc<str>,
    detokenizer: Detokenizer,
    front: usize,
    scored: Vec<Scored>,
    /// The client asked for no token at all.
    only: bool,
}

/// One sequence on its way to the client.
pub struct Choice {
    detokenizer: Detokenizer,
    stops: StopStrings,
    stop_tokens: Vec<u32>,
    tokens_min: u32,
    scores: bool,
    /// Until the first token.
    echo: Option<Echo>,
    /// Characters so far, shown or held back.
    characters: usize,
    tokens: u64,
}

impl Choice {
    /// `stops` are the checked ones, made ready once for all choices. `before`: the text that the
    /// answer continues; `None` starts afresh, as in a chat.
    pub fn new(text: &Text, checked: &Checked, stops: &Stops, before: Option<&[u32]>) -> Self {
        let (text, skip_special) = (text.clone(), checked.skip_special);
        Self {
            detokenizer: match before {
                None => Detokenizer::new(text, skip_special),
                Some(prompt) => Detokenizer::continuing(text, skip_special, prompt),
            },
            stops: StopStrings::of(stops, checked.include_stop),
            stop_tokens: checked.stop_tokens.clone(),
            tokens_min: checked.tokens_min,
            scores: checked.sampling.logprobs.is_some(),
            echo: None,
            characters: 0,
            tokens: 0,
        }
    }

    /// Puts the prompt in front; `only` drops the answer.
    pub fn echo(mut self, text: &Text, prompt: Echoed, only: bool) -> Self {
        self.echo = Some(Echo {
            detokenizer: Detokenizer::new(text.clone(), prompt.skip_special),
            text: prompt.text,
            front: prompt.front,
            scored: Vec::new(),
            only,
        });
        self
    }

    /// Tokens taken so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Takes one event: what became visible, and the end if this is it.
    pub fn take(&mut self, event: Event) -> Result<(TextDelta, Option<Ended>)> {
        match event {
            Event::Prompt(token) => {
                if let Some(echo) = &mut self.echo {
                    echo.scored.push(scored(&token, self.characters));
                    if echo.scored.len() > echo.front {
                        self.characters += echo.detokenizer.push(token.token).chars().count();
                    }
                }
                Ok((TextDelta::default(), None))
            }
            Event::Token(token) => Ok(self.token(&token)),
            Event::Finished { reason, completion_tokens, .. } => {
                Ok(self.finish(reason, completion_tokens))
            }
            Event::Failed(error) => Err(error),
        }
    }

    fn token(&mut self, token: &TokenEvent) -> (TextDelta, Option<Ended>) {
        if self.echo.as_ref().is_some_and(|e| e.only) {
            return (TextDelta::default(), None);
        }
        let mut piece = self.prompt();
        self.tokens += 1;
        if self.stop_tokens.contains(&token.token) {
            return (piece, None);
        }
        if self.scores {
            piece.scored.push(scored(token, self.characters));
        }
        let text = self.detokenizer.push(token.token);
        self.characters += text.chars().count();
        if self.tokens <= u64::from(self.tokens_min) {
            piece.text += &text;
            return (piece, None);
        }
        match self.stops.push(&text) {
            Stopped::No(shown) => {
                piece.text += &shown;
                (piece, None)
            }
            Stopped::Yes { text, .. } => {
                piece.text += &text;
                let ended = Ended { reason: FinishReason::Stop, completion_tokens: self.tokens };
                (piece, Some(ended))
            }
        }
    }

    fn finish(
        &mut self,
        reason: FinishReason,
        completion_tokens: u32,
    ) -> (TextDelta, Option<Ended>) {
        let only_prompt = self.echo.as_ref().is_some_and(|e| e.only);
        let mut piece = self.prompt();
        let mut ended = Ended { reason, completion_tokens: u64::from(completion_tokens) };
        if only_prompt {
            ended.reason = FinishReason::Length;
            ended.completion_tokens = 0;
            return (piece, Some(ended));
        }
        let rest = self.detokenizer.finish();
        match self.stops.push(&rest) {
            Stopped::No(shown) => {
                piece.text += &shown;
                piece.text += &self.stops.finish();
            }
            Stopped::Yes { text, .. } => {
                piece.text += &text;
                ended.reason = FinishReason::Stop;
            }
        }
        (piece, Some(ended))
    }

    /// The echoed prompt, once.
    fn prompt(&mut self) -> TextDelta {
        match self.echo.take() {
            None => TextDelta::default(),
            Some(echo) => {
                self.characters = echo.text.chars().count();
                TextDelta { text: echo.text.to_string(), scored: echo.scored }
            }
        }
    }
}

fn scored(token: &TokenEvent, offset: usize) -> Scored {
    Scored {
        token: token.token,
        logprob: token.logprob,
        top: token.top[..usize::from(token.top_len)].to_vec(),
        offset,
    }
}
