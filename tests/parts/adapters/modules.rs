//! How modules are named and chosen: Python's patterns, exclusions, layers, prefixes.

use super::{load, refusal, with};
use serde_json::{Value, json};
use support::files::{Files, tiny};

#[test]
fn python_patterns_choose_modules_as_re_fullmatch_does() {
    for (pattern, fits) in [
        (r".*\.layers\.[01]\.self_attn\.(q|v)_proj", true),
        (r"model\.layers\.\d+\.self_attn\.(?:q|v)_proj\Z", true),
        (r"(?P<head>.*)\.(?=q|v)[a-z]_proj", true),
        (r"(?i)MODEL\..*_PROJ", true),
        (r".*[q[v]_proj", true),
        (r"model.layers.{1,2}self_attn.[qv]_proj", false),
        (r"model.layers.{,2}.self_attn.[qv]_proj", true),
        (r".*q_proj|.*v_proj", true),
        (r"self_attn\.[qv]_proj", false),
        (r".*\.q_proj", false),
    ] {
        let mut files = Files::plain(3);
        files.set("target_modules", json!(pattern));
        match load(&files, &tiny()) {
            Ok(_) => assert!(fits, "{pattern}"),
            Err(e) => assert!(!fits && e.code == "unknown_tensor", "{pattern}: {e}"),
        }
    }
    for pattern in [r"(?(1)a|b)", r"(?x)a b", r"\Kabc", r"\p{L}", "(", r"a\", r"[a--b]", r"(?<n>a)"]
    {
        let mut files = Files::plain(3);
        files.set("target_modules", json!(pattern));
        assert_eq!(refusal(&files, "target_modules"), "invalid_adapter_config", "{pattern}");
    }
}

#[test]
fn a_pattern_that_backtracks_without_end_is_an_error() {
    let mut files = Files::plain(3);
    files.set("target_modules", json!(r"(?=(.+)+\1$)(.*.*.*.*.*.*)*(?!.)x\1"));
    let code = refusal(&files, "it takes too many steps");
    assert_eq!(code, "invalid_adapter_config");
}

#[test]
fn exclusions_and_layer_restrictions_leave_modules_out() {
    let cases: [(Value, bool); 8] = [
        (json!({"layers_to_transform": [0, 1]}), true),
        (json!({"layers_to_transform": 1}), false),
        (json!({"layers_to_transform": [0, 1], "layers_pattern": "layers"}), true),
        (json!({"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}), true),
        (json!({"layers_to_transform": [0, 1], "layers_pattern": ["h"]}), false),
        (json!({"exclude_modules": ["k_proj"]}), true),
        (json!({"exclude_modules": r".*layers\.1\..*"}), false),
        (json!({"target_modules": "all-linear"}), true),
    ];
    for (change, fits) in cases {
        let mut files = Files::plain(3);
        files.config = with(&files.config, change.clone());
        match load(&files, &tiny()) {
            Ok(_) => assert!(fits, "{change}"),
            Err(e) => assert!(!fits && e.code == "unknown_tensor", "{change}: {e}"),
        }
    }
}

#[test]
fn known_prefixes_lead_to_the_same_modules_and_mixing_them_is_refused() {
    for (from, to) in [
        ("base_model.model.model.", "model."),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.model.", "base_model.model.model.language_model."),
        ("base_model.model.model.", "base_model.model.language_model.model."),
    ] {
        let mut files = Files::plain(3);
        files.tensors.iter_mut().for_each(|t| t.0 = t.0.replacen(from, to, 1));
        let (summary, _) = load(&files, &tiny()).unwrap_or_else(|e| panic!("{to}: {e}"));
        assert_eq!(summary.sites, 4);
    }
    let mut files = Files::plain(3);
    let again = files.tensors[0].clone();
    files.tensors.push((again.0.replacen("base_model.model.", "", 1), again.1, again.2));
    assert_eq!(refusal(&files, "q_proj"), "duplicate_tensor");
}
