//! Whole answers: shapes, identity, sampling, stops, several choices and prompts.

use serde_json::{Value, json};
use support::live::{BASE, ENDLESS, Live, hello, with};

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("content")
}

#[tokio::test]
async fn a_chat_answer_has_openais_shape_and_names_who_answered() {
    let live = Live::start(&[]);
    let answer = live.chat(hello(BASE, 8)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let body = answer.json();
    let keys: Vec<&String> = body.as_object().unwrap().keys().collect();
    let expected = ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"];
    assert_eq!(keys, expected);
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], BASE);
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["logprobs"].is_null());
    // "user: hello\nassistant: ", a token for each character.
    let usage = json!({"prompt_tokens": 23, "completion_tokens": 8, "total_tokens": 31,
                       "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(body["usage"], usage);
    assert_eq!(answer.header("x-polylora-adapter"), "base");
    assert!(answer.header("x-polylora-digest").starts_with("sha256:"));
    assert!(answer.header("x-request-id").starts_with("req-"));

    let again = live.chat(hello(BASE, 8)).await.json();
    assert_eq!(content(&again), content(&body));
    let cached = again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached.is_some_and(|n| n > 0), "the prompt is found again: {again}");
}

#[tokio::test]
async fn an_adapter_answers_under_each_of_its_names_and_says_which_version() {
    let live = Live::start(&[]);
    let put = live.upload("sql", 1).await;
    assert_eq!(put.status, 201, "{}", put.text);
    let base = live.chat(hello(BASE, 16)).await.json();
    let mut answers = Vec::new();
    for model in ["sql", "sql@1", "tiny:sql", "tiny:sql@1"] {
        let answer = live.chat(hello(model, 16)).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.header("x-polylora-adapter"), "sql@1");
        assert_eq!(answer.header("x-polylora-digest"), put.json()["digest"].as_str().unwrap());
        assert_eq!(answer.json()["model"], model);
        answers.push(content(&answer.json()).to_owned());
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "one version, one answer");
    assert_ne!(answers[0], content(&base), "and not the base's");
}

#[tokio::test]
async fn the_same_seed_gives_the_same_answer_and_no_seed_a_new_one() {
    let live = Live::start(&[]);
    let ask = |seed: Value| with(hello(BASE, 24), json!({"temperature": 1.5, "seed": seed}));
    let text = async |seed: Value| content(&live.chat(ask(seed)).await.json()).to_owned();
    assert_eq!(text(json!(7)).await, text(json!(7)).await);
    assert_ne!(text(json!(7)).await, text(json!(8)).await);
    assert_eq!(text(json!(-1)).await, text(json!(-1)).await);
    assert_ne!(text(Value::Null).await, text(Value::Null).await);
}

#[tokio::test]
async fn several_choices_are_numbered_and_counted_together() {
    let live = Live::start(&[]);
    let many = with(hello(BASE, 12), json!({"n": 3, "temperature": 1.5, "seed": 5}));
    let body = live.chat(many).await.json();
    let choices = body["choices"].as_array().unwrap();
    let indices: Vec<_> = choices.iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_eq!(body["usage"]["prompt_tokens"], 23);
    assert_eq!(body["usage"]["completion_tokens"], 36);
    for (i, choice) in choices.iter().enumerate() {
        let one = with(hello(BASE, 12), json!({"temperature": 1.5, "seed": 5 + i}));
        let alone = live.chat(one).await.json();
        assert_eq!(choice["message"]["content"], content(&alone), "choice {i} is seed 5 + {i}");
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_where_it_begins() {
    let live = Live::start(&[]);
    let whole = live.chat(hello(BASE, 64)).await.json();
    let whole: Vec<char> = content(&whole).chars().collect();
    let stop: String = whole[20..23].iter().collect();
    let text: String = whole.iter().collect();
    let at = text.find(&stop).unwrap();
    for (include, expected) in [(false, &text[..at]), (true, &text[..at + stop.len()])] {
        let more = json!({"stop": ["never seen", &stop], "include_stop_str_in_output": include});
        let body = live.chat(with(hello(BASE, 64), more)).await.json();
        assert_eq!(content(&body), expected);
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        let used = body["usage"]["completion_tokens"].as_u64().unwrap();
        assert!(used < 64, "counted up to the stop: {used}");
    }
    live.idle().await;
}

#[tokio::test]
async fn a_stop_string_cancels_what_the_engine_would_still_do() {
    let live = Live::start(&[]);
    let text = live.chat(hello(BASE, 8)).await.json();
    let stop: String = content(&text).chars().skip(4).take(2).collect();
    for stream in [false, true] {
        let ask = with(hello(BASE, ENDLESS), json!({"stop": stop, "stream": stream}));
        assert_eq!(live.chat(ask).await.status, 200);
    }
    live.idle().await;
    let cancelled = "polylora_requests_finished_total{finished_reason=\"cancelled\"}";
    assert_eq!(live.metric(cancelled).await, 2.0);
}

#[tokio::test]
async fn a_stop_string_within_the_least_length_does_not_end_the_answer() {
    let live = Live::start(&[]);
    let text = live.chat(hello(BASE, 30)).await.json();
    let text: Vec<char> = content(&text).chars().collect();
    assert_eq!(text.len(), 30, "a character for each token");
    let stop = text[4].to_string();
    for least in [0, 5, 6] {
        let ask = with(hello(BASE, 30), json!({"stop": stop, "min_tokens": least}));
        let expected: String = match text.iter().skip(least).position(|c| *c == text[4]) {
            Some(at) => text[..least + at].iter().collect(),
            None => text.iter().collect(),
        };
        assert_eq!(content(&live.chat(ask).await.json()), expected, "at least {least}");
    }
}

#[tokio::test]
async fn stop_tokens_eos_and_least_lengths_are_obeyed() {
    let live = Live::start(&[]);
    let force = |token: u32| json!({"logit_bias": {token.to_string(): 100}, "ignore_eos": false});
    let eos = live.chat(with(hello(BASE, 8), force(2))).await.json();
    assert_eq!(eos["choices"][0]["finish_reason"], "stop");
    assert_eq!(content(&eos), "");
    let ignored = with(with(hello(BASE, 8), force(2)), json!({"ignore_eos": true}));
    let ignored = live.chat(ignored).await.json();
    assert_eq!(ignored["choices"][0]["finish_reason"], "length");
    assert_eq!(content(&ignored), "", "special tokens make no text");
    let shown =
        with(hello(BASE, 2), json!({"logit_bias": {"2": 100}, "skip_special_tokens": false}));
    assert_eq!(content(&live.chat(shown).await.json()), "<eos><eos>");
    let token = with(hello(BASE, 8), json!({"logit_bias": {"65": 100}, "stop_token_ids": [65]}));
    let token = live.chat(token).await.json();
    assert_eq!((content(&token), &token["choices"][0]["finish_reason"]), ("", &json!("stop")));
    let least = with(with(hello(BASE, 8), force(2)), json!({"min_tokens": 3}));
    let least = live.chat(least).await.json();
    assert_eq!(least["choices"][0]["finish_reason"], "stop");
    assert_eq!(least["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn prompts_come_as_text_as_tokens_and_several_at_once() {
    let live = Live::start(&[]);
    let ask = |prompt: Value| {
        json!({"model": BASE, "prompt": prompt, "temperature": 0, "max_tokens": 6,
               "ignore_eos": true})
    };
    let texts = async |prompt: Value| -> Vec<String> {
        let body = live.complete(ask(prompt)).await.json();
        let choices = body["choices"].as_array().expect("choices").clone();
        choices.iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect()
    };
    let tokenized = live.post("/tokenize", json!({"prompt": "abc"})).await.json();
    let tokens = &tokenized["tokens"];
    let one = texts(json!("abc")).await;
    assert_eq!(texts(json!(["abc"])).await, one);
    assert_eq!(texts(tokens.clone()).await, one);
    assert_eq!(texts(json!([tokens])).await, one);
    let both = texts(json!(["abc", "xyz"])).await;
    assert_eq!(both, [one[0].clone(), texts(json!("xyz")).await[0].clone()]);
    let default = live.complete(json!({"model": BASE, "prompt": "abc", "ignore_eos": true})).await;
    assert_eq!(default.json()["usage"]["completion_tokens"], 16);
    assert!(default.json()["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(default.json()["object"], "text_completion");
}

#[tokio::test]
async fn the_tokens_of_text_and_chat_come_back_as_text() {
    let live = Live::start(&[]);
    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "model": BASE});
    let tokenized = live.post("/tokenize", chat).await.json();
    let text = "user: hi\nassistant: ";
    assert_eq!(tokenized["count"], text.len());
    assert_eq!(tokenized["max_model_len"], support::live::CONTEXT);
    let back = json!({"tokens": tokenized["tokens"]});
    assert_eq!(live.post("/detokenize", back).await.json()["prompt"], text);
    let strings = json!({"prompt": "ab", "return_token_strs": true});
    assert_eq!(live.post("/tokenize", strings).await.json()["token_strs"], json!(["a", "b"]));
}
