//! Tokens to text as they come: only whole UTF-8 characters leave.

use super::Text;

/// Incremental detokeniser of one sequence.
pub struct Detokenizer {
    _text: Text,
}

impl Detokenizer {
    /// `skip_special`: special tokens produce no text.
    pub fn new(text: Text, _skip_special: bool) -> Self {
        Self { _text: text }
    }
    /// Text that became whole with this token (may be empty).
    pub fn push(&mut self, _token: u32) -> String {
        unimplemented!()
    }
    /// What is left at the end (incomplete bytes become U+FFFD).
    pub fn finish(&mut self) -> String {
        unimplemented!()
    }
}
