//! Work that blocks, off the async threads.
//!
//! Owns the two ways there. Never bounds them: whoever calls has taken a permit.

use crate::error::{Error, Result};
use std::io;
use tokio::sync::oneshot;
use tracing::Span;

/// Runs blocking work off the async threads.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(Error::fault(format!("a task failed: {e}"))))
}

/// Runs work on a thread of its own, in the caller's span. `give_way` is the first thing it does:
/// it says how the machine is to run the thread, and those that it starts. Errors: there is no
/// thread to be had.
pub async fn on_own_thread<T: Send + 'static>(
    name: &'static str,
    give_way: fn(),
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> io::Result<Result<T>> {
    let (done, outcome) = oneshot::channel();
    let span = Span::current();
    let body = move || {
        span.in_scope(|| {
            give_way();
            // Nobody waits any more: the work was done for nobody.
            let _ = done.send(work());
        });
    };
    std::thread::Builder::new().name(name.into()).spawn(body)?;
    let panicked = |_| Err(Error::fault(format!("the thread `{name}` panicked")));
    Ok(outcome.await.unwrap_or_else(panicked))
}
