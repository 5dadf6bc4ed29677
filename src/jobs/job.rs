//! What a job is: its work, whose it is, and how far it came.
//!
//! Owns the states and the moves between them. Never stores or runs anything. The thing to know:
//! what is being published is not taken back: before, a job can be cancelled, after it only its
//! evaluation. Of a trained one the name has not moved then, and does not.

use super::evaluate::EvaluationSet;
use super::rights::Rights;
use super::stage::{Progress, Stage};
use super::train::Verdict;
use super::work::Work;
use crate::adapters::actor::{Actor, Right, Tenant};
use crate::error::Error;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

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

/// A job that came in, with what its result is evaluated on.
pub struct Submission {
    pub id: String,
    pub owner: Owner,
    pub work: Work,
    pub sets: Vec<EvaluationSet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Queued,
    Running(Stage),
    /// Somebody paused it; somebody may let it go on.
    Paused,
    Done,
    Failed,
    Cancelled,
}

impl State {
    pub const ALL: [Self; 6] = [
        Self::Queued,
        Self::Running(Stage::Merging),
        Self::Paused,
        Self::Done,
        Self::Failed,
        Self::Cancelled,
    ];

    /// As the journal and the wire say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running(_) => "running",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// The version that came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// `name@number`
    pub id: String,
    /// `sha256:…`
    pub digest: String,
    /// Ids of files that it left beside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
    /// Tokens that it read, where it learnt from some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

/// Why a job failed: an [`Error`] as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: String,
    pub message: String,
}

impl From<&Error> for Failure {
    /// Of a fault only that there was one: what it is stands in the log.
    fn from(e: &Error) -> Self {
        let message = match e.code {
            "internal_error" => "a fault of the server; its log has the reason under the job's id",
            _ => &e.message,
        };
        Self { code: e.code.to_owned(), message: message.to_owned() }
    }
}

/// One job as it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: String,
    pub owner: Owner,
    pub work: Arc<Work>,
    pub state: State,
    /// Since it last began.
    pub progress: Option<Progress>,
    /// How often it began anew because the server had ended under it.
    pub restarts: u64,
    /// Unix seconds.
    pub created: u64,
    pub started: Option<u64>,
    pub ended: Option<u64>,
    pub outcome: Option<Outcome>,
    pub failure: Option<Failure>,
    /// How its result was judged, of a kind that is.
    pub gate: Option<Verdict>,
}

impl Job {
    /// queued → running; false when it was cancelled meanwhile.
    pub fn begin(&mut self, now: u64) -> bool {
        let queued = self.state == State::Queued;
        if queued {
            self.state = State::Running(self.work.first_stage());
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

    /// Stops what makes its result until it is resumed; false where there is nothing to stop.
    pub fn pause(&mut self) -> bool {
        let stops = match self.state {
            State::Queued => self.outcome.is_none(),
            State::Running(stage) => stage.is_making(),
            _ => false,
        };
        if stops {
            self.state = State::Paused;
        }
        stops
    }

    /// Back into the queue after a pause; false when it is not paused.
    pub fn resume(&mut self) -> bool {
        let paused = self.state == State::Paused;
        if paused {
            self.state = State::Queued;
        }
        paused
    }

    /// Who publishes its result.
    pub fn actor(&self) -> Actor {
        let name = self.owner.tenant.as_deref().unwrap_or_default().into();
        let Rights { given, bounds } = self.work.rights();
        let right = if given || self.owner.tenant.is_none() { Right::Given } else { Right::Own };
        Actor { tenant: Tenant { name, bounds }, right }
    }

    /// What it is made of is there: on from preparing it.
    pub fn made_ready(&mut self) -> bool {
        let ready = self.state == State::Running(Stage::Preparing);
        if ready {
            self.state = State::Running(Stage::Training);
        }
        ready
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

    /// Whether it can still be cancelled, and then it is. One that is only evaluated is done, but
    /// for one whose name waits for that.
    pub fn cancel(&mut self, now: u64) -> bool {
        let evaluated = match self.work.is_candidate() {
            true => State::Cancelled,
            false => State::Done,
        };
        self.state = match self.state {
            // Set aside while it was evaluated.
            State::Queued if self.outcome.is_some() => evaluated,
            State::Queued | State::Paused => State::Cancelled,
            State::Running(stage) if stage.is_making() => State::Cancelled,
            State::Running(Stage::Evaluating) => evaluated,
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

    /// 409 for a job that cannot be `done` (cancelled, paused or resumed) as it stands.
    pub fn over(&self, done: &str) -> Error {
        let is = match self.state {
            State::Running(stage) => stage.name(),
            state => state.name(),
        };
        self.work.kind().over(&self.id, is, done)
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
