//! What a training job tells, as it tells it.
//!
//! Owns the stream of events. Never polls: a job that gets on wakes it. The thing to know: it
//! begins with the first event, so a client that comes late reads all of them, oldest first.

use super::shown;
use crate::api::Api;
use crate::api::http::request::Deadline;
use crate::api::http::sse;
use crate::api::jobs::watching::{self, Next, STILL};
use crate::error::Result;
use crate::jobs::{Kind, Watch};
use bytes::Bytes;
use futures::Stream;
use std::convert::Infallible;
use std::sync::Arc;

/// A client's stream.
struct Told {
    api: Arc<Api>,
    id: String,
    tenant: Option<String>,
    watch: Watch,
    deadline: Deadline,
    /// Number of the event that it was told last.
    last: u64,
}

/// Frames of the events of a job, from the first on, until the job is over. Errors: those of
/// [`crate::jobs::Jobs::get`].
pub fn frames(
    api: Arc<Api>,
    id: String,
    tenant: Option<String>,
    deadline: Deadline,
) -> Result<impl Stream<Item = Result<Bytes, Infallible>>> {
    let watch = api.jobs.watch(Kind::Train, &id, tenant.as_deref())?;
    let told = Told { api, id, tenant, watch, deadline, last: 0 };
    Ok(futures::stream::unfold(Some(told), |told: Option<Told>| async move {
        let (frame, told) = told?.frame().await;
        Some((Ok(frame), told))
    }))
}

impl Told {
    /// The next frame; without a stream to go on with, it is the last.
    async fn frame(mut self) -> (Bytes, Option<Self>) {
        let is_over = match watching::next(&mut self.watch, self.deadline).await {
            Next::Still => return (Bytes::from_static(STILL), Some(self)),
            Next::Changed(_) => false,
            Next::Over => true,
            Next::Failed(error) => return (sse::failure(&error), None),
        };
        let tenant = self.tenant.as_deref();
        match self.api.jobs.told_since(Kind::Train, &self.id, tenant, self.last).await {
            Err(error) => (sse::failure(&error), None),
            Ok(events) => {
                self.last = events.last().map_or(self.last, |event| event.number);
                let json = |event| serde_json::to_string(&shown::event(event)).unwrap_or_default();
                let mut frame: Vec<u8> =
                    events.iter().flat_map(|event| sse::data(&json(event))).collect();
                if is_over {
                    frame.extend(sse::data("[DONE]"));
                }
                (frame.into(), (!is_over).then_some(self))
            }
        }
    }
}
