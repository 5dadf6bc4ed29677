//! Messages and tools of a chat request.
//!
//! Owns how many a request may bring. Never looks into one: `text::messages` does, for requests and
//! for training examples.

use crate::config::limits::MESSAGES_MAX;
use crate::error::Result;
use crate::text::messages;
use serde_json::Value;

pub use crate::text::messages::tools;

/// Checks the list and returns it as templates read it.
pub fn check(list: Vec<Value>) -> Result<Vec<Value>> {
    messages::check("messages", list, MESSAGES_MAX)
}
