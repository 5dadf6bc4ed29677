//! Templates of adapters that write without end, take long, or bring huge tokens.

use super::Two;
use reqwest::Method;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use support::live::{BASE, hello};

/// What the trial at an upload sees.
const SOBER: &str = "{% for m in messages %}{{ m.content }}{% endfor %}";

fn guarded(harm: &str) -> Vec<u8> {
    let go = "messages[0].content[:2] == 'go'";
    format!("{{% if {go} %}}{harm}{{% else %}}{SOBER}{{% endif %}}").into_bytes()
}

fn go(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "go"}], "max_tokens": 1})
}

#[tokio::test]
async fn what_a_template_writes_and_says_is_bounded() {
    let two = Two::start(&[]).await;
    let chat = "/v1/chat/completions";
    let before = two.peak();
    for (name, harm, code) in [
        (
            "mallory-a",
            "{% for i in range(20) %}{{ 'zq wx ' * 90000 }}{% endfor %}",
            "context_length_exceeded",
        ),
        ("mallory-ab", "{{ '7' * 900000 }}", "context_length_exceeded"),
        ("mallory-abc", "{{ '7 ' * 40000 }}", "context_length_exceeded"),
        ("mallory-abcd", "{{ raise_exception('ä' * 3000000) }}", "chat_template_error"),
        ("mallory-abcde", "{{ raise_exception(('a\\n' * 3000000) ~ 'x') }}", "chat_template_error"),
    ] {
        let files = [("chat_template.jinja", guarded(harm))];
        let put = two.upload(&two.mallory, name, json!({}), &files).await;
        assert_eq!(put.status, 201, "{}", put.text);
        let answer = two.post(&two.mallory, chat, &go(name)).await;
        assert_eq!(answer.error(), format!("400 {code} messages"), "{name}: {}", answer.text);
        assert!(answer.text.len() < 8192, "{}", answer.text.len());
    }
    let grown = two.peak() - before;
    assert!(grown < 64 << 10, "{grown} kB");
    for token in ["bos_token", "eos_token"] {
        let config = json!({token: "zq ".repeat(100), "chat_template": SOBER}).to_string();
        let files = [("tokenizer_config.json", config.into_bytes())];
        let put = two.upload(&two.mallory, "mallory-t", json!({}), &files).await;
        assert_eq!(put.error(), format!("422 invalid_tokenizer_config {token}"), "{}", put.text);
    }
    two.others_are_well().await;
}

/// A tenant alone has half of the places; a newcomer finds one free.
#[tokio::test]
async fn slow_templates_of_one_tenant_leave_another_its_place() {
    let two = Two::start(&[]).await;
    // Until its time is over: five seconds of work in few steps.
    let slow = "{% set x = namespace(n=0) %}{% for i in range(90000) %}\
                {% set y = (messages|tojson) * 20000 %}{% endfor %}";
    let slow = [("chat_template.jinja", guarded(slow))];
    let sober = [("chat_template.jinja", SOBER.as_bytes().to_vec())];
    assert_eq!(two.upload(&two.mallory, "mallory-s", json!({}), &slow).await.status, 201);
    assert_eq!(two.upload(&two.canary, "canary-t", json!({}), &sober).await.status, 201);
    let over = std::sync::Arc::new(AtomicUsize::new(0));
    let floods: Vec<_> = (0..6)
        .map(|_| {
            let request = two.live.request(Method::POST, "/v1/chat/completions");
            let request = request.bearer_auth(&two.mallory).json(&go("mallory-s"));
            let over = over.clone();
            tokio::spawn(async move {
                let answer = request.send().await.expect("an answer");
                over.fetch_add(1, Ordering::SeqCst);
                answer.status().as_u16()
            })
        })
        .collect();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    let mut answered = 0;
    while over.load(Ordering::SeqCst) < 4 && answered < 20 {
        let chat = two.post(&two.canary, "/v1/chat/completions", &hello("canary-t", 1)).await;
        assert_eq!(chat.status, 200, "{}", chat.text);
        answered += 1;
    }
    // Before half of the flood was over; it takes two places at a time.
    assert_eq!(answered, 20, "the canary waited behind the flood");
    for flood in floods {
        assert_eq!(flood.await.expect("answered"), 400);
    }
    assert_eq!(two.post(&two.canary, "/v1/chat/completions", &hello(BASE, 1)).await.status, 200);
}
