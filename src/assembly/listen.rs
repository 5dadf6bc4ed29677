//! From a whole server to one that listens: descriptors, threads, port, signals.
//!
//! Owns the process's side of a start and of its end. Never answers a request: `api` does.

use super::assemble::assemble;
use super::banner::Banner;
use super::log;
use crate::api::{self, Api};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::terminal::say;
use polylora_kernels::DeviceChoice;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpSocket, lookup_host};
use tokio::sync::mpsc;

/// File descriptors for everything but `connections_max`: databases, uploads, blobs being read,
/// pipes to templates, the reserve of connections.
const OTHER_FILES: usize = 160;

/// Connections that wait to be accepted; the system may hold it down. With fewer, a flood of new
/// ones makes others try again after a second.
const BACKLOG: u32 = 4096;

/// Threads for files and for work that blocks, each with two megabytes of stack. What clients cause
/// has places of its own, which are fewer.
const BLOCKING_THREADS_MAX: usize = 64;

/// Serves as `config` says, until it is told to stop.
pub fn serve(mut config: Config) -> Result<()> {
    polylora_kernels::return_large_blocks();
    let _log = log::start(&config)?;
    fit_descriptors(&mut config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2) // the engine's threads compute; these only move bytes and text
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()
        .map_err(|e| Error::fault(format!("cannot start the runtime: {e}")))?;
    runtime.block_on(async {
        let (api, storage) = assemble(config).await?;
        listen(api, &storage).await
    })
}

/// Lets the process open as many files as it may, and no more connections than these allow: one
/// that cannot be accepted would wait in the listener's backlog, health probes too.
fn fit_descriptors(config: &mut Config) {
    let Ok(files) = rlimit::increase_nofile_limit(u64::MAX) else { return };
    let connections = usize::try_from(files).unwrap_or(usize::MAX).saturating_sub(OTHER_FILES);
    let connections = connections.max(8);
    if connections < config.connections_max {
        tracing::warn!(
            files,
            asked = config.connections_max,
            connections,
            "connections_max is lowered: the process may not open more files"
        );
        config.connections_max = connections;
        let of_address = &mut config.connections_per_address_max;
        *of_address = (*of_address).min(connections);
    }
}

/// Opens the port, says so, and serves until told to stop.
async fn listen(api: Api, storage: &str) -> Result<()> {
    let listener = bind(&api.config).await?;
    let address =
        listener.local_addr().map_err(|e| Error::fault(format!("cannot tell the address: {e}")))?;
    // What `auto` passed over; a driver that cannot say is none to use.
    let gpus = match api.config.device {
        DeviceChoice::Auto => polylora_kernels::gpus().unwrap_or_default(),
        _ => Vec::new(),
    };
    let banner = Banner {
        url: &format!("http://{address}"),
        base: &api.base_name,
        device: &api.device,
        gpus: &gpus,
        storage,
        context: api.context,
        adapters: &api.registry.list(),
        program: &std::env::args().next().unwrap_or_else(|| "polylora".to_owned()),
        locked: api.access.required(),
    };
    say(&banner.page());
    api::serve(Arc::new(api), listener, told_to_stop()?).await
}

async fn bind(config: &Config) -> Result<TcpListener> {
    let (host, port) = (config.host.as_str(), config.port);
    listener(host, port).await.map_err(|e| {
        let message =
            format!("cannot listen on {host}:{port}: {e}; choose another --port or --host");
        Error::new(Kind::Unavailable, "port_unavailable", message)
    })
}

/// The first address of `host` that can be had.
async fn listener(host: &str, port: u16) -> std::io::Result<TcpListener> {
    let mut failure = std::io::Error::other("it has no address");
    for address in lookup_host((host, port)).await? {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // As a listener of std's does: a restart need not wait for old connections to be forgotten.
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(e) => failure = e,
        }
    }
    Err(failure)
}

/// Says so at each SIGTERM and Ctrl-C. The program listens for them when this returns.
fn told_to_stop() -> Result<mpsc::Receiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |e| Error::fault(format!("cannot wait for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let (told, stop) = mpsc::channel(2);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to stop: running requests may finish, unless told again");
            if told.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(stop)
}
