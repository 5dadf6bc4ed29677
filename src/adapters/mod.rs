//! Adapters: read, checked, stored by digest, named, leased and resident.
//!
//! Owns everything between an uploaded file and the factors a step multiplies with. Never runs a
//! model: the base rows that DoRA needs come in through `BaseRows`, and what must happen on the
//! engine thread is sent there as a `BankCommand`. The thing to know: an adapter is immutable and
//! named by the digest of its content.

pub mod actor;
pub mod alias;
pub mod bank;
pub mod composition;
pub mod format;
pub mod registry;
pub mod store;
pub mod version;

use std::fmt;
use std::sync::Arc;

/// SHA-256 of an adapter's content (or of the base model's files).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Reads what `Display` writes; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut digest = [0; 32];
        hex::decode_to_slice(text.strip_prefix("sha256:")?, &mut digest).ok()?;
        Some(Self(digest))
    }
}

impl fmt::Display for Digest {
    /// `sha256:<64 hex digits>`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(&self.0[..6]))
    }
}

/// Reads one row of a base weight as f32: (site, output row, out `[I]`). DoRA's norms need it.
/// Called off the engine thread.
pub type BaseRows = Arc<dyn Fn(crate::shape::Site, usize, &mut [f32]) + Send + Sync>;
/// Tries a bundle's chat template. Errors: `invalid_chat_template`. Blocking.
pub type TemplateTrial =
    Arc<dyn Fn(&format::bundle::Template) -> crate::error::Result<()> + Send + Sync>;
/// The id of a token of the base's tokenizer, added tokens included.
pub type TokenId = Arc<dyn Fn(&str) -> Option<u32> + Send + Sync>;

/// What bundles are checked against on the text side, which `adapters` cannot see.
#[derive(Clone)]
pub struct BaseText {
    pub check_template: TemplateTrial,
    pub token_id: TokenId,
    /// Tokens that the model has rows for.
    pub vocab: usize,
    /// Prompt plus answer, in tokens.
    pub context: usize,
}

/// Reads the base bias of a site, `None` where it has none. `bias = "all" | "lora_only"` replaces
/// it.
pub type BaseBias = Arc<dyn Fn(crate::shape::Site) -> Option<Vec<f32>> + Send + Sync>;
