//! What a route left on its answer for the audit log.
//!
//! Owns one small type that routes fill and `audit` reads. Never reaches a client.

/// What was changed, where the path does not say it.
#[derive(Clone, Default)]
pub struct Touched {
    pub name: Option<String>,
    pub digest: Option<String>,
}
