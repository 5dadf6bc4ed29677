//! The decoder against Hugging Face: rope, logits, batch invariance, the demo model.
//!
//! Numbers come from `golden/`, made by transformers. Never tests adapters.

use polylora::checkpoint::Checkpoint;
use polylora::checkpoint::source;
use polylora::shape::ModelShape;
use polylora_kernels::{Dtype, KvCache};
use serde_json::{Value, json};
use std::path::PathBuf;
use support::decoder::{Part, difference_max, ids, model, prefill, step, tiny_checkpoint};
use support::golden;
use support::tiny::{self, Storage};

fn floats(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).expect("numbers")
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| x - max - sum.ln() as f32).collect()
}

fn argmax(values: &[f32]) -> u32 {
    let best = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("a vocabulary").0 as u32
}

#[test]
fn tiny_models_of_every_family_give_the_logits_of_transformers() {
    let golden = golden("models.json");
    let prompt = ids(&golden["prompt"]);
    let mut wrong = Vec::new();
    for (name, case) in golden["models"].as_object().expect("cases") {
        let checkpoint = tiny_checkpoint(&case["config"], Storage::F32, 1);
        let ours = prefill(&mut model(&checkpoint, Dtype::F32, prompt.len()), &prompt);
        let positions = ids(&golden["positions"]);
        let rows = case["logits"].as_array().expect("rows");
        assert_eq!(rows.len(), positions.len());
        for (position, theirs) in positions.iter().zip(rows) {
            let difference = difference_max(&ours[*position as usize], &floats(theirs));
            if difference >= 1e-4 {
                wrong.push(format!("{name} at {position}: {difference}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn rope_frequencies_are_those_of_transformers() {
    for (name, case) in golden("models.json")["ropes"].as_object().expect("cases") {
        let mut config = case["config"].clone();
        config["model_type"] = json!("llama");
        config["hidden_size"] = json!(256);
        let shape = ModelShape::from_config(&tiny::config(&config)).expect("a shape");
        let (ours, factor) = shape.rope.frequencies(shape.head_dim);
        let theirs = floats(&case["inv_freq"]);
        let relative = |(a, b): (&f32, &f32)| (a - b).abs() / b;
        let worst = ours.iter().zip(&theirs).map(relative).fold(0.0, f32::max);
        assert_eq!(ours.len(), theirs.len());
        assert!(worst < 1e-6, "{name}: {worst}");
        let expected = case["factor"].as_f64().expect("a number") as f32;
        assert!((factor - expected).abs() < 1e-6, "{name}: factor {factor}");
    }
}

#[test]
fn chunks_pages_and_neighbours_do_not_change_a_bit() {
    let cases = [
        json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 24,
               "max_window_layers": 1}),
        json!({"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8,
               "sliding_window_pattern": 2, "num_hidden_layers": 4, "tie_word_embeddings": true}),
    ];
    let a: Vec<u32> = (0..37).map(|i| (i * 29 + 3) % 128).collect();
    let b: Vec<u32> = (0..21).map(|i| (i * 31 + 7) % 128).collect();
    for (case, dtype) in cases.iter().zip([Dtype::F32, Dtype::Bf16]) {
        let checkpoint = tiny_checkpoint(case, Storage::Bf16, 1);
        let mut model = model(&checkpoint, dtype, 64);
        let alone_a = prefill(&mut model, &a);
        let alone_b = prefill(&mut model, &b);
        // Pages in no order, the sequences side by side, in chunks that do not end with pages.
        let (pages_a, pages_b) = ([17, 3, 29], [4, 11]);
        let (mut mixed_a, mut mixed_b) = (Vec::new(), Vec::new());
        for (from_a, to_a, from_b, to_b) in [(0, 9, 0, 1), (9, 10, 1, 18), (10, 37, 18, 21)] {
            let parts = [
                Part {
                    tokens: &b[from_b..to_b],
                    position: from_b,
                    pages: &pages_b[..usize::div_ceil(to_b, KvCache::PAGE)],
                },
                Part {
                    tokens: &a[from_a..to_a],
                    position: from_a,
                    pages: &pages_a[..usize::div_ceil(to_a, KvCache::PAGE)],
                },
            ];
            let mut logits = step(&mut model, &parts);
            mixed_a.extend(logits.split_off(to_b - from_b));
            mixed_b.extend(logits);
        }
        assert!(alone_a == mixed_a, "{case}");
        assert!(alone_b == mixed_b, "{case}");
    }
}

/// The demo model: from `POLYLORA_DEMO_GGUF`, or located (and downloaded once) as the server does.
fn demo() -> Checkpoint {
    let path = match std::env::var_os("POLYLORA_DEMO_GGUF") {
        Some(path) => PathBuf::from(path),
        None => source::locate(source::DEMO).expect("the demo model").path,
    };
    Checkpoint::open(&path).expect("the demo model opens")
}

#[test]
fn the_demo_model_is_tokenised_as_transformers_does() {
    let info = &golden("trained.json")["info"];
    let checkpoint = demo();
    let sha = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
    assert_eq!(checkpoint.digest().expect("read").to_string(), sha);
    assert_eq!(checkpoint.storage, "gguf Q4_1");
    let text = &checkpoint.text;
    assert_eq!((text.bos, &*text.eos, text.add_bos), (Some(1), &[2][..], false));
    let encode = |s: &str| text.tokenizer.encode(s, true).expect("encodes").get_ids().to_vec();
    let plain = info["text"].as_str().expect("text");
    assert_eq!(encode(plain), ids(&info["text_ids"]));
    assert_eq!(text.tokenizer.decode(&ids(&info["text_ids"]), true).expect("decodes"), plain);
    let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    for (prompt, expected) in info["prompts"]
        .as_array()
        .expect("prompts")
        .iter()
        .zip(info["prompt_ids"].as_array().expect("ids"))
    {
        let prompt = prompt.as_str().expect("text");
        let chat = format!(
            "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}\
             <|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(encode(&chat), ids(expected), "{prompt}");
    }
    // GPT-2's words: the last of many spaces belongs to what follows; digits stand alone, without
    // their space.
    let pieces = |s: &str| text.tokenizer.encode(s, true).expect("encodes").get_tokens().to_vec();
    assert_eq!(pieces("if    b"), ["if", "ĠĠĠ", "Ġb"]);
    assert_eq!(pieces("in 2024"), ["in", "Ġ", "2", "0", "2", "4"]);
    let odd = "naïve 東京 🙂 x=10";
    assert_eq!(text.tokenizer.decode(&encode(odd), true).expect("decodes"), odd);
}

#[test]
fn the_demo_model_gives_the_logprobs_and_the_text_of_transformers() {
    let golden = golden("trained.json");
    let (info, base) = (&golden["info"], &golden["results"]["base"]);
    let mut model = model(&demo(), Dtype::F32, 192);
    let text = ids(&info["text_ids"]);
    let logits = prefill(&mut model, &text);
    let of_next = |(row, next): (&Vec<f32>, &u32)| log_softmax(row)[*next as usize];
    let sum: f32 = logits.iter().zip(&text[1..]).map(of_next).sum();
    let mean = sum / (text.len() - 1) as f32;
    let expected = base["mean_logprob_text"].as_f64().expect("a number") as f32;
    assert!((mean - expected).abs() < 1e-3, "mean logprob {mean}, expected {expected}");
    for (i, result) in base["prompts"].as_object().expect("prompts") {
        let mut tokens = ids(&info["prompt_ids"][i.parse::<usize>().expect("an index")]);
        let mut last = prefill(&mut model, &tokens).pop().expect("a row");
        let logprobs = log_softmax(&last);
        let expected = floats(&result["top_logprobs"]);
        for (id, expected) in ids(&result["top_ids"]).iter().zip(expected) {
            let ours = logprobs[*id as usize];
            assert!(
                (ours - expected).abs() < 1e-3,
                "prompt {i} token {id}: {ours}, expected {expected}"
            );
        }
        // Greedy, until two tokens are too close for f32 to tell.
        let pages: Vec<u32> = (0..12).collect();
        for expected in ids(&result["greedy"]).into_iter().take(12) {
            let best = argmax(&last);
            let mut others = log_softmax(&last);
            let top = others[best as usize];
            others[best as usize] = f32::NEG_INFINITY;
            let second = others.into_iter().fold(f32::NEG_INFINITY, f32::max);
            if top - second < 1e-3 {
                break;
            }
            assert_eq!(best, expected, "prompt {i} after {} tokens", tokens.len());
            let part = Part {
                tokens: &[best],
                position: tokens.len(),
                pages: &pages[..(tokens.len() + 1).div_ceil(KvCache::PAGE)],
            };
            last = step(&mut model, &[part]).pop().expect("a row");
            tokens.push(best);
        }
    }
}
