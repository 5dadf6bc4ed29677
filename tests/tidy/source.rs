//! What the rules read: the repository's files, and Rust taken apart far enough to be judged.

use fancy_regex::Regex;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Not of the repository: what tools leave behind, as .gitignore says.
pub const LEFT_BEHIND: &[&str] = &[".git", ".venv", "target", "node_modules"];

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below a directory of the repository whose names end so, as (path from the root, text).
pub fn files(below: &str, ends: &[&str]) -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        let Ok(entries) = fs::read_dir(dir) else {
            return;
        };
        for path in entries.map(|e| e.expect("an entry").path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if LEFT_BEHIND.contains(&name.as_str()) || name == "__pycache__" {
                continue;
            }
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(below), &mut found);
    found.sort();
    let named = found.into_iter().filter(|p| ends.iter().any(|e| p.to_string_lossy().ends_with(e)));
    named
        .map(|p| {
            let path =
                p.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
            (path, fs::read_to_string(&p).expect("text"))
        })
        .collect()
}

pub fn rust_files() -> Vec<(String, String)> {
    ["src", "kernels", "tests", "benches"].iter().flat_map(|d| files(d, &[".rs"])).collect()
}

/// Rust without its comments and the insides of its literals; every line stays where it is.
pub fn code_of(text: &str) -> String {
    let literal = concat!(
        r##"(?s)//[^\n]*|/\*.*?\*/|r(#+)".*?"\1|\br"[^"]*"|b?"(?:\\.|[^"\\])*"|"##,
        r"b?'(?:\\(?:u\{[0-9a-fA-F]+\}|x..|.)|[^'\\\n])'"
    );
    let pattern = Regex::new(literal).expect("a pattern");
    let (mut code, mut from) = (String::new(), 0);
    for found in pattern.find_iter(text).map(|m| m.expect("no backtrack limit")) {
        code += &text[from..found.start()];
        let kept = found.as_str().chars().map(|c| if c == '\n' { c } else { ' ' });
        code.extend(kept);
        from = found.end();
    }
    code + &text[from..]
}

/// (name, first line, number of lines) of every function with a body.
pub fn functions(code: &str) -> Vec<(String, usize, usize)> {
    let pattern = Regex::new(r"\bfn\s+(\w+)").expect("a pattern");
    let line_of = |at: usize| code[..at].matches('\n').count() + 1;
    let mut found = Vec::new();
    for captures in pattern.captures_iter(code).map(|c| c.expect("no backtrack limit")) {
        let (whole, name) = (captures.get(0).expect("match"), captures.get(1).expect("name"));
        let (mut parens, mut braces) = (0i32, 0i32);
        for (i, c) in code[whole.end()..].char_indices() {
            match c {
                '(' | '[' => parens += 1,
                ')' | ']' => parens -= 1,
                ';' if parens == 0 && braces == 0 => break, // a declaration
                '{' => braces += 1,
                '}' => braces -= 1,
                _ => continue,
            }
            if c == '}' && braces == 0 {
                let (first, last) = (line_of(whole.start()), line_of(whole.end() + i));
                found.push((name.as_str().to_owned(), first, last - first + 1));
                break;
            }
        }
    }
    found
}

/// The leaves of `a::{b, c::{self, d as e}}`, with the names they get.
pub fn leaves(tree: &str) -> Vec<(Vec<String>, String)> {
    fn walk(rest: &str, before: &[String], found: &mut Vec<(Vec<String>, String)>) {
        let rest = rest.trim();
        if let Some(group) = rest.strip_prefix('{').and_then(|r| r.strip_suffix('}')) {
            let (mut depth, mut from) = (0, 0);
            for (i, c) in group.char_indices().chain([(group.len(), ',')]) {
                depth += i32::from(c == '{') - i32::from(c == '}');
                if c == ',' && depth == 0 {
                    walk(&group[from..i], before, found);
                    from = i + 1;
                }
            }
        } else if let Some((head, tail)) = rest.split_once("::") {
            let path = [before, &[head.trim().to_owned()]].concat();
            walk(tail, &path, found);
        } else if !rest.is_empty() {
            let (name, alias) = rest.split_once(" as ").unwrap_or((rest, rest));
            let (name, alias) = (name.trim(), alias.trim());
            match (name, before.last()) {
                ("self", Some(last)) => found.push((before.to_vec(), last.clone())),
                _ => found.push(([before, &[name.to_owned()]].concat(), alias.to_owned())),
            }
        }
    }
    let mut found = Vec::new();
    walk(tree, &[], &mut found);
    found
}

/// Modules of this crate that the code names.
pub fn imports(code: &str) -> BTreeSet<String> {
    let path = Regex::new(r"\bcrate::(\w+)").expect("a pattern");
    let group = Regex::new(r"\bcrate::\{([^;]*)\}\s*;").expect("a pattern");
    let mut named = BTreeSet::new();
    for c in path.captures_iter(code).map(|c| c.expect("no backtrack limit")) {
        named.insert(c[1].to_owned());
    }
    for c in group.captures_iter(code).map(|c| c.expect("no backtrack limit")) {
        let heads = leaves(&format!("{{{}}}", &c[1])).into_iter();
        named.extend(heads.map(|(path, _)| path[0].clone()));
    }
    named
}

/// Type names in the code that contain a banned noun as a word of their own.
pub fn banned_names(code: &str, banned_nouns: &[&str]) -> Vec<String> {
    let pattern = Regex::new(r"\b(?:struct|enum|trait|type|union)\s+(\w+)").expect("a pattern");
    let word = Regex::new(r"[A-Z][a-z0-9]*").expect("a pattern");
    let names = pattern.captures_iter(code).map(|c| c.expect("no backtrack limit")[1].to_owned());
    let banned = |name: &String| {
        let mut words = word.find_iter(name).map(|m| m.expect("no backtrack limit").as_str());
        words.any(|w| banned_nouns.contains(&w))
    };
    names.filter(banned).collect()
}

/// An error made with a literal code: constructor, kind where it is said, code.
pub const MADE: &str = r#"(?x) Error::(invalid|not_found|unprocessable|new) \( \s*
    (?: (?:\w+::)* Kind::(\w+), \s* )?  "([a-z0-9_]+)" "#;
