//! The targets' bodies, for the targets.

mod shared;
#[path = "../common/tiny.rs"]
pub mod tiny;

pub use shared::bodies;
