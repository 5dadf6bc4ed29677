//! Training data: ids and masks against transformers and against what serving encodes, and every
//! refusal by line.
//!
//! Owns the tokenizers that the tests read with. Never trains.

mod files;
mod masks;

use polylora::checkpoint::source::{DEMO, locate};
use polylora::checkpoint::{Checkpoint, TextSource};
use polylora::error::Result;
use polylora::text::Text;
use polylora::train::data::{Dataset, Limits, Preview, Reading};
use serde_json::{Value, json};
use std::sync::OnceLock;
use std::time::{Duration, UNIX_EPOCH};
use tokenizers::AddedToken;

/// Special tokens of other families, beside the demo model's own.
const SPECIAL: &[&str] = &[
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
];

/// The demo model's vocabulary with the special tokens of all families, opened once.
fn source() -> TextSource {
    static SOURCE: OnceLock<TextSource> = OnceLock::new();
    let source = SOURCE.get_or_init(|| {
        let mut source = Checkpoint::open(&locate(DEMO).unwrap().path).unwrap().text;
        let special = SPECIAL.iter().map(|token| AddedToken::from(*token, true));
        source.tokenizer.add_special_tokens(special.collect::<Vec<_>>()).unwrap();
        source
    });
    TextSource {
        tokenizer: source.tokenizer.clone(),
        chat_template: source.chat_template.clone(),
        eos: source.eos.clone(),
        ..*source
    }
}

/// A text with this template, whose first token and ends are called so.
fn text_of(template: &str, bos: Option<&str>, ends: &[&str]) -> Text {
    let source = source();
    let id = |token: &str| source.tokenizer.token_to_id(token).unwrap();
    Text::new(TextSource {
        bos: bos.map(id),
        eos: ends.iter().map(|token| id(token)).collect(),
        add_bos: bos.is_some(),
        chat_template: Some(template.to_owned()),
        tokenizer: source.tokenizer.clone(),
    })
    .unwrap()
}

fn demo() -> &'static Text {
    static TEXT: OnceLock<Text> = OnceLock::new();
    TEXT.get_or_init(|| Text::new(source()).unwrap())
}

fn reading(text: &Text) -> Reading<'_> {
    Reading {
        text,
        own: None,
        kind: None,
        context: 8192,
        truncate: false,
        drop_unsupervised: false,
        now: UNIX_EPOCH + Duration::from_secs(1_709_219_045),
        limits: Limits::default(),
    }
}

fn file(lines: &[Value]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

fn read(reading: &Reading, file: &str) -> Result<Dataset> {
    reading.read(file.as_bytes(), &|| false).map(|read| read.expect("not over"))
}

fn previews(reading: &Reading, file: &str) -> Vec<Preview> {
    reading.preview(file.as_bytes(), usize::MAX, &|| false).unwrap().unwrap()
}

/// An example's ids, and which of them are learnt.
fn example(data: &Dataset, index: usize) -> (Vec<u32>, Vec<bool>) {
    let example = data.examples.get(index);
    (example.ids.to_vec(), example.weights.iter().map(|w| *w != 0.0).collect())
}

/// Supervised spans of the file's examples.
fn learnt(reading: &Reading, file: &str) -> Vec<Vec<String>> {
    let spans = |preview: Preview| {
        preview.spans.into_iter().filter(|s| s.supervised).map(|s| s.text).collect()
    };
    previews(reading, file).into_iter().map(spans).collect()
}

fn user(content: &str) -> Value {
    json!({"role": "user", "content": content})
}

fn system(content: &str) -> Value {
    json!({"role": "system", "content": content})
}

fn assistant(content: &str) -> Value {
    json!({"role": "assistant", "content": content})
}
