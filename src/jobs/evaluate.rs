//! Held-out examples: how well the base, adapters and a job's result say the right answers.
//!
//! Owns the measures. Never sees text: examples come as tokens. The thing to know: an example is
//! one ordinary sequence for each that is compared, all in the same steps, of a tenant of their own
//! and with rests between examples while others are served, so nobody's turn is taken.

use super::pace::Pace;
use crate::adapters::actor::Tenant;
use crate::adapters::registry::{Lease, Registry};
use crate::engine::{EngineHandle, Event, Request, Sampling};
use crate::error::{Error, Kind, Result};
use futures::future::try_join_all;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Whose turns are taken. No key can have this tenant: a `*` is in no name.
const TENANT: &str = "*evaluation";
/// After a full queue, before the next try.
const BUSY_PAUSE: Duration = Duration::from_millis(500);
/// Adapters that are resident together for it.
const TOGETHER: usize = 4;

/// One conversation with its right answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    pub tokens: Vec<u32>,
    /// Where the answer begins: at least 1, below the number of tokens.
    pub answer: usize,
    /// What each token counts; empty: 1 from the answer on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f32>,
}

impl Example {
    /// What a token counts.
    fn weight(&self, at: usize) -> f64 {
        if at < self.answer {
            return 0.0;
        }
        self.weights.get(at).map_or(1.0, |weight| f64::from(*weight))
    }
}

/// Examples of what one source was trained for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationSet {
    /// The source as the order calls it.
    pub model: String,
    pub examples: Vec<Example>,
}

/// One set, everybody's scores on it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// The source whose set it is.
    pub set: String,
    pub examples: usize,
    pub answer_tokens: usize,
    pub scores: Vec<Score>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Score {
    /// `base`, a source as the order calls it, or the result as `name@version`.
    pub model: String,
    /// Mean negative log-likelihood of the answers' tokens, in nats.
    pub loss: f64,
    /// Share of the answers' tokens that are the likeliest after the right ones before.
    pub token_accuracy: f64,
    /// Share of examples of whose answer every token is: what greedy decoding says then is the
    /// answer.
    pub exact_match: f64,
}

/// Who is compared: what the table calls it, and the version; `None` is the base.
pub struct Contestant {
    pub model: String,
    pub id: Option<String>,
}

/// What one of them made of one example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Σ w · ln p, and Σ w.
    pub logprob: f64,
    pub weight: f64,
    /// Tokens that count, and those of them that were the likeliest.
    pub counted: usize,
    pub correct: usize,
}

impl Scored {
    /// Whether greedy decoding says the answer.
    pub fn is_exact(&self) -> bool {
        self.correct == self.counted
    }
}

impl Score {
    pub fn of(model: &str, scored: &[Scored]) -> Self {
        let sum = |of: fn(&Scored) -> f64| scored.iter().map(of).sum::<f64>();
        Self {
            model: model.to_owned(),
            loss: -sum(|s| s.logprob) / sum(|s| s.weight),
            token_accuracy: sum(|s| s.correct as f64) / sum(|s| s.counted as f64),
            exact_match: sum(|s| f64::from(u8::from(s.is_exact()))) / scored.len() as f64,
        }
    }
}

/// Where scores are made.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    pub registry: &'a Registry,
    pub engine: &'a EngineHandle,
    pub pace: &'a Pace,
    /// Seconds of rest for each of work while requests run.
    pub rest: u32,
}

impl Bench<'_> {
    /// Scores every contestant on every set; `None` when `over` said to stop.
    pub async fn evaluate(
        self,
        sets: &[EvaluationSet],
        contestants: &[Contestant],
        over: impl Fn() -> bool,
    ) -> Result<Option<Vec<Evaluation>>> {
        let mut table = Vec::with_capacity(sets.len());
        for EvaluationSet { model: set, examples } in sets {
            let Some(all) = self.score(examples, contestants, &over).await? else {
                return Ok(None);
            };
            let answers = examples.iter().map(|e| e.tokens.len() - e.answer);
            let scores = contestants.iter().zip(&all);
            table.push(Evaluation {
                set: set.clone(),
                examples: examples.len(),
                answer_tokens: answers.sum(),
                scores: scores.map(|(who, scored)| Score::of(&who.model, scored)).collect(),
            });
        }
        Ok(Some(table))
    }

    /// By contestant and example; `None` when `over` said to stop.
    pub async fn score(
        self,
        examples: &[Example],
        contestants: &[Contestant],
        over: &impl Fn() -> bool,
    ) -> Result<Option<Vec<Vec<Scored>>>> {
        let mut all = Vec::with_capacity(contestants.len());
        for together in contestants.chunks(TOGETHER) {
            let ids: Vec<&str> = together.iter().filter_map(|c| c.id.as_deref()).collect();
            let leases = self.registry.acquire_all(&ids, None, &Tenant::default()).await?;
            let mut leases = leases.into_iter();
            let leases: Vec<Option<Lease>> =
                together.iter().map(|c| c.id.as_ref().and_then(|_| leases.next())).collect();
            let mut scores = vec![Vec::with_capacity(examples.len()); together.len()];
            for example in examples {
                if over() {
                    return Ok(None);
                }
                let begun = Instant::now();
                let each = leases.iter().map(|lease| scored(self.engine, example, lease.clone()));
                for (scores, scored) in scores.iter_mut().zip(try_join_all(each).await?) {
                    scores.push(scored);
                }
                self.pace.rest_task(begun.elapsed(), self.rest).await;
            }
            all.append(&mut scores);
        }
        Ok(Some(all))
    }
}

/// What a model makes of an example.
async fn scored(engine: &EngineHandle, example: &Example, lease: Option<Lease>) -> Result<Scored> {
    let sampling = Sampling { temperature: 0.0, prompt_logprobs: Some(1), ..Sampling::default() };
    let request = Request {
        prompt: example.tokens.clone(),
        sampling,
        tokens_max: 1,
        tokens_min: 0,
        stop_tokens: Vec::new(),
        lease: lease.map(Into::into),
        tenant: TENANT.to_owned(),
        weight: 1,
    };
    let mut stream = loop {
        match engine.submit(request.clone()) {
            Ok(stream) => break stream,
            Err(e) if e.kind == Kind::Busy => tokio::time::sleep(BUSY_PAUSE).await,
            Err(e) => return Err(e),
        }
    };
    let mut at = 0;
    let mut scored = Scored { logprob: 0.0, weight: 0.0, counted: 0, correct: 0 };
    while let Some(event) = stream.next().await {
        match event {
            Event::Prompt(event) => {
                let weight = example.weight(at);
                if weight != 0.0 {
                    scored.logprob += weight * f64::from(event.logprob);
                    scored.weight += weight;
                    scored.counted += 1;
                    let likeliest = event.top_len > 0 && event.top[0].0 == event.token;
                    scored.correct += usize::from(likeliest);
                }
                at += 1;
            }
            Event::Token(_) => {}
            Event::Finished { .. } if at == example.tokens.len() => return Ok(scored),
            Event::Finished { .. } => break,
            Event::Failed(e) => return Err(e),
        }
    }
    Err(Error::fault(format!("{at} of {} prompt tokens were scored", example.tokens.len())))
}
