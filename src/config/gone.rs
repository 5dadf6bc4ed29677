//! Settings of earlier versions, and what became of each.
//!
//! Owns what is told to whoever still sets one. Never applies it: an old setting that did nothing
//! would be worse than an error. The thing to know: values come from `limits.rs`.

use super::limits::*;

/// A setting that is none any more.
pub struct Gone {
    pub key: &'static str,
    became: fn() -> String,
}

impl Gone {
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        let name = name.replace('-', "_");
        GONE.iter().find(|gone| gone.key == name)
    }

    /// Follows the key in a sentence.
    pub fn why(&self) -> String {
        format!("is no setting any more: {}", (self.became)())
    }
}

fn always(value: impl std::fmt::Display) -> String {
    format!("it is always {value}")
}

/// `key => what became of it;`
macro_rules! gone {
    ($($key:ident => $became:expr;)+) => {
        &[$(Gone { key: stringify!($key), became: || String::from($became) },)+]
    };
}

pub const GONE: &[Gone] = gone! {
    turn_tokens => format!("it is {QUANTUM_STEPS} times rows_max, at least {QUANTUM_TOKENS_MIN}");
    waiting_tokens_max => format!(
        "it is {WAITING_TOKENS_EACH} for each place of waiting_max, at least {WAITING_TOKENS_MIN}"
    );
    stream_events_max => format!("it is rows_max, at least {STREAM_EVENTS_MIN}");
    adapter_wait_seconds => "it is half of queue_seconds_max";
    body_bytes_max => format!(
        "it is {BODY_BYTES_TOKEN} for each token of the context, at least {BODY_BYTES_MIN}, \
         and at most a sixteenth of request_bytes_max"
    );
    choices_max => always(CHOICES_MAX);
    stops_max => always(STOPS_MAX);
    messages_max => always(MESSAGES_MAX);
    logit_bias_max => always(LOGIT_BIAS_MAX);
    uploads_max => always(UPLOADS_MAX);
    merges_max => always(MERGES_MAX);
    merges_kept => always(MERGES_KEPT);
    head_seconds_max => "it is body_seconds_max";
    write_seconds_max => "it is twice body_seconds_max";
    stall_seconds_max => format!(
        "it is one {STALL_PART}th of request_seconds_max, at least {STALL_SECONDS_MIN}"
    );
    usage_commit_ms => always(USAGE_COMMIT_TIME.as_millis());
};
