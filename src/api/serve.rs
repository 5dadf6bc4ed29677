//! The socket: accept, speak HTTP/1.1, and on shutdown stop accepting, drain, end.
//!
//! Owns connections and their bounds. Never knows a route. The thing to know: shutting down is one
//! direction only: the listener closes first, running requests finish, then what is left is cut.

use super::{Api, App, routes};
use crate::error::{Error, Result};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

/// For the head of a request, from the first byte of the connection or the end of the last answer.
const HEAD_TIME_MAX: Duration = Duration::from_secs(60);
/// For last bytes to leave after the engine is drained.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(5);
/// Between two writings of what keys used: so much a crash may lose.
const BOOKS_PERIOD: Duration = Duration::from_secs(5);
/// After a failed accept (no file descriptors left), before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown` resolves, then drains for at most `drain_seconds`. Errors when the
/// listener is unusable.
pub async fn serve(
    app: App,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    listener.local_addr().map_err(|e| Error::fault(format!("the listener is unusable: {e}")))?;
    let api = Arc::new(Api::new(app));
    let router = routes::router(api.clone());
    let places = Arc::new(Semaphore::new(api.app.config.connections_max.max(1)));
    let (closing, closed) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    let keeper = tokio::spawn(keep_books(api.clone()));
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            (stream, permit) = accept(&listener, &places) => {
                connections.spawn(converse(stream, router.clone(), closed.clone(), permit));
            }
        }
    }
    api.draining.store(true, Ordering::Release);
    drop(listener);
    let _ = closing.send(true);
    let seconds = api.app.config.drain_seconds;
    tracing::info!(connections = connections.len(), seconds, "draining");
    api.app.engine.drain(Duration::from_secs(seconds)).await;
    let flushed = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(FLUSH_TIME_MAX, flushed).await.is_err() {
        tracing::warn!("connections cut after draining");
    }
    keeper.abort();
    api.app.access.flush().await
}

/// Writes down now and then what is only counted in memory.
async fn keep_books(api: Arc<Api>) {
    loop {
        tokio::time::sleep(BOOKS_PERIOD).await;
        if let Err(error) = api.app.access.flush().await {
            tracing::error!(%error, "the books of keys cannot be written");
        }
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
    stream: TcpStream,
    router: Router,
    mut closed: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
) {
    // Tokens are small and should leave at once.
    let _ = stream.set_nodelay(true);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME_MAX);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
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
