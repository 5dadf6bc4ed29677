//! What cannot be merged, and the reason that is given.

use crate::merge::sources::*;
use polylora::adapters::format::factors::{infer_shape, open};
use polylora::error::Error;
use polylora::merge::spec::{Method, Spec};
use polylora::merge::{check_bases, check_source};
use polylora::shape::{ModelShape, Projection};
use safetensors::tensor::TensorView;
use serde_json::json;
use std::path::Path;
use support::adapters::{Noise, Recipe, write_adapter};
use support::{golden_adapter, tiny};
use tempfile::TempDir;

fn refused(spec: &Spec, adapters: &[Adapter]) -> Error {
    match merged_in_steps(spec, adapters, 1) {
        Ok(_) => panic!("{spec:?} is merged"),
        Err(e) => e,
    }
}

#[test]
fn orders_that_cannot_be_are_refused_by_option() {
    let adapters = [adapter(4, &mut Noise(60)), adapter(4, &mut Noise(61))];
    type Spoil = fn(&mut Spec);
    let cases: [(&str, Method, Spoil); 13] = [
        ("`rank`", Method::Svd, |s| s.options.rank = Some(0)),
        ("`rank`", Method::Cat, |s| s.options.rank = Some(4)),
        ("`rank`", Method::Linear, |s| s.options.rank = Some(4)),
        ("`spread`", Method::Svd, |s| s.options.spread = true),
        ("`density`", Method::Ties, |s| s.options.density = 0.0),
        ("`density`", Method::Ties, |s| s.options.density = f64::NAN),
        ("`outliers`", Method::Breadcrumbs, |s| s.options.outliers = 1.0),
        ("`density` and `outliers`", Method::Breadcrumbs, |s| s.options.outliers = 0.6),
        ("`restarts`", Method::Lego, |s| s.options.restarts = 0),
        ("weight of s0", Method::Cat, |s| s.sources[0].weight = f64::INFINITY),
        ("two sources are named s0", Method::Cat, |s| s.sources[1].name = "s0".into()),
        ("add up to 1", Method::Slerp, |s| s.sources[0].weight = 0.4),
        ("add up to 1", Method::Interpolate, |s| s.sources[0].weight = -1.0),
    ];
    for (part, method, spoil) in cases {
        let mut order = spec(method, &[0.5, 0.5]);
        assert!(merged_in_steps(&order, &adapters, 1).is_ok(), "{method:?} as it was");
        spoil(&mut order);
        let e = refused(&order, &adapters);
        assert!(e.code == "invalid_merge" && e.message.contains(part), "{part}: {e:?}");
    }
    let e = Method::named("sum").expect_err("no such method");
    assert!(e.message.contains("dare_ties_svd") && e.message.contains("lego"), "{e}");
}

#[test]
fn factors_that_do_not_fit_the_method_are_refused_with_the_site() {
    let noise = &mut Noise(62);
    let (small, large) = (adapter(4, noise), adapter(5, noise));
    for method in [Method::Linear, Method::Ties, Method::MagnitudePrune] {
        let e = refused(&spec(method, &[1.0, 1.0]), &[small.clone(), large.clone()]);
        assert_eq!(e.code, "ranks_differ");
        assert!(e.message.contains("self_attn.q_proj") && e.message.contains("s1 has 5"), "{e}");
    }
    let e = refused(&spec(Method::Family, &[1.0, 1.0]), &[small.clone(), adapter(4, noise)]);
    assert!(e.code == "not_a_family" && e.message.contains("layers.0"), "{e}");

    let q = place(0, Projection::Q);
    let wide = Adapter::from([(q, factors(4, 41, 40, noise))]);
    let e = refused(&spec(Method::Svd, &[1.0, 1.0]), &[small.clone(), wide]);
    assert!(e.code == "base_mismatch" && e.message.contains("40 × 41"), "{e}");

    let many: Vec<Adapter> =
        (0..9).map(|_| Adapter::from([(q, factors(64, 40, 40, noise))])).collect();
    let e = refused(&spec(Method::Cat, &[1.0; 9]), &many);
    assert!(e.code == "rank_out_of_range" && e.message.contains("576"), "{e}");
    assert!(merged_in_steps(&spec(Method::Svd, &[1.0; 9]), &many, 1).is_ok());

    let mut huge = small.clone();
    huge.get_mut(&q).expect("q").b.iter_mut().for_each(|v| *v = 3e38);
    let e = refused(&spec(Method::Cat, &[1e6]), &[huge]);
    assert_eq!(e.code, "non_finite_values");
}

/// A small PEFT adapter of a model with this many outputs at k and v, in a directory of its own.
fn directory(kv_heads: usize) -> (TempDir, ModelShape) {
    let config = tiny::config(&json!({"model_type": "llama", "num_key_value_heads": kv_heads}));
    let shape = ModelShape::from_config(&config).expect("a shape");
    let dir = tempfile::tempdir().expect("directory");
    write_adapter(dir.path(), &shape, &Recipe::new(2, &[Projection::Q, Projection::V], 5));
    (dir, shape)
}

/// Adds a tensor of ones of `len` values to the adapter in `dir`.
fn add_tensor(dir: &Path, name: &str, len: usize) {
    let path = dir.join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).expect("tensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
    let ones = [1.0f32].repeat(len).iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let more = TensorView::new(safetensors::Dtype::F32, vec![len], &ones).expect("a view");
    let all = file.iter().map(|(n, v)| (n.to_owned(), v)).chain([(name.to_owned(), more)]);
    let written = safetensors::serialize(all, None).expect("tensors");
    std::fs::write(path, written).expect("written");
}

#[test]
fn what_is_no_product_of_factors_is_refused_by_tensor() {
    let check = |dir: &Path, part: &str| {
        let shape = infer_shape(&[dir]).expect("a shape");
        let adapter = open(dir, &shape).unwrap_or_else(|e| panic!("{part}: {e}"));
        let e = check_source("mine", &adapter).expect_err(part);
        assert!(e.code == "not_mergeable" && e.message.starts_with("mine holds"), "{e}");
        assert!(e.message.contains(part), "{part}: {e}");
    };
    check(&golden_adapter("sql"), "lora_magnitude_vector");
    check(&golden_adapter("lora-bias"), "lora_B.bias");
    let (dir, shape) = directory(1);
    let config = dir.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config).expect("config");
    let saved = "\"modules_to_save\":[\"input_layernorm\"],\"peft_type\"";
    std::fs::write(config, text.replace("\"peft_type\"", saved)).expect("written");
    add_tensor(dir.path(), "base_model.model.model.layers.0.input_layernorm.weight", shape.hidden);
    check(dir.path(), "input_layernorm");
}

#[test]
fn adapters_of_other_bases_are_refused() {
    let (one, other) = (directory(1).0, directory(2).0);
    let e = infer_shape(&[one.path(), other.path()]).expect_err("other sizes");
    assert!(e.code == "base_mismatch" && e.message.contains("v_proj"), "{e}");

    assert!(check_bases(&[("a", Some("x")), ("b", None), ("c", Some("x"))]).is_ok());
    let e = check_bases(&[("a", None), ("b", Some("x")), ("c", Some("y"))]).expect_err("two bases");
    assert!(e.code == "base_mismatch" && e.message.contains("`y`"), "{e}");
}

#[test]
fn a_value_that_is_not_finite_is_refused_by_name() {
    let (dir, _) = directory(1);
    let path = dir.path().join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&path).expect("tensors");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(path, bytes).expect("written");
    let adapter = open(dir.path(), &infer_shape(&[dir.path()]).expect("a shape")).expect("opened");
    let read = |(place, _): &_| adapter.read(*place).err();
    let e = adapter.modules().iter().find_map(read).expect("a NaN");
    assert!(e.code == "non_finite_values" && e.message.contains("_proj.lora_"), "{e}");
}
