//! What is refused, under which code, and what the message names.

use super::{load, refusal};
use polylora::adapters::BaseRows;
use polylora::adapters::format::{check, prepare};
use polylora::error::Error;
use polylora_kernels::Dtype;
use serde_json::{Value, json};
use std::sync::Arc;
use support::files::{Files, base_bias, tiny, values};
use support::gguf::{Meta, gguf, head};

/// A safetensors file from header entries as written, for headers that no library would make.
fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

#[test]
fn config_fields_that_change_the_arithmetic_are_refused_by_name() {
    for (field, value, code) in [
        ("peft_type", json!("VERA"), "unsupported_peft_type"),
        ("peft_type", Value::Null, "invalid_adapter_config"),
        ("target_parameters", json!(["experts"]), "unsupported_config_field"),
        ("trainable_token_indices", json!([1]), "unsupported_config_field"),
        ("layer_replication", json!([[0, 1]]), "unsupported_config_field"),
        ("alora_invocation_tokens", json!([1]), "unsupported_config_field"),
        ("use_qalora", json!(true), "unsupported_config_field"),
        ("kasa_config", json!({"a": 1}), "unsupported_config_field"),
        ("loftq_config", json!({"bits": 4}), "unsupported_config_field"),
        ("fan_in_fan_out", json!(true), "unsupported_config_field"),
        ("invented_next_year", json!(0), "unsupported_config_field"),
        ("init_lora_weights", json!("pissa_niter_4"), "base_weights_changed"),
        ("init_lora_weights", json!("olora"), "base_weights_changed"),
        ("r", json!(513), "rank_out_of_range"),
        ("r", json!(0), "rank_out_of_range"),
        ("rank_pattern", json!({"q_proj": 1024}), "rank_out_of_range"),
        ("lora_alpha", json!("8"), "invalid_adapter_config"),
        ("use_dora", json!("yes"), "invalid_adapter_config"),
        ("bias", json!("some"), "invalid_adapter_config"),
        ("target_modules", Value::Null, "invalid_adapter_config"),
        ("target_modules", json!(["q_proj", "v_proj", "w_proj"]), "target_not_found"),
        ("modules_to_save", json!(["lm_head"]), "unsupported_modules_to_save"),
        ("modules_to_save", json!(["score"]), "unsupported_modules_to_save"),
    ] {
        let mut files = Files::plain(3);
        files.set(field, value.clone());
        assert_eq!(refusal(&files, field), code, "{field} = {value}");
    }
    let mut files = Files::plain(3);
    for neutral in ["eva_config", "invented_next_year", "use_bdlora", "layer_replication"] {
        files.set(neutral, Value::Null);
    }
    files.set("init_lora_weights", json!("eva")).set("loftq_config", json!({}));
    files.set("lora_dropout", json!(0.1)).set("megatron_core", json!("megatron.core"));
    load(&files, &tiny()).unwrap();
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    type Change = fn(&mut Files);
    let cases: [(Change, &str, &str); 16] = [
        (
            |f| {
                f.drop_tensor("0.self_attn.q_proj.lora_B");
            },
            "missing_factor",
            "lora_A",
        ),
        (
            |f| {
                f.drop_tensor("0.self_attn.q_proj.lora_A");
            },
            "missing_factor",
            "lora_B",
        ),
        (
            |f| {
                f.set("use_dora", json!(true));
            },
            "missing_factor",
            "lora_magnitude_vector",
        ),
        (
            |f| {
                f.set("lora_bias", json!(true));
            },
            "missing_factor",
            "lora_B.bias",
        ),
        (
            |f| {
                f.factors("model.layers.2.self_attn.q_proj", 2, 8, 8, 1);
            },
            "layer_out_of_range",
            "layers.2.",
        ),
        (
            |f| {
                f.factors("model.layers.0.self_attn.qq_proj", 2, 8, 8, 1);
            },
            "unknown_tensor",
            "`model.layers.0.self_attn.q_proj`",
        ),
        (
            |f| {
                f.factors("model.layers.0.mlp.up_proj", 2, 8, 12, 1);
            },
            "unknown_tensor",
            "up_proj",
        ),
        (
            |f| {
                f.push("model.norm.weight", &[8], vec![1.0; 8]);
            },
            "unknown_tensor",
            "model.norm",
        ),
        (
            |f| {
                f.push("model.layers.0.self_attn.q_proj.bias", &[8], vec![1.0; 8]);
            },
            "unknown_tensor",
            "q_proj.bias",
        ),
        (
            |f| {
                f.push("model.layers.0.self_attn.q_proj.base_layer.weight", &[8, 8], vec![1.0; 64]);
            },
            "unknown_tensor",
            "base_layer",
        ),
        (
            |f| {
                f.push("model.layers.0.self_attn.q_proj.lora_magnitude_vector", &[8], vec![1.0; 8]);
            },
            "unknown_tensor",
            "use_dora",
        ),
        (|f| f.get("q_proj.lora_A").1 = vec![8, 2], "shape_mismatch", "expected [2, 8]"),
        (
            |f| {
                f.set("r", json!(4));
            },
            "shape_mismatch",
            "expected [4, 8]",
        ),
        (|f| f.get("q_proj.lora_B").2[5] = f32::NAN, "non_finite_values", "index 5"),
        (|f| f.get("v_proj.lora_A").2[3] = f32::INFINITY, "non_finite_values", "v_proj.lora_A"),
        (|f| f.tensors.clear(), "target_not_found", "q_proj"),
    ];
    for (change, code, needle) in cases {
        let mut files = Files::plain(3);
        change(&mut files);
        assert_eq!(refusal(&files, needle), code, "{needle}");
    }
}

#[test]
fn a_dora_row_without_a_norm_is_refused() {
    let mut files = Files::plain(3);
    files.set("use_dora", json!(true)).set("target_modules", json!(["q_proj"]));
    files.drop_tensor("v_proj").drop_tensor("layers.1");
    files.push("model.layers.0.self_attn.q_proj.lora_magnitude_vector", &[8], vec![1.0; 8]);
    files.get("lora_B").2.fill(0.0);
    let dir = tempfile::tempdir().unwrap();
    files.write(dir.path());
    let zero: BaseRows = Arc::new(|_, _, out| out.fill(0.0));
    let shape = tiny();
    let got = prepare(dir.path(), &shape, Dtype::F32, &zero, &base_bias(&shape));
    assert_eq!(got.map(|_| ()).unwrap_err().code, "non_finite_values");
}

fn check_bytes(file: &str, bytes: &[u8]) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let files = Files::plain(3);
    if file.ends_with(".safetensors") {
        files.write(dir.path());
    }
    std::fs::write(dir.path().join(file), bytes).unwrap();
    check(dir.path(), &tiny()).expect_err("refused")
}

#[test]
fn damaged_safetensors_are_refused() {
    let good = Files::plain(3).safetensors();
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |a: &str, b: &str, second: &str| {
        let t = |o: &str| format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{o}}}"#);
        format!(r#"{{"x":{},"{second}":{}}}"#, t(a), t(b))
    };
    let cases: [(Vec<u8>, &str); 13] = [
        (Vec::new(), "invalid_safetensors"),
        (good[..20].to_vec(), "invalid_safetensors"),
        (good[..good.len() - 1].to_vec(), "invalid_safetensors"),
        ([good.clone(), vec![0]].concat(), "invalid_safetensors"),
        (raw_safetensors("[]", &[]), "invalid_safetensors"),
        (raw_safetensors(&one("F32", "[1]", "[0,8]"), &[0; 8]), "invalid_safetensors"),
        (
            raw_safetensors(&one("F32", "[4611686018427387904,4]", "[0,0]"), &[]),
            "invalid_safetensors",
        ),
        (raw_safetensors(&one("F32", "[1]", "[4,0]"), &[0; 4]), "invalid_safetensors"),
        (
            raw_safetensors(
                &one("F32", "[1]", "[18446744073709551612,18446744073709551615]"),
                &[0; 4],
            ),
            "invalid_safetensors",
        ),
        (raw_safetensors(&one("I64", "[1]", "[0,8]"), &[0; 8]), "unsupported_dtype"),
        (raw_safetensors(&two("[0,4]", "[2,6]", "y"), &[0; 6]), "invalid_safetensors"),
        (raw_safetensors(&two("[0,4]", "[4,8]", "x"), &[0; 8]), "duplicate_tensor"),
        (raw_safetensors(&two("[0,4]", "[8,12]", "y"), &[0; 12]), "invalid_safetensors"),
    ];
    for (i, (bytes, code)) in cases.iter().enumerate() {
        let error = check_bytes("adapter_model.safetensors", bytes);
        assert_eq!(error.code, *code, "case {i}: {error}");
    }
    let mut huge = good;
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let error = check_bytes("adapter_model.safetensors", &huge);
    assert_eq!(error.code, "invalid_safetensors");
}

#[test]
fn gguf_adapters_that_do_not_fit_are_refused() {
    let a = ("blk.0.attn_v.weight.lora_a", vec![8, 2], values(1, 16));
    let b = ("blk.0.attn_v.weight.lora_b", vec![2, 4], values(2, 8));
    let file = |head: Vec<(&str, Meta)>, tensors: &[(&str, Vec<u64>, Vec<f32>)]| {
        check_bytes("adapter.gguf", &gguf(&head, tensors)).code
    };
    let both = [a.clone(), b.clone()];
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter.gguf"), gguf(&head("llama"), &both)).unwrap();
    assert_eq!(check(dir.path(), &tiny()).unwrap().sites, 1);

    assert_eq!(file(head("qwen2"), &both), "architecture_mismatch");
    let mut alora = head("llama");
    alora.push(("adapter.alora.invocation_tokens", Meta::U32s(vec![1, 2])));
    assert_eq!(file(alora, &both), "unsupported_config_field");
    assert_eq!(file(head("llama")[1..].iter().map(copy).collect(), &both), "invalid_gguf");
    assert_eq!(file(head("llama")[..3].iter().map(copy).collect(), &both), "invalid_gguf");
    assert_eq!(file(head("llama"), std::slice::from_ref(&a)), "missing_factor");
    let renamed = |t: &(&'static str, Vec<u64>, Vec<f32>), name| (name, t.1.clone(), t.2.clone());
    let unknown = renamed(&a, "blk.0.attn_norm.weight");
    assert_eq!(file(head("llama"), &[a.clone(), b.clone(), unknown]), "unknown_tensor");
    let beyond = renamed(&a, "blk.2.attn_v.weight.lora_a");
    assert_eq!(file(head("llama"), &[beyond]), "layer_out_of_range");
    let turned = (a.0, vec![2, 8], a.2.clone());
    assert_eq!(file(head("llama"), &[turned, b.clone()]), "shape_mismatch");
    assert_eq!(file(head("llama"), &[a.clone(), a.clone(), b.clone()]), "duplicate_tensor");
    let whole = gguf(&head("llama"), &both);
    for end in [0, 4, 20, 100, whole.len() - 40] {
        assert_eq!(check_bytes("adapter.gguf", &whole[..end]).code, "invalid_gguf", "{end}");
    }
}

fn copy(entry: &(&'static str, Meta)) -> (&'static str, Meta) {
    let value = match &entry.1 {
        Meta::Text(s) => Meta::Text(s),
        Meta::F32(v) => Meta::F32(*v),
        Meta::U32s(v) => Meta::U32s(v.clone()),
    };
    (entry.0, value)
}

#[test]
fn pickles_links_and_mixtures_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let code = || check(dir.path(), &tiny()).map(|_| ()).unwrap_err().code;
    assert_eq!(code(), "missing_file");
    let files = Files::plain(3);
    std::fs::write(dir.path().join("adapter_config.json"), files.config.to_string()).unwrap();
    assert_eq!(code(), "missing_file");
    std::fs::write(dir.path().join("adapter_model.bin"), b"\x80\x02").unwrap();
    assert_eq!(code(), "pickle_not_allowed");
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(elsewhere.path(), files.safetensors()).unwrap();
    let tensors = dir.path().join("adapter_model.safetensors");
    std::os::unix::fs::symlink(elsewhere.path(), &tensors).unwrap();
    assert_eq!(code(), "not_a_regular_file");
    std::fs::remove_file(&tensors).unwrap();
    std::fs::write(&tensors, files.safetensors()).unwrap();
    check(dir.path(), &tiny()).unwrap();
    std::fs::write(dir.path().join("x.gguf"), b"GGUF").unwrap();
    assert_eq!(code(), "ambiguous_adapter");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(400))]

    /// Whatever bytes arrive, the answer is a refusal or a whole adapter, never a panic.
    #[test]
    fn mangled_files_never_panic(at in 0usize..4000, byte: u8, cut in 0usize..4000, as_gguf: bool) {
        let (name, mut bytes) = if as_gguf {
            let a = ("blk.0.attn_v.weight.lora_a", vec![8, 2], values(1, 16));
            let b = ("blk.0.attn_v.weight.lora_b", vec![2, 4], values(2, 8));
            ("adapter.gguf", gguf(&head("llama"), &[a, b]))
        } else {
            ("adapter_model.safetensors", Files::plain(3).safetensors())
        };
        let at = at % bytes.len();
        bytes[at] = byte;
        if cut < bytes.len() && cut % 3 == 0 {
            bytes.truncate(cut);
        }
        let dir = tempfile::tempdir().unwrap();
        if !as_gguf {
            Files::plain(3).write(dir.path());
        }
        std::fs::write(dir.path().join(name), bytes).unwrap();
        let _ = check(dir.path(), &tiny());
    }
}
