//! Spoilt files beside good factors: templates, generation configs, tokenizers.

use crate::hostile::adapters::{Kind, Sent};
use crate::hostile::spoilt::{Spoilt, pick};
use serde_json::{Value, json};
use support::adapters::Noise;

fn beside(noise: &mut Noise, name: &str, content: impl Into<Vec<u8>>) -> Sent {
    let mut parts = Spoilt::new(noise).parts();
    parts.push((name.to_owned(), content.into()));
    Sent::Parts(parts)
}

const TEMPLATE: &[&str] = &["invalid_chat_template"];

pub const KINDS: &[Kind] = &[
    ("a template that does not compile or show", |n| {
        let deep = "{% if a %}".repeat(20_000);
        let nested = format!("{{{{ {}1{} }}}}", "(".repeat(30_000), ")".repeat(30_000));
        let long = "x".repeat(300 << 10);
        let texts: [&[u8]; 12] = [
            b"{% if %}",
            b"{{ messages",
            b"{% endfor %}",
            b"hello",
            b"",
            b"\xff\xfe",
            b"{{ raise_exception('never') }}",
            b"{% include '/etc/passwd' %}",
            b"{{ messages | attr('__class__') }}",
            deep.as_bytes(),
            nested.as_bytes(),
            long.as_bytes(),
        ];
        let text = pick(n, &texts).to_vec();
        (beside(n, "chat_template.jinja", text), TEMPLATE)
    }),
    ("a template that never ends", |n| {
        let texts = [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}\
             {% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "{% set a = namespace() %}{% set a.x = a %}{{ a ~ '' }}",
            "{{ messages | tojson(indent=999999999999) }}",
            "{{ 'x' * 99999999999 }}",
        ];
        let text = format!("{{{{ messages[0].content }}}}{}", pick(n, &texts));
        (beside(n, "chat_template.jinja", text), TEMPLATE)
    }),
    ("a tokenizer config that cannot be read", |n| {
        let texts = [
            "{\"chat_template\": 5}",
            "{\"chat_template\": {}}",
            "{\"chat_template\": [{\"name\": \"rag\", \"template\": \"x\"}]}",
            "{\"chat_template\": [1]}",
            "{\"chat_template\": \"{% if %}\"}",
            "{\"chat_template\": ",
            "{\"chat_template\": \"a\", \"chat_template\": \"b\"}",
            "[]",
        ];
        let codes: &[&str] = &["invalid_chat_template", "invalid_tokenizer_config"];
        let text = *pick(n, &texts);
        (beside(n, "tokenizer_config.json", text), codes)
    }),
    ("a generation config that cannot be applied", |n| {
        let values = [
            json!({"num_beams": 4}),
            json!({"temperature": -1}),
            json!({"temperature": "1"}),
            json!({"top_k": 1e30}),
            json!({"eos_token_id": [99999]}),
            json!({"eos_token_id": {"a": 1}}),
            json!({"max_new_tokens": -5}),
            json!({"stop_strings": [[]]}),
            json!({"watermarking_config": {"bias": 1}}),
            json!({"made_up": 1}),
            json!([]),
            Value::Null,
        ];
        let text = pick(n, &values).to_string();
        let codes: &[&str] = &["invalid_generation_config", "unsupported_generation_field"];
        (beside(n, "generation_config.json", text), codes)
    }),
    ("another tokenizer", |n| {
        let files = [
            json!({"added_tokens": [{"id": 500, "content": "<tool>"}]}),
            json!({"model": {"vocab": {"A": 66}}}),
            json!({"model": {"vocab": [["x", 0.0]]}}),
            json!({"model": {"vocab": {"A": -1}}}),
            json!({"added_tokens": {}}),
            json!([[[[]]]]),
        ];
        let text = pick(n, &files).to_string();
        (beside(n, "tokenizer.json", text), &["tokenizer_mismatch"])
    }),
];
