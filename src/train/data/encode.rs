//! Pieces of text to ids and weights.
//!
//! Owns the mask, and the cut at the context. Never renders. The thing to know: each piece is
//! encoded by itself, so the ids before a border are those that serving feeds.

use super::borders::{Form, Piece};
use super::form::wrong;
use crate::error::Result;
use crate::text::Text;

/// Texts that a piece is encoded behind where the tokenizer writes something before every text.
const ANCHORS: [&str; 3] = ["\n", "a", "."];
/// Tokens by which a text that is cut before it is encoded is longer than what is kept of it.
const MARGIN_TOKENS: usize = 64;

/// An example before it is one of many.
#[derive(Debug, Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub weights: Vec<f32>,
    /// Where each piece ends in `ids`; pieces that are missing were cut off.
    pub ends: Vec<usize>,
    /// The end was cut off.
    pub cut: bool,
}

impl Encoded {
    /// Ids with a weight, the first one left out: nothing predicts it.
    pub fn supervised(&self) -> usize {
        self.weights.iter().skip(1).filter(|w| **w != 0.0).count()
    }
}

/// See the file's head.
pub struct Encoder<'a> {
    text: &'a Text,
    context: usize,
    truncate: bool,
    /// Empty where every text is encoded as what it continues.
    anchors: Vec<(&'static str, Vec<u32>)>,
}

impl<'a> Encoder<'a> {
    /// Of examples of at most `context` ids, cut to it or refused.
    pub fn new(text: &'a Text, context: usize, truncate: bool) -> Result<Self> {
        let plain = |of: &str| text.encode(of, false);
        let mut anchors = Vec::new();
        if plain("\na")? != [plain("\n")?, plain("a")?].concat() {
            for anchor in ANCHORS {
                anchors.push((anchor, plain(anchor)?));
            }
        }
        Ok(Self { text, context, truncate, anchors })
    }

    /// Errors: `invalid_training_file` for one that is too long, `tokenizer_error`.
    pub fn encode(&self, pieces: &[Piece]) -> Result<Encoded> {
        let mut encoded = Encoded::default();
        for piece in pieces {
            let left = self.context - encoded.ids.len();
            let text = match self.truncate {
                true => front(&piece.text, (left + MARGIN_TOKENS) * self.text.token_bytes_max()),
                false => &piece.text,
            };
            let ids = match piece.form {
                Form::Token(id) => vec![id],
                Form::Prompt => self.within(text, true)?,
                Form::Rendered if encoded.ids.is_empty() => self.within(text, false)?,
                Form::Rendered => self.continued(text)?,
            };
            if ids.len() > left {
                if !self.truncate {
                    return Err(self.too_long(pieces));
                }
                encoded.cut = true;
            }
            encoded.ids.extend(&ids[..ids.len().min(left)]);
            encoded.weights.resize(encoded.ids.len(), f32::from(u8::from(piece.supervised)));
            encoded.ends.push(encoded.ids.len());
            if encoded.cut {
                break;
            }
        }
        if let Some(first) = encoded.weights.first_mut() {
            *first = 0.0;
        }
        Ok(encoded)
    }

    /// Of a text that others stand before.
    fn continued(&self, text: &str) -> Result<Vec<u32>> {
        for (anchor, ids) in &self.anchors {
            let mut joined = self.within(&format!("{anchor}{text}"), false)?;
            if joined.starts_with(ids) {
                return Ok(joined.split_off(ids.len()));
            }
        }
        self.within(text, false)
    }

    fn within(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match self.truncate {
            true => self.text.encode(text, special),
            false => self.text.encode_within(text, special, self.context),
        }
    }

    fn too_long(&self, pieces: &[Piece]) -> crate::error::Error {
        let bytes: usize = pieces.iter().map(|piece| piece.text.len()).sum();
        let context = self.context;
        wrong(format!("the example ({bytes} bytes of text) has more than {context} tokens"))
    }
}

/// The text's first so many bytes, or a few less.
fn front(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}
