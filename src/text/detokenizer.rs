//! Tokens to text as they come: only whole UTF-8 characters leave.
//!
//! Owns the bytes of a character that is not yet whole, three at most. Never decodes a token twice:
//! a push costs the length of its token, whatever came before. The thing to know: the pieces of a
//! stream concatenate to `Text::decode` of all its tokens.
//!
//! Bytes that can never become a character leave as U+FFFD at once: one for each broken character
//! in byte-level BPE, one for each byte in SentencePiece, as the tokenizers library has it. In one
//! case it differs on purpose: where a run of SentencePiece byte tokens holds whole characters and
//! broken ones, the library shows U+FFFD for all of them; here the whole ones stay, since they have
//! been streamed already.

use super::Text;
use crate::error::Result;

/// How many last tokens of a prompt can hold the start of a character: a character has four bytes.
const CHARACTER_TOKENS_MAX: usize = 4;

/// Incremental detokeniser of one sequence.
pub struct Detokenizer {
    text: Text,
    skip_special: bool,
    /// No token has had text yet.
    first: bool,
    /// How many characters a text loses at its start, not yet met.
    strip_left: usize,
    /// The start of a character.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// `skip_special`: special tokens produce no text. The text starts with the first token: a
    /// SentencePiece model's leading space is dropped, as `decode` does. For the answer to a chat.
    pub fn new(text: Text, skip_special: bool) -> Self {
        let strip_left = text.pieces.stripped().map_or(0, |(_, count)| count);
        Self { text, skip_special, first: true, strip_left, pending: Vec::new() }
    }

    /// The text continues `prompt`: a leading space is kept, and a character begun by the prompt's
    /// last tokens is completed. For plain completions, where prompt and answer are to be
    /// concatenated.
    pub fn continuing(text: Text, skip_special: bool, prompt: &[u32]) -> Self {
        let mut detokenizer = Self::new(text, skip_special);
        let tail = &prompt[prompt.len().saturating_sub(CHARACTER_TOKENS_MAX)..];
        if prompt.iter().any(|&t| !detokenizer.is_skipped(t)) {
            detokenizer.first = false;
            detokenizer.strip_left = 0;
        }
        for &token in tail {
            detokenizer.push(token);
        }
        detokenizer
    }

    /// Text that became whole with this token (may be empty).
    pub fn push(&mut self, token: u32) -> String {
        if self.is_skipped(token) {
            return String::new();
        }
        let Some(piece) = self.text.tokenizer.id_to_token(token) else {
            return String::new();
        };
        if self.text.pieces.spaced() && !self.first {
            self.pending.push(b' ');
        }
        self.text.pieces.append(&piece, self.first, &mut self.pending);
        self.first = false;
        let whole = self.take_whole();
        self.strip(whole)
    }

    /// What is left at the end (incomplete bytes become U+FFFD).
    pub fn finish(&mut self) -> String {
        let left = std::mem::take(&mut self.pending).len();
        match self.text.pieces.counts_bytes() {
            true => "\u{FFFD}".repeat(left),
            false => "\u{FFFD}".repeat(left.min(1)),
        }
    }

    fn is_skipped(&self, token: u32) -> bool {
        self.skip_special && self.text.pieces.is_special(token)
    }

    /// Takes every character that is whole or broken for good; leaves the start of one.
    fn take_whole(&mut self) -> String {
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(whole) => {
                    text.push_str(whole);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (whole, bad) = rest.split_at(e.valid_up_to());
                    // Never lossy: the bytes up to `valid_up_to` are UTF-8.
                    text.push_str(&String::from_utf8_lossy(whole));
                    rest = bad;
                    let Some(broken) = e.error_len() else { break };
                    let count = match self.text.pieces.counts_bytes() {
                        true => broken,
                        false => 1,
                    };
                    text.extend(std::iter::repeat_n('\u{FFFD}', count));
                    rest = &rest[broken..];
                }
            }
        }
        let left = rest.len();
        self.pending.drain(..self.pending.len() - left);
        text
    }

    fn strip(&mut self, mut text: String) -> String {
        if self.strip_left > 0
            && !text.is_empty()
            && let Some((mark, _)) = self.text.pieces.stripped()
        {
            while self.strip_left > 0 && text.starts_with(mark) {
                text.remove(0);
                self.strip_left -= 1;
            }
            if !text.is_empty() {
                self.strip_left = 0;
            }
        }
        text
    }
}

impl Text {
    /// Text of the tokens, special tokens skipped or not; what a [`Detokenizer`] gives piece by
    /// piece. Ids outside the vocabulary have no text.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String> {
        let mut detokenizer = Detokenizer::new(self.clone(), skip_special);
        let mut text: String = tokens.iter().map(|&t| detokenizer.push(t)).collect();
        text.push_str(&detokenizer.finish());
        Ok(text)
    }
}
