//! Encoding without being led on by a text that is too long.
//!
//! Owns when a text surely has too many tokens. Never cuts a text that is then used: what passes is
//! encoded whole. The thing to know: a long text is first counted in pieces, of which a few are
//! enough to refuse it; cutting adds a token or two a piece, so the count may be a quarter too
//! high.

use super::Text;
use crate::error::{Error, Result};

/// Bytes of a piece that is counted.
const PIECE_BYTES: usize = 16 << 10;
/// How far back a piece's end may move to stand before a space.
const SPACE_BYTES_MAX: usize = 256;

/// So many tokens counted in pieces are surely more than `tokens_max`.
pub fn surely_too_many(tokens_max: usize) -> usize {
    tokens_max + tokens_max / 4 + 64
}

impl Text {
    /// As [`encode`](Self::encode), but of a long text with surely more than `tokens_max` tokens
    /// only as much as it takes to know that. Errors: `context_length_exceeded`, `tokenizer_error`.
    pub fn encode_within(&self, text: &str, special: bool, tokens_max: usize) -> Result<Vec<u32>> {
        if text.len() > PIECE_BYTES {
            self.count_within(text, tokens_max)?;
        }
        self.encode(text, special)
    }

    fn count_within(&self, text: &str, tokens_max: usize) -> Result<()> {
        let (mut rest, mut counted) = (text, 0);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(end_of_piece(rest));
            counted += self.encode(piece, false)?.len();
            rest = after;
            if counted > surely_too_many(tokens_max) {
                let message = format!(
                    "the context is {tokens_max} tokens; the text has more than {counted} in its \
                     first {} of {} bytes",
                    text.len() - rest.len(),
                    text.len()
                );
                return Err(Error::invalid("context_length_exceeded", message));
            }
        }
        Ok(())
    }
}

/// Where the first piece ends: at a character's end, before a space if one is near.
fn end_of_piece(text: &str) -> usize {
    if text.len() <= PIECE_BYTES {
        return text.len();
    }
    let end = text.floor_char_boundary(PIECE_BYTES);
    let near = text.floor_char_boundary(end - SPACE_BYTES_MAX);
    text[near..end].rfind(' ').map_or(end, |at| near + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_before_a_space_or_at_a_characters_end_and_are_never_empty() {
        let words = "lorem ipsum ".repeat(4000);
        let end = end_of_piece(&words);
        assert!(end > PIECE_BYTES - SPACE_BYTES_MAX && words[end..].starts_with(' '));
        let one = "ä".repeat(20_000);
        assert_eq!(end_of_piece(&one), PIECE_BYTES);
        assert_eq!(end_of_piece(&format!("a{one}")), PIECE_BYTES - 1);
        assert_eq!(end_of_piece("short"), 5);
    }
}
