//! Series by adapter, for a bounded number of adapters.
//!
//! Owns which name has series of its own. Never looks a name up in the registry: whoever renders
//! says which names still exist. The thing to know: the first `adapters_max` names that have
//! traffic get their own label, the rest share [`OTHER`]; a deleted name makes room. There is no
//! end of compositions: all of them share [`COMPOSED`].

use super::make::Make;
use crate::ending::EndReason;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Label of requests for the base. No adapter can have this name.
pub const BASE: &str = "base";
/// Label of requests for several adapters summed, or for one weighted. No adapter can have this
/// name.
pub const COMPOSED: &str = "_composed";
/// Label of adapters beyond the bound. No adapter can have this name.
pub const OTHER: &str = "_other";

const FIRST_TOKEN: &str =
    "From a request's arrival to its first token, loading its adapter included.";

/// The figures of one adapter, or of all that share a label.
pub struct AdapterSeries {
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    completion_tokens: IntCounter,
    requests: [IntCounter; EndReason::ALL.len()],
    time_to_first_token: Histogram,
    /// The whole server's.
    first_tokens: Histogram,
    inter_token: Histogram,
    queue_time: Histogram,
}

impl AdapterSeries {
    /// A request's first token came, `since` the request did.
    pub fn first_token(&self, since: Duration) {
        self.time_to_first_token.observe(since.as_secs_f64());
        self.first_tokens.observe(since.as_secs_f64());
    }

    /// Another token of a choice came, `since` the one before.
    pub fn next_token(&self, since: Duration) {
        self.inter_token.observe(since.as_secs_f64());
    }

    /// A sequence that was computed, and how long it had waited for its first step.
    pub fn queued(&self, waited: Duration) {
        self.queue_time.observe(waited.as_secs_f64());
    }

    /// A request that ended, with its tokens: prompt, of these cached, and completion.
    pub fn ended(&self, reason: EndReason, prompt: u64, cached: u64, completion: u64) {
        self.prompt_tokens.inc_by(prompt);
        self.cached_tokens.inc_by(cached);
        self.completion_tokens.inc_by(completion);
        self.requests[reason.index()].inc();
    }
}

/// All adapters' series.
pub struct AdapterTable {
    prompt_tokens: IntCounterVec,
    cached_tokens: IntCounterVec,
    completion_tokens: IntCounterVec,
    requests: IntCounterVec,
    time_to_first_token: HistogramVec,
    first_tokens: Histogram,
    inter_token: HistogramVec,
    queue_time: HistogramVec,
    adapters_max: usize,
    named: Mutex<HashMap<String, Arc<AdapterSeries>>>,
    base: OnceLock<Arc<AdapterSeries>>,
    /// Made when they are first needed: most servers never do.
    composed: OnceLock<Arc<AdapterSeries>>,
    other: OnceLock<Arc<AdapterSeries>>,
}

impl AdapterTable {
    pub fn new(m: &Make, adapters_max: usize) -> Self {
        let tokens = |kind: &str, help: &str| {
            m.counters(&format!("adapter_{kind}_tokens_total"), help, &["adapter"])
        };
        let table = Self {
            prompt_tokens: tokens("prompt", "Prompt tokens of ended requests."),
            cached_tokens: tokens("cached", "Of these, found in the prefix cache."),
            completion_tokens: tokens("completion", "Tokens answered by ended requests."),
            requests: m.counters(
                "adapter_requests_total",
                "Requests that ended, by reason.",
                &["adapter", "finished_reason"],
            ),
            time_to_first_token: m
                .seconds_by_adapter("adapter_time_to_first_token_seconds", FIRST_TOKEN),
            first_tokens: m.seconds("time_to_first_token_seconds", FIRST_TOKEN),
            inter_token: m.seconds_by_adapter(
                "adapter_inter_token_seconds",
                "Between two tokens of a choice, as they were handed on.",
            ),
            queue_time: m.seconds_by_adapter(
                "adapter_queue_time_seconds",
                "From a sequence's submission to its first step.",
            ),
            adapters_max,
            named: Mutex::default(),
            base: OnceLock::new(),
            composed: OnceLock::new(),
            other: OnceLock::new(),
        };
        table.base.get_or_init(|| table.make(BASE));
        table
    }

    fn make(&self, label: &str) -> Arc<AdapterSeries> {
        let counter = |of: &IntCounterVec| of.with_label_values(&[label]);
        let histogram = |of: &HistogramVec| of.with_label_values(&[label]);
        Arc::new(AdapterSeries {
            prompt_tokens: counter(&self.prompt_tokens),
            cached_tokens: counter(&self.cached_tokens),
            completion_tokens: counter(&self.completion_tokens),
            requests: EndReason::ALL.map(|r| self.requests.with_label_values(&[label, r.name()])),
            time_to_first_token: histogram(&self.time_to_first_token),
            first_tokens: self.first_tokens.clone(),
            inter_token: histogram(&self.inter_token),
            queue_time: histogram(&self.queue_time),
        })
    }

    pub fn series(&self, adapter: Option<&str>) -> Arc<AdapterSeries> {
        let Some(name) = adapter else {
            return self.base.get_or_init(|| self.make(BASE)).clone();
        };
        if name == COMPOSED {
            return self.composed.get_or_init(|| self.make(COMPOSED)).clone();
        }
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = named.get(name) {
            return series.clone();
        }
        if named.len() < self.adapters_max {
            let series = self.make(name);
            named.insert(name.to_owned(), series.clone());
            return series;
        }
        self.other.get_or_init(|| self.make(OTHER)).clone()
    }

    /// Requests still under way for a name that is gone go on counting where nobody sees it.
    pub fn retain(&self, exists: impl Fn(&str) -> bool) {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        named.retain(|name, _| {
            let kept = exists(name);
            if !kept {
                self.remove(name);
            }
            kept
        });
    }

    /// That a label is not there is as good as removing it.
    fn remove(&self, label: &str) {
        for of in [&self.prompt_tokens, &self.cached_tokens, &self.completion_tokens] {
            let _ = of.remove_label_values(&[label]);
        }
        for reason in EndReason::ALL {
            let _ = self.requests.remove_label_values(&[label, reason.name()]);
        }
        for of in [&self.time_to_first_token, &self.inter_token, &self.queue_time] {
            let _ = of.remove_label_values(&[label]);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::ending::{EndReason, FinishReason};
    use crate::metrics::{Gateway, Metrics};

    const STOP: EndReason = EndReason::Finished(FinishReason::Stop);

    fn page(metrics: &Metrics) -> String {
        metrics.render(&Gateway::default())
    }

    #[test]
    fn names_beyond_the_bound_share_a_label_and_a_deleted_name_makes_room() {
        let metrics = Metrics::bounded(2);
        for name in ["a", "b", "c", "d"] {
            metrics.series(Some(name)).ended(STOP, 10, 4, 2);
        }
        metrics.series(None).ended(EndReason::Finished(FinishReason::Length), 5, 0, 1);
        let prompt = |page: &str, label: &str| {
            let series = format!("polylora_adapter_prompt_tokens_total{{adapter=\"{label}\"}} ");
            page.lines().find_map(|l| l.strip_prefix(&series)).map(str::to_owned)
        };
        let before = page(&metrics);
        let expected = [("a", "10"), ("b", "10"), ("_other", "20"), ("base", "5")];
        for (label, tokens) in expected {
            assert_eq!(prompt(&before, label).as_deref(), Some(tokens), "{label}");
        }
        let late = metrics.series(Some("a"));
        metrics.forget_adapters(|name| name != "a");
        late.ended(STOP, 10, 0, 0);
        metrics.series(Some("c")).ended(STOP, 1, 0, 0);
        let after = page(&metrics);
        assert!(!after.contains("adapter=\"a\""), "{after}");
        assert_eq!(prompt(&after, "c").as_deref(), Some("1"));
        assert_eq!(prompt(&after, "_other").as_deref(), Some("20"), "what was is not undone");
    }
}
