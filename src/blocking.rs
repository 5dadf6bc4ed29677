//! Work that blocks, off the async threads.
//!
//! Owns the one way there. Never bounds it: whoever calls has taken a place.

use crate::error::{Error, Result};

/// Runs blocking work off the async threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(Error::fault(format!("a task failed: {e}"))))
}
