//! Streams as bytes: frames, order, usage, and that pieces make the whole.

use serde_json::{Value, json};
use support::live::{BASE, Live, hello, rest, with};

/// The frames of a stream that went well, `[DONE]` taken off, each checked to be one `data:` line.
fn frames(body: &str) -> Vec<Value> {
    let mut frames: Vec<&str> = body.split_terminator("\n\n").collect();
    assert_eq!(frames.pop(), Some("data: [DONE]"), "{body}");
    assert!(body.ends_with("data: [DONE]\n\n"));
    let json = |frame: &&str| {
        let data = frame.strip_prefix("data: ").expect("a data line");
        assert!(!data.contains('\n'));
        serde_json::from_str(data).expect("JSON")
    };
    frames.iter().map(json).collect()
}

#[tokio::test]
async fn a_chat_stream_is_framed_as_openai_frames_it() {
    let live = Live::start(&[]);
    let ask =
        with(hello(BASE, 6), json!({"stream": true, "stream_options": {"include_usage": true}}));
    let (head, body) = rest(live.socket("POST /v1/chat/completions", &ask.to_string()));
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let head = head.to_ascii_lowercase();
    for header in [
        "content-type: text/event-stream; charset=utf-8",
        "cache-control: no-cache",
        "x-polylora-adapter: base",
        "x-polylora-digest: sha256:",
    ] {
        assert!(head.contains(header), "{header} is not in {head}");
    }
    let frames = frames(&body);
    let first = json!({"role": "assistant", "content": ""});
    assert_eq!(frames[0]["choices"][0]["delta"], first);
    let id = frames[0]["id"].clone();
    for frame in &frames {
        assert_eq!(frame["id"], id);
        assert_eq!(frame["object"], "chat.completion.chunk");
        assert_eq!(frame["model"], BASE);
    }
    let [.., last, usage] = &frames[..] else {
        panic!("{body}");
    };
    assert_eq!(last["choices"][0]["delta"], json!({}));
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert!(last["usage"].is_null() && last.as_object().unwrap().contains_key("usage"));
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 6);
    for frame in &frames[..frames.len() - 2] {
        assert!(frame["choices"][0]["finish_reason"].is_null());
    }
    let streamed: String = frames[1..frames.len() - 2]
        .iter()
        .map(|f| f["choices"][0]["delta"]["content"].as_str().expect("content"))
        .collect();
    let whole = live.chat(hello(BASE, 6)).await.json();
    assert_eq!(streamed, whole["choices"][0]["message"]["content"].as_str().unwrap());
}

#[tokio::test]
async fn without_include_usage_no_chunk_speaks_of_usage() {
    let live = Live::start(&[]);
    let ask = with(hello(BASE, 3), json!({"stream": true}));
    let body = live.chat(ask).await.text;
    for frame in frames(&body) {
        assert!(!frame.as_object().unwrap().contains_key("usage"));
        assert_eq!(frame["choices"].as_array().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn choices_of_a_stream_are_each_whole() {
    let live = Live::start(&[]);
    let ask =
        with(hello(BASE, 20), json!({"n": 4, "temperature": 1.5, "seed": 3, "logprobs": true}));
    let whole = live.chat(ask.clone()).await.json();
    let body = live.chat(with(ask, json!({"stream": true}))).await.text;
    let mut texts = vec![String::new(); 4];
    let (mut scores, mut ends) = (vec![0; 4], vec![0; 4]);
    for frame in frames(&body) {
        let choice = &frame["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        assert_eq!(ends[index], 0, "nothing after the end");
        texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
        scores[index] += choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
        ends[index] += usize::from(!choice["finish_reason"].is_null());
    }
    assert_eq!((scores, ends), (vec![20; 4], vec![1; 4]));
    for (choice, text) in whole["choices"].as_array().unwrap().iter().zip(texts) {
        assert_eq!(choice["message"]["content"], text);
    }
}

#[tokio::test]
async fn a_stop_string_never_shows_in_a_stream_not_even_its_start() {
    let live = Live::start(&[]);
    let whole = live.chat(hello(BASE, 40)).await.json();
    let whole = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let stop: String = whole.chars().skip(12).take(4).collect();
    let ask = with(hello(BASE, 40), json!({"stream": true, "stop": stop}));
    let frames = frames(&live.chat(ask).await.text);
    let shown: String = frames
        .iter()
        .map(|f| f["choices"][0]["delta"]["content"].as_str().unwrap_or_default())
        .collect();
    assert_eq!(shown, whole[..whole.find(&stop).unwrap()]);
    assert_eq!(frames.last().unwrap()["choices"][0]["finish_reason"], "stop");
    live.idle().await;
}

#[tokio::test]
async fn a_plain_stream_echoes_the_prompt_first() {
    let live = Live::start(&[]);
    let ask = json!({"model": BASE, "prompt": "hello", "max_tokens": 4, "temperature": 0,
                     "ignore_eos": true, "echo": true, "logprobs": 1, "stream": true});
    let frames = frames(&live.complete(ask.clone()).await.text);
    assert_eq!(frames[0]["object"], "text_completion");
    let text = |f: &Value| f["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text(&frames[0]).starts_with("hello"));
    let streamed: String = frames.iter().map(text).collect();
    let whole = live.complete(with(ask, json!({"stream": false}))).await.json();
    assert_eq!(streamed, whole["choices"][0]["text"].as_str().unwrap());
    let offsets: Vec<u64> = frames
        .iter()
        .flat_map(|f| f["choices"][0]["logprobs"]["text_offset"].as_array().cloned())
        .flatten()
        .map(|o| o.as_u64().unwrap())
        .collect();
    assert_eq!(offsets, (0..9).collect::<Vec<_>>());
}
