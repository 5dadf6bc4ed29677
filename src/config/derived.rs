//! Limits that follow from settings.
//!
//! Owns the arithmetic. Never names a value of its own: `limits.rs` does.

use super::limits::*;
use super::settings::Config;
use std::time::Duration;

impl Config {
    /// What a tenant, or an adapter, may get ahead of another one that waits.
    pub fn quantum_tokens(&self) -> usize {
        QUANTUM_TOKENS_MIN.max(QUANTUM_STEPS * self.rows_max)
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
    use super::*;
    use crate::config::Given;

    /// What was in force when each of these was a setting.
    #[test]
    fn what_follows_is_by_default_what_it_was_as_a_setting() {
        let config = Config::load(None, Given::default()).unwrap();
        assert_eq!(config.quantum_tokens(), 512);
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
        assert_eq!(config.quantum_tokens(), 16_384);
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
