//! Examples as a person reads them: which text is learnt.
//!
//! Owns the spans. Never renders or encodes. The thing to know: the spans of an example that was
//! not cut are its rendered text, piece by piece.

use super::borders::Piece;
use super::encode::Encoded;
use crate::error::Result;
use crate::text::Text;

/// One example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preview {
    /// In the file, from 1.
    pub line: u64,
    pub tokens: usize,
    /// Tokens that are learnt.
    pub supervised: usize,
    /// The end was cut off at the context.
    pub cut: bool,
    pub spans: Vec<Span>,
}

/// Text that is learnt, or that is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub text: String,
    pub supervised: bool,
}

impl Preview {
    pub fn new(text: &Text, line: u64, pieces: &[Piece], encoded: &Encoded) -> Result<Self> {
        let mut spans: Vec<Span> = Vec::new();
        let mut from = 0;
        for (i, (piece, &end)) in pieces.iter().zip(&encoded.ends).enumerate() {
            let last = i + 1 == encoded.ends.len();
            let shown = match encoded.cut && last {
                true => text.decode(&encoded.ids[from..end], false)?,
                false => piece.text.clone(),
            };
            from = end;
            match spans.last_mut() {
                _ if shown.is_empty() => {}
                Some(span) if span.supervised == piece.supervised => span.text += &shown,
                _ => spans.push(Span { text: shown, supervised: piece.supervised }),
            }
        }
        let (tokens, supervised) = (encoded.ids.len(), encoded.supervised());
        Ok(Self { line, tokens, supervised, cut: encoded.cut, spans })
    }
}
