//! Scores: the two formats agree with each other, with the text, and with probability.

use serde_json::{Value, json};
use support::live::{BASE, Live, hello, with};

#[tokio::test]
async fn chat_scores_follow_the_answer_and_its_alternatives_descend() {
    let live = Live::start(&[]);
    let ask = with(hello(BASE, 10), json!({"logprobs": true, "top_logprobs": 4}));
    let body = live.chat(ask).await.json();
    let choice = &body["choices"][0];
    let scored = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(scored.len(), 10);
    let text: String = scored.iter().map(|s| s["token"].as_str().unwrap()).collect();
    assert_eq!(text, choice["message"]["content"].as_str().unwrap());
    for s in scored {
        let top = s["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 4);
        // Greedy: the sampled token is the likeliest.
        assert_eq!(top[0]["token"], s["token"]);
        assert_eq!(top[0]["logprob"], s["logprob"]);
        let values: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(values.is_sorted_by(|a, b| a >= b), "{values:?}");
        assert!(values.iter().map(|v| v.exp()).sum::<f64>() <= 1.0 + 1e-6);
        assert_eq!(s["bytes"], json!(s["token"].as_str().unwrap().as_bytes()));
    }
    let none = with(hello(BASE, 3), json!({"logprobs": true}));
    let none = live.chat(none).await.json();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn every_token_of_the_vocabulary_shares_one_probability() {
    let live = Live::start(&[]);
    // Each token is forced in turn by its bias, which the reported score must not contain.
    let mut sum = 0.0;
    for token in 0..128 {
        let force = json!({"logprobs": true, "logit_bias": {token.to_string(): 100}});
        let body = live.chat(with(hello(BASE, 1), force)).await.json();
        let logprob = &body["choices"][0]["logprobs"]["content"][0]["logprob"];
        sum += logprob.as_f64().unwrap_or_else(|| panic!("{body}")).exp();
    }
    assert!((sum - 1.0).abs() < 1e-4, "{sum}");
}

fn lists(choice: &Value) -> (Vec<Value>, Vec<Value>, Vec<Value>, Vec<u64>) {
    let l = &choice["logprobs"];
    let list = |key: &str| l[key].as_array().unwrap_or_else(|| panic!("{choice}")).clone();
    let offsets = list("text_offset").iter().map(|o| o.as_u64().unwrap()).collect();
    (list("tokens"), list("token_logprobs"), list("top_logprobs"), offsets)
}

#[tokio::test]
async fn an_echoed_prompt_is_scored_as_if_it_had_been_sampled() {
    let live = Live::start(&[]);
    let ask = |prompt: &str, more: Value| {
        let base = json!({"model": BASE, "prompt": prompt, "temperature": 0, "ignore_eos": true});
        with(base, more)
    };
    let sampled = ask("hello", json!({"max_tokens": 5, "logprobs": 2}));
    let sampled = live.complete(sampled).await.json()["choices"][0].clone();
    let answer = sampled["text"].as_str().unwrap();
    let (_, expected, tops, _) = lists(&sampled);

    let both = format!("hello{answer}");
    let scored = ask(&both, json!({"max_tokens": 0, "echo": true, "logprobs": 2}));
    let scored = live.complete(scored).await;
    assert_eq!(scored.status, 200, "{}", scored.text);
    assert_eq!(scored.json()["usage"]["completion_tokens"], 0);
    let choice = &scored.json()["choices"][0];
    assert_eq!(
        (choice["text"].as_str(), &choice["finish_reason"]),
        (Some(both.as_str()), &json!("length"))
    );
    let (tokens, logprobs, top, offsets) = lists(choice);
    assert_eq!(tokens.len(), 10);
    assert!(logprobs[0].is_null() && top[0].is_null());
    assert_eq!(offsets, (0..10).collect::<Vec<_>>());
    for (i, (got, want)) in logprobs[5..].iter().zip(&expected).enumerate() {
        let (got, want) = (got.as_f64().unwrap(), want.as_f64().unwrap());
        assert!((got - want).abs() < 1e-4, "token {i}: {got} against {want}");
    }
    // The same score reads the same in both lists.
    for (i, top) in tops.iter().enumerate() {
        assert_eq!(top.as_object().unwrap().values().next(), Some(&expected[i]), "token {i}");
    }
    let names = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(
        top[5..].iter().map(names).collect::<Vec<_>>(),
        tops.iter().map(names).collect::<Vec<_>>()
    );

    let more = ask("hello", json!({"max_tokens": 5, "echo": true, "logprobs": 0}));
    let more = live.complete(more).await.json()["choices"][0].clone();
    assert_eq!(more["text"], both);
    let (tokens, logprobs, top, offsets) = lists(&more);
    assert_eq!((tokens.len(), offsets), (10, (0..10).collect()));
    assert_eq!(top[9].as_object().unwrap().len(), 1, "only the token itself");
    assert_eq!(logprobs[5..], expected);
}

#[tokio::test]
async fn offsets_count_the_special_tokens_that_an_echo_shows() {
    let live = Live::start(&[]);
    let echoed = async |more: Value| {
        let base = json!({"model": BASE, "max_tokens": 1, "temperature": 0, "echo": true,
                          "logprobs": 0, "ignore_eos": true});
        let choice = live.complete(with(base, more)).await.json()["choices"][0].clone();
        let text = choice["text"].as_str().expect("text").to_owned();
        (text, lists(&choice).3)
    };
    let (text, offsets) = echoed(json!({"prompt": "a<eos>b"})).await;
    assert!(text.starts_with("a<eos>b"), "{text}");
    assert_eq!(offsets, [0, 1, 6, 7], "as text they are part of the prompt");
    let tokens = json!({"prompt": [97, 2, 98]});
    let (text, offsets) = echoed(tokens.clone()).await;
    assert!(text.starts_with("ab"), "{text}");
    assert_eq!(offsets, [0, 1, 1, 2], "as tokens they are skipped, as the answer's are");
    let (text, offsets) = echoed(with(tokens, json!({"skip_special_tokens": false}))).await;
    assert!(text.starts_with("a<eos>b"), "{text}");
    assert_eq!(offsets, [0, 1, 6, 7], "unless they are asked for");
}
