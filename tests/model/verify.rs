//! `polylora verify`: our logits against candle-transformers', with and without adapters.
//!
//! Owns the proof that the comparison passes where it should and fails where it should. Never
//! checks what adapters are allowed.

use polylora::checkpoint::Checkpoint;
use polylora::cli::verify;
use polylora_kernels::Dtype;
use safetensors::Dtype::F32;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::Path;
use support::tiny::{self, Storage};

fn tiny_checkpoint(case: &Value, storage: Storage) -> Checkpoint {
    let dir = tempfile::tempdir().expect("a temporary directory");
    tiny::write(dir.path(), case, storage, 2);
    // Kept: tensors are read from the files when they are asked for.
    Checkpoint::open(&dir.keep()).expect("a tiny model opens")
}

fn check(checkpoint: &Checkpoint, adapter: Option<&Path>, what: &Value) {
    let report = verify::compare(checkpoint, adapter, Dtype::F32).expect("a report");
    for row in &report.rows {
        assert!(row.difference_max < 2e-4, "{what}: {row:?}");
        assert_eq!(row.agreed, row.positions, "{what}");
    }
    assert!(report.passed() && report.rows.len() >= 3);
}

/// What candle's models can express. Windows are longer than the prompts, because candle's are one
/// longer than those of transformers (which golden logits cover).
#[test]
fn verify_finds_tiny_models_equal_to_candle() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    for case in [
        json!({"model_type": "llama", "rope_scaling": llama3}),
        json!({"model_type": "llama", "rope_scaling": linear, "tie_word_embeddings": true}),
        json!({"model_type": "mistral", "head_dim": 32, "sliding_window": 64}),
        json!({"model_type": "qwen2"}),
        json!({"model_type": "qwen3", "head_dim": 32}),
        // A hidden size whose square root is not a bf16 number.
        json!({"model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32,
               "sliding_window": 64, "sliding_window_pattern": 2, "num_hidden_layers": 4,
               "hidden_size": 80, "tie_word_embeddings": true}),
    ] {
        check(&tiny_checkpoint(&case, Storage::F32), None, &case);
    }
}

#[test]
fn verify_refuses_what_candle_lacks_by_name() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0});
    let case = json!({"model_type": "llama", "rope_scaling": yarn});
    let checkpoint = tiny_checkpoint(&case, Storage::F32);
    let error = verify::compare(&checkpoint, None, Dtype::F32).expect_err("no reference");
    assert_eq!(error.code, "unsupported_reference");
    assert!(error.message.contains("Yarn"), "{error}");
}

#[test]
fn verify_shows_what_rounding_to_bf16_costs() {
    let checkpoint = tiny_checkpoint(&json!({"model_type": "llama"}), Storage::Bf16);
    let exact = verify::compare(&checkpoint, None, Dtype::F32).expect("a report");
    let rounded = verify::compare(&checkpoint, None, Dtype::Bf16).expect("a report");
    let worst = |r: &verify::Report| r.rows.iter().map(|r| r.difference_max).fold(0.0, f32::max);
    assert!(worst(&rounded) > 10.0 * worst(&exact));
    assert!(rounded.passed(), "{}", rounded.table());
    let strict = verify::Report { tolerance: worst(&rounded) / 2.0, ..rounded };
    assert!(!strict.passed() && strict.table().contains("DIFFERENT"));
}

/// A PEFT directory that changes some modules of a tiny model (hidden 64, kv width 32).
fn write_adapter(dir: &Path, config: &Value, factors: &[(&str, usize, [usize; 2])]) {
    let mut full = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "fan_in_fan_out": false, "init_lora_weights": true,
    });
    let names = factors.iter().map(|(module, ..)| module.rsplit('.').next());
    full["target_modules"] = names.collect();
    for (key, value) in config.as_object().expect("an object") {
        full[key] = value.clone();
    }
    std::fs::write(dir.join("adapter_config.json"), full.to_string()).expect("written");
    let dora = full["use_dora"] == true;
    let mut tensors = Vec::new();
    for (module, rank, [outputs, inputs]) in factors {
        let name = |part: &str| format!("base_model.model.{module}.{part}");
        tensors.push((name("lora_A.weight"), vec![*rank, *inputs]));
        tensors.push((name("lora_B.weight"), vec![*outputs, *rank]));
        if dora {
            tensors.push((name("lora_magnitude_vector"), vec![*outputs]));
        }
    }
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(name, dims)| {
            let salt = name.len() as f32;
            let lift = if name.ends_with("vector") { 1.5 } else { 0.0 };
            let value = |i: usize| ((i as f32 * 0.7 + salt).sin() * 0.2 + lift).to_le_bytes();
            (0..dims.iter().product()).flat_map(value).collect()
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, dims), data)| {
        let view = TensorView::new(F32, dims.clone(), data).expect("dims fit the values");
        (name.clone(), view)
    });
    let path = dir.join("adapter_model.safetensors");
    safetensors::serialize_to_file(views, None, &path).expect("written");
}

#[test]
fn verify_with_an_adapter_is_equal_to_candle_with_merged_weights() {
    let q = ("model.layers.0.self_attn.q_proj", 2, [64, 64]);
    let v = ("model.layers.2.self_attn.v_proj", 4, [32, 64]);
    let down = ("model.layers.1.mlp.down_proj", 4, [64, 96]);
    let head = ("lm_head", 4, [128, 64]);
    let patterns = json!({"rank_pattern": {"q_proj": 2},
                          "alpha_pattern": {"layers.2.self_attn.v_proj": 2, "v_proj": 16}});
    for (model, adapter, factors) in [
        (json!({"model_type": "llama"}), patterns, vec![q, v, down]),
        (
            json!({"model_type": "qwen2"}),
            json!({"use_dora": true, "r": 4, "rank_pattern": {"q_proj": 2}}),
            vec![q, v, down],
        ),
        (json!({"model_type": "llama"}), json!({"use_rslora": true}), vec![v, down, head]),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_adapter(dir.path(), &adapter, &factors);
        let checkpoint = tiny_checkpoint(&model, Storage::F32);
        check(&checkpoint, Some(dir.path()), &adapter);
    }
}
