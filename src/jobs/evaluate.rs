//! Held-out examples: how well the base, each source alone and the merge say the right answers.
//!
//! Owns the measures and their table. Never sees text: examples come as tokens. The thing to know:
//! examples are scored one at a time as ordinary sequences of a tenant of their own, with rests
//! between them while others are served, so nobody's turn is taken.

use super::pace::Pace;
use crate::adapters::registry::{Lease, Registry};
use crate::engine::{EngineHandle, Event, Request, Sampling};
use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Whose turns are taken. No key can have this tenant: a `*` is in no name.
const TENANT: &str = "*merges";
/// After a full queue, before the next try.
const BUSY_PAUSE: Duration = Duration::from_millis(500);

/// One conversation with its right answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Example {
    pub tokens: Vec<u32>,
    /// Where the answer begins: at least 1, below the number of tokens.
    pub answer: usize,
}

/// Examples of what one source was trained for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Share of examples of whose answer every token is the likeliest after the right ones before.
    pub exact_match: f64,
}

/// Who is compared: what the table calls it, and the version; `None` is the base.
pub struct Contestant {
    pub model: String,
    pub id: Option<String>,
}

/// Scores every contestant on every set; `None` when `over` said to stop.
pub async fn evaluate(
    sets: &[EvaluationSet],
    contestants: &[Contestant],
    registry: &Registry,
    engine: &EngineHandle,
    pace: &Pace,
    over: impl Fn() -> bool,
) -> Result<Option<Vec<Evaluation>>> {
    let mut table = Vec::with_capacity(sets.len());
    for set in sets {
        let answer = |e: &Example| e.tokens.len() - e.answer;
        let answer_tokens = set.examples.iter().map(answer).sum();
        let mut scores = Vec::with_capacity(contestants.len());
        for contestant in contestants {
            let lease = match &contestant.id {
                Some(id) => Some(registry.acquire(id).await?),
                None => None,
            };
            let (mut sum, mut exact) = (0.0, 0);
            for example in &set.examples {
                if over() {
                    return Ok(None);
                }
                let begun = Instant::now();
                let (logprob, all) = scored(engine, example, lease.clone()).await?;
                sum += logprob;
                exact += usize::from(all);
                pace.rest_task(begun.elapsed()).await;
            }
            scores.push(Score {
                model: contestant.model.clone(),
                loss: -sum / answer_tokens as f64,
                exact_match: exact as f64 / set.examples.len() as f64,
            });
        }
        let (set, examples) = (set.model.clone(), set.examples.len());
        table.push(Evaluation { set, examples, answer_tokens, scores });
    }
    Ok(Some(table))
}

/// Sum of log-probabilities of the answer's tokens, and whether each was the likeliest.
async fn scored(
    engine: &EngineHandle,
    example: &Example,
    lease: Option<Lease>,
) -> Result<(f64, bool)> {
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
    let (mut at, mut sum, mut all) = (0, 0.0, true);
    while let Some(event) = stream.next().await {
        match event {
            Event::Prompt(event) => {
                if at >= example.answer {
                    sum += f64::from(event.logprob);
                    all &= event.top_len > 0 && event.top[0].0 == event.token;
                }
                at += 1;
            }
            Event::Token(_) => {}
            Event::Finished { .. } if at == example.tokens.len() => return Ok((sum, all)),
            Event::Finished { .. } => break,
            Event::Failed(e) => return Err(e),
        }
    }
    Err(Error::fault(format!("{at} of {} prompt tokens were scored", example.tokens.len())))
}
