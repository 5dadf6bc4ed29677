//! A body as it comes, given up when it stalls or trickles.
//!
//! Owns the time that a body may take. Never keeps a byte. The thing to know: in each window of
//! `body_seconds_max` a body brings 4 KiB a second or it ends, as an error that also reaches
//! whoever reads it through a parser (`end`).

use super::errors::BODY_TIMEOUT;
use crate::error::{Error, Kind, Result};
use axum::body::{Body, BodyDataStream};
use bytes::Bytes;
use futures::{Stream, StreamExt, ready};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Waker, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// Bytes a second that a body comes at, at least.
const RATE_MIN: u64 = 4096;

/// The chunks of a body.
pub struct Paced {
    chunks: BodyDataStream,
    seconds: u64,
    window: Pin<Box<Sleep>>,
    /// In this window.
    came: u64,
    limits: Arc<Mutex<Limits>>,
}

/// What its reader allows.
struct Limits {
    /// Bytes that came, how many may, and what to say when more do.
    came: u64,
    total: u64,
    refusal: Option<Error>,
    /// How it ended, if it did so early.
    ended: Option<Error>,
}

/// A handle for whoever reads the body through a parser, which tells nothing of its errors.
#[derive(Clone)]
pub struct Reins(Arc<Mutex<Limits>>);

impl Reins {
    fn lock(&self) -> std::sync::MutexGuard<'_, Limits> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the body with `refusal` when it brings more than `total` bytes.
    pub fn limit(&self, total: u64, refusal: Error) {
        let mut limits = self.lock();
        (limits.total, limits.refusal) = (total, Some(refusal));
    }

    /// Bytes that came so far.
    pub fn came(&self) -> u64 {
        self.lock().came
    }

    /// Why it ended early, if it did.
    pub fn ended(&self) -> Option<Error> {
        self.lock().ended.clone()
    }
}

impl Paced {
    pub fn new(body: Body, seconds: u64) -> Self {
        let limits = Limits { came: 0, total: u64::MAX, refusal: None, ended: None };
        Self {
            chunks: body.into_data_stream(),
            seconds,
            window: Box::pin(tokio::time::sleep(Duration::from_secs(seconds))),
            came: 0,
            limits: Arc::new(Mutex::new(limits)),
        }
    }

    pub fn reins(&self) -> Reins {
        Reins(self.limits.clone())
    }

    /// The next chunk, unless the window ends before.
    fn next_in_time(&mut self, waker: &mut Waker) -> Poll<Option<Result<Bytes>>> {
        loop {
            if let Poll::Ready(next) = self.chunks.poll_next_unpin(waker) {
                return Poll::Ready(next.map(|chunk| {
                    chunk.map_err(|e| {
                        let message = format!("the body could not be read: {e}");
                        Error::invalid("incomplete_body", message)
                    })
                }));
            }
            ready!(self.window.as_mut().poll(waker));
            if self.came < self.seconds * RATE_MIN {
                return Poll::Ready(Some(Err(late(self.came, self.seconds))));
            }
            self.came = 0;
            let end = Instant::now() + Duration::from_secs(self.seconds);
            self.window.as_mut().reset(end);
        }
    }
}

impl Stream for Paced {
    type Item = Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, waker: &mut Waker) -> Poll<Option<Result<Bytes>>> {
        let next = ready!(self.next_in_time(waker));
        let reins = self.reins();
        let mut limits = reins.lock();
        let next = next.map(|chunk| {
            let chunk = chunk?;
            self.came += chunk.len() as u64;
            limits.came += chunk.len() as u64;
            match limits.refusal.clone().filter(|_| limits.came > limits.total) {
                Some(refusal) => Err(refusal),
                None => Ok(chunk),
            }
        });
        if let Some(Err(error)) = &next {
            limits.ended = Some(error.clone());
        }
        Poll::Ready(next)
    }
}

fn late(came: u64, seconds: u64) -> Error {
    let message = format!(
        "the body brought {came} bytes in {seconds} s (body_seconds_max); {RATE_MIN} a second are \
         the least"
    );
    Error::new(Kind::Invalid, BODY_TIMEOUT, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(pause: Duration, bytes: usize, count: usize) -> Body {
        Body::from_stream(futures::stream::unfold(0, move |at| async move {
            tokio::time::sleep(pause).await;
            let chunk = Bytes::from(vec![b'x'; bytes]);
            (at < count).then_some((Ok::<_, std::io::Error>(chunk), at + 1))
        }))
    }

    async fn read(body: Body) -> Result<usize> {
        let mut paced = Paced::new(body, 1);
        let mut read = 0;
        while let Some(chunk) = paced.next().await {
            read += chunk?.len();
        }
        Ok(read)
    }

    #[tokio::test]
    async fn a_body_that_stalls_or_trickles_is_given_up_and_one_that_comes_is_not() {
        let ms = Duration::from_millis;
        assert_eq!(read(body(ms(1), 65_536, 1200)).await.unwrap(), 1200 * 65_536);
        for (pause, bytes) in [(ms(3_600_000), 1), (ms(20), 1), (ms(100), 300)] {
            let e = read(body(pause, bytes, 10_000)).await.expect_err("too slow");
            assert_eq!(e.code, "body_timeout");
        }
    }

    #[tokio::test]
    async fn more_than_its_reader_allows_ends_it_in_the_readers_words() {
        let mut paced = Paced::new(body(Duration::ZERO, 100, 100), 30);
        let reins = paced.reins();
        reins.limit(250, Error::invalid("invalid_archive", "too much"));
        let mut read = 0;
        while let Some(Ok(chunk)) = paced.next().await {
            read += chunk.len();
        }
        assert_eq!((read, reins.ended().map(|e| e.code)), (200, Some("invalid_archive")));
    }
}
