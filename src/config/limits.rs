//! Limits that nobody sets: constants, each with the reason for its value.
//!
//! Owns the values, on one page. Never applies them. The thing to know: whatever an operator must
//! turn is a row of `settings.rs` instead.

use super::size::MIB;
use std::time::Duration;

/// Answers to one request (`n`). Each takes a place in the queue; whoever wants more asks again.
pub const CHOICES_MAX: usize = 16;
/// Stop strings, and stop tokens, of one request. OpenAI allows 4 strings. Each is looked for in
/// every piece of text.
pub const STOPS_MAX: usize = 16;
/// Messages of one chat request: longer than any conversation within a context, short enough for a
/// template that loops over them.
pub const MESSAGES_MAX: usize = 1024;
/// Entries of `logit_bias`. Each is applied at every token.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// Uploads received at once. Four keep a disk busy; they may take `upload_bytes_max` of it each
/// while they come. Whoever is told 429 tries again.
pub const UPLOADS_MAX: usize = 4;
/// Merges that wait or run. Two compute by turns, so more would only wait longer. A tenant may fill
/// half of the queue.
pub const MERGES_MAX: usize = 16;
/// Finished merges that are listed. A report has some kilobytes; the adapters that were made stay.
pub const MERGES_KEPT: usize = 100;
/// Bytes of a file to train on, as OpenAI's: a hundred thousand long conversations.
pub const FILE_BYTES_MAX: u64 = 512 * MIB;
/// Files that are kept, which is one full page of a list. A tenant has as many as it leaves free.
pub const FILES_MAX: u64 = 10_000;
/// Files on their way in parts. Each lasts an hour at most, and a client has one or two.
pub const FILE_UPLOADS_MAX: u64 = 64;

/// Usage records are gathered so long for one commit, and a crash loses at most these. Ten commits
/// a second are little for any disk.
pub const USAGE_COMMIT_TIME: Duration = Duration::from_millis(100);

/// Tokens that a tenant, or an adapter, may get ahead of another one that waits: two steps' rows. A
/// turn shorter than a step would be none.
pub(super) const QUANTUM_TOKENS_MIN: usize = 512;
pub(super) const QUANTUM_STEPS: usize = 2;
/// Prompt tokens that wait, for each place in the queue: long prompts fill it sooner than short
/// ones, and 512 Ki tokens (2 MiB) are held by any machine.
pub(super) const WAITING_TOKENS_MIN: usize = 524_288;
pub(super) const WAITING_TOKENS_EACH: usize = 2048;
/// Unread events of a stream. A reader that is a thousand tokens behind does not read; one step can
/// bring an event for each row.
pub(super) const STREAM_EVENTS_MIN: usize = 1024;
/// A body holds a context's text, escaped, and what is around it.
pub(super) const BODY_BYTES_MIN: u64 = 4 * MIB;
pub(super) const BODY_BYTES_TOKEN: u64 = 16;
/// A server is stalled when no step ends for this part of what a whole request may take, but a step
/// on a slow machine has ten seconds.
pub(super) const STALL_PART: u64 = 10;
pub(super) const STALL_SECONDS_MIN: u64 = 10;
