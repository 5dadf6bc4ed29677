//! What is read of a `tokenizer_config.json`, and of other small files beside the factors.
//!
//! Owns their bounds. Never judges a template: `bundle` does.

use super::names::{TOKENIZER_CONFIG, unreadable};
use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Longest tokenizer_config.json; some list thousands of unused tokens.
const TOKENIZER_CONFIG_BYTES_MAX: u64 = 8 << 20;

/// What is read of a tokenizer_config.json.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct TokenizerConfig {
    pub chat_template: Value,
    pub bos_token: Value,
    pub eos_token: Value,
    pub pad_token: Value,
}

impl TokenizerConfig {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read(path, TOKENIZER_CONFIG_BYTES_MAX, "invalid_tokenizer_config")?;
        let invalid = |why: String| {
            Error::unprocessable("invalid_tokenizer_config", format!("{TOKENIZER_CONFIG}: {why}"))
        };
        // The parser would take a list for the fields in order.
        if !bytes.trim_ascii_start().starts_with(b"{") {
            return Err(invalid("it is no object".into()));
        }
        serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))
    }
}

/// Whether the tokenizer_config.json at `path` is to be looked at for a template. One that cannot
/// be read is: the upload is then refused, naming it.
pub fn holds_template(path: &Path) -> bool {
    TokenizerConfig::read(path).map_or(true, |c| !c.chat_template.is_null())
}

/// A token as a string, or as `{"content": …}`.
pub fn token_text(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

/// A whole file of at most `bytes_max`.
pub fn read(path: &Path, bytes_max: u64, code: &'static str) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(|e| unreadable(path, &e))?;
    if bytes.len() as u64 > bytes_max {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let message = format!("`{name}` has more than {bytes_max} bytes");
        return Err(Error::unprocessable(code, message));
    }
    Ok(bytes)
}
