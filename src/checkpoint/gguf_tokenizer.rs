//! A `tokenizers::Tokenizer` from GGUF metadata.
//!
//! Owns the table of pre-tokenizers that files name. Never guesses: a model or pre-tokenizer that
//! is not in the table is refused by name. The thing to know: `gpt2` files hold byte-level merges;
//! `llama` files hold SentencePiece scores, from which the merges are found again.

use super::config_json::{invalid, unsupported};
use super::parts::TextSource;
use crate::error::Result;
use crate::header::gguf::{Metadata, Value};
use serde_json::json;
use std::collections::HashMap;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

const WORDS: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
const TAIL: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
/// Mistral's newer vocabulary: words split where case changes.
const CASED_WORDS: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Control tokens that end a turn, for files that name only one end token.
const TURN_ENDS: [&str; 5] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>"];

const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

struct Pieces<'a> {
    metadata: &'a Metadata,
    tokens: Vec<&'a str>,
    types: Vec<u32>,
}

/// Builds everything textual from the metadata. Errors name the key that is missing or not
/// supported.
pub fn text_source(metadata: &Metadata) -> Result<TextSource> {
    let pieces = Pieces::new(metadata)?;
    let model =
        pieces.text("model").ok_or_else(|| invalid("gguf: tokenizer.ggml.model is missing"))?;
    let tokenizer = match model {
        "gpt2" => pieces.byte_level()?,
        "llama" => pieces.sentence_piece()?,
        other => {
            return Err(unsupported(format!(
                "gguf: tokenizer.ggml.model = {other} is not supported; gpt2 and llama are"
            )));
        }
    };
    let llama3 = matches!(pieces.text("pre"), Some("llama-bpe" | "llama3" | "llama-v3"));
    let chat_template = match metadata.get("tokenizer.chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        _ => None,
    };
    Ok(TextSource {
        chat_template,
        bos: pieces.id("bos_token_id"),
        eos: pieces.ends(),
        add_bos: pieces.flag("add_bos_token").unwrap_or(model == "llama" || llama3),
        tokenizer,
    })
}

impl<'a> Pieces<'a> {
    fn new(metadata: &'a Metadata) -> Result<Self> {
        let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
        let types = match metadata.get("tokenizer.ggml.token_type") {
            Some(Value::Array(list)) if list.len() == tokens.len() => {
                list.iter().map(|v| v.number().unwrap_or(1.0) as u32).collect()
            }
            Some(_) => {
                return Err(invalid("gguf: tokenizer.ggml.token_type has not one entry per token"));
            }
            None => vec![1; tokens.len()],
        };
        Ok(Self { metadata, tokens, types })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&format!("tokenizer.ggml.{key}"))
    }
    fn text(&self, key: &str) -> Option<&'a str> {
        match self.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }
    fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }
    /// A token id that the vocabulary has.
    fn id(&self, key: &str) -> Option<u32> {
        let id = self.get(key)?.number()? as u32;
        ((id as usize) < self.tokens.len()).then_some(id)
    }

    fn ends(&self) -> Vec<u32> {
        let named = ["eos_token_id", "eot_token_id", "eom_token_id"];
        let mut ends: Vec<u32> = named.iter().filter_map(|key| self.id(key)).collect();
        for (id, token) in self.tokens.iter().enumerate() {
            if self.types[id] == CONTROL && TURN_ENDS.contains(token) {
                ends.push(id as u32);
            }
        }
        let mut seen = std::collections::HashSet::new();
        ends.retain(|id| seen.insert(*id));
        ends
    }

    fn vocabulary(&self) -> Vocab {
        let pairs = self.tokens.iter().zip(0u32..);
        pairs.map(|(t, id)| ((*t).to_owned(), id)).collect()
    }

    fn byte_level(&self) -> Result<Tokenizer> {
        let pre = self.text("pre").ok_or_else(|| invalid("gguf: tokenizer.ggml.pre is missing"))?;
        let split = |regex: String| {
            let split = json!({
                "type": "Split", "pattern": {"Regex": regex}, "invert": false,
                "behavior": "Isolated",
            });
            json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
        };
        let digits = json!({"type": "Digits", "individual_digits": true});
        let (pre_tokenizer, ignore_merges) = match pre {
            "smollm" => {
                (json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}), false)
            }
            "gpt-2" => (bytes(true), false),
            "llama-bpe" | "llama3" | "llama-v3" => {
                (split(format!(r"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{TAIL}")), true)
            }
            "qwen2" => (split(format!(r"{CONTRACTIONS}|{WORDS}|\p{{N}}|{TAIL}")), false),
            "tekken" => (split(CASED_WORDS.to_owned()), true),
            other => {
                return Err(unsupported(format!(
                    "gguf: tokenizer.ggml.pre = {other} is not supported; smollm, gpt-2, \
                     llama-bpe, qwen2 and tekken are"
                )));
            }
        };
        let merges = strings(self.metadata, "tokenizer.ggml.merges")?
            .into_iter()
            .map(|m| match m.split_once(' ') {
                Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
                None => Err(invalid(format!("gguf: tokenizer.ggml.merges has {m:?}"))),
            })
            .collect::<Result<Vec<_>>>()?;
        let model =
            BPE::builder().vocab_and_merges(self.vocabulary(), merges).ignore_merges(ignore_merges);
        let mut tokenizer = self.finish(model.build(), bytes(true))?;
        tokenizer.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(pre_tokenizer)));
        if pre == "qwen2" {
            set_normalizer(&mut tokenizer, json!({"type": "NFC"}))?;
        }
        Ok(tokenizer)
    }

    fn sentence_piece(&self) -> Result<Tokenizer> {
        let prefix = self.flag("add_space_prefix").unwrap_or(true);
        let mut normalizers = vec![spaces(" ", "▁")];
        let mut decoders =
            vec![spaces("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let mut model = BPE::builder()
            .vocab_and_merges(self.vocabulary(), self.merges_by_score()?)
            .byte_fallback(true)
            .fuse_unk(true);
        if let Some(unknown) = self.id("unknown_token_id") {
            model = model.unk_token(self.tokens[unknown as usize].to_owned());
        }
        let decoder = json!({"type": "Sequence", "decoders": decoders});
        let mut tokenizer = self.finish(model.build(), decoder)?;
        let normalizer = json!({"type": "Sequence", "normalizers": normalizers});
        set_normalizer(&mut tokenizer, normalizer)?;
        Ok(tokenizer)
    }

    /// SentencePiece joins the neighbours whose union scores best: every way to split a piece in
    /// two known pieces is a merge, ranked by the score of the whole.
    fn merges_by_score(&self) -> Result<Vec<(String, String)>> {
        let scores = match self.get("scores") {
            Some(Value::Array(list)) if list.len() == self.tokens.len() => list,
            _ => {
                return Err(invalid("gguf: tokenizer.ggml.scores has not one entry per token"));
            }
        };
        let ids: HashMap<&str, u32> = self.tokens.iter().copied().zip(0u32..).collect();
        let mut merges = Vec::new();
        for (token, score) in self.tokens.iter().zip(scores) {
            let score = score.number().unwrap_or(0.0);
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                    merges.push((score, *l, *r, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let pairs = merges.into_iter();
        Ok(pairs.map(|(_, _, _, l, r)| (l.to_owned(), r.to_owned())).collect())
    }

    /// Adds the decoder and the tokens that text is searched for before the model sees it.
    fn finish(
        &self,
        model: tokenizers::Result<BPE>,
        decoder: serde_json::Value,
    ) -> Result<Tokenizer> {
        let fail = |e: tokenizers::Error| invalid(format!("gguf: tokenizer: {e}"));
        let mut tokenizer = Tokenizer::new(model.map_err(fail)?);
        tokenizer.with_decoder(Some(part::<DecoderWrapper>(decoder)));
        let of_type = |wanted: u32| {
            let typed = self.tokens.iter().zip(&self.types);
            typed.filter(move |(_, t)| **t == wanted).map(move |(token, _)| {
                AddedToken::from(*token, wanted == CONTROL).normalized(false)
            })
        };
        tokenizer.add_special_tokens(of_type(CONTROL)).map_err(fail)?;
        tokenizer.add_tokens(of_type(USER_DEFINED)).map_err(fail)?;
        Ok(tokenizer)
    }
}

/// Bytes as printable letters, after GPT-2's words where asked for; a decoder ignores the settings.
fn bytes(use_regex: bool) -> serde_json::Value {
    json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": use_regex,
    })
}

fn spaces(from: &str, to: &str) -> serde_json::Value {
    json!({"type": "Replace", "pattern": {"String": from}, "content": to})
}

/// One of the parts above; they are constants, so they parse.
fn part<T: serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
    serde_json::from_value(value).expect("a tokenizer part of this file")
}

fn set_normalizer(tokenizer: &mut Tokenizer, value: serde_json::Value) -> Result<()> {
    match tokenizer.with_normalizer(Some(part::<NormalizerWrapper>(value))) {
        Ok(_) => Ok(()),
        Err(e) => Err(invalid(format!("gguf: tokenizer: {e}"))),
    }
}

fn strings<'a>(metadata: &'a Metadata, key: &str) -> Result<Vec<&'a str>> {
    let Some(Value::Array(list)) = metadata.get(key) else {
        return Err(invalid(format!("gguf: {key} is missing")));
    };
    let read = |v: &'a Value| match v {
        Value::String(s) => Ok(s.as_str()),
        other => Err(invalid(format!("gguf: {key} holds {other:?}, expected text"))),
    };
    list.iter().map(read).collect()
}
