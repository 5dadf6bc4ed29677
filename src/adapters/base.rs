//! What adapters are prepared and checked with, of a base that this module cannot see.
//!
//! Owns the types of these questions. Never answers one: `model` and `text` do.

use super::format::template::Template;
use crate::error::Result;
use crate::shape::Site;
use std::sync::Arc;

/// Reads one row of a base weight as f32: (site, output row, out `[I]`). DoRA's norms need it.
/// Called off the engine thread.
pub type BaseRows = Arc<dyn Fn(Site, usize, &mut [f32]) + Send + Sync>;
/// Tries a bundle's chat template. Errors: `invalid_chat_template`. Blocking.
pub type TemplateTrial = Arc<dyn Fn(&Template) -> Result<()> + Send + Sync>;
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
pub type BaseBias = Arc<dyn Fn(Site) -> Option<Vec<f32>> + Send + Sync>;
