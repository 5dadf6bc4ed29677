//! The rules of the house, checked: lengths, names and words; who may import whom is in
//! `tidy/rooms.rs`, those for README and `docs/` in `tidy/prose.rs`.
//!
//! Owns the rules' machinery and its exceptions. Never judges style that rustfmt or clippy judge.
//! The thing to know: an exception is an entry below with its reason; a rule is tried on a bad
//! example at the end of this file.

#[path = "tidy/graph.rs"]
mod graph;
#[path = "tidy/pages.rs"]
mod pages;
#[path = "tidy/prose.rs"]
mod prose;
#[path = "tidy/rooms.rs"]
mod rooms;
#[path = "tidy/source.rs"]
mod source;

use fancy_regex::Regex;
use source::*;
use std::fs;

const LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;

/// (file, what, limit, reason): the longest file, function or line that this file may hold.
const ALLOWED: &[(&str, &str, usize, &str)] = &[
    ("src/metrics/mod.rs", "function", 110, "a table of series, one entry each; no branch in it"),
    (
        "tests/parts/adapters/refusals.rs",
        "function",
        120,
        "a table of wrong adapters, one entry each",
    ),
    ("tests/program/api/adapters.rs", "function", 100, "a table of wrong uploads, one entry each"),
    ("tests/program/api/refusals.rs", "function", 125, "a table of wrong bodies, one entry each"),
    (
        "tests/allocations.rs",
        "unsafe",
        1,
        "counts what an allocator is asked for; implementing one is unsafe",
    ),
    (
        "tests/training_memory.rs",
        "unsafe",
        1,
        "counts what an allocator is asked for; implementing one is unsafe",
    ),
];

/// Pure modules: state and integers in, integers out.
const PURE: &[&str] = &[
    "src/adapters/ledger.rs",
    "src/engine/scheduler/mod.rs",
    "src/engine/scheduler/plan.rs",
    "src/engine/scheduler/shares.rs",
    "src/engine/pages.rs",
    "src/engine/sequence.rs",
];
const IMPURE: &[&str] =
    &["candle", "polylora_kernels", "Instant::now", "SystemTime", "rand::", "std::fs"];

/// Doers: a type named so owns nothing in particular.
const BANNED_NOUNS: &[&str] =
    &["Manager", "Handler", "Processor", "Helper", "Util", "Utils", "Wrapper", "Context"];

const ROOT: &[&str] = &[
    ".ci",
    ".dockerignore",
    ".gitignore",
    "ARCHITECTURE.md",
    "Cargo.lock",
    "Cargo.toml",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "README.md",
    "adapters",
    "benches",
    "docs",
    "kernels",
    "rustfmt.toml",
    "src",
    "tests",
];
/// Fails with every violation, not with the first.
fn none(violations: Vec<String>) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

fn allowed(path: &str, what: &str, limit: usize) -> usize {
    let entry = ALLOWED.iter().find(|(p, w, ..)| *p == path && *w == what);
    entry.map_or(limit, |(_, _, more, _)| *more)
}

#[test]
fn files_functions_and_lines_are_short() {
    let mut wrong = Vec::new();
    for (path, text) in rust_files() {
        let lines = text.lines().count();
        if lines > allowed(&path, "file", LINES_MAX) {
            wrong.push(format!("{path}: {lines} lines"));
        }
        for (name, line, length) in functions(&code_of(&text)) {
            if length > allowed(&path, "function", FUNCTION_LINES_MAX) {
                wrong.push(format!("{path}:{line}: fn {name} has {length} lines"));
            }
        }
        for (i, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > allowed(&path, "line", COLUMNS_MAX) {
                wrong.push(format!("{path}:{}: {columns} columns", i + 1));
            }
        }
    }
    for (path, _, _, reason) in ALLOWED {
        if !root().join(path).exists() || reason.is_empty() {
            wrong.push(format!("{path} is excepted, but is not there or has no reason"));
        }
    }
    none(wrong);
}

#[test]
fn every_file_says_what_it_owns() {
    let silent = |t: &str| t.lines().next().is_none_or(|l| !l.starts_with("//! ") || l.len() < 20);
    none(rust_files().into_iter().filter(|(_, t)| silent(t)).map(|(p, _)| p).collect());
}

#[test]
fn unsafe_code_is_in_the_kernels_only() {
    let pattern = Regex::new(r"\bunsafe\b").expect("a pattern");
    let has = |t: &str| pattern.is_match(&code_of(t)).expect("no backtrack limit");
    let outside = rust_files()
        .into_iter()
        .filter(|(p, _)| !p.starts_with("kernels/") && allowed(p, "unsafe", 0) == 0);
    none(outside.filter(|(_, t)| has(t)).map(|(p, _)| p).collect());
}

#[test]
fn types_are_named_for_what_they_are() {
    let mut wrong = Vec::new();
    for (path, text) in rust_files() {
        wrong.extend(
            banned_names(&code_of(&text), BANNED_NOUNS).iter().map(|n| format!("{path}: {n}")),
        );
    }
    none(wrong);
}

#[test]
fn scheduling_is_pure() {
    let mut wrong = Vec::new();
    for path in PURE {
        let code = code_of(&fs::read_to_string(root().join(path)).expect(path));
        wrong.extend(IMPURE.iter().filter(|w| code.contains(**w)).map(|w| format!("{path}: {w}")));
    }
    none(wrong);
}

#[test]
fn nothing_is_unfinished_silenced_or_unbounded() {
    // In two halves, so that this file does not find itself.
    let words = [
        ["TO", "DO"],
        ["FIX", "ME"],
        ["XX", "X"],
        ["todo", "!"],
        ["unimplemented", "!"],
        ["#[ign", "ore"],
        ["allow(dead", "_code"],
        ["unbounded", "_channel"],
        ["channel::unb", "ounded"],
        ["mpsc::chan", "nel()"],
    ]
    .map(|w| w.concat());
    let mut texts = rust_files();
    for place in ["kernels", "tests", "benches", ".ci", "Makefile", "Dockerfile"] {
        texts.extend(files(place, &[".cu", ".cuh", ".py", ".sh", ".mjs", ".ci/run"]));
    }
    for file in ["Makefile", "Dockerfile"] {
        texts.push((file.to_owned(), fs::read_to_string(root().join(file)).expect(file)));
    }
    let mut wrong = Vec::new();
    for (path, text) in texts {
        if allowed(&path, "silenced", 0) > 0 {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let found = words.iter().find(|w| line.contains(w.as_str()));
            wrong.extend(found.map(|w| format!("{path}:{}: {w}", i + 1)));
        }
    }
    none(wrong);
}

#[test]
fn the_root_holds_what_a_newcomer_expects_and_nothing_else() {
    let entries = fs::read_dir(root()).expect("the root").map(|e| e.expect("an entry").file_name());
    let names: Vec<String> = entries.map(|n| n.to_string_lossy().into_owned()).collect();
    let known = |n: &String| ROOT.contains(&n.as_str()) || LEFT_BEHIND.contains(&n.as_str());
    none(names.into_iter().filter(|n| !known(n)).collect());
}

#[test]
fn the_repository_speaks_only_of_itself() {
    let words =
        [["/wo", "rk/"], ["/ro", "ot/"], ["arti", "factory"], [".lib", "rary"]].map(|w| w.concat());
    let ends = [".rs", ".cu", ".py", ".sh", ".mjs", ".md", ".json", "run", ".toml"];
    let places = ["src", "kernels", "tests", "benches", "adapters", ".ci"];
    let mut texts: Vec<_> = places.iter().flat_map(|place| files(place, &ends)).collect();
    texts.extend(prose::prose());
    let mut wrong = Vec::new();
    for (path, text) in texts {
        wrong.extend(
            words.iter().filter(|w| text.contains(w.as_str())).map(|w| format!("{path}: {w}")),
        );
    }
    none(wrong);
}

#[test]
fn the_rules_find_what_they_forbid() {
    let text = r####"
        use crate::{api::App, engine::{request::Event, step}, error::Result};
        fn long(x: [u8; 2]) -> char { // } not this brace, nor unsafe
            let s = "}} unsafe \" fn no() {}"; let r = r#"fn "no() {"#; let c = '{'; let q = '\'';
            let life: &'static str = s;
            crate::cli::main();
        }
        fn declared(&self) -> [u8; 4];
        struct RequestHandler; struct Contextual; enum HandlerKind {}
    "####;
    let code = code_of(text);
    assert_eq!(code.lines().count(), text.lines().count());
    let named: Vec<String> = imports(&code).into_iter().collect();
    assert_eq!(named, ["api", "cli", "engine", "error"]);
    assert_eq!(functions(&code), [("long".to_owned(), 3, 5)]);
    assert_eq!(banned_names(&code, BANNED_NOUNS), ["RequestHandler", "HandlerKind"]);
    assert!(!code.contains("unsafe") && code.contains("'static"), "{code}");
}
