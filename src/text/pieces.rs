//! The bytes of one token.
//!
//! Owns the reading of a tokenizer's decoder: byte-level BPE, SentencePiece (Replace, ByteFallback,
//! Fuse, Strip), Metaspace, or none. Never joins tokens: `detokenizer` does. The thing to know: a
//! decoder we cannot take apart into bytes per token is refused at start by name, so nothing is
//! ever decoded approximately.

use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::HashSet;
use tokenizers::Tokenizer;

/// How the vocabulary's strings become bytes.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    /// Every character stands for a byte.
    byte_level: bool,
    /// `<0xE2>` is the byte 0xE2.
    byte_fallback: bool,
    /// Strings that stand for others, usually `▁` for a space.
    replaced: Vec<(String, String)>,
    /// The character that stands for a space, and whether the first token of a text loses it.
    metaspace: Option<(char, bool)>,
    /// The character, and how many of it a text loses at its start.
    stripped: Option<(char, usize)>,
    /// No decoder: tokens are words.
    spaced: bool,
    special: HashSet<u32>,
}

impl Pieces {
    pub fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let mut pieces = Self {
            special: tokenizer
                .get_added_tokens_decoder()
                .iter()
                .filter(|(_, token)| token.special)
                .map(|(&id, _)| id)
                .collect(),
            ..Self::default()
        };
        match tokenizer.get_decoder() {
            None => pieces.spaced = true,
            Some(decoder) => {
                let decoder = serde_json::to_value(decoder)
                    .map_err(|e| Error::fault(format!("the tokenizer's decoder: {e}")))?;
                let steps = match decoder["decoders"].as_array() {
                    Some(steps) => steps.clone(),
                    None => vec![decoder],
                };
                let mut fused = false;
                for step in &steps {
                    pieces.add_step(step, &mut fused)?;
                }
                if pieces.byte_level
                    && (pieces.byte_fallback
                        || pieces.metaspace.is_some()
                        || !pieces.replaced.is_empty())
                {
                    return Err(unsupported("ByteLevel together with other steps"));
                }
            }
        }
        Ok(pieces)
    }

    fn add_step(&mut self, step: &Value, fused: &mut bool) -> Result<()> {
        match (step["type"].as_str().unwrap_or_default(), *fused) {
            ("ByteLevel", false) => self.byte_level = true,
            ("ByteFallback", false) => self.byte_fallback = true,
            ("Fuse", _) => *fused = true,
            ("Replace", false) => {
                let (Some(from), Some(to)) =
                    (step["pattern"]["String"].as_str(), step["content"].as_str())
                else {
                    return Err(unsupported("Replace with a regular expression"));
                };
                self.replaced.push((from.into(), to.into()));
            }
            ("Metaspace", false) => {
                let mark =
                    step["replacement"].as_str().and_then(|s| s.chars().next()).unwrap_or('▁');
                self.metaspace = Some((mark, step["prepend_scheme"] != "never"));
            }
            ("Strip", true) if step["stop"].as_u64() == Some(0) => {
                let content = step["content"].as_str().and_then(|s| s.chars().next());
                let count = step["start"].as_u64().unwrap_or(0) as usize;
                self.stripped = content.map(|c| (c, count));
            }
            (name, true) => return Err(unsupported(&format!("{name} after Fuse"))),
            (name, false) => return Err(unsupported(name)),
        }
        Ok(())
    }

    /// Appends the bytes of `piece`, a string of the vocabulary. `first`: it opens the text.
    pub fn append(&self, piece: &str, first: bool, out: &mut Vec<u8>) {
        if self.byte_level {
            return append_byte_level(piece, out);
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(piece)
        {
            return out.push(byte);
        }
        if let Some((mark, drops_first)) = self.metaspace {
            for c in piece.chars() {
                match c == mark {
                    true if first && drops_first => {}
                    true => out.push(b' '),
                    false => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
            return;
        }
        match self.replaced.as_slice() {
            [] => out.extend_from_slice(piece.as_bytes()),
            pairs => {
                let text =
                    pairs.iter().fold(piece.to_owned(), |text, (from, to)| text.replace(from, to));
                out.extend_from_slice(text.as_bytes());
            }
        }
    }

    pub fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token)
    }

    /// What a text loses at its start.
    pub fn stripped(&self) -> Option<(char, usize)> {
        self.stripped
    }

    /// Whether words are joined by a space.
    pub fn spaced(&self) -> bool {
        self.spaced
    }

    /// Whether every byte that is not part of a character shows as one U+FFFD (SentencePiece),
    /// rather than every broken character (byte-level BPE).
    pub fn counts_bytes(&self) -> bool {
        self.byte_fallback
    }
}

/// `<0xE2>` as SentencePiece names its byte tokens.
fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    match digits.len() {
        2 => u8::from_str_radix(digits, 16).ok(),
        _ => None,
    }
}

/// Undoes the printable alphabet of byte-level BPE. A piece with any other character (an added
/// token) is literal.
fn append_byte_level(piece: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in piece.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                return out.extend_from_slice(piece.as_bytes());
            }
        }
    }
}

/// The alphabet: printable Latin-1 bytes stand for themselves; the other 68, in order, for U+0100
/// and up.
fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121) as u8 + 0x7F),
        0x143 => Some(0xAD),
        _ => None,
    }
}

fn unsupported(what: &str) -> Error {
    Error::invalid(
        "unsupported_tokenizer",
        format!(
            "the tokenizer's decoder uses {what}, which is not supported; supported are \
             ByteLevel, Metaspace and Replace, ByteFallback, Fuse, Strip"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::byte_of;

    #[test]
    fn byte_alphabet_covers_every_byte_once() {
        let mut bytes: Vec<u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }
}
