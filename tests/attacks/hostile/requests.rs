//! Malformed requests: each number gives one.
//!
//! Owns the ways to spoil a sound body, its headers, its path, and what is said on a bare socket.
//! Never sends anything. Most mutations are refused; some leave a request that is still sound.

use crate::hostile::server::{BASE, GOOD};
use crate::hostile::spoilt::pick;
use reqwest::Method;
use serde_json::{Value, json};
use support::adapters::Noise;

pub struct Case {
    pub what: &'static str,
    pub method: Method,
    pub path: String,
    pub headers: Vec<(&'static str, Vec<u8>)>,
    pub body: Vec<u8>,
    /// It cannot be sound.
    pub surely: bool,
}

/// A sound body and its route.
fn sound(noise: &mut Noise) -> (&'static str, Value) {
    let message = json!({"role": "user", "content": "hello"});
    let call = json!({"id": "1", "type": "function",
                      "function": {"name": "f", "arguments": "{\"x\": 1}"}});
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
    let chat = json!({
        "model": GOOD,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]}, message,
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "2"}],
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "n": 2,
        "logit_bias": {"65": -1.5}, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "stop": ["a", "b"], "stop_token_ids": [3], "max_tokens": 2,
        "min_tokens": 1, "logprobs": true, "top_logprobs": 2, "stream": true,
        "stream_options": {"include_usage": true}, "tools": [tool], "tool_choice": "auto",
    });
    let plain = json!({"model": BASE, "prompt": [[1, 2], [3]], "echo": true, "logprobs": 2,
                       "max_tokens": 0});
    let text = json!({"model": GOOD, "prompt": "abc", "max_tokens": 2, "stop": "x", "n": 2});
    let tokens = json!({"model": BASE, "messages": [message], "return_token_strs": true});
    let back = json!({"model": BASE, "tokens": [72, 105]});
    let all = [
        ("/v1/chat/completions", chat),
        ("/v1/completions", plain),
        ("/v1/completions", text),
        ("/tokenize", tokens),
        ("/detokenize", back),
    ];
    pick(noise, &all).clone()
}

/// What nobody expects in any place.
fn odd(noise: &mut Noise) -> Value {
    let deep = (0..100).fold(json!(1), |v, _| json!([v]));
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1e308),
        json!(-1e308),
        json!(5e-324),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(9007199254740993u64),
        json!(4294967296u64),
        json!(0.5),
        json!(""),
        json!(" "),
        json!("x".repeat(10_000)),
        json!("\u{0}"),
        json!("\u{202e}🚲é"),
        json!("1"),
        json!("<eos>"),
        json!([]),
        json!({}),
        json!([null]),
        json!([[]]),
        json!([1.5]),
        json!({"a": 1}),
        json!({"type": "text"}),
        json!({"role": "user"}),
        json!(vec![1; 2000]),
        json!(vec!["a"; 200]),
        deep,
    ];
    pick(noise, &values).clone()
}

/// A random place in a value.
fn place<'a>(noise: &mut Noise, mut value: &'a mut Value) -> &'a mut Value {
    loop {
        let inner = match value {
            Value::Object(map) if !map.is_empty() && noise.below(4) > 0 => noise.below(map.len()),
            Value::Array(list) if !list.is_empty() && noise.below(4) > 0 => noise.below(list.len()),
            _ => return value,
        };
        value = match value {
            Value::Object(map) => map.values_mut().nth(inner).expect("counted"),
            Value::Array(list) => &mut list[inner],
            _ => unreachable!("only these hold others"),
        };
    }
}

pub fn case(i: usize) -> Case {
    let noise = &mut Noise(0xdead_0000 + i as u64);
    let (path, body) = sound(noise);
    let mut case = Case {
        what: "",
        method: Method::POST,
        path: path.to_owned(),
        headers: vec![("content-type", b"application/json".to_vec())],
        body: Vec::new(),
        surely: false,
    };
    match i % 16 {
        0..5 => wrong_value(noise, &mut case, body),
        5 | 6 => other_fields(noise, &mut case, body),
        7..11 => damaged_text(noise, &mut case, body),
        11 => numbers(noise, &mut case, body),
        12 => nested(noise, &mut case),
        13 => not_json(noise, &mut case, body),
        14 => headers(noise, &mut case, body),
        _ => paths(noise, &mut case, body),
    }
    case
}

fn wrong_value(noise: &mut Noise, case: &mut Case, mut body: Value) {
    case.what = "a value of the wrong kind";
    for _ in 0..1 + noise.below(2) {
        let value = odd(noise);
        let map = body.as_object_mut().expect("an object");
        let field = noise.below(map.len());
        let field = map.values_mut().nth(field).expect("counted");
        *place(noise, field) = value;
    }
    case.body = body.to_string().into_bytes();
}

fn other_fields(noise: &mut Noise, case: &mut Case, mut body: Value) {
    let map = body.as_object_mut().expect("an object");
    let names: Vec<String> = map.keys().cloned().collect();
    let name = pick(noise, &names);
    match noise.below(4) {
        0 => {
            case.what = "a required field missing";
            let required = ["model", "messages", "prompt", "tokens"];
            let gone = names.iter().find(|n| n.as_str() != "model" && required.contains(&&***n));
            map.remove(gone.expect("each body has one"));
            case.surely = true;
        }
        1 => {
            case.what = "a field misspelt";
            let value = map.remove(name).expect("a field");
            map.insert(format!("{name}s_"), value);
            case.surely = true;
        }
        2 => {
            case.what = "a field of another server";
            let fields =
                ["best_of", "guided_json", "lora_path", "response_format", "suffix", "audio"];
            map.insert((*pick(noise, &fields)).into(), json!({"a": 7}));
            case.surely = true;
        }
        _ => {
            case.what = "a model that nobody has";
            let long = "a".repeat(5000);
            let models =
                ["", "nobody", "../tiny", "tiny:", "good@0", "good@99", "good@1@1", "gооd", &long];
            map.insert("model".into(), (*pick(noise, &models)).into());
            case.surely = true;
        }
    }
    case.body = body.to_string().into_bytes();
}

fn damaged_text(noise: &mut Noise, case: &mut Case, body: Value) {
    let mut text = body.to_string().into_bytes();
    match noise.below(4) {
        0 => {
            case.what = "a body cut short";
            text.truncate(noise.below(text.len()));
            case.surely = true;
        }
        1 => {
            case.what = "bits turned";
            for _ in 0..1 + noise.below(6) {
                let at = noise.below(text.len());
                text[at] ^= 1 << noise.below(8);
            }
        }
        2 => {
            case.what = "bytes put in";
            for _ in 0..1 + noise.below(4) {
                let at = noise.below(text.len());
                text.insert(at, noise.below(256) as u8);
            }
        }
        _ => {
            case.what = "bytes that are not UTF-8";
            let at = text.iter().position(|&b| b == b'"').expect("a string") + 1;
            let bad: [&[u8]; 4] = [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"];
            text.splice(at..at, pick(noise, &bad).iter().copied());
            case.surely = true;
        }
    }
    case.body = text;
}

fn numbers(noise: &mut Noise, case: &mut Case, body: Value) {
    case.what = "a number beyond reason";
    let long = "9".repeat(500);
    let fraction = format!("0.{}", "1".repeat(5000));
    let numbers = [
        "1e999",
        "-1e999",
        "1E+309",
        &long,
        &fraction,
        "-0",
        "01",
        "1.",
        ".5",
        "0x10",
        "NaN",
        "Infinity",
        "1e-999999999999",
        "18446744073709551616",
        "1e18446744073709551616",
    ];
    let names = ["max_tokens", "temperature", "seed", "n", "top_k", "min_tokens", "top_logprobs"];
    let (name, number) = (pick(noise, &names), pick(noise, &numbers));
    let text = body.to_string();
    case.body = text.replacen('{', &format!("{{\"{name}\":{number},"), 1).into_bytes();
}

fn nested(noise: &mut Noise, case: &mut Case) {
    case.what = "nesting without end";
    let depth = 200 + noise.below(200_000);
    let (open, close) = *pick(noise, &[("[", "]"), ("{\"a\":", "}")]);
    let (closing, field) =
        (noise.below(2) == 0, *pick(noise, &["messages", "tools", "prompt", "stop"]));
    let end = if closing { close.repeat(depth) } else { String::new() };
    let text = format!("{{\"model\":\"{BASE}\",\"{field}\":{}1{end}}}", open.repeat(depth));
    case.body = text.into_bytes();
    case.surely = true;
}

fn not_json(noise: &mut Noise, case: &mut Case, body: Value) {
    case.what = "a body that is no object of JSON";
    let text = body.to_string();
    let bom = format!("\u{feff}{text}");
    let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let large = format!("{{\"model\":\"{}\"}}", "a".repeat(2 << 20));
    let twice = format!("{text}{text}");
    let bodies: [&[u8]; 12] = [
        b"",
        b" ",
        b"null",
        b"[]",
        b"1",
        b"\"a\"",
        b"{",
        b"model=tiny&prompt=a",
        bom.as_bytes(),
        &wide,
        large.as_bytes(),
        twice.as_bytes(),
    ];
    case.body = pick(noise, &bodies).to_vec();
    case.surely = true;
}

fn headers(noise: &mut Noise, case: &mut Case, body: Value) {
    case.what = "headers";
    case.body = body.to_string().into_bytes();
    let kinds: [&[u8]; 8] = [
        b"text/plain",
        b"",
        b"application/json; charset=utf-16",
        b"application/jsonp",
        b"\xff\xfe",
        b"application/x-www-form-urlencoded",
        b"multipart/form-data; boundary=x",
        b"*/*",
    ];
    match noise.below(4) {
        0 => case.headers[0].1 = pick(noise, &kinds).to_vec(),
        1 => case.headers.clear(),
        2 => {
            let value = vec![b'a'; 1 << (10 + noise.below(10))];
            case.headers.push((*pick(noise, &["x-request-id", "authorization", "cookie"]), value));
        }
        _ => {
            for _ in 0..noise.below(300) {
                case.headers.push(("x-more", vec![b' ' + noise.below(94) as u8; noise.below(60)]));
            }
            case.headers.push(("x-request-id", b"a\tb%0d%0a<script>".to_vec()));
        }
    }
}

fn paths(noise: &mut Noise, case: &mut Case, body: Value) {
    case.what = "paths and methods";
    case.body = body.to_string().into_bytes();
    let long = format!("/v1/models/{}", "a".repeat(30_000));
    let paths = [
        "/",
        "//",
        "/v1",
        "/v1/chat/completions/",
        "/v1/chat/completions%00",
        "/v1/../metrics",
        "/v1/models/%2e%2e%2fetc",
        "/v1/models/nobody",
        "/v1/adapters/nobody",
        "/v1/adapters/a%00b",
        "/v1/adapters/%FF",
        "/V1/MODELS",
        "/v1/models/../../etc/passwd",
        "/%",
        &long,
    ];
    let methods =
        [Method::GET, Method::PUT, Method::DELETE, Method::PATCH, Method::OPTIONS, Method::TRACE];
    if noise.below(3) == 0 {
        case.method = pick(noise, &methods).clone();
        case.surely = true;
    } else {
        case.path = (*pick(noise, &paths)).to_owned();
        case.method = pick(noise, &[Method::GET, Method::POST, Method::DELETE]).clone();
    }
}

/// What is said on a socket of its own: HTTP and what looks like it.
pub fn raw(i: usize) -> (&'static str, Vec<u8>) {
    let noise = &mut Noise(0xbeef_0000 + i as u64);
    let (path, body) = sound(noise);
    let body = body.to_string();
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n");
    let length = body.len();
    let (what, text) = match i % 10 {
        0 => (
            "a body shorter than declared",
            format!("{head}content-length: {}\r\n\r\n{body}", length + 7),
        ),
        1 => (
            "a body longer than declared",
            format!("{head}content-length: {}\r\n\r\n{body}", length - 7),
        ),
        2 => ("two lengths", format!("{head}content-length: 3\r\ncontent-length: 4\r\n\r\n{body}")),
        3 => (
            "length and chunks",
            format!("{head}content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n{body}"),
        ),
        4 => (
            "chunks that lie",
            format!("{head}transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n{body}"),
        ),
        5 => (
            "chunks that are none",
            format!("{head}transfer-encoding: chunked\r\n\r\nxyz\r\n{body}\r\n0\r\n\r\n"),
        ),
        6 => ("a length that is none", format!("{head}content-length: -1\r\n\r\n{body}")),
        7 => ("a header without end", format!("{head}x: {}", "a".repeat(noise.below(1 << 20)))),
        8 => ("another protocol", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        _ => {
            let mut bytes = format!("{head}content-length: {length}\r\n\r\n{body}").into_bytes();
            for _ in 0..1 + noise.below(6) {
                let at = noise.below(head.len());
                bytes[at] = noise.below(256) as u8;
            }
            return ("a head damaged", bytes);
        }
    };
    (what, text.into_bytes())
}
