//! Tiny models written to disk: every weight is a formula of its name, so tests and
//! `golden/make_models.py` agree on them.
//!
//! Owns the formula and the file layout of a Hugging Face directory. Never knows an expected
//! result.

use half::bf16;
use polylora::shape::{ModelShape, Norm, Projection, Site};
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::Path;

/// A tensor of a checkpoint, row-major.
pub struct Tensor {
    pub name: String,
    pub dims: Vec<usize>,
    pub values: Vec<f32>,
}

/// How tensors are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    F32,
    Bf16,
}

/// The keys all tiny models share, overridden by those of `case`. A vocabulary of 128, contexts of
/// 128.
pub fn config(case: &Value) -> Value {
    let mut config = json!({
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
    });
    for (key, value) in case.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

/// Numbers in [-0.5, 0.5) with 24 bits each, from the name (FNV-1a) and the index (SplitMix64).
pub fn uniform(name: &str, count: usize) -> impl Iterator<Item = f32> + use<> {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    (1..=count as u64).map(move |i| {
        let mut x = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        (x >> 40) as f32 / (1 << 24) as f32 - 0.5
    })
}

/// All tensors of a model of this shape.
pub fn tensors(shape: &ModelShape) -> Vec<Tensor> {
    let mut out = Vec::new();
    let mut add = |name: String, dims: Vec<usize>| {
        let count = dims.iter().product();
        let (scale, offset) = match &name {
            n if n.ends_with("norm.weight") => (0.5, if shape.norm_plus_one { 0.0 } else { 1.0 }),
            n if n.contains("embed_tokens") => (2.0, 0.0),
            _ => (0.5, 0.0),
        };
        let values = uniform(&name, count).map(|u| u * scale + offset).collect();
        out.push(Tensor { name, dims, values });
    };
    add("model.embed_tokens.weight".into(), vec![shape.vocab, shape.hidden]);
    for l in 0..shape.layers {
        for p in Projection::ALL {
            let (inputs, outputs) = shape.site_dims(Site::Layer(l, p));
            let module = format!("model.layers.{l}.{}", p.module());
            add(format!("{module}.weight"), vec![outputs, inputs]);
            let bias = match p {
                Projection::Q | Projection::K | Projection::V => shape.qkv_bias,
                Projection::O => shape.o_bias,
                _ => shape.mlp_bias,
            };
            if bias {
                add(format!("{module}.bias"), vec![outputs]);
            }
        }
        for (name, width) in layer_norms(shape, l) {
            add(format!("model.layers.{l}.{name}.weight"), vec![width]);
        }
    }
    add("model.norm.weight".into(), vec![shape.hidden]);
    if !shape.tied_head {
        add("lm_head.weight".into(), vec![shape.vocab, shape.hidden]);
    }
    out
}

fn layer_norms(shape: &ModelShape, layer: usize) -> Vec<(&'static str, usize)> {
    let all = [
        (Norm::Input(layer), "input_layernorm", true),
        (Norm::PostAttention(layer), "post_attention_layernorm", true),
        (Norm::PreFeedforward(layer), "pre_feedforward_layernorm", shape.post_norms),
        (Norm::PostFeedforward(layer), "post_feedforward_layernorm", shape.post_norms),
        (Norm::Query(layer), "self_attn.q_norm", shape.qk_norm),
        (Norm::Key(layer), "self_attn.k_norm", shape.qk_norm),
    ];
    let present = all.into_iter().filter(|(.., there)| *there);
    present
        .map(|(norm, name, _)| match norm {
            Norm::Query(_) | Norm::Key(_) => (name, shape.head_dim),
            _ => (name, shape.hidden),
        })
        .collect()
}

/// Writes config, tokenizer, template and weights (`shards` files) of the model that `case`
/// describes.
pub fn write(dir: &Path, case: &Value, storage: Storage, shards: usize) {
    let config = config(case);
    let shape = ModelShape::from_config(&config).expect("a supported config");
    write_json(dir, "config.json", &config);
    write_json(dir, "tokenizer.json", &tokenizer());
    let template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}\
                    {% if add_generation_prompt %}assistant: {% endif %}";
    let own = json!({"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template});
    write_json(dir, "tokenizer_config.json", &own);
    write_json(dir, "generation_config.json", &json!({"eos_token_id": [2]}));
    let tensors = tensors(&shape);
    if shards == 1 {
        return write_shard(&dir.join("model.safetensors"), &tensors, storage);
    }
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
        write_shard(&dir.join(&file), part, storage);
        for t in part {
            map.insert(t.name.clone(), json!(file));
        }
    }
    let index = json!({"metadata": {}, "weight_map": map});
    write_json(dir, "model.safetensors.index.json", &index);
}

fn write_json(dir: &Path, name: &str, value: &Value) {
    std::fs::write(dir.join(name), value.to_string()).expect("writing to a temporary directory");
}

fn write_shard(path: &Path, tensors: &[Tensor], storage: Storage) {
    let bytes = |t: &Tensor| -> Vec<u8> {
        let values = t.values.iter();
        match storage {
            Storage::F32 => values.flat_map(|v| v.to_le_bytes()).collect(),
            Storage::Bf16 => values.flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    };
    let dtype = match storage {
        Storage::F32 => safetensors::Dtype::F32,
        Storage::Bf16 => safetensors::Dtype::BF16,
    };
    let data: Vec<Vec<u8>> = tensors.iter().map(bytes).collect();
    let views = tensors.iter().zip(&data).map(|(t, d)| {
        let view = TensorView::new(dtype, t.dims.clone(), d).expect("dims fit the values");
        (t.name.clone(), view)
    });
    safetensors::serialize_to_file(views, None, path).expect("writing to a temporary directory");
}

/// One token per ASCII byte, the id being the byte; 1 is `<bos>` and 2 is `<eos>`.
fn tokenizer() -> Value {
    let token = |byte: u32| match byte {
        1 => "<bos>".to_owned(),
        2 => "<eos>".to_owned(),
        33..=126 => char::from_u32(byte).expect("ASCII").to_string(),
        127 => '\u{121}'.to_string(),
        other => char::from_u32(256 + other).expect("a letter").to_string(),
    };
    let vocab: serde_json::Map<String, Value> = (0..128).map(|b| (token(b), json!(b))).collect();
    let special = |id: u32| {
        json!({"id": id, "content": token(id), "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                       "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(1), special(2)],
        "pre_tokenizer": bytes, "decoder": bytes, "post_processor": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}
