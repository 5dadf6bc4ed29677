//! What lies beside the factors: which files count, what is read of them, what is refused.

use polylora::adapters::format::bundle::{self, Bundle, Template};
use polylora::adapters::format::files::AdapterFiles;
use polylora::adapters::format::generation::Generation;
use polylora::adapters::format::{Summary, check_upload};
use polylora::error::Result;
use serde_json::{Value, json};
use std::path::Path;
use support::files::{Files, base_text, tiny};
use tempfile::TempDir;

/// A good adapter with these files beside it.
fn folder(beside: &[(&str, String)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    Files::plain(3).write(dir.path());
    for (name, text) in beside {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn read(dir: &Path) -> Result<Bundle> {
    bundle::read_bundle(dir, &AdapterFiles::find(dir)?, &base_text())
}

fn template(beside: &[(&str, String)]) -> Option<Template> {
    read(folder(beside).path()).unwrap().template
}

/// `code param` of the refusal; the message must hold `needle`.
fn refusal(beside: &[(&str, String)], needle: &str) -> String {
    let dir = folder(beside);
    let error = check_upload(dir.path(), &tiny(), &base_text()).map(|_| ()).expect_err(needle);
    assert!(error.message.contains(needle), "{needle:?} is not in {:?}", error.message);
    format!("{} {}", error.code, error.param.unwrap_or_default())
}

fn config(fields: Value) -> (&'static str, String) {
    ("tokenizer_config.json", fields.to_string())
}

fn jinja(text: &str) -> (&'static str, String) {
    ("chat_template.jinja", text.to_owned())
}

fn generation(fields: Value) -> (&'static str, String) {
    ("generation_config.json", fields.to_string())
}

#[test]
fn files_that_say_nothing_leave_the_digest_alone_and_those_that_count_change_it() {
    let digest = |beside: &[(&str, String)]| {
        AdapterFiles::find(folder(beside).path()).unwrap().digest().unwrap()
    };
    let plain = digest(&[]);
    let silent = config(json!({"model_max_length": 2048, "chat_template": null}));
    let tokenizer = ("tokenizer.json", json!({"added_tokens": []}).to_string());
    assert_eq!(digest(&[silent.clone(), tokenizer, ("README.md", "#".into())]), plain);

    let mut all = vec![
        plain,
        digest(&[jinja("a")]),
        digest(&[jinja("b")]),
        digest(&[config(json!({"chat_template": "a"}))]),
        digest(&[jinja("a"), silent]),
        digest(&[generation(json!({"top_k": 5}))]),
        digest(&[generation(json!({"top_k": 6}))]),
    ];
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 7, "each content has its own digest");
}

#[test]
fn a_template_is_found_where_transformers_puts_it() {
    assert_eq!(template(&[]), None);
    assert_eq!(template(&[config(json!({"eos_token": "b"}))]), None, "no template, nothing to say");
    let own = json!({"chat_template": "old", "bos_token": "a", "eos_token": {"content": "b"}});
    let found = template(&[config(own.clone())]).unwrap();
    let token = |t: &str| Some(t.to_owned());
    let expected = Template { text: "old".into(), bos_token: token("a"), eos_token: token("b") };
    assert_eq!(found, expected);
    let newer = template(&[config(own), jinja("new")]).unwrap();
    assert_eq!(newer, Template { text: "new".into(), ..expected });
    let list = json!([{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]);
    let found = template(&[config(json!({"chat_template": list.clone()}))]).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&found.text).unwrap(), list);
}

#[test]
fn the_eos_of_a_chat_adapter_ends_answers_unless_its_generation_config_says_otherwise() {
    let own = || config(json!({"chat_template": "t", "eos_token": "c"}));
    let read = |beside: &[(&str, String)]| read(folder(beside).path()).unwrap().generation;
    assert_eq!(read(&[own()]).stop_tokens_more, [2]);
    let both = read(&[own(), generation(json!({"eos_token_id": [7]}))]);
    assert_eq!((both.stop_tokens, both.stop_tokens_more), (Some(vec![7]), vec![]));
}

#[test]
fn templates_and_tokenizer_configs_that_cannot_be_are_refused_by_name() {
    let template = "invalid_chat_template chat_template";
    assert_eq!(refusal(&[jinja("")], "empty"), "invalid_chat_template ");
    assert_eq!(refusal(&[jinja(&"x".repeat(300_000))], "chat_template.jinja"), template_code());
    assert_eq!(refusal(&[config(json!({"chat_template": 5}))], "neither text nor"), template);
    let broken = ("tokenizer_config.json", "{\"chat_template\": ".to_owned());
    assert_eq!(refusal(&[broken], "line 1 column"), "invalid_tokenizer_config ");
    let list = ("tokenizer_config.json", "[]".to_owned());
    assert_eq!(refusal(&[list], "no object"), "invalid_tokenizer_config ");
    let twice = ("tokenizer_config.json", "{\"eos_token\":1,\"eos_token\":2}".to_owned());
    assert_eq!(refusal(&[twice], "duplicate field"), "invalid_tokenizer_config ");
}

fn template_code() -> &'static str {
    "invalid_chat_template "
}

#[test]
fn generation_defaults_are_read_in_full() {
    let file = generation(json!({
        "_from_model_config": true, "transformers_version": "5.0", "do_sample": true,
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
        "max_new_tokens": 99, "eos_token_id": 3, "pad_token_id": 0, "stop_strings": ["END"],
        "num_beams": 1, "length_penalty": 1.0, "bad_words_ids": null, "use_cache": true,
        "max_length": 20, "renormalize_logits": false, "suppress_tokens": [],
    }));
    let expected = Generation {
        temperature: Some(0.6),
        top_p: Some(0.9),
        top_k: Some(20),
        min_p: Some(0.05),
        repetition_penalty: Some(1.1),
        tokens_max: Some(99),
        stop_tokens: Some(vec![3]),
        stop_tokens_more: vec![],
        stops: vec!["END".into()],
    };
    let dir = folder(&[file]);
    let summary = check_upload(dir.path(), &tiny(), &base_text()).unwrap();
    assert_eq!(summary.generation, expected);
    let greedy = folder(&[generation(json!({"do_sample": false, "temperature": 0.7}))]);
    assert_eq!(read(greedy.path()).unwrap().generation.temperature, Some(0.0));
    let json = serde_json::to_value(&summary).unwrap();
    assert_eq!(serde_json::from_value::<Summary>(json.clone()).unwrap(), summary);
    // What an older program stored has neither.
    let mut old = json;
    old.as_object_mut().unwrap().retain(|k, _| k != "generation" && k != "chat_template");
    assert!(serde_json::from_value::<Summary>(old).unwrap().generation.is_empty());
}

#[test]
fn a_generation_field_that_cannot_be_applied_is_refused_by_name() {
    for (field, value, code) in [
        ("temperature", json!(2.5), "invalid_generation_config"),
        ("temperature", json!("hot"), "invalid_generation_config"),
        ("top_p", json!(0), "invalid_generation_config"),
        ("top_k", json!(-1), "invalid_generation_config"),
        ("min_p", json!(1.5), "invalid_generation_config"),
        ("repetition_penalty", json!(0), "invalid_generation_config"),
        ("max_new_tokens", json!(0), "invalid_generation_config"),
        ("max_new_tokens", json!(1e30), "invalid_generation_config"),
        ("do_sample", json!(1), "invalid_generation_config"),
        ("eos_token_id", json!(10), "invalid_generation_config"),
        ("eos_token_id", json!([1, -2]), "invalid_generation_config"),
        ("eos_token_id", json!(vec![1; 17]), "invalid_generation_config"),
        ("stop_strings", json!([""]), "invalid_generation_config"),
        ("stop_strings", json!(5), "invalid_generation_config"),
        ("num_beams", json!(4), "unsupported_generation_field"),
        ("no_repeat_ngram_size", json!(3), "unsupported_generation_field"),
        ("max_length", json!(32), "unsupported_generation_field"),
        ("suppress_tokens", json!([1]), "unsupported_generation_field"),
        ("renormalize_logits", json!(true), "unsupported_generation_field"),
        ("invented_next_year", json!(0), "unsupported_generation_field"),
    ] {
        let file = generation(json!({field: value}));
        assert_eq!(refusal(&[file], field), format!("{code} {field}"), "{value}");
    }
    let list = ("generation_config.json", "[]".to_owned());
    assert_eq!(refusal(&[list], "generation_config.json"), "invalid_generation_config ");
}

#[test]
fn a_tokenizer_that_is_the_bases_is_read_over_and_another_one_refused() {
    let tokenizer = |vocab: Value, added: Value| {
        let file = json!({
            "version": "1.0", "truncation": {"max_length": 5}, "padding": {"pad_id": 9},
            "added_tokens": added, "normalizer": null,
            "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
        });
        ("tokenizer.json", file.to_string())
    };
    let added = |id: u32, content: &str| json!([{"id": id, "content": content, "special": true}]);
    let same = tokenizer(json!({"a": 0, "j": 9}), added(1, "b"));
    assert!(read(folder(&[same]).path()).is_ok());
    let pieces = tokenizer(json!([["a", 0.0], ["b", -1.5]]), json!([]));
    assert!(read(folder(&[pieces]).path()).is_ok());
    let padded = || tokenizer(json!({"a": 0}), added(10, "<pad>"));
    let padding = config(json!({"pad_token": "<pad>"}));
    assert!(read(folder(&[padded(), padding]).path()).is_ok());

    let code = "tokenizer_mismatch ";
    assert_eq!(refusal(&[padded()], "`<pad>` (10) is no token"), code);
    let moved = tokenizer(json!({"a": 0, "b": 2}), json!([]));
    assert_eq!(refusal(&[moved], "`b` (2) is token 1"), code);
    let turned = tokenizer(json!([["b", 0.0]]), json!([]));
    assert_eq!(refusal(&[turned], "`b` (0) is token 1"), code);
    let tool = tokenizer(json!({}), added(11, "<tool>"));
    assert_eq!(refusal(&[tool], "<tool>"), code);
    assert_eq!(refusal(&[("tokenizer.json", "{\"model\": [".into())], "a tokenizer's model"), code);
    assert_eq!(refusal(&[("tokenizer.json", "{} {}".into())], "trailing"), code);
    let deep = format!("{{\"normalizer\": {}", "[".repeat(100_000));
    assert_eq!(refusal(&[("tokenizer.json", deep)], "EOF"), code);
}
