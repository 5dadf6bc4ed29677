//! What the key of a job allowed when the job came in.
//!
//! Owns what the journal keeps of it. Never judges: the registry does.

use crate::adapters::actor::Bounds;
use serde::{Deserialize, Serialize};

/// What the key of a job allows when its result is published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rights {
    /// To publish under the name, whosever that is.
    pub given: bool,
    pub bounds: Bounds,
}
