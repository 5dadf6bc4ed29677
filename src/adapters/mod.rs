//! Adapters: read, checked, stored by digest, named, leased and resident.
//!
//! Owns everything between an uploaded file and the factors a step multiplies with. Never runs a
//! model: the base rows that DoRA needs come in through `BaseRows`, and what must happen on the
//! engine thread is sent there as a `BankCommand`. The thing to know: an adapter is immutable and
//! named by the digest of its content.

pub mod actor;
pub mod alias;
pub mod bank;
mod base;
pub mod composition;
pub mod format;
pub mod ledger;
pub mod registry;
pub mod store;
pub mod version;

pub use base::{BaseBias, BaseRows, BaseText, TemplateTrial, TokenId};
use std::fmt;

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
