//! An optimizer step, done by the engine's thread when requests leave it time.
//!
//! Owns the way of a trainer to that thread and back. Never computes. The thing to know: the engine
//! has the trainer only for one step, so jobs take turns between steps; one that is told to stop is
//! dropped before its next piece.

use crate::engine::{Background, EngineHandle, shutting_down};
use crate::error::{Error, Result};
use crate::train::{Advance, StepReport, Trainer};
use polylora_kernels::Device;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// The time after which it looks again whether the step is still wanted.
const LOOK_TIME: Duration = Duration::from_millis(20);

/// A trainer after a step, and what the step was; `None`: there was none left.
type Stepped = (Box<Trainer>, Option<Box<StepReport>>);

/// See the file's head.
struct Quantum {
    trainer: Option<Box<Trainer>>,
    unwanted: Arc<AtomicBool>,
    reply: Sender<Result<Stepped>>,
}

/// A trainer that is to be made, on the device that it will run on.
struct Start<F> {
    make: Option<F>,
    reply: Sender<Result<Trainer>>,
}

impl<F: FnOnce(&Device) -> Result<Trainer> + Send> Background for Start<F> {
    fn advance(&mut self, device: &Device) -> bool {
        if let Some(make) = self.make.take() {
            // Whoever waits no longer has ended the job.
            let _ = self.reply.send(make(device));
        }
        false
    }
}

impl Background for Quantum {
    fn advance(&mut self, device: &Device) -> bool {
        let Some(mut trainer) = self.trainer.take() else { return false };
        if self.unwanted.load(Ordering::Acquire) {
            return false;
        }
        let stepped = match trainer.advance(device) {
            Ok(Advance::Running) => {
                self.trainer = Some(trainer);
                return true;
            }
            Ok(Advance::Stepped(report)) => Ok((trainer, Some(report))),
            Ok(Advance::Done) => Ok((trainer, None)),
            Err(error) => Err(error),
        };
        // Whoever waits no longer has ended the job.
        let _ = self.reply.send(stepped);
        false
    }
}

/// Makes a trainer. Blocking. `None` when `over` says before that it is not wanted. Errors: those
/// of `make`; `shutting_down`.
pub fn start(
    engine: &EngineHandle,
    make: impl FnOnce(&Device) -> Result<Trainer> + Send + 'static,
    over: &dyn Fn() -> bool,
) -> Result<Option<Trainer>> {
    let (reply, replies) = channel();
    engine.background(Box::new(Start { make: Some(make), reply }))?;
    wait(&replies, over)
}

/// Runs the trainer's next optimizer step on the engine's thread. Blocking. `None` when `over` says
/// before the end that it is not wanted. Errors: the trainer's; `shutting_down`.
pub fn run(
    engine: &EngineHandle,
    trainer: Box<Trainer>,
    over: &dyn Fn() -> bool,
) -> Result<Option<Stepped>> {
    let (reply, replies) = channel();
    let unwanted = Arc::new(AtomicBool::new(false));
    let quantum = Quantum { trainer: Some(trainer), unwanted: unwanted.clone(), reply };
    engine.background(Box::new(quantum))?;
    let stepped = wait(&replies, over)?;
    unwanted.store(stepped.is_none(), Ordering::Release);
    Ok(stepped)
}

/// What the engine's thread answers, unless it is `over` before.
fn wait<T>(replies: &Receiver<Result<T>>, over: &dyn Fn() -> bool) -> Result<Option<T>> {
    loop {
        match replies.recv_timeout(LOOK_TIME) {
            Ok(answer) => return answer.map(Some),
            // It was dropped unfinished: the engine ends, or a piece of it panicked.
            Err(RecvTimeoutError::Disconnected) if over() => return Err(shutting_down()),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::fault("a piece of the training job failed"));
            }
            Err(RecvTimeoutError::Timeout) if over() => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
