//! Text from outside in log lines and terminals: nobody forges a line or floods the log.

use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use support::live::{BASE, Live};
use tempfile::NamedTempFile;

/// What an attacker wants to see at the start of a line.
const FORGED: &str = "2026-01-01T00:00:00.000000Z  INFO polylora::audit: {\"action\":\"forged\"}";
/// Ways to begin a line, or what a viewer takes for one, or to rewrite the one before.
const BREAKS: [&str; 8] = [
    "\n",
    "\r\n",
    "\r",
    "\u{85}",
    "\u{2028}",
    "\u{2029}",
    "\u{1b}[2K\u{1b}[1G",
    "\u{9b}2K\u{202e}",
];

/// Files of an upload that is refused, quoting them.
fn uploads(good: &Path, text: &str) -> Vec<(&'static str, Form)> {
    let part = |bytes: Vec<u8>, name: &str| Part::bytes(bytes).file_name(name.to_owned());
    let config = |r: Value, more: Value| {
        let mut config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r,
            "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base"});
        let fields = config.as_object_mut().expect("an object");
        fields.extend(more.as_object().expect("an object").clone());
        config.to_string().into_bytes()
    };
    let tensors = |name: &str| {
        let head = json!({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}});
        let head = head.to_string().into_bytes();
        [&(head.len() as u64).to_le_bytes()[..], &head, &[0; 4]].concat()
    };
    let both = |config: Vec<u8>, tensors: Vec<u8>| {
        let form = Form::new().part("a", part(config, "adapter_config.json"));
        form.part("b", part(tensors, "adapter_model.safetensors"))
    };
    let plain = || config(json!(4), json!({}));
    let template = format!("{{{{ raise_exception({}) }}}}", json!(text));
    let mut tar = Vec::new();
    tar_entry(&mut tar, text);
    vec![
        ("tensor", both(plain(), tensors(text))),
        ("field", both(config(json!(4), json!({text: 1})), tensors("x"))),
        ("value", both(config(json!(4), json!({"peft_type": text})), tensors("x"))),
        ("number", both(config(json!(text), json!({})), tensors("x"))),
        ("target", both(config(json!(4), json!({"target_modules": [text]})), tensors("x"))),
        (
            "template",
            support::live::form(good).part("c", part(template.into_bytes(), "chat_template.jinja")),
        ),
        ("entry", Form::new().part("a", part(tar, "adapter.tar"))),
    ]
}

/// An archive with one entry of this name and nothing in it.
fn tar_entry(tar: &mut Vec<u8>, name: &str) {
    let mut header = [0u8; 512];
    let name: Vec<u8> = format!("../{name}").bytes().take(99).collect();
    header[..name.len()].copy_from_slice(&name);
    header[100..108].copy_from_slice(b"0000644\0");
    header[124..136].copy_from_slice(b"00000000000\0");
    header[148..156].fill(b' ');
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend_from_slice(&header);
    tar.extend_from_slice(&[0; 1024]);
}

/// The log of a server that was sent these texts in every way.
async fn logged(format: &str, texts: &[String]) -> (String, usize) {
    let file = NamedTempFile::new().expect("a file");
    let log: Stdio = file.reopen().expect("the file again").into();
    let flags = ["--log-filter", "info,polylora=debug", "--log-format", format];
    let live = Live::start_logging(&flags, log);
    let good = live.adapter_files(1, 0.3);
    let mut refused = 0;
    for text in texts {
        for (what, form) in uploads(&good, text) {
            let put = live.request(reqwest::Method::PUT, "/v1/adapters/x").multipart(form);
            let answer = support::live::whole(put).await;
            assert!((400..500).contains(&answer.status), "{what}: {}", answer.text);
            refused += 1;
        }
        let ask = json!({"model": text, "messages": [{"role": text, "content": text}]});
        assert!(live.chat(ask).await.status >= 400);
    }
    (String::from_utf8_lossy(&std::fs::read(file.path()).expect("the log")).into_owned(), refused)
}

#[tokio::test]
async fn no_text_from_outside_begins_a_line_or_drives_a_terminal() {
    let texts: Vec<String> = BREAKS.iter().map(|b| format!("x{b}{FORGED}")).collect();
    for format in ["text", "json"] {
        let (log, refused) = logged(format, &texts).await;
        assert_eq!(refused, 7 * BREAKS.len());
        let told = log.matches("forged").count();
        assert!(told >= 4 * BREAKS.len(), "at least four ways lead to the log: {told}");
        let odd = |c: char| {
            let turns = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2028}' | '\u{2029}');
            (c.is_control() && c != '\n') || turns
        };
        assert!(!log.contains(odd), "{format}: {:?}", log.lines().find(|l| l.contains(odd)));
        for line in log.lines() {
            let forged = line.trim_start().starts_with(FORGED) || line.starts_with("{\"action\"");
            assert!(!forged, "{format}: {line}");
            if format == "json" && line.starts_with('{') {
                let line: Value = serde_json::from_str(line).expect("JSON");
                assert!(line["target"] != "polylora::audit" || !line.to_string().contains(FORGED));
            }
        }
    }
}

#[tokio::test]
async fn a_long_text_is_not_logged_at_length() {
    let texts = ["lorem ipsum ".repeat(20_000), "\n\u{1b}".repeat(100_000)];
    for format in ["text", "json"] {
        let (log, _) = logged(format, &texts).await;
        let longest = log.lines().map(str::len).max().unwrap_or_default();
        assert!(longest < 20_000, "{format}: a line of {longest} bytes");
        assert!(log.len() < 200_000, "{format}: {} bytes for 16 requests", log.len());
    }
}

/// A server of one answer, for a client.
fn answers_once(body: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut request = [0; 4096];
        assert!(stream.read(&mut request).expect("a request") > 0);
        stream.write_all(body.as_bytes()).expect("sent");
    });
    url
}

#[test]
fn what_a_model_says_does_not_drive_the_terminal() {
    let said = "hi\n\tthere\u{1b}]0;owned\u{7}\u{1b}[2J\u{9b}31m\rback";
    let event = json!({"choices": [{"delta": {"content": said}}]});
    let stream = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n\
         data: {event}\n\ndata: [DONE]\n\n"
    );
    let error = json!({"error": {"message": said, "code": "x", "type": "x", "param": null}});
    let error = error.to_string();
    let length = error.len();
    let refusal = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {length}\r\n\r\n{error}"
    );
    for (answer, good) in [(stream, true), (refusal, false)] {
        let url = answers_once(answer);
        let program = support::command::program();
        let args = ["chat", "--url", &url, "--model-name", BASE, "Hi"];
        let done = Command::new(program).args(args).output().expect("it runs");
        let shown = if good { done.stdout } else { done.stderr };
        let shown = String::from_utf8(shown).expect("UTF-8");
        assert!(shown.contains("there") && shown.contains("\\u{1b}]0;owned"), "{shown:?}");
        let odd = |c: char| c.is_control() && c != '\n' && c != '\t';
        assert!(!shown.contains(odd), "{shown:?}");
    }
}
