//! The decoder against Hugging Face: shapes, checkpoints, rope, logits, batch invariance, the demo model.
//!
//! Numbers come from `golden/` (made by transformers) or from the same weights written in another file format. Never
//! tests adapters.

#[path = "common/tiny.rs"]
mod tiny;

use polylora::adapters::bank::Bank;
use polylora::model::checkpoint::Checkpoint;
use polylora::model::weights::Weights;
use polylora::model::{Batch, Model, ModelOptions, source};
use polylora::shape::ModelShape;
use polylora_kernels::{Device, Dtype, KvCache};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tiny::Storage;

/// Rows of one sequence in a step.
struct Part<'a> {
    tokens: &'a [u32],
    position: usize,
    /// Pages of the whole sequence so far.
    pages: &'a [u32],
}

/// A model with room for `tokens` tokens in 32 pages.
fn model(checkpoint: &Checkpoint, dtype: Dtype, tokens: usize) -> Model {
    let weights = Weights::load(checkpoint, Some(dtype), &mut |_, _| ()).expect("weights load");
    let options = ModelOptions {
        threads: 2,
        rows_max: tokens,
        logit_rows_max: tokens,
        kv_pages: 32,
        kv_dtype: dtype,
        context: tokens.max(64),
    };
    let device = Device::cpu(options.threads);
    Model::new(Arc::new(weights), device, &options).expect("a model")
}

/// Logits of every row of every part, in order: [rows][V].
fn step(model: &mut Model, parts: &[Part]) -> Vec<Vec<f32>> {
    let mut batch = Batch {
        page_indptr: vec![0],
        segment_indptr: vec![0],
        logit_indptr: vec![0],
        ..Batch::default()
    };
    for (s, part) in parts.iter().enumerate() {
        for (i, token) in part.tokens.iter().enumerate() {
            batch.logit_rows.push(batch.tokens.len() as u32);
            batch.tokens.push(*token);
            batch.positions.push((part.position + i) as u32);
            batch.sequences.push(s as u32);
        }
        batch.pages.extend(part.pages);
        batch.page_indptr.push(batch.pages.len() as u32);
    }
    let vocab = model.shape().vocab;
    let logits = model.forward(&batch, &Bank::new(1));
    logits.chunks(vocab).map(<[f32]>::to_vec).collect()
}

/// One sequence from its first token, in one step.
fn prefill(model: &mut Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let pages: Vec<u32> = (0..tokens.len().div_ceil(KvCache::PAGE) as u32).collect();
    step(
        model,
        &[Part {
            tokens,
            position: 0,
            pages: &pages,
        }],
    )
}

fn tiny_checkpoint(case: &Value, storage: Storage, shards: usize) -> Checkpoint {
    let dir = tempfile::tempdir().expect("a temporary directory");
    tiny::write(dir.path(), case, storage, shards);
    // Kept: tensors are read from the files when they are asked for.
    Checkpoint::open(&dir.keep()).expect("a tiny model opens")
}

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let text = std::fs::read(path.join(name)).expect("a golden file");
    serde_json::from_slice(&text).expect("golden JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

fn floats(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).expect("numbers")
}

fn difference_max(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(
        0.0,
        |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) },
    )
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
        json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 24, "max_window_layers": 1}),
        json!({"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8, "sliding_window_pattern": 2,
               "num_hidden_layers": 4, "tie_word_embeddings": true}),
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

#[test]
fn shards_and_bf16_storage_hold_the_same_model() {
    let case = json!({"model_type": "llama"});
    let prompt: Vec<u32> = (0..20).map(|i| (i * 13 + 1) % 128).collect();
    let one = tiny_checkpoint(&case, Storage::Bf16, 1);
    let three = tiny_checkpoint(&case, Storage::Bf16, 3);
    assert!(!one.stored_f32());
    assert_ne!(one.digest, three.digest);
    let logits = prefill(&mut model(&one, Dtype::F32, 20), &prompt);
    assert!(logits == prefill(&mut model(&three, Dtype::F32, 20), &prompt));
    // bf16 arithmetic on the same weights: close, and not the same.
    let rounded = prefill(&mut model(&one, Dtype::Bf16, 20), &prompt);
    let differences = logits
        .iter()
        .zip(&rounded)
        .map(|(a, b)| difference_max(a, b));
    let worst = differences.fold(0.0, f32::max);
    assert!(worst > 0.0 && worst < 0.15, "{worst}");
}

#[test]
fn configs_of_other_models_are_refused_by_key_and_value() {
    let rope = |kind: &str| json!({"rope_type": kind, "factor": 2.0});
    for (case, words) in [
        (json!({"model_type": "phi3"}), "model_type = phi3"),
        (json!({"model_type": "qwen3_moe"}), "model_type = qwen3_moe"),
        (
            json!({"rope_scaling": rope("dynamic")}),
            "rope_type = dynamic",
        ),
        (
            json!({"rope_scaling": rope("longrope")}),
            "rope_type = longrope",
        ),
        (
            json!({"rope_scaling": {"type": "mrope"}}),
            "rope_type = mrope",
        ),
        (json!({"num_local_experts": 8}), "num_local_experts = 8"),
        (
            json!({"attn_logit_softcapping": 50.0}),
            "attn_logit_softcapping = 50",
        ),
        (
            json!({"final_logit_softcapping": 30.0}),
            "final_logit_softcapping = 30",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor = 0.5",
        ),
        (json!({"hidden_act": "relu"}), "hidden_act = relu"),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quant_method = \"gptq\"",
        ),
        (
            json!({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention", "full_attention"]}),
            "chunked_attention",
        ),
    ] {
        let mut config = tiny::config(&json!({"model_type": "llama"}));
        for (key, value) in case.as_object().expect("an object") {
            config[key] = value.clone();
        }
        let error = ModelShape::from_config(&config).expect_err(words);
        assert_eq!(error.code, "unsupported_model", "{case}");
        assert!(error.message.contains(words), "{words}: {error}");
    }
    for (key, value) in [("hidden_size", Value::Null), ("vocab_size", json!("many"))] {
        let mut config = tiny::config(&json!({"model_type": "llama"}));
        config[key] = value;
        let error = ModelShape::from_config(&config).expect_err(key);
        assert_eq!(error.code, "invalid_model");
        assert!(error.message.contains(key), "{error}");
    }
}

#[test]
fn missing_files_and_strange_tensors_are_refused_by_name() {
    let open = |dir: &Path| Checkpoint::open(dir).map(|_| ()).expect_err("refused");
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        tiny::write(dir.path(), &json!({"model_type": "llama"}), Storage::F32, 1);
        std::fs::remove_file(dir.path().join(file)).expect("it was there");
        let error = open(dir.path());
        assert_eq!(error.code, "invalid_model");
        assert!(error.message.contains(file), "{error}");
    }
    // The weights of a model with biases under the config of one without, and the other way round.
    let (with, without) = (
        json!({"model_type": "llama", "attention_bias": true}),
        json!({"model_type": "llama"}),
    );
    for (weights, config, code) in [
        (&with, &without, "unsupported_model"),
        (&without, &with, "invalid_model"),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        tiny::write(dir.path(), weights, Storage::F32, 1);
        let config = tiny::config(config).to_string();
        std::fs::write(dir.path().join("config.json"), config).expect("written");
        let checkpoint = Checkpoint::open(dir.path()).expect("its header is fine");
        let error = Weights::load(&checkpoint, None, &mut |_, _| ()).err();
        let error = error.expect("refused");
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains("_proj.bias"), "{error}");
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    tiny::write(dir.path(), &without, Storage::F32, 1);
    let weights = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).expect("written above");
    std::fs::write(&weights, &bytes[..bytes.len() - 4]).expect("written");
    assert!(open(dir.path()).message.contains("model.safetensors"));
}

#[test]
fn a_text_config_and_its_prefixed_tensors_are_a_gemma() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let case = json!({"model_type": "gemma3_text", "tie_word_embeddings": true});
    tiny::write(dir.path(), &case, Storage::F32, 1);
    let mut text = tiny::config(&case);
    text.as_object_mut()
        .expect("an object")
        .shift_remove("tie_word_embeddings");
    let config = json!({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]});
    std::fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!(checkpoint.shape.family, "gemma3");
    assert!(checkpoint.shape.tied_head);
    // generation_config.json first, then config.json, then the tokenizer's own, each once.
    assert_eq!(checkpoint.text.eos, [2, 1, 106]);
    assert_eq!(checkpoint.text.bos, Some(1));
    assert!(!checkpoint.text.add_bos);
    assert!(checkpoint.text.chat_template.is_some());
}

/// A GGUF file as converters write it: other names, `llama`'s rotary rows interleaved, Gemma's norms with their +1.
fn write_gguf(path: &Path, case: &Value) {
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
    use candle_core::{Device, Tensor};
    let shape = ModelShape::from_config(&tiny::config(case)).expect("a shape");
    let arch = shape.family;
    let gemma = arch == "gemma3";
    let parts = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        (
            "post_attention_layernorm",
            if gemma {
                "post_attention_norm"
            } else {
                "ffn_norm"
            },
        ),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_", "attn_q_"),
        ("self_attn.k_", "attn_k_"),
        ("self_attn.v_", "attn_v_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    let mut tensors = Vec::new();
    for t in tiny::tensors(&shape) {
        let name = parts
            .iter()
            .fold(t.name.clone(), |n, (hf, gguf)| n.replace(hf, gguf));
        let mut tensor = Tensor::from_vec(t.values, t.dims.clone(), &Device::Cpu).expect("fits");
        let heads = match t.name {
            ref n if n.contains("q_proj") => Some(shape.heads),
            ref n if n.contains("k_proj") => Some(shape.kv_heads),
            _ => None,
        };
        if let Some(heads) = heads.filter(|_| arch == "llama") {
            let split = (heads, 2, shape.head_dim / 2, shape.hidden);
            let rows = tensor
                .reshape(split)
                .and_then(|t| t.transpose(1, 2)?.contiguous());
            tensor = rows
                .and_then(|t| t.reshape(t_dims(&t, shape.hidden)))
                .expect("fits");
        }
        if gemma && name.ends_with("norm.weight") {
            tensor = (tensor + 1.0).expect("a sum");
        }
        tensors.push((
            name,
            QTensor::quantize(&tensor, GgmlDType::F32).expect("f32"),
        ));
    }
    let count = |key: &str, n: usize| (format!("{arch}.{key}"), gguf_file::Value::U32(n as u32));
    let number = |key: &str, x: f64| (format!("{arch}.{key}"), gguf_file::Value::F32(x as f32));
    let text = |key: &str, s: &str| (key.to_owned(), gguf_file::Value::String(s.to_owned()));
    let strings = |list: &[&str]| {
        let list = list
            .iter()
            .map(|s| gguf_file::Value::String((*s).to_owned()));
        gguf_file::Value::Array(list.collect())
    };
    let mut metadata = vec![
        text("general.architecture", arch),
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", "gpt-2"),
        (
            "tokenizer.ggml.tokens".to_owned(),
            strings(&["a", "b", "ab"]),
        ),
        ("tokenizer.ggml.merges".to_owned(), strings(&["a b"])),
        count("block_count", shape.layers),
        count("embedding_length", shape.hidden),
        count("feed_forward_length", shape.ffn),
        count("attention.head_count", shape.heads),
        count("attention.head_count_kv", shape.kv_heads),
        count("attention.key_length", shape.head_dim),
        count("context_length", shape.context),
        number(
            "attention.layer_norm_rms_epsilon",
            f64::from(shape.norm_eps),
        ),
        number("rope.freq_base", shape.rope.theta),
    ];
    metadata.extend(shape.windows[0].map(|w| count("attention.sliding_window", w as usize)));
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let mut file = std::fs::File::create(path).expect("a temporary file");
    gguf_file::write(&mut file, &metadata, &tensors).expect("written");
}

/// Rows of `width` again, after a split by heads; a bias has a width of one.
fn t_dims(t: &candle_core::Tensor, width: usize) -> (usize, usize) {
    (t.elem_count() / width, width)
}

#[test]
fn a_gguf_file_holds_the_same_model_as_the_directory() {
    let prompt: Vec<u32> = (0..20).map(|i| (i * 13 + 1) % 128).collect();
    for case in [
        json!({"model_type": "llama"}),
        json!({"model_type": "qwen2"}),
        json!({"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": true}),
        json!({"model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
               "num_hidden_layers": 6, "tie_word_embeddings": true}),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("tiny.gguf");
        write_gguf(&path, &case);
        let gguf = Checkpoint::open(&path).expect("a GGUF file opens");
        let directory = tiny_checkpoint(&case, Storage::F32, 1);
        assert_eq!(gguf.shape, directory.shape);
        assert!(gguf.stored_f32());
        let theirs = prefill(&mut model(&directory, Dtype::F32, 20), &prompt);
        let ours = prefill(&mut model(&gguf, Dtype::F32, 20), &prompt);
        let differences = ours.iter().zip(&theirs).map(|(a, b)| difference_max(a, b));
        // Only Gemma's norms come back from their +1 rounded.
        let worst = differences.fold(0.0, f32::max);
        assert!(worst < 1e-5, "{case}: {worst}");
        assert_eq!(
            gguf.text
                .tokenizer
                .encode("ab", false)
                .expect("encodes")
                .get_ids(),
            [2]
        );
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
    assert_eq!(checkpoint.digest.to_string(), sha);
    assert_eq!(checkpoint.storage, "gguf Q4_1, dequantised to bf16");
    let text = &checkpoint.text;
    assert_eq!(
        (text.bos, &*text.eos, text.add_bos),
        (Some(1), &[2][..], false)
    );
    let encode = |s: &str| {
        text.tokenizer
            .encode(s, true)
            .expect("encodes")
            .get_ids()
            .to_vec()
    };
    let plain = info["text"].as_str().expect("text");
    assert_eq!(encode(plain), ids(&info["text_ids"]));
    assert_eq!(
        text.tokenizer
            .decode(&ids(&info["text_ids"]), true)
            .expect("decodes"),
        plain
    );
    let system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";
    for (prompt, expected) in info["prompts"]
        .as_array()
        .expect("prompts")
        .iter()
        .zip(info["prompt_ids"].as_array().expect("ids"))
    {
        let prompt = prompt.as_str().expect("text");
        let chat = format!(
            "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(encode(&chat), ids(expected), "{prompt}");
    }
    // GPT-2's words: the last of many spaces belongs to what follows; digits stand alone, without their space.
    let pieces = |s: &str| {
        text.tokenizer
            .encode(s, true)
            .expect("encodes")
            .get_tokens()
            .to_vec()
    };
    assert_eq!(pieces("if    b"), ["if", "ĠĠĠ", "Ġb"]);
    assert_eq!(pieces("in 2024"), ["in", "Ġ", "2", "0", "2", "4"]);
    let odd = "naïve 東京 🙂 x=10";
    assert_eq!(
        text.tokenizer.decode(&encode(odd), true).expect("decodes"),
        odd
    );
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
    assert!(
        (mean - expected).abs() < 1e-3,
        "mean logprob {mean}, expected {expected}"
    );
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
