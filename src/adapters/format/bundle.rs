//! What an adapter brings beside its factors: a chat template and defaults of generation.
//!
//! Owns reading `chat_template.jinja`, `tokenizer_config.json` and the check of `tokenizer.json`.
//! Never renders: a template is tried by `BaseText`, in a process of its own. The thing to know:
//! the files are part of the version's content; of a `tokenizer_config.json` only the template and
//! the names of the bos, eos and padding tokens are read.

use super::files::AdapterFiles;
use super::generation::{self, Generation};
use super::names::{TOKENIZER, TOKENIZER_CONFIG};
pub use super::template::Template;
use super::tokenizer_config::{TokenizerConfig, read, token_text};
use super::vocabulary;
use crate::adapters::BaseText;
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Longest template: its text is kept in memory for those in use.
const TEMPLATE_BYTES_MAX: u64 = 256 << 10;
/// Longest start or end token that a template may write.
const TOKEN_CHARS_MAX: usize = 256;

/// All of it, checked.
#[derive(Debug, Default)]
pub struct Bundle {
    pub template: Option<Template>,
    pub generation: Generation,
}

/// Reads and checks what lies beside the factors in `dir`. Errors: `invalid_chat_template`,
/// `invalid_tokenizer_config`, `tokenizer_mismatch`, `invalid_generation_config`,
/// `unsupported_generation_field`. Blocking.
pub fn read_bundle(dir: &Path, files: &AdapterFiles, base: &BaseText) -> Result<Bundle> {
    let tokenizer = dir.join(TOKENIZER);
    if tokenizer.exists() {
        let own = dir.join(TOKENIZER_CONFIG);
        let own = if own.exists() { TokenizerConfig::read(&own)? } else { Default::default() };
        vocabulary::check(&tokenizer, token_text(&own.pad_token).as_deref(), base)?;
    }
    let template = template(files)?;
    if let Some(template) = &template {
        (base.check_template)(template)?;
    }
    let mut generation = match &files.generation {
        None => Generation::default(),
        Some(path) => generation::parse(&read(path, 1 << 20, "invalid_generation_config")?, base)?,
    };
    // A chat model ends its turn with the eos of its tokenizer; PEFT saves no generation config.
    let eos = template.as_ref().and_then(|t| t.eos_token.as_deref());
    if let (None, Some(eos)) = (&generation.stop_tokens, eos) {
        generation.stop_tokens_more = (base.token_id)(eos).into_iter().collect();
    }
    Ok(Bundle { template, generation })
}

/// The template of an adapter that was checked before. Errors as `read_bundle`. Blocking.
pub fn template(files: &AdapterFiles) -> Result<Option<Template>> {
    let own = match &files.tokenizer_config {
        None => TokenizerConfig::default(),
        Some(path) => TokenizerConfig::read(path)?,
    };
    let text = match (&files.template, own.chat_template) {
        (Some(path), _) => {
            let bytes = read(path, TEMPLATE_BYTES_MAX, "invalid_chat_template")?;
            String::from_utf8(bytes).map_err(|e| invalid_template(e.to_string()))?
        }
        (None, Value::Null) => return Ok(None),
        (None, Value::String(text)) => text,
        (None, list @ Value::Array(_)) => list.to_string(),
        (None, _) => return Err(invalid_template("it is neither text nor a list".into())),
    };
    if text.len() as u64 > TEMPLATE_BYTES_MAX {
        return Err(invalid_template(format!(
            "it has {} bytes; the limit is {TEMPLATE_BYTES_MAX}",
            text.len()
        )));
    }
    Ok(Some(Template {
        text,
        bos_token: sane("bos_token", &own.bos_token)?,
        eos_token: sane("eos_token", &own.eos_token)?,
    }))
}

fn invalid_template(why: String) -> Error {
    Error::unprocessable("invalid_chat_template", format!("the chat template: {why}"))
        .param("chat_template")
}

/// A token that a template may write.
fn sane(name: &str, token: &Value) -> Result<Option<String>> {
    let text = token_text(token);
    if text.as_ref().is_some_and(|t| t.chars().nth(TOKEN_CHARS_MAX).is_some()) {
        let message =
            format!("{TOKENIZER_CONFIG}: `{name}` is longer than {TOKEN_CHARS_MAX} characters");
        return Err(Error::unprocessable("invalid_tokenizer_config", message).param(name));
    }
    Ok(text)
}
