//! Whom a benchmark asks, and by which route.
//!
//! Owns the plain types. Never sends a request.

use super::plan::Target;
use crate::cli::client::Client;

/// One side of a comparison.
#[derive(Clone)]
pub struct Contender {
    pub name: String,
    pub client: Client,
    pub targets: Vec<Target>,
}
