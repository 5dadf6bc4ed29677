//! The answer of a run: one body, or a stream of events.
//!
//! Owns the order of a stream. Never ends a failed one with `[DONE]`: clients take that for
//! success. The thing to know: nothing is sent before it is asked for, so a client that does not
//! read stalls only its own body.

use super::generate::{ResponseFormat, Run};
use super::sampling::Checked;
use crate::api::http::sse::{data, event_stream, failure};
use crate::error::{Error, Result};
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use http::header::CONTENT_TYPE;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use tracing::{Instrument, Span};

/// A run whose pieces are sent as they come.
struct Live<S> {
    run: Run,
    show: S,
    include_usage: bool,
    /// Frames not yet taken by the connection: those of one event.
    frames: VecDeque<Bytes>,
    over: bool,
    /// The request's: its lines go on carrying its id.
    span: Span,
}

/// The answer as it was asked for: as a stream, or in one body.
pub async fn respond(
    mut run: Run,
    show: impl ResponseFormat,
    checked: &Checked,
) -> Result<Response> {
    if checked.stream {
        run.admitted().await?;
        return Ok(live(run, show, checked.include_usage));
    }
    let json = [(CONTENT_TYPE, "application/json")];
    Ok((json, run.collect(show).await?).into_response())
}

fn live(run: Run, show: impl ResponseFormat, include_usage: bool) -> Response {
    let frames = (0..run.choices())
        .filter_map(|index| show.opening(index))
        .map(|json| data(&json))
        .collect();
    let live = Live { run, show, include_usage, frames, over: false, span: Span::current() };
    let stream = futures::stream::unfold(live, |mut live| async move {
        let span = live.span.clone();
        let frame = live.next().instrument(span).await?;
        Some((Ok::<_, Infallible>(frame), live))
    });
    event_stream(Body::from_stream(stream.fuse()))
}

impl<S: ResponseFormat> Live<S> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Some(frame);
            }
            if self.over {
                return None;
            }
            // A panic here would cut the connection without a word: the status is long gone.
            let advanced = AssertUnwindSafe(self.advance()).catch_unwind().await;
            let failed = match advanced {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error,
                Err(_) => Error::fault("a bug ended the stream"),
            };
            self.over = true;
            tracing::warn!(code = failed.code, reason = %failed.message, "stream failed");
            return Some(failure(&failed));
        }
    }

    async fn advance(&mut self) -> Result<()> {
        match self.run.next().await? {
            Some((index, piece, reason)) => {
                if !piece.is_empty() {
                    self.frames.push_back(data(&self.show.piece(index, &piece)));
                }
                if let Some(reason) = reason {
                    self.frames.push_back(data(&self.show.ending(index, reason)));
                }
            }
            None => {
                self.over = true;
                if self.include_usage {
                    let usage = self.show.usage(self.run.usage());
                    self.frames.push_back(data(&usage));
                }
                self.frames.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
            }
        }
        Ok(())
    }
}
