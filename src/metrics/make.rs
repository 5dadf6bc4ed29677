//! Making a series: its name under the prefix, its place in the registry, its buckets.
//!
//! Owns prefix and buckets. Never knows what is counted. The thing to know: a name that is wrong or
//! taken is a bug of the table in `mod.rs`, found by the first test that starts anything.

use prometheus::core::Collector;
use prometheus::{
    Counter, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

/// From a millisecond to the longest a client waits.
const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];
/// The same for each adapter: fewer, since there are many of them.
const SECONDS_FEW: [f64; 8] = [0.005, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];
const ROWS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Makes series in a registry.
pub struct Make<'a>(pub &'a Registry);

impl Make<'_> {
    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let collector = made.expect("metric name");
        self.0.register(Box::new(collector.clone())).expect("metric registered once");
        collector
    }

    pub fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(opts(name, help)))
    }
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(opts(name, help), labels))
    }
    pub fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(opts(name, help)))
    }
    pub fn float_counter(&self, name: &str, help: &str) -> Counter {
        self.register(Counter::with_opts(opts(name, help)))
    }
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(opts(name, help), labels))
    }
    pub fn seconds(&self, name: &str, help: &str) -> Histogram {
        self.register(Histogram::with_opts(histogram(name, help, &SECONDS)))
    }
    pub fn rows(&self, name: &str, help: &str) -> Histogram {
        self.register(Histogram::with_opts(histogram(name, help, &ROWS)))
    }
    /// One histogram of seconds for each adapter.
    pub fn seconds_by_adapter(&self, name: &str, help: &str) -> HistogramVec {
        self.register(HistogramVec::new(histogram(name, help, &SECONDS_FEW), &["adapter"]))
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("polylora_{name}"), help)
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts::new(format!("polylora_{name}"), help).buckets(buckets.to_vec())
}
