//! What one request used, told once: to the metrics of its adapter.
//!
//! Owns the figures of a request from the moment it is queued to its end. Never changes an answer.
//! The thing to know: an account is settled exactly once, by the end of its answer or, when the
//! client went away, by being dropped.

use super::limits::Deadline;
use super::target::Target;
use super::{Api, clock, errors};
use crate::access::Ticket;
use crate::engine::{Admission, FinishReason};
use crate::error::{Error, Result};
use crate::metrics::{AdapterSeries, Outcome};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Where a request came in. Made at the edge.
#[derive(Clone)]
pub struct Origin {
    pub begun: Instant,
    pub deadline: Deadline,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    pub prompt: u64,
    /// Of the prompt, found in the prefix cache.
    pub cached: u64,
    pub completion: u64,
}

/// One request's account.
pub struct Account {
    series: Arc<AdapterSeries>,
    pub origin: Origin,
    /// By choice: when its newest token came.
    last: Vec<Option<Instant>>,
    admissions: Vec<Admission>,
    queue_time_max: Duration,
    submitted: Instant,
    place: Place,
    /// What it took of its key's and its adapter's limits.
    ticket: Option<Ticket>,
    settled: bool,
}

impl Account {
    /// Opens the account of a request for `target`.
    pub fn open(api: &Arc<Api>, target: &Target, origin: Origin) -> Self {
        let name = target.lease.as_ref().map(|lease| lease.version().name.as_str());
        Self {
            series: api.app.metrics.series(name),
            origin,
            last: Vec::new(),
            admissions: Vec::new(),
            queue_time_max: Duration::from_secs(api.app.config.queue_seconds_max),
            submitted: Instant::now(),
            place: Place::new(api, name),
            ticket: None,
            settled: false,
        }
    }

    /// Reserves `tokens` of what key and adapter may use. Errors: those of [`Access::admit`].
    ///
    /// [`Access::admit`]: crate::access::Access::admit
    pub fn admit(&mut self, api: &Api, target: &Target, tokens: u64) -> Result<()> {
        let name = target.lease.as_ref().map(|lease| lease.version().name.as_str());
        let ticket = api.app.access.admit(&target.caller, name, tokens, clock())?;
        self.ticket = Some(ticket);
        Ok(())
    }

    /// The sequences are queued, in the order of choices.
    pub fn queued(&mut self, admissions: Vec<Admission>) {
        self.last = vec![None; admissions.len()];
        self.place.queued(&admissions);
        self.admissions = admissions;
        self.submitted = Instant::now();
    }

    pub fn admissions(&self) -> &[Admission] {
        &self.admissions
    }

    /// Until when something must happen: the end of the queue's patience while no choice has been
    /// in a step, the request's deadline after that.
    pub fn until(&self) -> tokio::time::Instant {
        let end = tokio::time::Instant::from_std(self.submitted + self.queue_time_max);
        if self.waiting() { end.min(self.origin.deadline.at) } else { self.origin.deadline.at }
    }

    /// Whether no choice has been in a step.
    pub fn waiting(&self) -> bool {
        self.admissions.iter().all(|a| a.get().is_none())
    }

    /// What to say when [`until`](Self::until) has passed.
    pub fn late(&self) -> Error {
        if tokio::time::Instant::now() >= self.origin.deadline.at {
            return errors::timed_out(self.origin.deadline.seconds_max);
        }
        errors::queued_too_long(self.queue_time_max.as_secs())
    }

    /// A token of choice `index` came.
    pub fn token(&mut self, index: usize) {
        let now = Instant::now();
        let first = self.last.iter().all(Option::is_none);
        match self.last[index].replace(now) {
            Some(before) => self.series.token(false, now - before),
            None if first => self.series.token(true, now - self.origin.begun),
            None => {}
        }
    }

    /// The request is over. Only the first call counts.
    pub fn settle(&mut self, used: Used, outcome: Outcome) {
        if std::mem::replace(&mut self.settled, true) || self.admissions.is_empty() {
            return;
        }
        if let Some(ticket) = &mut self.ticket {
            ticket.used(used.prompt + used.completion);
        }
        for admitted in self.admissions.iter().filter_map(Admission::get) {
            self.series.queued(admitted.waited);
        }
        self.series.ended(outcome, used.prompt, used.cached, used.completion);
    }
}

/// How a request ended whose choices all did: cut short if one of them was.
pub fn outcome(reasons: impl Iterator<Item = FinishReason>) -> Outcome {
    let mut reasons = reasons;
    match reasons.any(|r| r == FinishReason::Length) {
        true => Outcome::Length,
        false => Outcome::Stop,
    }
}

/// Requests for adapters that are under way.
#[derive(Default)]
pub struct UnderWay {
    places: Mutex<(u64, HashMap<u64, Busy>)>,
}

struct Busy {
    adapter: String,
    admissions: Vec<Admission>,
}

impl UnderWay {
    /// Names with a sequence in the steps, and names with one in the queue; sorted.
    pub fn adapters(&self) -> (Vec<String>, Vec<String>) {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut running, mut waiting) = (BTreeSet::new(), BTreeSet::new());
        for busy in places.1.values() {
            for admission in &busy.admissions {
                let names = if admission.get().is_some() { &mut running } else { &mut waiting };
                names.insert(busy.adapter.clone());
            }
        }
        (running.into_iter().collect(), waiting.into_iter().collect())
    }
}

/// A request's entry among those under way; dropping it takes it out. None for the base.
struct Place {
    api: Arc<Api>,
    id: Option<u64>,
}

impl Place {
    fn new(api: &Arc<Api>, adapter: Option<&str>) -> Self {
        let id = adapter.map(|name| {
            let mut places = api.under_way.places.lock().unwrap_or_else(PoisonError::into_inner);
            places.0 += 1;
            let id = places.0;
            places.1.insert(id, Busy { adapter: name.to_owned(), admissions: Vec::new() });
            id
        });
        Self { api: api.clone(), id }
    }

    fn queued(&self, admissions: &[Admission]) {
        let mut places = self.api.under_way.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(busy) = self.id.and_then(|id| places.1.get_mut(&id)) {
            busy.admissions = admissions.to_vec();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let mut places =
                self.api.under_way.places.lock().unwrap_or_else(PoisonError::into_inner);
            places.1.remove(&id);
        }
    }
}
