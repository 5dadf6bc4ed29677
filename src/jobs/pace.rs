//! Work that gives way: on a thread of its own that the machine runs last, and that rests while
//! requests are served.
//!
//! Owns when such threads compute: one at a time, who has computed least first. Never decides what.
//! The thing to know: while the engine is idle they go on without a pause; while it is busy each
//! rests `REST` times as long as it worked, and as long again for each of the others, and since
//! they are also of the lowest priority, the share of all is small but never nothing.

use super::desk::Desk;
use crate::blocking::on_own_thread;
use crate::engine::EngineHandle;
use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Rest for each second of work while requests run.
/// A hundred would leave one step in a hundred beside a site that is being merged, which is just
/// what a 99th percentile sees.
pub const REST: u32 = 150;
/// Longest rest at once of one alone.
const REST_TIME_MAX: Duration = Duration::from_secs(60);
/// The time after which it looks again whether the engine is idle.
const LOOK_TIME: Duration = Duration::from_millis(10);

/// What a thread that gives way asks between two pieces of its work. Cheap to clone.
#[derive(Clone)]
pub struct Pace {
    engine: EngineHandle,
    stopping: Arc<AtomicBool>,
    desk: Arc<Desk>,
}

/// A job or a survey under way, until dropped.
pub struct Active {
    desk: Arc<Desk>,
    tenant: String,
}

impl Drop for Active {
    fn drop(&mut self) {
        self.desk.leave(&self.tenant);
    }
}

impl Pace {
    /// `stopping` turns true when nothing more is to be begun.
    pub fn new(engine: EngineHandle, stopping: Arc<AtomicBool>) -> Self {
        Self { engine, stopping, desk: Arc::default() }
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Counts one more of the tenant's among those under way.
    pub fn enter(&self, tenant: &str) -> Active {
        self.desk.enter(tenant);
        Active { desk: self.desk.clone(), tenant: tenant.to_owned() }
    }

    /// Computes once it is the tenant's turn; also says how long that took. Blocking.
    pub fn compute<T>(&self, tenant: &str, work: impl FnOnce() -> T) -> (T, Duration) {
        self.desk.compute(tenant, work)
    }

    /// Whether a rest that began then, `times` as long as the work, is not over: it is due only
    /// while requests run.
    fn due(&self, begun: Instant, worked: Duration, times: u32) -> bool {
        let rest = (worked * times).min(REST_TIME_MAX) * self.desk.jobs().max(1);
        !self.engine.is_idle() && !self.is_stopping() && begun.elapsed() < rest
    }

    /// Rests a thread after it worked for so long.
    pub fn rest(&self, worked: Duration) {
        let begun = Instant::now();
        while self.due(begun, worked, REST) {
            std::thread::sleep(LOOK_TIME);
        }
    }

    /// Rests a task, `times` as long as it worked.
    pub async fn rest_task(&self, worked: Duration, times: u32) {
        let begun = Instant::now();
        while self.due(begun, worked, times) {
            tokio::time::sleep(LOOK_TIME).await;
        }
    }
}

/// Runs `work` on a thread of its own, of the lowest priority; so are the threads that it starts.
pub async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let give_way = || {
        #[cfg(target_os = "linux")] // where a thread has a priority of its own
        if let Err(error) = rustix::process::nice(19) {
            tracing::warn!(%error, "the merging thread keeps its priority");
        }
    };
    let done = on_own_thread("merge", give_way, work).await;
    done.unwrap_or_else(|e| Err(Error::fault(format!("the merging thread did not start: {e}"))))
}
