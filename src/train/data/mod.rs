//! A file of training data to ids and weights.
//!
//! Owns the formats, which tokens are learnt, and what is refused, by line. Never knows HTTP, the
//! registry or a path: it reads bytes. The thing to know: reading is plain work for a thread of its
//! own, and ends between two renderings once its caller says that it is over.

mod borders;
mod digests;
mod encode;
mod examples;
mod form;
mod lines;
mod preview;
mod problems;
mod reading;
mod split;
mod walk;

pub use digests::{Digest, digest, digest_of, shared};
pub use examples::Examples;
pub use form::Kind;
pub use preview::{Preview, Span};
pub use reading::{Counts, Dataset, Reading};
pub use walk::{Checked, Limits, check};
