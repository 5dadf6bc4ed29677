//! What jobs do, by kind. Another kind is a directory beside `merge`, a variant here, and an arm of
//! each match.
//!
//! Owns the list of kinds, and what the queue asks of each. Never runs one. The thing to know: what
//! the journal has from before there were kinds are merges.

use super::merge::{MergeSpec, Plan};
use super::rights::Rights;
use super::stage::{Progress, Stage};
use crate::adapters::registry::{PinnedSource, Registry};
use crate::adapters::version::{Lineage, Parent};
use crate::error::{Error, Kind as ErrorKind, Result, brief};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// What is to be done. Stored as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Work {
    Merge(MergeSpec),
}

/// The kinds, without what is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Merge,
}

/// Work under way.
pub enum Making {
    Merge(Box<Plan>),
}

/// What the made says of itself.
pub struct Made {
    /// JSON
    pub report: String,
    /// SVG
    pub picture: String,
}

impl Work {
    /// As the journal has it. Errors when the text is no work of this version.
    pub fn parse(text: &str) -> serde_json::Result<Self> {
        let mut value: Value = serde_json::from_str(text)?;
        if let Some(fields) = value.as_object_mut() {
            fields.entry("kind").or_insert_with(|| "merge".into());
        }
        serde_json::from_value(value)
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Merge(_) => Kind::Merge,
        }
    }

    /// Of the adapter that comes out.
    pub fn name(&self) -> &str {
        match self {
            Self::Merge(spec) => &spec.name,
        }
    }

    /// The versions that it is made of, which are kept until it is over.
    pub fn from(&self) -> &[Parent] {
        match self {
            Self::Merge(spec) => &spec.from,
        }
    }

    /// What its key allowed when it came in.
    pub fn rights(&self) -> Rights {
        match self {
            Self::Merge(spec) => spec.rights,
        }
    }

    /// What it is at when it begins.
    pub fn first_stage(&self) -> Stage {
        match self {
            Self::Merge(_) => Stage::Merging,
        }
    }

    /// What the version that comes out of the job `id` says of itself.
    pub fn lineage(&self, id: &str) -> Lineage {
        match self {
            Self::Merge(spec) => spec.lineage(id),
        }
    }

    /// Names of those that its result is compared with, in the order of `from`.
    pub fn compared(&self) -> Vec<String> {
        match self {
            Self::Merge(spec) => spec.spec.sources.iter().map(|s| s.name.clone()).collect(),
        }
    }

    /// Opens the sources. Blocking. Errors: those of the kind.
    pub fn begin(&self, registry: &Registry, sources: &[PinnedSource]) -> Result<Making> {
        match self {
            Self::Merge(spec) => {
                Plan::new(spec, registry, sources).map(Box::new).map(Making::Merge)
            }
        }
    }
}

impl Making {
    /// The next piece of work, short enough that requests do not feel it.
    pub fn step(&mut self) -> Result<Progress> {
        match self {
            Self::Merge(plan) => plan.step(),
        }
    }

    /// Writes the adapter into `dir`.
    pub fn finish(self, dir: &Path) -> Result<Made> {
        match self {
            Self::Merge(plan) => {
                let (report, picture) = plan.finish(dir)?;
                Ok(Made { report, picture })
            }
        }
    }
}

impl Kind {
    /// As logs and errors say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Merge => "merge",
        }
    }

    /// 404 for a job that nobody has, or that the caller may not know of.
    pub fn not_found(self, id: &str) -> Error {
        let shown = brief(id);
        let error = match self {
            Self::Merge => {
                Error::not_found("merge_not_found", format!("there is no merge `{shown}`"))
            }
        };
        error.param("id")
    }

    /// 409 for a job that is over or being published, which `is` says.
    pub fn over(self, id: &str, is: &str) -> Error {
        let message = format!("the {} `{id}` is {is} and cannot be cancelled", self.word());
        let code = match self {
            Self::Merge => "merge_over",
        };
        Error::new(ErrorKind::Conflict, code, message).param("id")
    }

    /// 409 for a job without a report.
    pub fn report_missing(self, id: &str, is: &str) -> Error {
        let message = format!("the {} `{id}` is {is} and has no report", self.word());
        let code = match self {
            Self::Merge => "merge_report_missing",
        };
        Error::new(ErrorKind::Conflict, code, message).param("id")
    }

    /// A job that ended the server too often.
    pub fn abandoned(self, restarts: u64) -> Error {
        let message = format!("the server ended {restarts} times while it ran");
        let code = match self {
            Self::Merge => "merge_abandoned",
        };
        Error::new(ErrorKind::Fault, code, message)
    }

    /// A source that is no longer there.
    pub fn source_gone(self, source: &Parent) -> Error {
        let message = format!("the source {} ({}) is gone", source.id, source.digest);
        let code = match self {
            Self::Merge => "merge_source_gone",
        };
        Error::new(ErrorKind::Conflict, code, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_from_before_there_were_kinds_is_a_merge() {
        let old = r#"{"name": "both", "from": [], "any_base": false,
            "spec": {"method": "lego", "sources": [], "options": {}, "seed": 18446744073709551615}}"#;
        let Ok(Work::Merge(spec)) = Work::parse(old) else { panic!("no merge") };
        assert_eq!((spec.name.as_str(), spec.spec.seed), ("both", u64::MAX));
        let written = serde_json::to_string(&Work::Merge(spec.clone())).unwrap();
        assert_eq!(Work::parse(&written).unwrap(), Work::Merge(spec));
        assert!(Work::parse(r#"{"kind": "dream", "name": "both"}"#).is_err());
    }
}
