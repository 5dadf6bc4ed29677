//! A job that a client watches while it runs.
//!
//! Owns what comes next on such a stream, and its signs of life. Never shows a job.

use crate::api::http::errors::timed_out;
use crate::api::http::request::Deadline;
use crate::error::Error;
use crate::jobs::{Job, Watch};
use std::time::Duration;

/// Between two signs of life where nothing changes, for proxies that cut what is silent.
const STILL_TIME: Duration = Duration::from_secs(15);
/// A sign of life: a comment, which clients skip.
pub const STILL: &[u8] = b": still\n\n";

/// What there is to tell.
pub enum Next {
    /// Nothing, and the stream goes on.
    Still,
    Changed(Box<Job>),
    /// The job was over when it was told last.
    Over,
    /// The stream ends: the server stops, or the request took too long.
    Failed(Error),
}

/// Waits for a change.
pub async fn next(watch: &mut Watch, deadline: Deadline) -> Next {
    let next = tokio::select! {
        next = watch.next() => next,
        () = tokio::time::sleep(STILL_TIME) => return Next::Still,
        () = tokio::time::sleep_until(deadline.at) => Err(timed_out(deadline.seconds_max)),
    };
    match next {
        Ok(Some(job)) => Next::Changed(Box::new(job)),
        Ok(None) => Next::Over,
        Err(error) => Next::Failed(error),
    }
}
