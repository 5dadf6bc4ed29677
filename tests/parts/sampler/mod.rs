//! The sampler against Hugging Face's logits processors and against a naive reference in f64.
//!
//! `golden/sampler.json` says what probabilities transformers leaves to each token; the reference
//! here is held to it first, then the sampler to both. The thing to know: a draw is checked by the
//! interval of the reference's cumulative sums that its random number falls in.

mod reference;

use polylora::engine::request::{Sampling, TokenEvent};
use polylora::engine::sampler::{History, Sampler, uniform};
use reference::{Dice, assert_distributed, no_history, reference};
use serde::Deserialize;
use std::cmp::Ordering;

fn sample(sampler: &mut Sampler, logits: &[f32], s: &Sampling, history: History<'_>) -> TokenEvent {
    sampler.sample(&mut logits.to_vec(), s, history).unwrap()
}

fn distribution(logits: &[f32], s: &Sampling, history: History<'_>, draws: u64) -> Vec<usize> {
    let mut sampler = Sampler::new(logits.len());
    let mut counts = vec![0; logits.len()];
    for seed in 0..draws {
        let s = Sampling { seed, ..s.clone() };
        counts[sample(&mut sampler, logits, &s, history).token as usize] += 1;
    }
    counts
}

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    logits: Vec<f32>,
    history: Vec<u32>,
    probabilities: Vec<f64>,
    logprobs: Vec<f64>,
}

fn golden() -> Vec<Case> {
    let golden: Golden = serde_json::from_str(include_str!("../../golden/sampler.json")).unwrap();
    golden.cases
}

impl Case {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            ..Sampling::default()
        }
    }
    fn history(&self) -> History<'_> {
        History { tokens: &self.history, prompt_len: 10, banned: &[] }
    }
}

#[test]
fn probabilities_are_those_that_hugging_face_leaves() {
    for (i, case) in golden().iter().enumerate() {
        let (s, history) = (case.sampling(), case.history());
        let (probabilities, close) = reference(&case.logits, &s, history);
        assert!(!close, "case {i}");
        for (token, (ours, theirs)) in probabilities.iter().zip(&case.probabilities).enumerate() {
            assert!((ours - theirs).abs() < 2e-6, "case {i} token {token}: {ours} for {theirs}");
        }
        let counts = distribution(&case.logits, &s, history, 20_000);
        assert_distributed(&counts, &case.probabilities, &format!("case {i}"));
    }
}

#[test]
fn logprobs_are_those_of_the_untouched_logits() {
    for case in golden() {
        let mut sampler = Sampler::new(case.logits.len());
        for (seed, top) in [(1, 0), (2, 1), (3, 5), (4, 20)] {
            let mut s = Sampling { logprobs: Some(top), seed, ..case.sampling() };
            s.logit_bias = vec![(3, 5.0), (4, -100.0)];
            let event = sample(&mut sampler, &case.logits, &s, case.history());
            check_logprobs(&event, &case.logprobs, top);
            let scored = sampler.score(&case.logits, event.token, top).unwrap();
            assert_eq!(scored, event);
        }
        let silent = sample(&mut sampler, &case.logits, &case.sampling(), case.history());
        assert!(silent.logprob.is_nan() && silent.top_len == 0);
    }
}

fn check_logprobs(event: &TokenEvent, logprobs: &[f64], top: u8) {
    let near = |a: f32, b: f64| assert!((f64::from(a) - b).abs() < 1e-5, "{a} for {b}");
    near(event.logprob, logprobs[event.token as usize]);
    let mut order: Vec<usize> = (0..logprobs.len()).collect();
    order.sort_by(|&a, &b| logprobs[b].total_cmp(&logprobs[a]).then(a.cmp(&b)));
    assert_eq!(event.top_len, top);
    for (i, &(token, logprob)) in event.top[..usize::from(top)].iter().enumerate() {
        assert_eq!(token as usize, order[i]);
        near(logprob, logprobs[order[i]]);
    }
}

#[test]
fn draws_are_those_of_the_naive_reference() {
    let mut dice = Dice(0);
    let mut close_calls = 0;
    let mut small = (1..=3).map(|i| Sampler::new(10_usize.pow(i))).collect::<Vec<_>>();
    for case in 0..3000 {
        let power = dice.below(3);
        let vocab = 10_usize.pow(power as u32 + 1);
        let scale = dice.pick(&[0.0, 1.0, 4.0, 10.0]);
        let logits = dice.logits(vocab, scale);
        let tokens: Vec<u32> = (0..20).map(|_| dice.below(vocab) as u32).collect();
        let s = Sampling {
            temperature: dice.pick(&[0.2, 0.7, 1.0, 1.0, 3.0]),
            top_p: dice.pick(&[1.0, 1.0, 0.95, 0.5, 0.01]),
            top_k: dice.pick(&[0, 0, 1, 3, 50, 5000]),
            min_p: dice.pick(&[0.0, 0.0, 0.1, 1.0]),
            repetition_penalty: dice.pick(&[1.0, 1.3, 0.7]),
            presence_penalty: dice.pick(&[0.0, 0.7, -1.0]),
            frequency_penalty: dice.pick(&[0.0, 0.3, -0.2]),
            logit_bias: vec![(dice.below(vocab) as u32, 2.5), (dice.below(vocab) as u32, -100.0)],
            seed: case,
            ..Sampling::default()
        };
        let banned = [dice.below(vocab) as u32];
        let history = History { tokens: &tokens, prompt_len: 1 + dice.below(19), banned: &banned };
        let (probabilities, close) = reference(&logits, &s, history);
        if close {
            close_calls += 1;
            continue;
        }
        let index = (tokens.len() - history.prompt_len) as u64;
        let token = sample(&mut small[power], &logits, &s, history).token as usize;
        let below: f64 = probabilities[..token].iter().sum();
        let above = below + probabilities[token];
        let u = uniform(case, index);
        assert!(probabilities[token] > 0.0, "case {case}: token {token} was cut off");
        assert!(below - 1e-5 <= u && u <= above + 1e-5, "case {case}: {u} in {below}..{above}");
    }
    assert!(close_calls < 900, "{close_calls}");
}

#[test]
fn a_large_vocabulary_is_filtered_and_drawn_right() {
    const VOCAB: usize = 151_936;
    let mut dice = Dice(7);
    let mut sampler = Sampler::new(VOCAB);
    for (seed, (scale, top_k, top_p)) in [
        (10.0, 0, 1.0),
        (10.0, 0, 0.9),
        (1.0, 0, 0.9),
        (0.0, 0, 0.5),
        (1.0, 40_000, 0.9),
        (10.0, 50, 1.0),
    ]
    .into_iter()
    .enumerate()
    {
        let logits = dice.logits(VOCAB, scale);
        let s = Sampling { top_k, top_p, seed: seed as u64, ..Sampling::default() };
        let (probabilities, _) = reference(&logits, &s, no_history());
        let token = sample(&mut sampler, &logits, &s, no_history()).token as usize;
        let below: f64 = probabilities[..token].iter().sum();
        // A cut may fall one token off in f32: the tolerance is some tokens wide.
        let u = uniform(s.seed, 0);
        assert!(below - 1e-4 <= u && u <= below + probabilities[token] + 1e-4, "{seed}");
    }
}

#[test]
fn greedy_takes_the_first_maximum_after_penalties_bias_and_ban() {
    let mut sampler = Sampler::new(5);
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let logits = [1.0, 4.0, 4.0, 3.0, -1.0];
    let mut token = |s: &Sampling, history| sample(&mut sampler, &logits, s, history).token;
    assert_eq!(token(&greedy, no_history()), 1);
    let said = History { tokens: &[1, 3, 3], prompt_len: 1, banned: &[] };
    assert_eq!(token(&greedy, said), 1, "history alone changes nothing");
    let s = Sampling { repetition_penalty: 1.1, ..greedy.clone() };
    assert_eq!(token(&s, said), 2, "the prompt counts for repetition");
    let s = Sampling { frequency_penalty: -0.6, ..greedy.clone() };
    assert_eq!(token(&s, said), 3, "the output counts, twice");
    let s = Sampling { presence_penalty: -0.6, ..greedy.clone() };
    assert_eq!(token(&s, said), 1, "the output counts, once; the prompt does not");
    let s = Sampling { logit_bias: vec![(4, 5.5), (99, 50.0)], ..greedy.clone() };
    assert_eq!(token(&s, said), 4);
    let banned = History { banned: &[1, 2, 99], ..no_history() };
    assert_eq!(token(&greedy, banned), 3);
}

#[test]
fn a_row_of_nonsense_is_an_error_and_harms_no_other() {
    let mut sampler = Sampler::new(40);
    let fresh = Dice(3).logits(40, 4.0);
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let loud = Sampling { logprobs: Some(3), top_k: 3, ..Sampling::default() };
    let before = sample(&mut sampler, &fresh, &loud, no_history());
    for s in [&greedy, &loud, &Sampling { top_p: 0.5, ..Sampling::default() }] {
        for bad in [nan, inf] {
            for place in [0, 17, 39] {
                let mut logits = fresh.clone();
                logits[place] = bad;
                let error = sampler.sample(&mut logits, s, no_history()).unwrap_err();
                assert_eq!(error.code, "non_finite_logits");
            }
        }
        let mut nothing = vec![-inf; 40];
        assert!(sampler.sample(&mut nothing, s, no_history()).is_err());
        let all: Vec<u32> = (0..40).collect();
        let banned = History { banned: &all, ..no_history() };
        assert!(sampler.sample(&mut fresh.clone(), s, banned).is_err());
    }
    assert!(sampler.score(&[nan; 40], 0, 1).is_err());
    assert_eq!(sample(&mut sampler, &fresh, &loud, no_history()), before);
}

#[test]
fn impossible_tokens_are_neither_drawn_nor_listed() {
    let mut logits = vec![f32::NEG_INFINITY; 3000];
    (logits[5], logits[2999]) = (1.0, 1.0);
    let s = Sampling { logprobs: Some(20), ..Sampling::default() };
    let event = sample(&mut Sampler::new(3000), &logits, &s, no_history());
    assert_eq!((event.top_len, event.top[0].0, event.top[1].0), (2, 5, 2999));
    for s in [s.clone(), Sampling { top_k: 2500, ..s.clone() }, Sampling { top_p: 0.99, ..s }] {
        let counts = distribution(&logits, &s, no_history(), 2000);
        let mut probabilities = vec![0.0; 3000];
        (probabilities[5], probabilities[2999]) = (0.5, 0.5);
        assert_distributed(&counts, &probabilities, "two tokens");
    }
}

#[test]
fn extreme_temperatures_draw_a_token() {
    let logits = Dice(1).logits(500, 10.0);
    let mut sampler = Sampler::new(500);
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let best = sample(&mut sampler, &logits, &greedy, no_history()).token;
    let freezing = Sampling { temperature: f32::MIN_POSITIVE, ..Sampling::default() };
    let token = sample(&mut sampler, &logits, &freezing, no_history()).token;
    assert_eq!(logits[token as usize], logits[best as usize]);
    let hot = Sampling { temperature: 1e30, ..Sampling::default() };
    let counts = distribution(&logits, &hot, no_history(), 20_000);
    assert_distributed(&counts, &vec![1.0 / 500.0; 500], "infinitely hot");
}

#[test]
fn a_min_p_of_one_keeps_the_most_likely_and_its_equals() {
    let logits = [1.0, 3.0, 2.9, 3.0];
    let s = Sampling { min_p: 1.0, ..Sampling::default() };
    let counts = distribution(&logits, &s, no_history(), 2000);
    assert_distributed(&counts, &[0.0, 0.5, 0.0, 0.5], "two equals");
}

#[test]
fn the_same_seed_and_index_draw_the_same_whatever_was_sampled_before() {
    let mut dice = Dice(5);
    let logits = dice.logits(1000, 3.0);
    let mut tokens: Vec<u32> = (0..50).map(|_| dice.below(1000) as u32).collect();
    let s = Sampling {
        top_p: 0.9,
        repetition_penalty: 1.2,
        frequency_penalty: 0.1,
        logprobs: Some(5),
        seed: 11,
        ..Sampling::default()
    };
    let run = |sampler: &mut Sampler, tokens: &mut Vec<u32>, noise: bool| {
        for _ in 0..50 {
            if noise {
                let other = Sampling { temperature: 2.0, top_k: 7, ..Sampling::default() };
                sample(sampler, &vec![0.5; 1000], &other, no_history());
            }
            let history = History { tokens, prompt_len: 50, banned: &[] };
            let event = sample(sampler, &logits, &s, history);
            tokens.push(event.token);
        }
    };
    let mut again = tokens.clone();
    run(&mut Sampler::new(1000), &mut tokens, false);
    run(&mut Sampler::new(1000), &mut again, true);
    assert_eq!(tokens, again);
    assert_ne!(tokens[50..60], tokens[60..70]);
}

#[test]
fn random_numbers_are_uniform_and_unrelated_along_seeds_and_indices() {
    const CELLS: usize = 32;
    let cell = |u: f64| {
        assert_eq!(u.partial_cmp(&1.0), Some(Ordering::Less));
        (u * CELLS as f64) as usize
    };
    let mut single = vec![0; CELLS];
    let mut pairs = vec![vec![0; CELLS * CELLS]; 3];
    for seed in 0..1000_u64 {
        for index in 0..500 {
            let here = cell(uniform(seed, index));
            single[here] += 1;
            let others = [(seed, index + 1), (seed + 1, index), (index, seed + 1_000_000)];
            for (pairs, (seed, index)) in pairs.iter_mut().zip(others) {
                pairs[here * CELLS + cell(uniform(seed, index))] += 1;
            }
        }
    }
    assert_distributed(&single, &[1.0 / CELLS as f64; CELLS], "single");
    for (which, pairs) in ["indices", "seeds", "swapped"].iter().zip(pairs) {
        assert_distributed(&pairs, &vec![1.0 / (CELLS * CELLS) as f64; CELLS * CELLS], which);
    }
}
