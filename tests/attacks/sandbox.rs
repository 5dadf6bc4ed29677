//! Strangers' chat templates: what they may do, and what becomes of those that mean harm.

use polylora::error::Error;
use polylora::text::sandbox::{Sandbox, TemplateSource};
use polylora::text::template::{ChatInputs, ChatTemplate};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

fn sandbox() -> Sandbox {
    Sandbox::new(Path::new(support::command::program()))
}

fn source(text: &str) -> TemplateSource {
    TemplateSource {
        text: text.to_owned(),
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
    }
}

fn inputs<'a>(messages: &'a [Value], tools: Option<&'a Value>) -> ChatInputs<'a> {
    let now = UNIX_EPOCH + Duration::from_secs(1_750_000_000);
    ChatInputs { messages, tools, add_generation_prompt: true, now }
}

fn render(sandbox: &Sandbox, text: &str, said: &str) -> Result<String, Error> {
    let messages = [json!({"role": "user", "content": said})];
    sandbox.render(&source(text), &inputs(&messages, None))
}

#[test]
fn a_worker_renders_what_this_process_would_and_every_known_template_passes_its_trial() {
    let path = format!("{}/tests/golden/templates.json", env!("CARGO_MANIFEST_DIR"));
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let sandbox = sandbox();
    let mut seen = 0;
    for case in golden["cases"].as_array().unwrap() {
        let text = match &case["template"] {
            Value::String(text) => text.clone(),
            list => list.to_string(),
        };
        let token = |name: &str| golden[name].as_str().map(str::to_owned);
        let source =
            TemplateSource { text, bos_token: token("bos_token"), eos_token: token("eos_token") };
        let here =
            ChatTemplate::new(&source.text, source.bos_token.clone(), source.eos_token.clone());
        let here = here.unwrap_or_else(|e| panic!("{}: {e}", case["name"]));
        let empty = Vec::new();
        let messages = case["messages"].as_array().unwrap_or(&empty);
        let tools = Some(&case["tools"]).filter(|t| t.is_array());
        let inputs = inputs(messages, tools);
        let outcome = |r: Result<String, Error>| r.map_err(|e| (e.code, e.message, e.param));
        let there = outcome(sandbox.render(&source, &inputs));
        assert_eq!(there, outcome(here.render(&inputs)), "{}", case["name"]);
        // One case is a list of values, not a chat.
        if case["name"] != "what Python prints" {
            sandbox.check(&source).unwrap_or_else(|e| panic!("{}: {e}", case["name"]));
        }
        seen += 1;
    }
    assert!(seen > 5, "{seen} cases");
}

#[test]
fn a_template_is_refused_with_line_and_reason() {
    let sandbox = sandbox();
    for (text, needle) in [
        ("a\n{% for %}", ":2"),
        ("{{ messages[0].content }}\n{{ messages | nothing }}", ":2"),
        ("hello", "lacks the user's message"),
        ("{{ raise_exception('only on Sundays') }}", "only on Sundays"),
        ("x\n{% include 'default' %}", "`include` in line 2"),
        ("{%- import 'a' as b %}", "`import` in line 1"),
        ("{% extends 'default' %}", "`extends`"),
        ("{% from 'a' import b %}", "`from`"),
        ("{{ messages[0].content.format.__globals__ }}{{ self._env }}", "undefined"),
    ] {
        let e = sandbox.check(&source(text)).expect_err(text);
        assert_eq!(e.code, "invalid_chat_template", "{text}: {e}");
        assert!(e.message.contains(needle), "{text}: {e}");
    }
    let words = "{% for m in messages %}{% if m.role == 'system' %}\
                 {{ raise_exception('no system role') }}{% endif %}{{ m.content }}{% endfor %}";
    sandbox.check(&source(words)).expect("a template may refuse a role in its own words");
}

/// Templates that never end, grow without bound or break the engine they run in.
const HARMFUL: [(&str, &str); 8] = [
    (
        "a loop in loops",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ),
    ("a macro that calls itself", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"),
    (
        "a string that doubles",
        "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}\
         {% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s | length }}",
    ),
    (
        "a capture that doubles",
        "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}\
         {% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
    ),
    ("an indent of years", "{{ messages | tojson(indent=1000000000000) }}"),
    (
        "a value that holds itself",
        "{% set a = namespace() %}{% set a.x = a %}{% set b = namespace() %}{% set b.x = b %}\
         {{ [a] == [b] }}{{ a }}{{ 'x' ~ a }}",
    ),
    ("replacing nothing by much", "{{ ('x' * 90000000).replace('', 'x' * 90000000) }}"),
    (
        "much raw text",
        "{% for a in range(99999) %}{% for b in range(40) %}{{ 'x' * 65536 }}{% endfor %}\
         {% endfor %}",
    ),
];

#[test]
fn a_template_that_means_harm_ends_as_an_error_and_the_next_one_renders() {
    let sandbox = sandbox();
    for (what, harm) in HARMFUL {
        let text = format!("{{{{ messages[0].content }}}}{harm}");
        let e = sandbox.check(&source(&text)).expect_err(what);
        assert_eq!(e.code, "invalid_chat_template", "{what}: {e}");
        // At a request: it shows only when somebody says the word.
        let said = "messages[0].content";
        let text = format!("{{{{ {said} }}}}{{% if 'harm' in {said} %}}{harm}{{% endif %}}");
        sandbox.check(&source(&text)).expect("it hides well");
        let e = render(&sandbox, &text, "do harm").expect_err(what);
        assert_eq!(
            (e.code, e.param.as_deref()),
            ("chat_template_error", Some("messages")),
            "{what}"
        );
        assert_eq!(render(&sandbox, &text, "hello").expect(what), "hello", "{what}");
    }
}

#[test]
fn a_worker_that_died_while_idle_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let mortal = dir.path().join("mortal");
    let pid = dir.path().join("pid");
    let (noted, program) = (pid.display(), support::command::program());
    let script = format!("#!/bin/sh\necho $$ > {noted}\nexec {program} \"$@\"\n");
    std::fs::write(&mortal, script).unwrap();
    std::fs::set_permissions(&mortal, PermissionsExt::from_mode(0o755)).unwrap();
    let sandbox = Sandbox::new(&mortal);
    let text = "{{ bos_token }}{{ messages[0].content }}{{ strftime_now('%Y') }}";
    assert_eq!(render(&sandbox, text, "a").unwrap(), "<s>a2025");
    let dies = std::fs::read_to_string(&pid).unwrap();
    let dies = dies.trim();
    assert!(Command::new("kill").args(["-9", dies]).status().unwrap().success());
    // Until it is dead, that is a zombie: its parent has not looked yet.
    while !std::fs::read_to_string(format!("/proc/{dies}/stat")).unwrap().contains(") Z ") {
        std::thread::yield_now();
    }
    assert_eq!(render(&sandbox, text, "b").unwrap(), "<s>b2025");
}

#[test]
fn large_conversations_pass_through_whole() {
    let sandbox = sandbox();
    let said = "é".repeat(1 << 20);
    let text = "{% for m in messages %}{{ m.content }}{% endfor %}";
    for _ in 0..3 {
        assert_eq!(render(&sandbox, text, &said).unwrap(), said);
    }
}
