//! Prompts that cannot fit a context, by text, by tokens and by template.

use super::Two;
use serde_json::{Value, json};
use support::live::{BASE, CONTEXT, hello, with};

/// 3 MB that would take the tokenizer a gigabyte, and 150 kB that could be a context's, are both
/// refused for little.
#[tokio::test]
async fn a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized() {
    let two = Two::start(&[]).await;
    two.others_are_well().await;
    let before = two.peak();
    let long = |unit: &str| unit.repeat(3_000_000 / unit.len());
    for text in [long("1"), long("a b\n"), long("<eos>"), "7 ".repeat(75_000)] {
        let shown = &text[..8];
        for (path, body, param) in [
            ("/v1/completions", json!({"prompt": text}), "prompt"),
            ("/v1/completions", json!({"prompt": ["a", text], "echo": true}), "prompt[1]"),
            ("/tokenize", json!({"prompt": text}), "prompt"),
            ("/v1/chat/completions", chat(&text), "messages"),
            ("/tokenize", chat(&text), "messages"),
        ] {
            let answer = two.post(&two.mallory, path, &with(json!({"model": BASE}), body)).await;
            let expected = format!("400 context_length_exceeded {param}");
            assert_eq!(answer.error(), expected, "{path} {shown:?}: {}", answer.text);
            assert!(answer.text.contains("bytes"), "{}", answer.text);
        }
    }
    let ids: Vec<u32> = vec![5; CONTEXT + 1];
    let completion = json!({"model": BASE, "prompt": ids});
    let answer = two.post(&two.mallory, "/v1/completions", &completion).await;
    assert_eq!(answer.error(), "400 context_length_exceeded prompt", "{}", answer.text);
    let answer = two.post(&two.mallory, "/detokenize", &json!({"tokens": ids})).await;
    assert_eq!(answer.error(), "400 context_length_exceeded tokens", "{}", answer.text);
    let grown = two.peak() - before;
    assert!(grown < 64 << 10, "{grown} kB");
    two.others_are_well().await;
}

fn chat(text: &str) -> Value {
    json!({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": text}]})
}

/// What is long and fits is taken: refusing by bytes refuses nobody who could be served.
#[tokio::test]
async fn a_prompt_that_just_fits_is_served_whatever_its_bytes() {
    let two = Two::start(&[]).await;
    // Five bytes each, one token each.
    let special = "<eos>".repeat(CONTEXT - 300);
    let answer = two.post(&two.canary, "/tokenize", &json!({"prompt": special})).await;
    assert_eq!(answer.json()["count"], json!(CONTEXT - 300), "{}", answer.text.len());
    let prompt = "a".repeat(20_000);
    let body = with(hello(BASE, 1), chat(&prompt));
    let answer = two.post(&two.canary, "/tokenize", &with(chat(&prompt), json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let max = json!({"max_tokens": CONTEXT, "stream": false});
    let answer = two.post(&two.canary, "/v1/chat/completions", &with(body, max)).await;
    assert_eq!(answer.error(), "400 context_length_exceeded messages", "{}", answer.text);
}
