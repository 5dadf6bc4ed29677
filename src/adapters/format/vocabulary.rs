//! A bundle's tokenizer against the base's.
//!
//! Owns which differences matter. Never builds a tokenizer from an untrusted file: its tokens are
//! read one by one and looked up. The thing to know: folders of PEFT carry a copy of the base's
//! tokenizer; a token that the base has not, or has under another id, would make other prompts than
//! the adapter was trained on, so it is refused; what training leaves behind (padding, truncation,
//! a padding token) changes no prompt and is read over.

use super::names::{TOKENIZER, unreadable};
use crate::adapters::BaseText;
use crate::error::{Error, Result, brief};
use serde::Deserialize;
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Longest tokenizer.json; the largest vocabularies take some 35 MB.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Marks an error of ours among the parser's own.
const MISMATCH: &str = "mismatch: ";

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
}

/// Compares every token of the file. `padding`: the token that only fills up batches. Errors:
/// `tokenizer_mismatch`.
pub fn check(path: &Path, padding: Option<&str>, base: &BaseText) -> Result<()> {
    let file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let length = file.metadata().map_err(|e| unreadable(path, &e))?.len();
    if length > FILE_BYTES_MAX {
        return Err(mismatch(format!("it has {length} bytes; the limit is {FILE_BYTES_MAX}")));
    }
    let reader = BufReader::with_capacity(1 << 16, file.take(FILE_BYTES_MAX));
    let mut json = serde_json::Deserializer::from_reader(reader);
    let comparison = Comparison { base, padding };
    let compared = Part::File(&comparison).deserialize(&mut json).and_then(|()| json.end());
    compared.map_err(|e| {
        let reason = e.to_string();
        mismatch(reason.strip_prefix(MISMATCH).unwrap_or(&reason).to_owned())
    })
}

fn mismatch(why: String) -> Error {
    Error::unprocessable("tokenizer_mismatch", format!("{TOKENIZER}: {why}"))
}

struct Comparison<'a> {
    base: &'a BaseText,
    padding: Option<&'a str>,
}

impl Comparison<'_> {
    fn token(&self, token: &str, id: u64) -> Result<(), String> {
        let found = (self.base.token_id)(token);
        if found.map(u64::from) == Some(id) || self.padding == Some(token) {
            return Ok(());
        }
        let shown = brief(token);
        let there = match found {
            Some(there) => format!("is token {there} of the base"),
            None => "is no token of the base".to_owned(),
        };
        Err(format!(
            "{MISMATCH}`{shown}` ({id}) {there}: the adapter was trained with another tokenizer"
        ))
    }
}

/// A place in the file, and how it is read.
#[derive(Clone, Copy)]
enum Part<'a> {
    File(&'a Comparison<'a>),
    AddedTokens(&'a Comparison<'a>),
    Model(&'a Comparison<'a>),
    /// Of BPE, WordPiece and WordLevel: a map; of Unigram: pieces with scores, by id.
    Vocabulary(&'a Comparison<'a>),
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<(), D::Error> {
        match self {
            Self::File(_) | Self::Model(_) => d.deserialize_map(self),
            Self::AddedTokens(_) => d.deserialize_seq(self),
            Self::Vocabulary(_) => d.deserialize_any(self),
        }
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::File(_) => "a tokenizer",
            Self::AddedTokens(_) => "a list of added tokens",
            Self::Model(_) => "a tokenizer's model",
            Self::Vocabulary(_) => "a vocabulary",
        })
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match (self, key.as_str()) {
                (Self::File(c), "added_tokens") => map.next_value_seed(Self::AddedTokens(c))?,
                (Self::File(c), "model") => map.next_value_seed(Self::Model(c))?,
                (Self::Model(c), "vocab") => map.next_value_seed(Self::Vocabulary(c))?,
                (Self::Vocabulary(c), token) => {
                    let id = map.next_value()?;
                    c.token(token, id).map_err(M::Error::custom)?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<(), S::Error> {
        match self {
            Self::AddedTokens(c) => {
                while let Some(added) = seq.next_element::<Added>()? {
                    c.token(&added.content, added.id).map_err(S::Error::custom)?;
                }
                Ok(())
            }
            Self::Vocabulary(c) => {
                let mut id = 0;
                while let Some((piece, _)) = seq.next_element::<(String, f64)>()? {
                    c.token(&piece, id).map_err(S::Error::custom)?;
                    id += 1;
                }
                Ok(())
            }
            _ => Err(S::Error::custom("a list where an object belongs")),
        }
    }
}
