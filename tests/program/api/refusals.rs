//! What is refused: status, code and the parameter to blame, and that the server goes on.

use reqwest::Method;
use serde_json::{Value, json};
use support::live::{BASE, CONTEXT, Live, hello, whole, with};

/// Each change to a good chat body is refused as said, and the server goes on.
async fn check(cases: &[(Value, &str)]) {
    let live = Live::start(&[]);
    for (change, expected) in cases {
        let answer = live.chat(with(hello(BASE, 4), change.clone())).await;
        assert_eq!(answer.error(), *expected, "{change}: {}", answer.text);
    }
    assert_eq!(live.chat(hello(BASE, 4)).await.status, 200, "the server goes on");
}

#[tokio::test]
async fn a_bad_message_or_model_is_blamed_by_its_path() {
    let second = |m: Value| json!({"messages": [{"role": "user", "content": "hi"}, m]});
    check(&[
        (json!({"model": "nobody"}), "404 model_not_found model"),
        (json!({"model": 5}), "400 invalid_type model"),
        (json!({"model": null}), "400 missing_parameter model"),
        (json!({"messages": null}), "400 missing_parameter messages"),
        (json!({"messages": []}), "400 invalid_value messages"),
        (json!({"messages": "hi"}), "400 invalid_type messages"),
        (second(json!({"role": "user"})), "400 missing_parameter messages[1].content"),
        (second(json!({"role": "user", "content": 1})), "400 invalid_type messages[1].content"),
        (second(json!({"role": "x", "content": ""})), "400 invalid_value messages[1].role"),
    ])
    .await;
}

#[tokio::test]
async fn a_sampling_parameter_out_of_range_is_blamed_by_name() {
    check(&[
        (json!({"temperature": -1}), "400 invalid_value temperature"),
        (json!({"temperature": 2.1}), "400 invalid_value temperature"),
        (json!({"temperature": "hot"}), "400 invalid_type temperature"),
        (json!({"top_p": 0}), "400 invalid_value top_p"),
        (json!({"top_p": 1.1}), "400 invalid_value top_p"),
        (json!({"top_k": -2}), "400 invalid_value top_k"),
        (json!({"min_p": 2}), "400 invalid_value min_p"),
        (json!({"seed": 1.5}), "400 invalid_type seed"),
        (json!({"presence_penalty": 3}), "400 invalid_value presence_penalty"),
        (json!({"frequency_penalty": -3}), "400 invalid_value frequency_penalty"),
        (json!({"repetition_penalty": 0}), "400 invalid_value repetition_penalty"),
        (json!({"logit_bias": {"128": 1}}), "400 invalid_value logit_bias.128"),
        (json!({"logit_bias": {"a": 1}}), "400 invalid_value logit_bias.a"),
        (json!({"logit_bias": {"1": 101}}), "400 invalid_value logit_bias.1"),
    ])
    .await;
}

#[tokio::test]
async fn a_length_stop_or_count_out_of_range_is_blamed_by_name() {
    check(&[
        (json!({"stop": ["a", ""]}), "400 invalid_value stop[1]"),
        (json!({"stop": vec!["a"; 65]}), "400 invalid_value stop"),
        (json!({"stop": 5}), "400 invalid_type stop"),
        (json!({"stop_token_ids": [-1]}), "400 invalid_value stop_token_ids[0]"),
        (json!({"stop_token_ids": [128]}), "400 invalid_value stop_token_ids[0]"),
        (json!({"n": 0}), "400 invalid_value n"),
        (json!({"n": 5_000_000}), "400 invalid_value n"),
        (json!({"max_tokens": 0}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": -1}), "400 invalid_value max_tokens"),
        (json!({"max_tokens": CONTEXT}), "400 context_length_exceeded messages"),
        (json!({"max_completion_tokens": 6}), "400 invalid_value max_completion_tokens"),
        (
            json!({"max_tokens": null, "max_completion_tokens": -1}),
            "400 invalid_value max_completion_tokens",
        ),
        (
            json!({"max_tokens": null, "max_completion_tokens": 0}),
            "400 invalid_value max_completion_tokens",
        ),
        (json!({"min_tokens": 9}), "400 invalid_value min_tokens"),
        (json!({"top_logprobs": 2}), "400 invalid_value top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "400 invalid_value top_logprobs"),
        (json!({"logprobs": 2}), "400 invalid_type logprobs"),
    ])
    .await;
}

#[tokio::test]
async fn what_is_unknown_or_unsupported_is_refused_by_name() {
    let json_only = json!({"response_format": {"type": "json_object"}});
    check(&[
        (json!({"stream_options": {}}), "400 invalid_value stream_options"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "400 invalid_type stream_options.x"),
        (json!({"tool_choice": "required"}), "400 unsupported_parameter tool_choice"),
        (json!({"tools": [{"type": "web"}]}), "400 invalid_value tools[0]"),
        (json_only, "400 unsupported_parameter response_format"),
        (json!({"best_of": 4}), "400 unsupported_parameter best_of"),
        (json!({"temprature": 1}), "400 unknown_parameter temprature"),
        (json!({"prompt": "x"}), "400 unknown_parameter prompt"),
    ])
    .await;
}

#[tokio::test]
async fn a_bad_plain_body_is_blamed_on_its_parameter() {
    let live = Live::start(&[]);
    let cases = [
        (json!({"prompt": null}), "400 missing_parameter prompt"),
        (json!({"prompt": []}), "400 invalid_value prompt"),
        (json!({"prompt": {}}), "400 invalid_type prompt"),
        (json!({"prompt": [1, "a"]}), "400 invalid_type prompt"),
        (json!({"prompt": ""}), "400 empty_prompt prompt"),
        (json!({"prompt": ["a", ""]}), "400 empty_prompt prompt[1]"),
        (json!({"prompt": [1, 2, 128]}), "400 invalid_value prompt[2]"),
        (json!({"prompt": [[1], [2, 999]]}), "400 invalid_value prompt[1][1]"),
        (json!({"prompt": vec!["a"; 9], "n": 2}), "400 invalid_value prompt"),
        (json!({"prompt": "a".repeat(CONTEXT)}), "400 context_length_exceeded prompt"),
        (json!({"max_tokens": 0}), "400 invalid_value max_tokens"),
        (json!({"logprobs": 21}), "400 invalid_value logprobs"),
        (json!({"logprobs": true}), "400 invalid_type logprobs"),
        (json!({"suffix": "x"}), "400 unsupported_parameter suffix"),
        (json!({"messages": []}), "400 unknown_parameter messages"),
    ];
    for (change, expected) in cases {
        let answer =
            live.complete(with(json!({"model": BASE, "prompt": "a"}), change.clone())).await;
        assert_eq!(answer.error(), expected, "{}", answer.text);
    }
}

#[tokio::test]
async fn what_changes_no_answer_is_accepted() {
    let live = Live::start(&[]);
    let harmless = json!({
        "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
        "parallel_tool_calls": true, "response_format": {"type": "text"}, "best_of": 1,
        "logit_bias": {}, "presence_penalty": 0, "stop": null, "modalities": ["text"],
        "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto",
    });
    let answer = live.chat(with(hello(BASE, 4), harmless)).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
}

#[tokio::test]
async fn no_attack_on_a_name_reaches_a_model() {
    let live = Live::start(&[]);
    let long = "a".repeat(4096);
    for name in [
        "",
        " ",
        "../tiny",
        "TINY",
        "tiny:",
        "tiny:tiny",
        ":tiny",
        "tiny@1",
        "base",
        "tıny",
        "a\0b",
        "a/b",
        &long,
    ] {
        let answer = live.chat(hello(name, 1)).await;
        assert_eq!(answer.error(), "404 model_not_found model", "{name}");
        assert!(answer.text.len() < 1000, "a name is not echoed at length");
        assert_eq!(answer.header("x-polylora-adapter"), "", "nobody answered");
    }
}

#[tokio::test]
async fn bodies_that_are_not_json_are_refused_in_the_same_shape() {
    // A sixteenth of it is the longest body.
    let live = Live::start(&["--request-bytes-max", "16MiB"]);
    let path = "/v1/chat/completions";
    let post = |kind: &'static str, body: String| {
        let request = live.request(Method::POST, path);
        whole(request.header("content-type", kind).body(body))
    };
    let json = "application/json";
    let broken = post(json, "{\"model\": \"tiny\",\n \"messages\": [}".into()).await;
    assert_eq!(broken.error(), "400 invalid_json -");
    assert!(broken.text.contains("line 2 column"), "{}", broken.text);
    assert_eq!(post(json, "[1]".into()).await.error(), "400 invalid_json -");
    assert_eq!(post(json, "[".repeat(60_000)).await.error(), "400 invalid_json -");
    assert_eq!(post("text/plain", "{}".into()).await.error(), "415 unsupported_media_type -");
    let form = post("application/x-www-form-urlencoded", "a=b".into()).await;
    assert_eq!(form.error(), "415 unsupported_media_type -");
    let large = format!("{{\"model\": \"{}\"}}", "a".repeat(1 << 20));
    assert_eq!(post(json, large).await.error(), "413 body_too_large -");
    // Without a declared length, counted while reading.
    let chunks = futures::stream::iter((0..300).map(|_| Ok::<_, std::io::Error>("a".repeat(4096))));
    let request = live.request(Method::POST, path).header("content-type", json);
    let streamed = whole(request.body(reqwest::Body::wrap_stream(chunks))).await;
    assert_eq!(streamed.error(), "413 body_too_large -");
    assert_eq!(live.chat(hello(BASE, 2)).await.status, 200);
}

#[tokio::test]
async fn unknown_routes_and_wrong_methods_answer_in_the_same_shape() {
    let live = Live::start(&[]);
    assert_eq!(live.get("/v1/nothing").await.error(), "404 unknown_route -");
    let wrong = live.get("/v1/chat/completions").await;
    assert_eq!(wrong.error(), "405 method_not_allowed -");
    assert_eq!(wrong.header("allow"), "POST");
    let nobody = live.get("/v1/models/nobody").await;
    assert_eq!(nobody.error(), "404 model_not_found model");
    assert!(nobody.text.contains("GET /v1/models lists"), "{}", nobody.text);
    for path in ["/chat/completions", "/adapters/pirate/rollback", "/models/org/name"] {
        let lost = live.post(path, hello(BASE, 1)).await;
        assert_eq!(lost.error(), "404 unknown_route -");
        assert!(lost.text.contains(&format!("POST /v1{path}")), "{}", lost.text);
    }
    for path in ["/chat", "/chat/completions/more", "/adapters//rollback"] {
        let lost = live.post(path, hello(BASE, 1)).await;
        assert!(!lost.text.contains("/v1"), "{}", lost.text);
    }
}
