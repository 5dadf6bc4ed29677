//! A connection's socket: it gives up on a reader who takes nothing, finds out whether a client
//! that sends nothing more has gone, and lets one that still sends see its answer.
//!
//! Owns the times of a connection below HTTP. Never looks at bytes. The thing to know: the end of
//! the client's side is kept from hyper while an answer is due, since TCP tells a client that hung
//! up and one that waits apart only when something is sent to it: an interim answer is sent.

use super::connection::Connection;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// A write that waits longer makes its connection one that may be closed for others.
const STALL_TIME: Duration = Duration::from_secs(5);
/// From the end of the client's side to the first question whether it is still there; the time
/// doubles from one to the next.
const FIRST_QUESTION: Duration = Duration::from_millis(500);
const LAST_QUESTION: Duration = Duration::from_secs(15);
/// For the refusal of a peer that is gone to arrive.
const REPLY_TIME: Duration = Duration::from_millis(100);
/// A client cannot be asked within an answer. One that ended its side and was sent nothing for so
/// long counts as gone.
const QUIET_TIME: Duration = Duration::from_secs(30);
/// Harmless before an answer: clients of HTTP/1.1 must read over it (RFC 9110, 15.2).
const QUESTION: &[u8] = b"HTTP/1.1 102 Processing\r\n\r\n";
/// What is read and thrown away, at most, after an answer to a client that still sends.
const UNREAD_BYTES_MAX: usize = 64 << 20;
const UNREAD_TIME_MAX: Duration = Duration::from_secs(2);

/// A stream that keeps these times.
pub struct Socket<S> {
    stream: S,
    connection: Arc<Connection>,
    write_time_max: Duration,
    /// While a write waits.
    waiting: Option<Waiting>,
    /// When something was sent last.
    sent_at: Instant,
    /// Once the client has ended its side.
    ended: Option<Ended>,
    /// Once our side is ended, while the client may still send.
    leftover: Option<Leftover>,
}

struct Waiting {
    since: Instant,
    sleep: Pin<Box<Sleep>>,
    stalled: bool,
}

struct Ended {
    sleep: Pin<Box<Sleep>>,
    pause: Duration,
    /// A question was sent, its reply is looked for next.
    asked: bool,
}

struct Leftover {
    sleep: Pin<Box<Sleep>>,
    bytes: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    pub fn new(stream: S, connection: Arc<Connection>, write_time_max: Duration) -> Self {
        let sent_at = Instant::now();
        Self {
            stream,
            connection,
            write_time_max,
            waiting: None,
            sent_at,
            ended: None,
            leftover: None,
        }
    }

    /// Passes a write's progress on; a wait beyond the limit is an error.
    fn in_time<T>(
        &mut self,
        cx: &mut TaskContext<'_>,
        progress: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            if self.waiting.take().is_some_and(|w| w.stalled) {
                self.connection.go_on();
            }
            return progress;
        }
        let max = self.write_time_max;
        let waiting = self.waiting.get_or_insert_with(|| Waiting {
            since: Instant::now(),
            sleep: Box::pin(sleep(STALL_TIME.min(max))),
            stalled: false,
        });
        ready!(waiting.sleep.as_mut().poll(cx));
        if waiting.since.elapsed() < max {
            waiting.stalled = true;
            self.connection.stall();
            waiting.sleep.as_mut().reset(waiting.since + max);
            ready!(waiting.sleep.as_mut().poll(cx));
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client reads nothing")))
    }

    /// Notes what a write brought.
    fn sent(&mut self, progress: &Poll<io::Result<usize>>) {
        if matches!(progress, Poll::Ready(Ok(1..))) {
            self.connection.begin();
            if self.ended.is_some() {
                self.sent_at = Instant::now();
            }
        }
    }

    /// The client has ended its side: pending while it may wait for an answer, then the end.
    fn after_end(&mut self, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        while self.connection.awaits_answer(cx) {
            let ended = self.ended.get_or_insert_with(|| {
                self.sent_at = Instant::now();
                let sleep = Box::pin(sleep(FIRST_QUESTION));
                Ended { sleep, pause: FIRST_QUESTION, asked: false }
            });
            ready!(ended.sleep.as_mut().poll(cx));
            let gone = match self.connection.has_begun() {
                true => self.sent_at.elapsed() >= QUIET_TIME,
                false => !self.connection.is_modern(),
            };
            // Whether the request is whole shows when its route has looked: by now it has.
            if gone || self.connection.is_wanting() {
                break;
            }
            let mut next = ended.pause;
            if ended.asked {
                ended.asked = false;
                ended.pause = (ended.pause * 2).min(LAST_QUESTION);
                // A refused question has left an error behind, which any write reports.
                ready_or_later(Pin::new(&mut self.stream).poll_write(cx, b""))?;
            } else if !self.connection.has_begun() && self.waiting.is_none() {
                let sent = Pin::new(&mut self.stream).poll_write(cx, QUESTION);
                let sent = ready_or_later(sent)?;
                if sent.is_some_and(|n| n < QUESTION.len()) {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                ended.asked = sent.is_some();
                next = REPLY_TIME;
            }
            ended.sleep.as_mut().reset(Instant::now() + next);
        }
        Poll::Ready(Ok(()))
    }
}

/// A write that would wait is none here.
fn ready_or_later<T>(progress: Poll<io::Result<T>>) -> io::Result<Option<T>> {
    match progress {
        Poll::Ready(done) => done.map(Some),
        Poll::Pending => Ok(None),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ended.is_none() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
            if buffer.filled().len() > before {
                self.connection.hear();
                return Poll::Ready(Ok(()));
            }
        }
        self.after_end(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.sent(&progress);
        self.in_time(cx, progress)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let progress = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.sent(&progress);
        self.in_time(cx, progress)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        let progress = Pin::new(&mut self.stream).poll_flush(cx);
        if progress.is_ready() {
            self.connection.rest();
        }
        self.in_time(cx, progress)
    }

    /// Ends our side. A client that is still sending would lose what we said last to a connection
    /// reset, so for a moment all that comes is read and thrown away.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.leftover.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            if this.ended.is_some() || !this.connection.is_sending() {
                return Poll::Ready(Ok(()));
            }
            this.connection.stall();
        }
        let leftover = this.leftover.get_or_insert_with(|| Leftover {
            sleep: Box::pin(sleep(UNREAD_TIME_MAX)),
            bytes: UNREAD_BYTES_MAX,
        });
        let mut scratch = [0; 16 << 10];
        while leftover.bytes > 0 && leftover.sleep.as_mut().poll(cx).is_pending() {
            let mut buffer = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {
                    leftover.bytes = leftover.bytes.saturating_sub(buffer.filled().len());
                }
                _ => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}
