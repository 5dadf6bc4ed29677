//! A server out of a configuration: what is made in which order, what memory it takes, its log.
//!
//! Owns a start and the end. Never reads arguments: `cli` does. The thing to know: everything that
//! can be refused is refused before the port opens.

mod adapters;
mod assemble;
mod banner;
mod dtypes;
mod ledger;
mod listen;
mod log;
#[cfg(feature = "otel")]
mod otel;
mod progress;

pub use assemble::assemble;
pub use listen::serve;
