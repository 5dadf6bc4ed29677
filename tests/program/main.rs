//! The real program as its users meet it: over HTTP, and at the command line.

mod api;
mod cli;
