//! Figures of a contest: percentiles, rates, ratios; a table for people and JSON for machines.
//!
//! Owns every definition of a figure. Never times anything. The thing to know: tokens per second
//! are all answered tokens over the time from a round's start to its last byte, and a ratio is
//! taken within a round.

use super::contender::Contender;
use super::load::{Outcome, Timing};
use polylora_kernels::State;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// One turn of one contender.
#[derive(Debug, Clone, Default)]
pub struct Round {
    pub seconds: f64,
    pub timings: Vec<Timing>,
    /// How often each refusal came.
    pub errors: BTreeMap<String, usize>,
    /// How often each target was asked.
    pub asked: BTreeMap<String, usize>,
}

impl Round {
    pub fn new(outcomes: Vec<Outcome>, wall: Duration) -> Self {
        let mut round = Self { seconds: wall.as_secs_f64(), ..Self::default() };
        for o in outcomes {
            *round.asked.entry(o.asked).or_default() += 1;
            match o.answer {
                Ok(timing) => round.timings.push(timing),
                Err(label) => *round.errors.entry(label).or_default() += 1,
            }
        }
        round
    }

    fn tokens(&self) -> u64 {
        self.timings.iter().map(|t| t.tokens).sum()
    }

    /// Output tokens per second.
    pub fn rate(&self) -> f64 {
        self.tokens() as f64 / self.seconds
    }

    fn json(&self) -> Value {
        let prompt: Vec<f64> =
            self.timings.iter().filter_map(|t| t.prompt_tokens).map(|n| n as f64).collect();
        let per_token = self.timings.iter().filter(|t| t.tokens > 1);
        let per_token =
            per_token.filter_map(|t| Some((t.total - t.first?) / (t.tokens - 1) as f64)).collect();
        json!({
            "seconds": self.seconds,
            "answered": self.timings.len(),
            "errors": self.errors,
            "asked": self.asked,
            "output_tokens": self.tokens(),
            "output_tokens_per_second": self.rate(),
            "requests_per_second": self.timings.len() as f64 / self.seconds,
            "prompt_tokens_mean": prompt.iter().sum::<f64>() / prompt.len().max(1) as f64,
            "time_to_first_token_seconds": spread(firsts(&self.timings)),
            "inter_token_seconds": spread(gaps(&self.timings)),
            "seconds_per_output_token": spread(per_token),
            "latency_seconds": spread(totals(&self.timings)),
        })
    }
}

fn firsts(timings: &[Timing]) -> Vec<f64> {
    timings.iter().filter_map(|t| t.first).collect()
}
fn gaps(timings: &[Timing]) -> Vec<f64> {
    timings.iter().flat_map(|t| t.gaps.iter().copied()).collect()
}
fn totals(timings: &[Timing]) -> Vec<f64> {
    timings.iter().map(|t| t.total).collect()
}

/// The p-th percentile by nearest rank: the smallest value that p % of all do not exceed. `None` of
/// nothing.
pub fn percentile(values: &mut [f64], p: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (p / 100.0 * values.len() as f64).ceil() as usize;
    values.get(rank.max(1) - 1).copied()
}

fn spread(mut values: Vec<f64>) -> Value {
    let mut at = |p| percentile(&mut values, p);
    json!({"p50": at(50.0), "p95": at(95.0), "p99": at(99.0), "max": at(100.0)})
}

/// Smallest, median and largest.
fn range(mut values: Vec<f64>) -> [f64; 3] {
    [0.0, 50.0, 100.0].map(|p| percentile(&mut values, p).unwrap_or(f64::NAN))
}

/// All rounds of all contenders.
pub struct Contest {
    sides: Vec<Side>,
    /// The machine's, before each round.
    states: Vec<State>,
}

struct Side {
    name: String,
    url: String,
    models: Vec<String>,
    rounds: Vec<Round>,
}

impl Contest {
    pub fn new(contenders: &[Contender]) -> Self {
        let side = |c: &Contender| Side {
            name: c.name.clone(),
            url: c.client.url.clone(),
            models: c.targets.iter().map(ToString::to_string).collect(),
            rounds: Vec::new(),
        };
        Self { sides: contenders.iter().map(side).collect(), states: Vec::new() }
    }

    /// A round begins, in this state of the machine.
    pub fn begin(&mut self, state: State) {
        self.states.push(state);
    }

    pub fn add(&mut self, contender: usize, round: Round) {
        self.sides[contender].rounds.push(round);
    }

    /// One line on the round just run.
    pub fn last(&self, contender: usize) -> String {
        let Some(r) = self.sides[contender].rounds.last() else {
            return String::new();
        };
        let failed: usize = r.errors.values().sum();
        format!("{:.1} tokens/s, {} answered, {failed} failed", r.rate(), r.timings.len())
    }

    pub fn answered(&self) -> usize {
        self.sides.iter().flat_map(|s| &s.rounds).map(|r| r.timings.len()).sum()
    }

    /// Rate of a contender over that of the first, round by round: smallest, median, largest.
    fn ratio(&self, side: &Side) -> [f64; 3] {
        let pairs = side.rounds.iter().zip(&self.sides[0].rounds);
        range(pairs.map(|(mine, first)| mine.rate() / first.rate()).collect())
    }

    /// The table for people.
    pub fn table(&self) -> String {
        let wide = self.sides.iter().map(|s| s.name.len()).max().unwrap_or(0).max(9);
        let mut page = format!(
            "{:wide$}  {:>9}  {:>22}  {:>17}  {:>20}  {:>20}  {:>17}\n",
            "contender",
            "answered",
            "output tokens/s",
            "ratio",
            "first token, ms",
            "between tokens, ms",
            "latency, s"
        );
        page += &format!(
            "{:wide$}  {:>9}  {:>22}  {:>17}  {:>20}  {:>20}  {:>17}\n",
            "",
            "of sent",
            "median (min-max)",
            "median (min-max)",
            "p50/p95/p99",
            "p50/p95/p99",
            "p50/p95/p99"
        );
        for side in &self.sides {
            let timings: Vec<Timing> = side.rounds.iter().flat_map(|r| r.timings.clone()).collect();
            let failed: usize = side.rounds.iter().flat_map(|r| r.errors.values()).sum();
            let [low, mid, high] = range(side.rounds.iter().map(Round::rate).collect());
            let [least, usual, most] = self.ratio(side);
            page += &format!(
                "{:wide$}  {:>9}  {:>22}  {:>17}  {:>20}  {:>20}  {:>17}\n",
                side.name,
                format!("{}/{}", timings.len(), timings.len() + failed),
                format!("{mid:.1} ({low:.1}-{high:.1})"),
                format!("{usual:.2} ({least:.2}-{most:.2})"),
                three(firsts(&timings), 1e3, 0),
                three(gaps(&timings), 1e3, 1),
                three(totals(&timings), 1.0, 2),
            );
        }
        page += &self.machine();
        for side in &self.sides {
            for (label, n) in side.rounds.iter().flat_map(|r| &r.errors) {
                page += &format!("{}: {n} x {label}\n", side.name);
            }
        }
        page
    }

    /// What the machine did, from the slowest round to the fastest.
    fn machine(&self) -> String {
        let Some(threads) = self.states.first().map(|s| s.threads) else {
            return String::new();
        };
        let of = |values: Vec<f64>, decimals: usize| {
            let [low, mid, high] = range(values);
            format!("{mid:.decimals$} ({low:.decimals$}-{high:.decimals$})")
        };
        let trips: Vec<f64> = self.states.iter().filter_map(|s| s.round_trip_ns).collect();
        let trips = match trips.is_empty() {
            true => String::new(),
            false => format!("core to core and back {} ns, ", of(trips, 0)),
        };
        let read = of(self.states.iter().map(|s| s.read_gbs).collect(), 1);
        format!("machine, by round: {trips}read {read} GB/s ({threads} threads)\n")
    }

    /// The report for machines.
    pub fn json(&self, options: Value) -> Value {
        let sides = self.sides.iter().map(|s| {
            let ([low, mid, high], [least, usual, most]) =
                (range(s.rounds.iter().map(Round::rate).collect()), self.ratio(s));
            json!({
                "name": s.name, "url": s.url, "models": s.models,
                "output_tokens_per_second": {"median": mid, "min": low, "max": high},
                "ratio_to_first": {"median": usual, "min": least, "max": most},
                "rounds": s.rounds.iter().map(Round::json).collect::<Vec<_>>(),
            })
        });
        json!({
            "options": options,
            "states": self.states.iter().map(state_json).collect::<Vec<_>>(),
            "contenders": sides.collect::<Vec<_>>(),
        })
    }
}

/// A state for machines.
pub fn state_json(state: &State) -> Value {
    json!({
        "round_trip_ns": state.round_trip_ns,
        "read_gigabytes_per_second": state.read_gbs,
        "threads": state.threads,
    })
}

/// `p50/p95/p99` with a unit's factor and decimals.
fn three(mut values: Vec<f64>, factor: f64, decimals: usize) -> String {
    let at = |p| {
        percentile(&mut values, p).map_or("-".to_owned(), |v| format!("{:.decimals$}", v * factor))
    };
    [50.0, 95.0, 99.0].map(at).join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let mut v: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let at = [0.0, 50.0, 95.0, 99.0, 100.0].map(|p| percentile(&mut v, p));
        assert_eq!(at, [1.0, 50.0, 95.0, 99.0, 100.0].map(Some));
        assert_eq!(percentile(&mut [3.0], 50.0), Some(3.0));
        assert_eq!(percentile(&mut [], 50.0), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        let round = |tokens, seconds| Round {
            seconds,
            timings: vec![Timing { tokens, ..Timing::default() }],
            ..Round::default()
        };
        let side = |name: &str, rounds| Side {
            name: name.into(),
            url: String::new(),
            models: Vec::new(),
            rounds,
        };
        // The machine slows threefold in the second round; the ratio does not move.
        let contest = Contest {
            sides: vec![
                side("base", vec![round(300, 1.0), round(100, 1.0)]),
                side("mixed", vec![round(270, 1.0), round(90, 1.0)]),
            ],
            states: [(70.4, 33.0), (340.0, 55.26)]
                .map(|(ns, read_gbs)| State { round_trip_ns: Some(ns), read_gbs, threads: 2 })
                .into(),
        };
        for r in contest.ratio(&contest.sides[1]) {
            assert!((r - 0.9).abs() < 1e-12);
        }
        let table = contest.table();
        assert!(table.contains("0.90 (0.90-0.90)"), "{table}");
        let line = "core to core and back 70 (70-340) ns, read 33.0 (33.0-55.3) GB/s (2 threads)";
        assert!(table.contains(line), "{table}");
    }
}
