//! What several commands do alike: run a future to its end, refuse an argument.
//!
//! Owns these two. Never prints.

use crate::error::{Error, Result};
use std::future::Future;

/// An argument that clap alone cannot check.
pub fn bad_argument(message: impl Into<String>) -> Error {
    Error::invalid("invalid_arguments", message)
}

/// Runs a client's future to its end; clients need one thread and leave the cores to the server.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::fault(format!("cannot start the runtime: {e}")))?
        .block_on(future)
}
