//! Requests that compute: chat, completions, tokens of a text.
//!
//! Owns the way from a body to a queued sequence, and from its events to an answer. Never computes:
//! the engine does.

mod accounting;
pub mod chat;
mod choice;
pub mod completions;
pub mod encode;
mod entry;
mod generate;
pub mod in_flight;
mod logprobs;
pub mod messages;
mod model_ref;
mod resolve;
mod sampling;
mod stream;
pub mod templates;
pub mod tokenize;
