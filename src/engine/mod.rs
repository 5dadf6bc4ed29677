//! The engine: one thread that turns tokens into tokens. Plan, run, commit.
//!
//! Owns the model, the KV cache, the bank and every sequence. Never waits on a client, a file or a
//! lock held elsewhere, and knows no text. The thing to know: others hold an `EngineHandle` and an
//! `EventStream`; all else is this thread's alone.

pub mod background;
pub mod batch;
pub mod command;
pub mod handle;
pub mod options;
pub mod pages;
pub mod probe;
pub mod queue;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod step;

pub use background::Background;
pub use handle::EngineHandle;
pub use options::EngineOptions;
pub use queue::shutting_down;
pub use request::{Admission, Event, EventStream, Request, Sampling, TokenEvent};
