//! A merge as a job: what is merged, and under which name it is published.
//!
//! Owns what the journal keeps of it. Never opens a source: `plan` does.

use crate::adapters::version::{Lineage, Parent};
use crate::jobs::rights::Rights;
use crate::merge::spec::Spec;
use serde::{Deserialize, Serialize};

/// A merge that was asked for. Stored as JSON; the stored text decides the result, so a job runs by
/// what was read back from it. Fields may be added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MergeSpec {
    /// Of the adapter that comes out.
    pub name: String,
    /// Sources are called as the client called them.
    pub spec: Spec,
    /// What each source was when the job came in.
    pub from: Vec<Parent>,
    /// Merge sources that name different base models.
    pub any_base: bool,
    /// What its key allowed when it came in.
    #[serde(default)]
    pub rights: Rights,
}

impl MergeSpec {
    /// What the version that comes out of the job `id` says of itself.
    pub fn lineage(&self, id: &str, rests_on: Vec<String>) -> Lineage {
        Lineage::Merged {
            method: self.spec.method.name().to_owned(),
            from: self.from.clone(),
            job: Some(id.to_owned()),
            rests_on,
        }
    }
}
