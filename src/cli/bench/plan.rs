//! What a round sends: targets, prompts and arrival times, all from one seed.
//!
//! Owns every random choice of the bench. Never sends. The thing to know: request i is a function
//! of (seed, i), whichever worker takes it and however fast the server is.

use clap::ValueEnum;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Exp, Zipf};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The route asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    Chat,
    Completions,
}

impl Endpoint {
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
        }
    }
}

/// How requests choose among what a contender is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Popularity {
    Uniform,
    /// The k-th is asked in proportion to 1 / k^S.
    Zipf(f64),
    RoundRobin,
}

impl FromStr for Popularity {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("zipf:").map(str::parse::<f64>)) {
            ("uniform", _) => Ok(Self::Uniform),
            ("roundrobin", _) => Ok(Self::RoundRobin),
            (_, Some(Ok(s))) if s > 0.0 && s.is_finite() => Ok(Self::Zipf(s)),
            _ => Err("expected uniform, zipf:S with S above 0, or roundrobin".to_owned()),
        }
    }
}

impl fmt::Display for Popularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Zipf(s) => write!(f, "zipf:{s}"),
            Self::RoundRobin => f.write_str("roundrobin"),
        }
    }
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub model: String,
    /// An adapter by its index in llama-server's list, which its API has no names for.
    pub lora: Option<u32>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.lora {
            Some(index) => write!(f, "lora={index}"),
            None => f.write_str(&self.model),
        }
    }
}

/// One round of one contender.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    /// At least one.
    pub targets: Vec<Target>,
    pub popularity: Popularity,
    /// Prompts to choose from; empty: make some of `prompt_words` words.
    pub prompts: Vec<String>,
    pub prompt_words: usize,
    pub endpoint: Endpoint,
    pub tokens_max: u32,
    pub ignore_eos: bool,
    /// Workers, when there is no rate.
    pub concurrency: usize,
    /// Arrivals per second.
    pub rate: Option<f64>,
    pub requests: Option<usize>,
    pub duration: Option<Duration>,
}

/// One request to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shot {
    pub target: Target,
    pub prompt: String,
}

/// Short, common words: about one token each for the tokenizers in use.
const WORDS: &[&str] = &[
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "name",
    "team",
    "minute",
    "idea",
    "body",
    "back",
    "parent",
    "face",
    "level",
    "office",
    "door",
    "health",
    "person",
    "art",
    "war",
    "history",
    "party",
    "result",
    "change",
    "morning",
    "reason",
    "research",
    "girl",
    "guy",
    "moment",
    "air",
    "teacher",
    "force",
    "education",
];

/// One number from several: neighbours give unrelated streams.
pub fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9E37_79B9_7F4A_7C15, |h, p| {
        let x = (h ^ p).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (x ^ (x >> 31)).wrapping_mul(0x94D0_49BB_1331_11EB)
    })
}

impl Plan {
    /// Request `i` of the round.
    pub fn shot(&self, i: usize) -> Shot {
        let mut rng = StdRng::seed_from_u64(mix(&[self.seed, i as u64]));
        let n = self.targets.len();
        let target = match self.popularity {
            Popularity::RoundRobin => i % n,
            Popularity::Uniform => rng.random_range(0..n),
            Popularity::Zipf(s) => {
                let law = Zipf::new(n as f64, s).expect("n >= 1 and s > 0 were checked");
                (law.sample(&mut rng) as usize - 1).min(n - 1)
            }
        };
        let prompt = match self.prompts.len() {
            0 => (0..self.prompt_words)
                .map(|_| WORDS[rng.random_range(0..WORDS.len())])
                .collect::<Vec<_>>()
                .join(" "),
            count => self.prompts[rng.random_range(0..count)].clone(),
        };
        Shot { target: self.targets[target].clone(), prompt }
    }

    /// When each request of a round with a rate is due, from the start of the round. Empty without
    /// a rate.
    pub fn arrivals(&self) -> Vec<Duration> {
        let Some(rate) = self.rate else {
            return Vec::new();
        };
        let mut rng = StdRng::seed_from_u64(mix(&[self.seed, u64::MAX]));
        let gaps = Exp::new(rate).expect("a rate above 0 was checked");
        let end = self.duration.map_or(f64::INFINITY, |d| d.as_secs_f64());
        let (mut due, mut all) = (0.0, Vec::new());
        while self.requests.is_none_or(|n| all.len() < n) {
            due += gaps.sample(&mut rng);
            if due >= end {
                break;
            }
            all.push(Duration::from_secs_f64(due));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(popularity: &str, rate: Option<f64>) -> Plan {
        Plan {
            seed: 7,
            targets: ["a", "b", "c", "d"]
                .map(|m| Target { model: m.to_owned(), lora: None })
                .to_vec(),
            popularity: popularity.parse().expect("a law"),
            prompts: Vec::new(),
            prompt_words: 5,
            endpoint: Endpoint::Chat,
            tokens_max: 4,
            ignore_eos: true,
            concurrency: 1,
            rate,
            requests: Some(4000),
            duration: None,
        }
    }

    fn counts(p: &Plan) -> [usize; 4] {
        let mut counts = [0; 4];
        for i in 0..4000 {
            let target = p.shot(i).target;
            counts[p.targets.iter().position(|t| *t == target).expect("a target")] += 1;
        }
        counts
    }

    #[test]
    fn same_seed_makes_the_same_requests_and_another_seed_does_not() {
        let p = plan("uniform", None);
        let other = Plan { seed: 8, ..p.clone() };
        assert!((0..50).all(|i| p.shot(i) == p.clone().shot(i)));
        assert!((0..50).any(|i| p.shot(i) != other.shot(i)));
        assert_eq!(p.shot(3).prompt.split(' ').count(), 5);
        assert_ne!(p.shot(0).prompt, p.shot(1).prompt);
    }

    #[test]
    fn popularity_follows_its_law() {
        assert_eq!(counts(&plan("roundrobin", None)), [1000; 4]);
        assert!(counts(&plan("uniform", None)).iter().all(|n| (900..1100).contains(n)));
        // zipf:1 over four: 1, 1/2, 1/3, 1/4 of 12/25
        let zipf = counts(&plan("zipf:1", None));
        for (n, expected) in zipf.iter().zip([1920.0, 960.0, 640.0, 480.0]) {
            assert!((*n as f64 / expected - 1.0).abs() < 0.12, "{zipf:?}");
        }
        for wrong in ["zipf", "zipf:0", "zipf:x", "popular"] {
            assert!(wrong.parse::<Popularity>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn arrivals_come_at_the_rate_and_are_not_evenly_spaced() {
        let all = plan("uniform", Some(50.0)).arrivals();
        assert_eq!(all.len(), 4000);
        let last = all[3999].as_secs_f64();
        assert!((last - 80.0).abs() < 5.0, "4000 arrivals at 50 a second took {last} s");
        let gaps: Vec<f64> = all.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let var = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((var.sqrt() / mean - 1.0).abs() < 0.1, "exponential gaps: deviation equals mean");
    }
}
