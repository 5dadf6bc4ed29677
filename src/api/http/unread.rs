//! Bodies that nobody reads to their end: an answer that is ready early.
//!
//! Owns what becomes of the rest of such a body. Never looks at bytes. The thing to know: a short
//! rest is read, so that the connection can go on; a long one makes the answer say `connection:
//! close`, and the socket reads on for a moment, so that a client that still sends sees it.

use super::connection::Connection;
use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use futures::StreamExt;
use http::header::EXPECT;
use hyper::body::{Body as _, Frame, SizeHint};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;
use tokio::sync::oneshot;

/// A rest that is read before the answer leaves.
const REST_BYTES_MAX: usize = 256 << 10;
const REST_TIME_MAX: Duration = Duration::from_millis(100);

/// A request's body in the hands of its route; what is not read of it comes back when it is
/// dropped.
struct Lent {
    body: Option<Body>,
    back: Option<oneshot::Sender<Rest>>,
    /// The client waits with the body until somebody wants it, or it is broken off.
    beyond: bool,
    connection: Option<Arc<Connection>>,
}

enum Rest {
    Nothing,
    Of(Body),
    /// It cannot be read, or its client was never asked for it and need not send it.
    Beyond,
}

/// The other end of a lent body, if there is a body.
pub struct Loan(Option<oneshot::Receiver<Rest>>);

/// Lends the body out.
pub fn lend(request: Request, connection: Option<Arc<Connection>>) -> (Request, Loan) {
    if request.body().is_end_stream() {
        return (request, Loan(None));
    }
    let (back, rest) = oneshot::channel();
    let beyond = request.headers().contains_key(EXPECT);
    let lend = |body| Body::new(Lent { body: Some(body), back: Some(back), beyond, connection });
    (request.map(lend), Loan(Some(rest)))
}

impl Loan {
    /// Once there is an answer: whether the body was read to its end, or is now.
    pub async fn settled(self) -> bool {
        let Some(mut rest) = self.0 else { return true };
        let body = match rest.try_recv() {
            Ok(Rest::Nothing) => return true,
            Ok(Rest::Of(body)) => body,
            // The answer may hold it still: then the connection ends with the answer.
            Ok(Rest::Beyond) | Err(_) => return false,
        };
        if body.size_hint().lower() > REST_BYTES_MAX as u64 {
            return false;
        }
        let mut chunks = body.into_data_stream();
        let reading = async {
            let mut left = REST_BYTES_MAX;
            loop {
                match chunks.next().await {
                    None => return true,
                    Some(Ok(chunk)) if chunk.len() <= left => left -= chunk.len(),
                    Some(_) => return false,
                }
            }
        };
        tokio::time::timeout(REST_TIME_MAX, reading).await.unwrap_or(false)
    }
}

impl Lent {
    fn end(&mut self) {
        self.body = None;
        if let Some(connection) = &self.connection {
            connection.read_whole();
        }
    }
}

impl hyper::body::Body for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        this.beyond = false;
        let progress = Pin::new(&mut *body).poll_frame(cx);
        if let Some(connection) = &this.connection {
            connection.want(progress.is_pending());
        }
        let frame = ready!(progress);
        match &frame {
            Some(Err(_)) => this.beyond = true,
            Some(Ok(_)) if !body.is_end_stream() => {}
            _ => this.end(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), |body| body.size_hint())
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let rest = match self.body.take() {
            None => Rest::Nothing,
            Some(_) if self.beyond => Rest::Beyond,
            Some(body) => Rest::Of(body),
        };
        if let Some(connection) = &self.connection {
            connection.want(false);
        }
        if let Some(back) = self.back.take() {
            // Nobody waits for it when the client is gone.
            let _ = back.send(rest);
        }
    }
}
