//! The socket: accept, speak HTTP/1.1, and on shutdown drain, then end.
//!
//! Owns connections and their bounds. Never knows a route. The thing to know: while it drains the
//! server still answers: new requests are told 503, `/ready` says no, and what runs finishes; the
//! port closes when nothing runs any more.

use super::app::Api;
use super::http::connection::{Connection, Said};
use super::http::permits::{ConnectionPermit, ConnectionPermits};
use super::http::socket::Socket;
use super::routes;
use crate::database::FULL;
use crate::error::{Error, Result};
use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// For last bytes to leave after the engine is drained, at least; and when told to hurry.
const FLUSH_TIME: Duration = Duration::from_secs(5);
const HURRIED_TIME: Duration = Duration::from_millis(400);
/// Between two writings of what keys used: so much a crash may lose.
const BOOKS_PERIOD: Duration = Duration::from_secs(5);
/// What a connection takes in small blocks: the buffer that it is read into, and what it does.
const CONNECTION_BYTES: u64 = 16 << 10;
/// After a failed accept (no file descriptors left), before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Beyond `connections_max`, for health probes while all places are at requests; and how long such
/// a connection may last.
pub const RESERVE_PLACES: usize = 32;
const RESERVE_TIME: Duration = Duration::from_secs(5);

/// Serves until `stop` says so once, then drains for at most `drain_seconds`, or until it says so
/// again. Errors when the listener is unusable.
pub async fn serve(
    api: Arc<Api>,
    listener: TcpListener,
    mut stop: mpsc::Receiver<()>,
) -> Result<()> {
    listener.local_addr().map_err(|e| Error::fault(format!("the listener is unusable: {e}")))?;
    let mut server = Listener::new(&api, listener);
    let keeper = tokio::spawn(keep_books(api.clone()));
    let watcher = tokio::spawn(api.storage.clone().watch());
    loop {
        tokio::select! {
            Some(()) = stop.recv() => break,
            () = server.admit() => {}
        }
    }
    api.requests.draining.store(true, Ordering::Release);
    api.jobs.stop();
    let time = Duration::from_secs(api.config.drain_seconds);
    tracing::info!(connections = server.connections.len(), seconds = time.as_secs(), "draining");
    let end = Instant::now() + time;
    let hurried = {
        let mut drained = pin!(api.engine.drain(time));
        loop {
            tokio::select! {
                () = &mut drained => break false,
                Some(()) = stop.recv() => break true,
                () = server.admit() => {}
            }
        }
    };
    // Nothing runs any more, or is told now that it must not.
    api.engine.drain(Duration::ZERO).await;
    let now = Instant::now();
    server.close(if hurried { now + HURRIED_TIME } else { end.max(now + FLUSH_TIME) }).await;
    keeper.abort();
    watcher.abort();
    close_books(&api).await
}

/// Writes down what still waits for it, and says what could not be.
async fn close_books(api: &Api) -> Result<()> {
    let (storage, usage, access) = (&api.storage, &api.usage, &api.access);
    storage.try_again().await;
    let flushed = tokio::time::timeout(FLUSH_TIME, usage.flush()).await;
    let records = usage.pending();
    if flushed.is_err() || records > 0 {
        tracing::error!(records, "usage records of requests that were answered are lost");
    }
    let books = access.flush().await;
    storage.close().await;
    match books {
        Err(error) if error.code == FULL => {
            let records = access.records_late();
            tracing::error!(%error, records, "records of the audit log, and use of keys, are lost");
            Ok(())
        }
        books => books,
    }
}

/// Writes down now and then what is only counted in memory.
async fn keep_books(api: Arc<Api>) {
    loop {
        tokio::time::sleep(BOOKS_PERIOD).await;
        api.storage.writable().await;
        if let Err(error) = api.access.flush().await {
            tracing::error!(%error, "the books of keys cannot be written");
        }
        if api.requests.intake.was_busy() {
            // A failed thread leaves the pages where they are.
            let _ = tokio::task::spawn_blocking(polylora_kernels::return_free_pages).await;
        }
    }
}

/// The listener and the connections that came through it.
struct Listener {
    api: Arc<Api>,
    listener: TcpListener,
    router: Router,
    permits: Arc<ConnectionPermits>,
    reserve: Arc<ConnectionPermits>,
    connections: JoinSet<()>,
    /// Tells connections to end after what they are at.
    closing: watch::Sender<bool>,
    head_time_max: Duration,
    write_time_max: Duration,
}

impl Listener {
    fn new(api: &Arc<Api>, listener: TcpListener) -> Self {
        let config = &api.config;
        Self {
            api: api.clone(),
            listener,
            router: routes::router(api.clone()),
            permits: ConnectionPermits::new(
                config.connections_max,
                config.connections_per_address_max,
            ),
            reserve: ConnectionPermits::new(RESERVE_PLACES, RESERVE_PLACES),
            connections: JoinSet::new(),
            closing: watch::channel(false).0,
            head_time_max: config.head_time_max(),
            write_time_max: config.write_time_max(),
        }
    }

    /// Takes the next connection in, or takes note of one that ended.
    async fn admit(&mut self) {
        tokio::select! {
            Some(_) = self.connections.join_next() => {}
            accepted = self.listener.accept() => match accepted {
                Ok((stream, peer)) => self.take_in(stream, peer.ip()),
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    // Perhaps there are no file descriptors left.
                    self.permits.close_one();
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// Gives a connection its place, in the reserve if all others are at requests. One that finds
    /// no place there either is closed.
    fn take_in(&mut self, stream: TcpStream, peer: IpAddr) {
        let (permit, reserved) = match self.permits.take(peer) {
            Ok(permit) => (permit, None),
            Err(full) => match self.reserve.take(peer) {
                Ok(permit) => (permit, Some(full)),
                Err(_) => return,
            },
        };
        let Ok(local) = stream.local_addr() else { return };
        self.api.requests.intake.took(CONNECTION_BYTES);
        // Tokens are small and should leave at once.
        let _ = stream.set_nodelay(true);
        let connection = Connection::new(permit.seat.clone(), local.ip().to_canonical(), reserved);
        let socket = Socket::new(stream, connection.clone(), self.write_time_max);
        let mut http = http1::Builder::new();
        let head_time_max = if reserved.is_some() { RESERVE_TIME } else { self.head_time_max };
        http.timer(TokioTimer::new()).header_read_timeout(head_time_max);
        http.keep_alive(reserved.is_none());
        let (router, closed) = (self.router.clone(), self.closing.subscribe());
        let talk = converse(http, socket, connection, router, closed, permit);
        self.connections.spawn(async move {
            match reserved {
                None => talk.await,
                Some(_) => drop(tokio::time::timeout(RESERVE_TIME, talk).await),
            }
        });
    }

    /// Takes nobody in any more; answers under way leave until `end`, then what is left is cut.
    async fn close(self, end: Instant) {
        let Self { listener, mut connections, closing, .. } = self;
        drop(listener);
        closing.send_replace(true);
        let flushed = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout_at(end, flushed).await.is_err() {
            tracing::warn!("connections cut after draining");
        }
        connections.shutdown().await;
    }
}

/// One connection, until it ends, the server does, or its place is given to another one.
async fn converse(
    http: http1::Builder,
    socket: Socket<TcpStream>,
    connection: Arc<Connection>,
    router: Router,
    mut closed: watch::Receiver<bool>,
    mut permit: ConnectionPermit,
) {
    let router = TowerToHyperService::new(router);
    let asked = connection.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        let exchange = asked.ask(&request);
        request.extensions_mut().insert(asked.clone());
        let answer = router.call(request);
        async move {
            answer.await.map(|response| response.map(|body| Said { body, _exchange: exchange }))
        }
    });
    let mut served = pin!(http.serve_connection(TokioIo::new(socket), service));
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = async { drop(closed.wait_for(|closed| *closed).await) } => {
            served.as_mut().graceful_shutdown();
            served.await
        }
        _ = &mut permit.lost => {
            // A request that was admitted while this was decided is answered.
            if !connection.is_busy() {
                return;
            }
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended early");
    }
}
