//! The socket: accept, speak HTTP/1.1, and on shutdown drain, then end.
//!
//! Owns connections and their bounds. Never knows a route. The thing to know: while it drains the
//! server still answers: new requests are told 503, `/ready` says no, and what runs finishes; the
//! port closes when nothing runs any more.

use super::socket::Socket;
use super::{Api, App, routes};
use crate::error::{Error, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// For last bytes to leave after the engine is drained, at least; and when told to hurry.
const FLUSH_TIME: Duration = Duration::from_secs(5);
const HURRIED_TIME: Duration = Duration::from_millis(400);
/// Between two writings of what keys used: so much a crash may lose.
const BOOKS_PERIOD: Duration = Duration::from_secs(5);
/// After a failed accept (no file descriptors left), before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` says so once, then drains for at most `drain_seconds`, or until it says so
/// again. Errors when the listener is unusable.
pub async fn serve(app: App, listener: TcpListener, mut stop: mpsc::Receiver<()>) -> Result<()> {
    listener.local_addr().map_err(|e| Error::fault(format!("the listener is unusable: {e}")))?;
    let api = Arc::new(Api::new(app));
    let mut door = Door::new(&api, listener);
    let keeper = tokio::spawn(keep_books(api.clone()));
    loop {
        tokio::select! {
            Some(()) = stop.recv() => break,
            () = door.admit() => {}
        }
    }
    api.draining.store(true, Ordering::Release);
    api.app.jobs.stop();
    let time = Duration::from_secs(api.app.config.drain_seconds);
    tracing::info!(connections = door.connections.len(), seconds = time.as_secs(), "draining");
    let end = Instant::now() + time;
    let hurried = {
        let mut drained = pin!(api.app.engine.drain(time));
        loop {
            tokio::select! {
                () = &mut drained => break false,
                Some(()) = stop.recv() => break true,
                () = door.admit() => {}
            }
        }
    };
    // Nothing runs any more, or is told now that it must not.
    api.app.engine.drain(Duration::ZERO).await;
    let now = Instant::now();
    door.close(if hurried { now + HURRIED_TIME } else { end.max(now + FLUSH_TIME) }).await;
    keeper.abort();
    if tokio::time::timeout(FLUSH_TIME, api.app.usage.flush()).await.is_err() {
        tracing::error!("usage records were not committed in time");
    }
    api.app.access.flush().await
}

/// Writes down now and then what is only counted in memory.
async fn keep_books(api: Arc<Api>) {
    loop {
        tokio::time::sleep(BOOKS_PERIOD).await;
        if let Err(error) = api.app.access.flush().await {
            tracing::error!(%error, "the books of keys cannot be written");
        }
        if api.intake.was_busy() {
            // A failed thread leaves the pages where they are.
            let _ = tokio::task::spawn_blocking(polylora_kernels::return_free_pages).await;
        }
    }
}

/// The listener and the connections that came through it.
struct Door {
    listener: TcpListener,
    router: Router,
    places: Arc<Semaphore>,
    connections: JoinSet<()>,
    /// Tells connections to end after what they are at.
    closing: watch::Sender<bool>,
    head_time_max: Duration,
    write_time_max: Duration,
}

impl Door {
    fn new(api: &Arc<Api>, listener: TcpListener) -> Self {
        let config = &api.app.config;
        Self {
            listener,
            router: routes::router(api.clone()),
            places: Arc::new(Semaphore::new(config.connections_max.max(1))),
            connections: JoinSet::new(),
            closing: watch::channel(false).0,
            head_time_max: Duration::from_secs(config.head_seconds_max),
            write_time_max: Duration::from_secs(config.write_seconds_max),
        }
    }

    /// Takes the next connection in, or takes note of one that ended.
    async fn admit(&mut self) {
        tokio::select! {
            Some(_) = self.connections.join_next() => {}
            (stream, permit) = accept(&self.listener, &self.places) => {
                // Tokens are small and should leave at once.
                let _ = stream.set_nodelay(true);
                let mut http = http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(self.head_time_max);
                let socket = Socket::new(stream, self.write_time_max);
                let (router, closed) = (self.router.clone(), self.closing.subscribe());
                self.connections.spawn(converse(http, socket, router, closed, permit));
            }
        }
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

/// The next connection, once there is a place for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> (TcpStream, OwnedSemaphorePermit) {
    loop {
        let permit = places.clone().acquire_owned().await;
        let permit = permit.expect("the places are never closed");
        match listener.accept().await {
            Ok((stream, _)) => return (stream, permit),
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, until it ends or the server does.
async fn converse(
    http: http1::Builder,
    socket: Socket<TcpStream>,
    router: Router,
    mut closed: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
) {
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(http.serve_connection(TokioIo::new(socket), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = async { drop(closed.wait_for(|closed| *closed).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended early");
    }
}
