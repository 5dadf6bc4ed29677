//! Limits that nobody sets: constants, each with the reason for its value, and what follows from
//! settings.
//!
//! Owns the values, on one page. Never applies them. The thing to know: whatever an operator must
//! turn is a row of `settings.rs` instead.

use super::settings::Config;
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

/// Usage records are gathered so long for one commit, and a crash loses at most these. Ten commits
/// a second are little for any disk.
pub const USAGE_COMMIT_TIME: Duration = Duration::from_millis(100);

/// Tokens that a tenant, or an adapter, may get ahead of another one that waits: two steps' rows. A
/// turn shorter than a step would be none.
pub(super) const TURN_TOKENS_MIN: usize = 512;
pub(super) const TURN_STEPS: usize = 2;
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

impl Config {
    /// What a tenant, or an adapter, may get ahead of another one that waits.
    pub fn turn_tokens(&self) -> usize {
        TURN_TOKENS_MIN.max(TURN_STEPS * self.rows_max)
    }

    /// Prompt tokens of waiting sequences together; at least one prompt as long as the context.
    pub fn waiting_tokens_max(&self, context: usize) -> usize {
        WAITING_TOKENS_MIN.max(WAITING_TOKENS_EACH * self.waiting_max).max(context)
    }

    /// Unread events of one stream; a reader that is further behind loses its stream.
    pub fn stream_events_max(&self) -> usize {
        STREAM_EVENTS_MIN.max(self.rows_max)
    }

    /// A request for an adapter that has no room waits so long, and then gets 507: half of what it
    /// may wait for its first step.
    pub fn adapter_wait_max(&self) -> Duration {
        Duration::from_secs(self.queue_seconds_max) / 2
    }

    /// Of a request that is no upload; `request_bytes_max` may allow less.
    pub fn body_bytes_max(&self, context: usize) -> u64 {
        BODY_BYTES_MIN.max(BODY_BYTES_TOKEN * context as u64)
    }

    /// For the head of a request.
    pub fn head_time_max(&self) -> Duration {
        Duration::from_secs(self.body_seconds_max)
    }

    /// For bytes of an answer that the client does not read. Longer than for a body: a reader that
    /// thinks about what it read is no attacker.
    pub fn write_time_max(&self) -> Duration {
        2 * Duration::from_secs(self.body_seconds_max)
    }

    /// Without a finished step while there is work, /live says stalled.
    pub fn stall_time_max(&self) -> Duration {
        Duration::from_secs((self.request_seconds_max / STALL_PART).max(STALL_SECONDS_MIN))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Given;
    use super::*;

    /// What was in force when each of these was a setting.
    #[test]
    fn what_follows_is_by_default_what_it_was_as_a_setting() {
        let config = Config::load(None, Given::default()).unwrap();
        assert_eq!(config.turn_tokens(), 512);
        assert_eq!(config.waiting_tokens_max(131_072), 524_288);
        assert_eq!(config.stream_events_max(), 1024);
        assert_eq!(config.adapter_wait_max(), Duration::from_secs(30));
        assert_eq!(config.body_bytes_max(131_072), 4 << 20);
        assert_eq!(config.head_time_max(), Duration::from_secs(30));
        assert_eq!(config.write_time_max(), Duration::from_secs(60));
        assert_eq!(config.stall_time_max(), Duration::from_secs(60));
    }

    #[test]
    fn what_follows_grows_with_what_it_follows_from() {
        let given = [
            ("rows_max", "8192"),
            ("waiting_max", "4096"),
            ("queue_seconds_max", "1"),
            ("body_seconds_max", "5"),
            ("request_seconds_max", "3600"),
        ];
        let config = Config::load(None, Given::of(&given)).unwrap();
        assert_eq!(config.turn_tokens(), 16_384);
        assert_eq!(config.waiting_tokens_max(512), 4096 * 2048);
        assert_eq!(config.stream_events_max(), 8192, "one step can bring as many");
        assert_eq!(config.adapter_wait_max(), Duration::from_millis(500));
        assert_eq!(config.body_bytes_max(1 << 20), 16 << 20);
        assert_eq!(config.head_time_max(), Duration::from_secs(5));
        assert_eq!(config.write_time_max(), Duration::from_secs(10));
        assert_eq!(config.stall_time_max(), Duration::from_secs(360));
        assert_eq!(config.waiting_tokens_max(1 << 24), 1 << 24, "one prompt always fits");
    }
}
