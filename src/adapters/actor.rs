//! Who asks something of the registry: a tenant with its bounds, and a right to a name.
//!
//! Owns the plain types. Never knows a key: whoever calls says which right it has.

use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Bounds of one tenant beside its share; `None` is without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bounds {
    pub names: Option<u64>,
    pub disk_bytes: Option<u64>,
    pub resident_bytes: Option<u64>,
}

/// Whose a request is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tenant {
    /// Empty: an operator, who is bound by the whole alone.
    pub name: Arc<str>,
    pub bounds: Bounds,
}

/// What somebody may do to a name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Right {
    /// Everything, whosever it is.
    #[default]
    Given,
    /// Everything while its tenant owns it, or nobody does.
    Own,
    Nothing,
}

/// Who changes a name, and by which right. The default is an operator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Actor {
    pub tenant: Tenant,
    pub right: Right,
}

impl Tenant {
    pub fn is_operator(&self) -> bool {
        self.name.is_empty()
    }

    /// What its key allows it to have in memory, if that is bounded.
    pub fn resident_bytes_max(&self) -> Option<u64> {
        self.bounds.resident_bytes.filter(|_| !self.is_operator())
    }
}
