//! A connection as its requests see it: where it came in, and what it is at.
//!
//! Owns the few facts that the socket below and the routes above tell each other. Never reads or
//! writes. The thing to know: both run on the connection's own task, so the order in which they say
//! something is the order in which it happened.

use super::permits::{Full, Seat};
use bytes::Bytes;
use futures::task::AtomicWaker;
use http::{Request, Version};
use hyper::body::{Body, Frame, SizeHint};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context as TaskContext, Poll};

/// One connection.
pub struct Connection {
    seat: Seat,
    /// The address that the client connected to.
    pub local: IpAddr,
    /// Why it has only a place of the reserve, if it has.
    pub reserved: Option<Full>,
    /// A request is under way: its head came, its answer is not over.
    asking: AtomicBool,
    /// Its route waits for more of its body.
    wanting: AtomicBool,
    /// It was admitted.
    admitted: AtomicBool,
    /// Its client leaves bytes of the answer unread.
    stalled: AtomicBool,
    /// Bytes of its answer were sent.
    begun: AtomicBool,
    /// It is HTTP/1.1, so it may be sent an interim answer.
    modern: AtomicBool,
    /// Bytes came that no request has taken yet.
    heard: AtomicBool,
    /// An answer leaves while its request's body is not read.
    unread: AtomicBool,
    /// Woken when an answer is over.
    over: AtomicWaker,
}

impl Connection {
    pub fn new(seat: Seat, local: IpAddr, reserved: Option<Full>) -> Arc<Self> {
        Arc::new(Self {
            seat,
            local,
            reserved,
            asking: AtomicBool::new(false),
            wanting: AtomicBool::new(false),
            admitted: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            modern: AtomicBool::new(false),
            heard: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            over: AtomicWaker::new(),
        })
    }

    /// A head came. The exchange lasts until its answer is over.
    pub fn ask<B: Body>(self: &Arc<Self>, request: &Request<B>) -> Exchange {
        self.begun.store(false, Relaxed);
        self.admitted.store(false, Relaxed);
        self.modern.store(request.version() == Version::HTTP_11, Relaxed);
        self.asking.store(true, Relaxed);
        self.heard.store(false, Relaxed);
        self.wanting.store(false, Relaxed);
        self.seat.free();
        Exchange { connection: self.clone() }
    }

    /// The request may be answered: from here on its connection is not closed for another one.
    pub fn admit(&self) {
        self.admitted.store(true, Relaxed);
        self.seat.hold();
    }

    /// Whether it is at a request that may be answered, of a client that has sent all that is
    /// wanted now and takes the answer.
    pub fn is_busy(&self) -> bool {
        let waits = self.stalled.load(Relaxed) || self.wanting.load(Relaxed);
        self.admitted.load(Relaxed) && !waits
    }

    /// The client makes us wait.
    pub fn stall(&self) {
        self.stalled.store(true, Relaxed);
        self.seat.free();
    }

    /// It does not any more.
    pub fn go_on(&self) {
        self.stalled.store(false, Relaxed);
        self.hold_if_busy();
    }

    fn hold_if_busy(&self) {
        if self.is_asking() && self.is_busy() {
            self.seat.hold();
        }
    }

    /// All that was said is sent. After an answer the connection waits for the next request, and
    /// may be closed for another one.
    pub fn rest(&self) {
        if !self.is_asking() && self.admitted.swap(false, Relaxed) {
            self.seat.free();
        }
    }

    /// The request's body was read to its end. Its answer is not begun, whatever was sent to have
    /// the body come.
    pub fn read_whole(&self) {
        self.begun.store(false, Relaxed);
        self.heard.store(false, Relaxed);
    }

    /// The answer leaves without it.
    pub fn leave_unread(&self) {
        self.unread.store(true, Relaxed);
    }

    /// Whether more of the request's body is waited for: as long as it is, the connection may be
    /// closed for another one.
    pub fn want(&self, more: bool) {
        self.wanting.store(more, Relaxed);
        if more {
            self.seat.free();
        } else {
            self.hold_if_busy();
        }
    }

    pub fn is_wanting(&self) -> bool {
        self.wanting.load(Relaxed)
    }

    pub fn hear(&self) {
        self.heard.store(true, Relaxed);
    }

    pub fn begin(&self) {
        self.begun.store(true, Relaxed);
    }

    pub fn has_begun(&self) -> bool {
        self.begun.load(Relaxed)
    }

    pub fn is_modern(&self) -> bool {
        self.modern.load(Relaxed)
    }

    /// Whether a client that ends its side now may still wait for an answer. If so, `cx` is woken
    /// when that is over.
    pub fn awaits_answer(&self, cx: &TaskContext<'_>) -> bool {
        self.over.register(cx.waker());
        self.is_asking()
    }

    /// Whether the client may still be sending what nobody will read.
    pub fn is_sending(&self) -> bool {
        let heard = !self.asking.load(Relaxed) && self.heard.load(Relaxed);
        self.unread.load(Relaxed) || heard
    }

    fn is_asking(&self) -> bool {
        self.asking.load(Relaxed)
    }
}

/// A request and its answer, under way on a connection.
pub struct Exchange {
    connection: Arc<Connection>,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.connection.asking.store(false, Relaxed);
        self.connection.seat.free();
        self.connection.over.wake();
    }
}

/// The body of an answer: with it the exchange ends.
pub struct Said {
    pub body: axum::body::Body,
    pub _exchange: Exchange,
}

impl Body for Said {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
