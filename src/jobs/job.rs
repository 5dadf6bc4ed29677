//! What a job is: an order, whose it is, and how far it came.
//!
//! Owns the states and the moves between them. Never stores or runs anything. The thing to know:
//! what is being published is not taken back: before, a job can be cancelled, after it only its
//! evaluation.

use super::evaluate::EvaluationSet;
use crate::adapters::actor::{Actor, Bounds, Right, Tenant};
use crate::adapters::version::Parent;
use crate::error::{Error, Kind};
use crate::merge::Progress;
use crate::merge::spec::Spec;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What is to be done. Stored as JSON; the stored text decides the result, so a job runs by what
/// was read back from it. Fields may be added, never renamed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
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

/// What the key of an order allows when its result is published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rights {
    /// To publish under the order's name, whosever that is.
    pub given: bool,
    pub bounds: Bounds,
}

/// Whose a job is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Id of the key.
    pub key: String,
    /// `None`: an operator's.
    pub tenant: Option<String>,
}

impl Owner {
    /// Whether whoever has this tenant (or none) may know of the job.
    pub fn known_to(&self, tenant: Option<&str>) -> bool {
        tenant.is_none() || self.tenant.as_deref() == tenant
    }
}

/// An order that came in, with what it is evaluated on.
pub struct Submission {
    pub id: String,
    pub owner: Owner,
    pub order: Order,
    pub sets: Vec<EvaluationSet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Queued,
    Running(Stage),
    Done,
    Failed,
    Cancelled,
}

/// What a running job is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Merging,
    Publishing,
    Evaluating,
}

impl State {
    pub const ALL: [Self; 5] =
        [Self::Queued, Self::Running(Stage::Merging), Self::Done, Self::Failed, Self::Cancelled];

    /// As the journal and the wire say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running(_) => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Self::Merging => "merging",
            Self::Publishing => "publishing",
            Self::Evaluating => "evaluating",
        }
    }
}

/// The version that came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// `name@number`
    pub id: String,
    /// `sha256:…`
    pub digest: String,
}

/// Why a job failed: an [`Error`] as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: String,
    pub message: String,
}

impl From<&Error> for Failure {
    fn from(e: &Error) -> Self {
        Self { code: e.code.to_owned(), message: e.message.clone() }
    }
}

/// One job as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: String,
    pub owner: Owner,
    pub order: Arc<Order>,
    pub state: State,
    /// Sites merged, since it last began.
    pub progress: Option<Progress>,
    /// How often it began anew because the server had ended under it.
    pub restarts: u64,
    /// Unix seconds.
    pub created: u64,
    pub started: Option<u64>,
    pub ended: Option<u64>,
    pub outcome: Option<Outcome>,
    pub failure: Option<Failure>,
}

impl Job {
    /// queued → running; false when it was cancelled meanwhile.
    pub fn begin(&mut self, now: u64) -> bool {
        let queued = self.state == State::Queued;
        if queued {
            self.state = State::Running(Stage::Merging);
            self.started = Some(now);
        }
        queued
    }

    /// Back into the queue, so that others get a turn; it will begin anew.
    pub fn set_aside(&mut self) -> bool {
        let running = matches!(self.state, State::Running(_));
        if running {
            self.state = State::Queued;
            self.progress = None;
        }
        running
    }

    /// Who publishes its result.
    pub fn actor(&self) -> Actor {
        let name = self.owner.tenant.as_deref().unwrap_or_default().into();
        let Rights { given, bounds } = self.order.rights;
        let right = if given || self.owner.tenant.is_none() { Right::Given } else { Right::Own };
        Actor { tenant: Tenant { name, bounds }, right }
    }

    /// On to another stage; false when it was cancelled meanwhile.
    pub fn advance(&mut self, stage: Stage) -> bool {
        let running = matches!(self.state, State::Running(_));
        if running {
            self.state = State::Running(stage);
        }
        running
    }

    /// The result is there and serves.
    pub fn published(&mut self, outcome: Outcome) {
        self.state = State::Running(Stage::Evaluating);
        self.outcome = Some(outcome);
    }

    /// Whether it can still be cancelled, and then it is. One that is only evaluated is done.
    pub fn cancel(&mut self, now: u64) -> bool {
        self.state = match self.state {
            // Set aside while it was evaluated.
            State::Queued if self.outcome.is_some() => State::Done,
            State::Queued | State::Running(Stage::Merging) => State::Cancelled,
            State::Running(Stage::Evaluating) => State::Done,
            _ => return false,
        };
        self.ended = Some(now);
        true
    }

    /// Back to the queue: it was cancelled or had begun, and that could not be written down. One
    /// that is done stays so.
    pub fn requeue(&mut self) -> bool {
        let again = matches!(self.state, State::Running(_) | State::Cancelled);
        if again {
            (self.state, self.progress) = (State::Queued, None);
            (self.started, self.ended) = (None, None);
        }
        again
    }

    /// It is done, or failed; false when it was over already.
    pub fn end(&mut self, failure: Option<&Error>, now: u64) -> bool {
        if self.state.is_over() {
            return false;
        }
        self.ended = Some(now);
        self.failure = failure.map(Failure::from);
        self.state = if failure.is_some() { State::Failed } else { State::Done };
        true
    }
}

/// 404 for a job that nobody has, or that the caller may not know of.
pub fn not_found(id: &str) -> Error {
    let shown: String = id.chars().take(64).collect();
    Error::not_found("merge_not_found", format!("there is no merge `{shown}`")).param("id")
}

/// 409 for a job that is over or being published.
pub fn over(job: &Job) -> Error {
    let what = match job.state {
        State::Running(stage) => stage.name(),
        state => state.name(),
    };
    let message = format!("the merge `{}` is {what} and cannot be cancelled", job.id);
    Error::new(Kind::Conflict, "merge_over", message).param("id")
}
