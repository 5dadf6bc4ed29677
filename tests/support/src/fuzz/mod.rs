//! What each fuzz target does with its bytes, and a few good inputs to begin with.
//!
//! Shared by the targets (`targets/`) and the ordinary test that runs every body on its seeds and
//! writes the first corpora, so that none of this rots. Whatever comes in, a body ends: with a
//! refusal or a result, never with a panic.

use crate::files::{Files, tiny as shape, values};
mod app;

use crate::gguf::{Meta, gguf, head};
use app::{BASE, in_process};
use axum::body::Body;
use http::Request;
use polylora::adapters::format::{check, config::PeftConfig};
use polylora::text::template::{ChatInputs, ChatTemplate};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::UNIX_EPOCH;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tower::ServiceExt;

/// (name, body, seeds)
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

pub const TARGETS: [Target; 6] = [
    ("safetensors", safetensors, safetensors_seeds),
    ("config", config, config_seeds),
    ("gguf", gguf_file, gguf_seeds),
    ("template", template, template_seeds),
    ("request", request, request_seeds),
    ("archive", archive, archive_seeds),
];

/// In memory where the system has that: a body writes files thousands of times a second.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a directory")
}

/// A good adapter's directory, of which one file is overwritten.
fn folder(config: bool, file: &str, data: &[u8]) -> PathBuf {
    static FOLDERS: [OnceLock<TempDir>; 2] = [OnceLock::new(), OnceLock::new()];
    let dir = FOLDERS[usize::from(config)].get_or_init(|| {
        let dir = scratch();
        if config {
            Files::plain(3).write(dir.path());
        }
        dir
    });
    std::fs::write(dir.path().join(file), data).expect("a file is written");
    dir.path().to_owned()
}

/// The header of `adapter_model.safetensors`, and its tensors under a good config.
pub fn safetensors(data: &[u8]) {
    let _ = check(&folder(true, "adapter_model.safetensors", data), &shape());
}

fn safetensors_seeds() -> Vec<Vec<u8>> {
    let mut dora = Files::plain(3);
    dora.config["use_dora"] = json!(true);
    let file = |header: &str, data: &[u8]| {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(data);
        file
    };
    let one = r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"a":"b"}}"#;
    vec![Files::plain(3).safetensors(), dora.safetensors(), file(one, &[0; 4]), file("{}", &[])]
}

/// `adapter_config.json`, and its patterns on module paths.
pub fn config(data: &[u8]) {
    let Ok(config) = PeftConfig::parse(data) else { return };
    for path in ["model.layers.0.self_attn.q_proj", "lm_head", "", "model.layers.11.mlp.up_proj"] {
        let _ = config.targets_module(path);
        let _ = config.scale(path);
    }
}

fn config_seeds() -> Vec<Vec<u8>> {
    let full = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none",
        "target_modules": "model\\.layers\\.\\d+\\.(self_attn\\.(q|v)_proj|mlp\\.[a-z]{2,4}_proj)",
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 4, "down_proj": 32},
        "alpha_pattern": {"[qk]_proj": 64}, "use_rslora": true, "use_dora": false,
        "modules_to_save": null, "init_lora_weights": true, "exclude_modules": "(?i)LM_HEAD",
    });
    let listed = json!({
        "peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1],
        "layers_pattern": ["layers"], "lora_bias": true, "eva_config": {"rho": 2.0},
    });
    let linear = json!({"peft_type": "LORA", "target_modules": "all-linear", "r": 1});
    [full, listed, linear, Files::plain(3).config].map(|c| c.to_string().into_bytes()).to_vec()
}

/// A GGUF adapter.
pub fn gguf_file(data: &[u8]) {
    let _ = check(&folder(false, "adapter.gguf", data), &shape());
}

fn gguf_seeds() -> Vec<Vec<u8>> {
    let a = ("blk.0.attn_v.weight.lora_a", vec![8, 2], values(1, 16));
    let b = ("blk.0.attn_v.weight.lora_b", vec![2, 4], values(2, 8));
    let mut alora = head("llama");
    alora.push(("adapter.alora.invocation_tokens", Meta::U32s(vec![1, 2])));
    vec![
        gguf(&head("llama"), &[a.clone(), b.clone()]),
        gguf(&alora, &[a, b]),
        gguf(&head("qwen2"), &[]),
        gguf(&[], &[]),
    ]
}

/// A chat template: compiled, tried, and rendered with tools.
pub fn template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let token = |t: &str| Some(t.to_owned());
    let Ok(template) = ChatTemplate::new(text, token("<s>"), token("</s>")) else { return };
    let _ = template.check();
    let messages = [json!({"role": "user", "content": [{"type": "text", "text": "é\n"}]})];
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    let _ = template.render(&ChatInputs {
        messages: &messages,
        tools: Some(&tools),
        add_generation_prompt: false,
        now: UNIX_EPOCH,
    });
}

fn template_seeds() -> Vec<Vec<u8>> {
    let golden = serde_json::from_str(include_str!("../../../golden/templates.json"));
    let golden: Value = golden.expect("golden JSON");
    let cases = golden["cases"].as_array().expect("cases").iter();
    let text = |c: &Value| c["template"].as_str().map(|t| t.as_bytes().to_vec());
    let mut seeds: Vec<Vec<u8>> = cases.filter_map(text).collect();
    seeds.dedup();
    seeds.push(
        b"{% set ns = namespace(a=[]) %}{% macro f(x) %}{{ x | tojson(indent=2) }}\
                 {% endmacro %}{{ f(messages) }}{{ strftime_now('%d %b %Y') }}"
            .to_vec(),
    );
    seeds
}

struct Served {
    runtime: Runtime,
    router: axum::Router,
    _dir: TempDir,
}

impl Served {
    fn get() -> &'static Self {
        static SERVED: OnceLock<Served> = OnceLock::new();
        SERVED.get_or_init(|| {
            let builder = &mut tokio::runtime::Builder::new_multi_thread();
            let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime");
            let dir = scratch();
            let router = runtime.block_on(in_process(dir.path()));
            Self { runtime, router, _dir: dir }
        })
    }

    /// Sends one request; whatever it is, the answer is no fault of the server's.
    fn ask(&self, request: Request<Body>) {
        let (status, body) = self.runtime.block_on(async {
            let answer = self.router.clone().oneshot(request).await.expect("infallible");
            let status = answer.status().as_u16();
            let body = axum::body::to_bytes(answer.into_body(), 64 << 20).await.expect("a body");
            (status, body)
        });
        if status < 400 {
            return;
        }
        let body: Value = serde_json::from_slice(&body).expect("an error is JSON");
        let code = body["error"]["code"].as_str().expect("an error has a code");
        let sound = code == "shutting_down" || code == "insufficient_capacity";
        assert!(status < 500 || sound, "{status} {body}");
    }
}

const ROUTES: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

/// A body for one of the routes that take JSON; the first byte chooses.
pub fn request(data: &[u8]) {
    let Some((route, body)) = data.split_first() else { return };
    let request = Request::post(ROUTES[usize::from(*route) % ROUTES.len()])
        .header("content-type", "application/json")
        .body(Body::from(body.to_vec()));
    Served::get().ask(request.expect("a request"));
}

fn request_seeds() -> Vec<Vec<u8>> {
    let message = json!({"role": "user", "content": "hello"});
    let call = json!({"id": "1", "type": "function",
                      "function": {"name": "f", "arguments": "{\"x\": 1}"}});
    let chat = json!({
        "model": BASE, "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]}, message,
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"}],
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "n": 2,
        "logit_bias": {"65": -1.5}, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "stop": ["a", "b"], "stop_token_ids": [3], "max_tokens": 4,
        "min_tokens": 1, "logprobs": true, "top_logprobs": 2, "stream": true,
        "stream_options": {"include_usage": true}, "tool_choice": "auto",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "response_format": {"type": "text"}, "user": "u",
    });
    let plain = json!({"model": BASE, "prompt": [[1, 2], [3]], "echo": true, "logprobs": 2,
                       "max_tokens": 0, "suffix": null});
    let texts = json!({"model": BASE, "prompt": ["a", "é"], "best_of": 1, "ignore_eos": true});
    let tokens = json!({"model": BASE, "messages": [message], "return_token_strs": true});
    let back = json!({"model": BASE, "tokens": [72, 105]});
    let routed = [(0, chat), (1, plain), (1, texts), (2, tokens), (3, back)];
    routed.map(|(route, body)| [vec![route], body.to_string().into_bytes()].concat()).to_vec()
}

/// The body of an upload: an archive, or a GGUF file.
pub fn archive(data: &[u8]) {
    let request = Request::put("/v1/adapters/fuzzed")
        .header("content-type", "application/octet-stream")
        .body(Body::from(data.to_vec()));
    Served::get().ask(request.expect("a request"));
}

fn archive_seeds() -> Vec<Vec<u8>> {
    let config = Files::plain(3).config.to_string().into_bytes();
    let files: [(&str, &[u8]); 3] = [
        ("a/adapter_config.json", &config),
        ("a/adapter_model.safetensors", b"weights"),
        ("a/README.md", b"# read me"),
    ];
    let mut tar = tar::Builder::new(Vec::new());
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, content).expect("an entry");
        zip.start_file(path, options).expect("an entry");
        zip.write_all(content).expect("its content");
    }
    let tar = tar.into_inner().expect("a tar");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).expect("compressed");
    let zip = zip.finish().expect("a zip").into_inner();
    vec![tar, gzip.finish().expect("a gzip"), zip, gguf(&head("llama"), &[])]
}
