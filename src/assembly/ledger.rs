//! The memory ledger: what the server will take, checked against what there is before the port
//! opens.
//!
//! Owns the sum and its table. Never allocates. The thing to know: weights are counted twice over a
//! start, first as a lower bound from the shape (before hours of loading), then exactly.

use crate::api::RENDERS_MAX;
use crate::checkpoint::Checkpoint;
use crate::config::{Config, human, limits};
use crate::engine::Event;
use crate::error::{Error, Kind, Result};
use crate::shape::{Projection, Site};
use crate::text::sandbox::WORKER_BYTES_MAX;
use polylora_kernels::WeightDtype;
use std::mem::size_of;

/// What is taken, line by line.
pub struct Ledger {
    weights: u64,
    /// (what, bytes, remark), weights first
    lines: Vec<(&'static str, u64, String)>,
    /// Processes that render templates of adapters, or try those of uploads.
    workers: u64,
}

impl Ledger {
    /// `pages` of `page_bytes` each hold `page_tokens` tokens.
    pub fn new(
        config: &Config,
        weights: (u64, String),
        pages: (u64, u64, u64),
        buffers: u64,
    ) -> Self {
        let (count, bytes, tokens) = pages;
        let streams = (config.waiting_max + config.sequences_max) as u64;
        let ring = (config.stream_events_max() * size_of::<Event>()) as u64;
        let lines = vec![
            ("weights", weights.0, weights.1),
            ("KV cache", count * bytes, format!("{} tokens in {count} pages", count * tokens)),
            ("step buffers", buffers, format!("{} rows", config.rows_max)),
            ("adapters", config.adapter_bytes_max.0, "at most".to_owned()),
            ("requests", config.request_bytes_max.0, "at most, before they are queued".to_owned()),
            ("training", config.train_bytes.0, "at most, while jobs train".to_owned()),
            ("streams", streams * ring, format!("at most, {streams} of them")),
        ];
        let workers = RENDERS_MAX + limits::UPLOADS_MAX as u64;
        Self { weights: weights.0, lines, workers }
    }

    fn total(&self) -> u64 {
        self.lines.iter().map(|l| l.1).sum()
    }

    /// Weights are loaded already: the rest must fit into `available`.
    pub fn check(&self, available: u64, config: &Config) -> Result<()> {
        let rest = self.total() - self.weights;
        if rest <= available {
            return Ok(());
        }
        let message = format!(
            "{} are needed beside the weights, but {} are available; \
             lower kv_bytes (now {}), adapter_bytes_max (now {}), request_bytes_max (now {}) or \
             train_bytes (now {})",
            human(rest),
            human(available),
            human(config.kv_bytes.0),
            human(config.adapter_bytes_max.0),
            human(config.request_bytes_max.0),
            human(config.train_bytes.0)
        );
        Err(Error::new(Kind::Capacity, "insufficient_memory", message))
    }

    /// The table for people.
    pub fn table(&self, available: u64) -> String {
        let line = |what: &str, bytes: u64, remark: &str| {
            format!("  {what:<13}{:>10}  {remark}", human(bytes))
        };
        let mut page = vec!["memory".to_owned()];
        page.extend(self.lines.iter().map(|(what, bytes, remark)| line(what, *bytes, remark)));
        let remark = format!("of {} available", human(available + self.weights));
        page.push(line("sum", self.total(), &remark));
        let remark = format!("beside it, at most: {} processes for templates", self.workers);
        page.push(line("templates", self.workers * WORKER_BYTES_MAX, &remark));
        page.iter().map(|l| format!("{}\n", l.trim_end())).collect()
    }
}

/// Bytes that the weights need at least, known before they are read.
pub fn weights_at_least(checkpoint: &Checkpoint, dtype: Option<WeightDtype>) -> u64 {
    let shape = &checkpoint.shape;
    let smallest = if checkpoint.packed() { WeightDtype::Int4 } else { WeightDtype::Bf16 };
    let product = |site| {
        let (inputs, outputs) = shape.site_dims(site);
        (inputs * outputs) as u64
    };
    let layer: u64 = Projection::ALL.iter().map(|p| product(Site::Layer(0, *p))).sum();
    let tables = if shape.tied_head { 1 } else { 2 };
    let parameters = layer * shape.layers as u64 + tables * product(Site::Head);
    (parameters as f64 * dtype.unwrap_or(smallest).bits() / 8.0) as u64
}

/// Refuses before loading what cannot fit.
pub fn check_weights(least: u64, available: u64) -> Result<()> {
    if least <= available {
        return Ok(());
    }
    let message =
        format!("the weights alone need {}, but {} are available", human(least), human(available));
    Err(Error::new(Kind::Capacity, "insufficient_memory", message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Given;

    fn ledger(available: u64) -> (Result<()>, String) {
        let given = [
            ("kv_bytes", "1GiB"),
            ("adapter_bytes_max", "1GiB"),
            ("request_bytes_max", "64MiB"),
            ("train_bytes", "0"),
        ];
        let config = Config::load(None, Given::of(&given)).expect("sizes");
        let ledger = Ledger::new(&config, (3 << 30, "bf16".into()), (1024, 1 << 20, 16), 1 << 20);
        (ledger.check(available, &config), ledger.table(available))
    }

    #[test]
    fn a_sum_that_does_not_fit_is_refused_and_says_what_to_lower() {
        let (fits, table) = ledger(3 << 30);
        assert!(fits.is_ok());
        assert!(table.contains("16384 tokens in 1024 pages"), "{table}");
        assert!(table.contains("of 6.0 GiB available"), "{table}");
        let refused = ledger(2 << 30).0.expect_err("2 GiB hold no 2 GiB and buffers");
        assert_eq!(refused.code, "insufficient_memory");
        assert!(refused.message.contains("kv_bytes (now 1.0 GiB)"), "{refused}");
    }
}
