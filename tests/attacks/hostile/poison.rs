//! An adapter that makes NaN of some prompts, beside one that does not.
//!
//! Its factors are finite and the probe's prompts are harmless, so the upload is taken: on the
//! embedding, only the column of one control character is huge, and its product overflows.

use crate::hostile::server::{GOOD, Hostile};
use futures::future::join_all;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};

/// The token whose row of the embedding overflows.
const POISON: u32 = 7;

fn poison() -> Vec<(String, Vec<u8>)> {
    let shape = crate::hostile::server::shape();
    let (vocab, hidden) = (shape.vocab, shape.hidden);
    let mut a = vec![0.0f32; vocab];
    for (token, x) in a.iter_mut().enumerate() {
        *x = if token == POISON as usize { 3e38 } else { 2e-38 };
    }
    let b = vec![3e38f32; hidden];
    let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let (a, b) = (bytes(&a), bytes(&b));
    let table = "base_model.model.model.embed_tokens.lora_embedding_";
    let views = [
        (format!("{table}A"), TensorView::new(Dtype::F32, vec![1, vocab], &a).expect("a view")),
        (format!("{table}B"), TensorView::new(Dtype::F32, vec![hidden, 1], &b).expect("a view")),
    ];
    let tensors = serialize(views, None).expect("a file");
    let config = json!({"peft_type": "LORA", "r": 1, "lora_alpha": 1,
                        "target_modules": ["embed_tokens"]});
    vec![
        ("adapter_config.json".into(), config.to_string().into_bytes()),
        ("adapter_model.safetensors".into(), tensors),
    ]
}

fn ask(model: &str, prompt: Value) -> Value {
    json!({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 48, "logprobs": 5,
           "ignore_eos": true})
}

#[tokio::test]
async fn a_poisoned_adapter_fails_its_own_requests_and_changes_no_bit_of_its_neighbours() {
    // Few pages: those that held NaN come back to others at once.
    let flags = ["--kv-bytes", "1MiB", "--rows-max", "24", "--sequences-max", "16"];
    let server = Hostile::with(&flags).await;
    let put = server.put("poison", &poison()).await;
    assert_eq!(put.status, 201, "{}", put.text);
    let good: Vec<Value> = (0..6u32)
        .map(|i| ask(GOOD, (0..40 + i).map(|t| 33 + (t * 5 + i) % 90).collect()))
        .collect();
    let text = |answer: crate::hostile::server::Answer| {
        assert_eq!(answer.status, 200, "{}", answer.text);
        // Bit for bit: floats are written with the digits that give them back.
        let answer: Value = serde_json::from_str(&answer.text).expect("JSON");
        answer["choices"].to_string()
    };
    let mut alone = Vec::new();
    for body in &good {
        alone.push(text(server.post("/v1/completions", body).await));
    }
    let bad: Vec<Value> = (0..30u32)
        .map(|i| ask("poison", (0..30).map(|t| if t == i { POISON } else { 40 + t }).collect()))
        .collect();
    for round in 0..3 {
        let (good, bad) = tokio::join!(
            join_all(good.iter().map(|body| server.post("/v1/completions", body))),
            join_all(bad.iter().map(|body| server.post("/v1/completions", body))),
        );
        for answer in bad {
            assert_eq!(answer.code(), Some("non_finite_logits"), "{}", answer.text);
            assert_eq!(answer.status, 500, "{}", answer.text);
        }
        let together: Vec<String> = good.into_iter().map(text).collect();
        assert!(together == alone, "round {round}: the same bits beside a poisoned adapter");
    }
    let rows = server.metric("polylora_step_rows_sum").await;
    let steps = server.metric("polylora_step_rows_count").await;
    assert!(rows > 2.0 * steps, "they shared steps: {rows} rows in {steps} steps");
    let failed = "polylora_requests_finished_total{finished_reason=\"failed\"}";
    assert_eq!(server.metric(failed).await, 90.0);
    // The same adapter without the token it fails on is as good as any.
    let harmless = server.post("/v1/completions", &ask("poison", json!("hello"))).await;
    assert_eq!(harmless.status, 200, "{}", harmless.text);
    server.canary("the poison").await;
}
