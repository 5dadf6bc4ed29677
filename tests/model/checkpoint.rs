//! Models on disk: directories and GGUF files hold the same model, and what cannot be one is
//! refused by name.
//!
//! Owns a GGUF writer that does to weights what converters do. Never checks logits against anything
//! but the same weights in another file.

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};
use polylora::checkpoint::Checkpoint;
use polylora::model::weights::Weights;
use polylora::shape::ModelShape;
use polylora_kernels::Dtype;
use serde_json::{Value, json};
use std::path::Path;
use support::decoder::{difference_max, ids, model, prefill, tiny_checkpoint};
use support::golden;
use support::tiny::{self, Storage};

#[test]
fn shards_and_bf16_storage_hold_the_same_model() {
    let case = json!({"model_type": "llama"});
    let prompt: Vec<u32> = (0..20).map(|i| (i * 13 + 1) % 128).collect();
    let one = tiny_checkpoint(&case, Storage::Bf16, 1);
    let three = tiny_checkpoint(&case, Storage::Bf16, 3);
    assert!(!one.stored_f32());
    assert_ne!(one.digest().expect("read"), three.digest().expect("read"));
    let logits = prefill(&mut model(&one, Dtype::F32, 20), &prompt);
    assert!(logits == prefill(&mut model(&three, Dtype::F32, 20), &prompt));
    // bf16 arithmetic on the same weights: close, and not the same.
    let rounded = prefill(&mut model(&one, Dtype::Bf16, 20), &prompt);
    let differences = logits.iter().zip(&rounded).map(|(a, b)| difference_max(a, b));
    let worst = differences.fold(0.0, f32::max);
    assert!(worst > 0.0 && worst < 0.15, "{worst}");
}

#[test]
fn configs_of_other_models_are_refused_by_key_and_value() {
    let rope = |kind: &str| json!({"rope_type": kind, "factor": 2.0});
    for (case, words) in [
        (json!({"model_type": "phi3"}), "model_type = phi3"),
        (json!({"model_type": "qwen3_moe"}), "model_type = qwen3_moe"),
        (json!({"rope_scaling": rope("dynamic")}), "rope_type = dynamic"),
        (json!({"rope_scaling": rope("longrope")}), "rope_type = longrope"),
        (json!({"rope_scaling": {"type": "mrope"}}), "rope_type = mrope"),
        (json!({"num_local_experts": 8}), "num_local_experts = 8"),
        (json!({"attn_logit_softcapping": 50.0}), "attn_logit_softcapping = 50"),
        (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping = 30"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
        (json!({"hidden_act": "relu"}), "hidden_act = relu"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "quant_method = \"gptq\""),
        (
            json!({"model_type": "qwen3", "num_hidden_layers": 1,
                   "layer_types": ["chunked_attention"]}),
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
    let (with, without) =
        (json!({"model_type": "llama", "attention_bias": true}), json!({"model_type": "llama"}));
    for (weights, config, code) in
        [(&with, &without, "unsupported_model"), (&without, &with, "invalid_model")]
    {
        let dir = tempfile::tempdir().expect("a temporary directory");
        tiny::write(dir.path(), weights, Storage::F32, 1);
        let config = tiny::config(config).to_string();
        std::fs::write(dir.path().join("config.json"), config).expect("written");
        let checkpoint = Checkpoint::open(dir.path()).expect("its header is fine");
        let error =
            Weights::load(&checkpoint, None, &polylora_kernels::Device::cpu(2), &|_, _| ()).err();
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
    text.as_object_mut().expect("an object").shift_remove("tie_word_embeddings");
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

/// Tensors as converters write them: other names, `llama`'s rotary rows interleaved, Gemma's norms
/// with their +1.
fn gguf_tensors(shape: &ModelShape) -> Vec<(String, QTensor)> {
    let gemma = shape.family == "gemma3";
    let parts = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", if gemma { "post_attention_norm" } else { "ffn_norm" }),
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
    for t in tiny::tensors(shape) {
        let name = parts.iter().fold(t.name.clone(), |n, (hf, gguf)| n.replace(hf, gguf));
        let mut tensor = Tensor::from_vec(t.values, t.dims.clone(), &Device::Cpu).expect("fits");
        let heads = match t.name {
            ref n if n.contains("q_proj") => Some(shape.heads),
            ref n if n.contains("k_proj") => Some(shape.kv_heads),
            _ => None,
        };
        if let Some(heads) = heads.filter(|_| shape.family == "llama") {
            let split = (heads, 2, shape.head_dim / 2, shape.hidden);
            let rows = tensor.reshape(split).and_then(|t| t.transpose(1, 2)?.contiguous());
            tensor = rows.and_then(|t| t.reshape(t_dims(&t, shape.hidden))).expect("fits");
        }
        if gemma && name.ends_with("norm.weight") {
            tensor = (tensor + 1.0).expect("a sum");
        }
        tensors.push((name, QTensor::quantize(&tensor, GgmlDType::F32).expect("f32")));
    }
    tensors
}

/// A GGUF file of the model that `case` describes. `extra` metadata overrides.
fn write_gguf(path: &Path, case: &Value, extra: Vec<(String, gguf_file::Value)>) {
    let shape = ModelShape::from_config(&tiny::config(case)).expect("a shape");
    let arch = shape.family;
    let tensors = gguf_tensors(&shape);
    let count = |key: &str, n: usize| (format!("{arch}.{key}"), gguf_file::Value::U32(n as u32));
    let number = |key: &str, x: f64| (format!("{arch}.{key}"), gguf_file::Value::F32(x as f32));
    let text = |key: &str, s: &str| (key.to_owned(), gguf_file::Value::String(s.to_owned()));
    let strings = |list: &[&str]| {
        let list = list.iter().map(|s| gguf_file::Value::String((*s).to_owned()));
        gguf_file::Value::Array(list.collect())
    };
    let mut metadata = vec![
        text("general.architecture", arch),
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", "gpt-2"),
        ("tokenizer.ggml.tokens".to_owned(), strings(&["a", "b", "ab"])),
        ("tokenizer.ggml.merges".to_owned(), strings(&["a b"])),
        count("block_count", shape.layers),
        count("embedding_length", shape.hidden),
        count("feed_forward_length", shape.ffn),
        count("attention.head_count", shape.heads),
        count("attention.head_count_kv", shape.kv_heads),
        count("attention.key_length", shape.head_dim),
        count("context_length", shape.context),
        number("attention.layer_norm_rms_epsilon", f64::from(shape.norm_eps)),
        number("rope.freq_base", shape.rope.theta),
    ];
    metadata.extend(shape.windows[0].map(|w| count("attention.sliding_window", w as usize)));
    // A key that is there twice is refused: the extra one stands for the usual one.
    metadata.retain(|(key, _)| extra.iter().all(|(other, _)| other != key));
    metadata.extend(extra);
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
        json!({"model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32,
               "sliding_window": 8, "num_hidden_layers": 6, "tie_word_embeddings": true}),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("tiny.gguf");
        write_gguf(&path, &case, Vec::new());
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
        assert_eq!(gguf.text.tokenizer.encode("ab", false).expect("encodes").get_ids(), [2]);
    }
}

#[test]
fn sentencepiece_vocabularies_in_gguf_files_encode_as_sentencepiece_does() {
    use gguf_file::Value as Meta;
    for case in golden("sentencepiece.json")["cases"].as_array().expect("cases") {
        let list = |key: &str, one: fn(&Value) -> Meta| {
            let values = case[key].as_array().expect("a list");
            Meta::Array(values.iter().map(one).collect())
        };
        let metadata = [
            ("model", Meta::String("llama".to_owned())),
            ("tokens", list("tokens", |v| Meta::String(v.as_str().expect("text").to_owned()))),
            ("scores", list("scores", |v| Meta::F32(v.as_f64().expect("a number") as f32))),
            ("token_type", list("types", |v| Meta::I32(v.as_i64().expect("a number") as i32))),
            ("unknown_token_id", Meta::U32(0)),
            ("bos_token_id", Meta::U32(1)),
            ("eos_token_id", Meta::U32(2)),
            ("add_space_prefix", Meta::Bool(case["add_space_prefix"] == true)),
        ];
        let metadata = metadata.map(|(key, v)| (format!("tokenizer.ggml.{key}"), v));
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("tiny.gguf");
        write_gguf(&path, &json!({"model_type": "llama"}), metadata.to_vec());
        let text = Checkpoint::open(&path).expect("opens").text;
        assert_eq!((text.bos, &*text.eos, text.add_bos), (Some(1), &[2][..], true));
        for example in case["texts"].as_array().expect("texts") {
            let plain = example["text"].as_str().expect("text");
            let encoded = text.tokenizer.encode(plain, false).expect("encodes");
            assert_eq!(encoded.get_ids(), ids(&example["ids"]), "{plain:?}");
            let decoded = text.tokenizer.decode(encoded.get_ids(), false).expect("decodes");
            assert_eq!(decoded, plain);
        }
        let turn = text.tokenizer.encode("a<turn>b", false).expect("encodes");
        assert!(turn.get_tokens().contains(&"<turn>".to_owned()));
    }
}

#[test]
fn gguf_files_of_other_models_are_refused_by_key_and_value() {
    use gguf_file::Value as Meta;
    let text = |s: &str| Meta::String(s.to_owned());
    for (key, value, words) in [
        ("general.architecture", text("phi3"), "general.architecture = phi3"),
        ("llama.expert_count", Meta::U32(8), "llama.expert_count = 8"),
        ("llama.rope.scaling.type", text("longrope"), "rope.scaling.type = longrope"),
        ("llama.rope.dimension_count", Meta::U32(8), "rope.dimension_count = 8"),
        ("tokenizer.ggml.model", text("bert"), "tokenizer.ggml.model = bert"),
        ("tokenizer.ggml.pre", text("falcon"), "tokenizer.ggml.pre = falcon"),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("tiny.gguf");
        write_gguf(&path, &json!({"model_type": "llama"}), vec![(key.to_owned(), value)]);
        let error = Checkpoint::open(&path).map(|_| ()).expect_err(words);
        assert_eq!(error.code, "unsupported_model", "{error}");
        assert!(error.message.contains(words), "{words}: {error}");
    }
}

/// What a load that `meddle` interferes with, once it has begun, is refused with.
fn refused_midway(checkpoint: &Checkpoint, meddle: impl Fn() + Sync) -> String {
    let once = std::sync::Once::new();
    let told = |done: u64, total: u64| {
        assert!(done <= total, "{done} of {total}");
        once.call_once(&meddle);
    };
    let loaded = Weights::load(checkpoint, None, &polylora_kernels::Device::cpu(2), &told);
    let error = loaded.err().expect("refused");
    assert_eq!(error.code, "invalid_model");
    error.message
}

#[test]
fn a_file_that_is_changed_or_cut_while_it_is_read_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let case = json!({"model_type": "llama"});
    let gguf = dir.path().join("tiny.gguf");
    tiny::write(dir.path(), &case, Storage::Bf16, 2);
    for (file, opened) in [
        ("tiny.gguf", &gguf),
        ("model-00002-of-00002.safetensors", &dir.path().to_owned()),
        ("config.json", &dir.path().to_owned()),
    ] {
        write_gguf(&gguf, &case, Vec::new());
        let path = dir.path().join(file);
        let checkpoint = Checkpoint::open(opened).expect("opens");
        let why = refused_midway(&checkpoint, || {
            // The clock of some file systems stands still for some milliseconds.
            let later = std::time::SystemTime::now() + std::time::Duration::from_secs(3);
            let file = std::fs::File::options().write(true).open(&path).expect("there");
            file.set_modified(later).expect("a new time");
        });
        assert!(why.contains(file) && why.contains("changed while it was read"), "{why}");
    }
    for (file, opened) in
        [("tiny.gguf", &gguf), ("model-00001-of-00002.safetensors", &dir.path().to_owned())]
    {
        let checkpoint = Checkpoint::open(opened).expect("opens");
        let path = dir.path().join(file);
        let length = std::fs::metadata(&path).expect("there").len();
        let cut = std::fs::File::options().write(true).open(&path).expect("there");
        cut.set_len(length / 2).expect("cut");
        let why = refused_midway(&checkpoint, || ());
        assert!(why.contains(file) && why.contains("the file ends within tensor"), "{why}");
    }
    // What is cut already is not begun.
    for opened in [&gguf, &dir.path().to_owned()] {
        let error = Checkpoint::open(opened).map(|_| ()).expect_err("it is cut");
        assert_eq!(error.code, "invalid_model", "{error}");
        assert!(error.message.contains("outside the file's data"), "{error}");
    }
}

#[test]
fn headers_of_models_are_read_as_strictly_as_those_of_adapters() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    tiny::write(dir.path(), &json!({"model_type": "llama"}), Storage::Bf16, 1);
    let path = dir.path().join("model.safetensors");
    let good = std::fs::read(&path).expect("written");
    let size = u64::from_le_bytes(good[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = (&good[8..8 + size], &good[8 + size..]);
    let header = std::str::from_utf8(header).expect("text").trim_end();
    let with = |header: &str, more: &[u8]| {
        let size = (header.len() as u64).to_le_bytes();
        [&size[..], header.as_bytes(), data, more].concat()
    };
    let entries: Value = serde_json::from_str(header).expect("JSON");
    let norm = &entries["model.norm.weight"];
    let again = format!("{{\"model.norm.weight\":{norm},{}", &header[1..]);
    let there = norm["data_offsets"].to_string();
    let moved = header.replace(&there, "[0,0]");
    let odd = header.replacen("\"BF16\"", "\"F7\"", 1);
    std::fs::write(&path, with(header, &[])).expect("written");
    Checkpoint::open(dir.path()).expect("it is good so far");
    for (bytes, code, words) in [
        (with(&again, &[]), "invalid_model", "tensor `model.norm.weight` is in the file twice"),
        (with(header, &[0; 8]), "invalid_model", "8 bytes of data belong to no tensor"),
        (with(&moved, &[]), "invalid_model", "cannot lie at bytes 0..0"),
        (with(&odd, &[]), "unsupported_model", "is stored as F7"),
    ] {
        std::fs::write(&path, bytes).expect("written");
        let error = Checkpoint::open(dir.path()).map(|_| ()).expect_err(words);
        assert_eq!(error.code, code, "{error}");
        let named = error.message.contains("model.safetensors: ");
        assert!(named && error.message.contains(words), "{words}: {error}");
    }
}
