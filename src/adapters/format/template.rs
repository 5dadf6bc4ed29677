//! A chat template as an adapter brings it.
//!
//! Owns its parts. Never renders it.

/// A chat template and the tokens it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Jinja, or a JSON list of `{"name", "template"}`.
    pub text: String,
    /// `None`: the base's.
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
}
