//! The rules for what is written for people: README, ARCHITECTURE and `docs/`.
//!
//! Owns lengths, links and the comparison with the code. Never judges style. The thing to know:
//! `POLYLORA_WRITE_DOCS=1 cargo test --test tidy` writes the parts that come from the code anew.

use super::none;
use super::pages::{anchor, parts, with_part};
use super::source::*;
use fancy_regex::Regex;
use polylora::error::codes::GROUPS;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

const README_LINES_MAX: usize = 200;
const ARCHITECTURE_LINES_MAX: usize = 200;
const PROSE_COLUMNS_MAX: usize = 120;

/// Statuses by kind, as `Kind` says them.
const STATUSES: &[(&str, u16)] = &[
    ("Invalid", 400),
    ("Unauthorized", 401),
    ("Forbidden", 403),
    ("NotFound", 404),
    ("Conflict", 409),
    ("Precondition", 412),
    ("TooLarge", 413),
    ("Unprocessable", 422),
    ("Busy", 429),
    ("Unavailable", 503),
    ("Capacity", 507),
    ("Fault", 500),
];

fn page(path: &str) -> (String, String) {
    (path.to_owned(), fs::read_to_string(root().join(path)).expect(path))
}

/// Every page for people: (path, text).
pub fn prose() -> Vec<(String, String)> {
    let mut all = vec![page("README.md"), page("ARCHITECTURE.md")];
    all.extend(files("docs", &[".md"]));
    all
}

#[test]
fn what_comes_from_the_code_is_in_the_docs_word_for_word() {
    let mut wrong = Vec::new();
    for (path, name, part) in parts() {
        let (_, text) = page(path);
        let Some(right) = with_part(&text, name, &part) else {
            wrong.push(format!("{path} has no place for {name}"));
            continue;
        };
        if std::env::var_os("POLYLORA_WRITE_DOCS").is_some() {
            fs::write(root().join(path), right).expect(path);
        } else if right != text {
            let lines = || right.lines().zip(text.lines()).enumerate();
            let (i, (now, then)) = lines().find(|(_, (a, b))| a != b).unwrap_or((0, ("", "")));
            wrong.push(format!(
                "{path}:{}: the code says\n  {now}\nthe page says\n  {then}\n\
                 run POLYLORA_WRITE_DOCS=1 cargo test --test tidy",
                i + 1
            ));
        }
    }
    none(wrong);
}

#[test]
fn pages_for_people_are_short_and_their_lines_fit() {
    none(prose().iter().flat_map(|(path, text)| too_long(path, text)).collect());
}

fn too_long(path: &str, text: &str) -> Vec<String> {
    let most = match path {
        "README.md" => README_LINES_MAX,
        "ARCHITECTURE.md" => ARCHITECTURE_LINES_MAX,
        _ => usize::MAX,
    };
    let lines = text.lines().count();
    let mut wrong = Vec::new();
    if lines > most {
        wrong.push(format!("{path}: {lines} lines, at most {most}"));
    }
    let wide = text.lines().enumerate().map(|(i, l)| (i + 1, l.chars().count()));
    let wide = wide.filter(|(_, columns)| *columns > PROSE_COLUMNS_MAX);
    wrong.extend(wide.map(|(i, columns)| format!("{path}:{i}: {columns} columns")));
    wrong
}

#[test]
fn links_between_pages_lead_somewhere() {
    let pages: BTreeMap<String, String> = prose().into_iter().collect();
    none(pages.iter().flat_map(|(path, text)| broken_links(path, text, &pages)).collect());
}

/// Links to files that are not there, and to headings that a page does not have.
fn broken_links(path: &str, text: &str, pages: &BTreeMap<String, String>) -> Vec<String> {
    let link = Regex::new(r"\]\(([^)\s]+)\)").expect("a pattern");
    let mut wrong = Vec::new();
    let text = without_code(text);
    for found in link.captures_iter(text.as_str()).map(|c| c.expect("no backtrack limit")) {
        let target = &found[1];
        if target.starts_with("https://") || target.starts_with("http://") {
            continue;
        }
        let (file, heading) = target.split_once('#').unwrap_or((target, ""));
        let to = if file.is_empty() { path.to_owned() } else { resolved(path, file) };
        if !file.is_empty() && !root().join(&to).exists() {
            wrong.push(format!("{path}: {target} is not there"));
        } else if !heading.is_empty() {
            let headings = pages.get(&to).map(|t| headings(t)).unwrap_or_default();
            if !headings.contains(heading) {
                wrong.push(format!("{path}: {to} has no heading #{heading}"));
            }
        }
    }
    wrong
}

#[test]
fn tests_that_pages_name_are_there() {
    none(prose().iter().flat_map(|(path, text)| missing_tests(path, text)).collect());
}

/// Tests in back-quotes that are not there; `tests/a/{b,c}` names two.
fn missing_tests(path: &str, text: &str) -> Vec<String> {
    let named = r"`((?:kernels/)?tests/[^`{\s]*)(?:\{([^`}]*)\})?`";
    let named = Regex::new(named).expect("a pattern");
    let all = named.captures_iter(text).map(|c| c.expect("no backtrack limit"));
    let paths = all.flat_map(|c| {
        let ends = c.get(2).map_or("", |ends| ends.as_str()).split(',');
        ends.map(|end| format!("{}{end}", &c[1])).collect::<Vec<_>>()
    });
    let missing = paths.filter(|p| !root().join(p).exists());
    missing.map(|p| format!("{path}: {p} is not there")).collect()
}

fn resolved(from: &str, link: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." | "" => {}
            name => parts.push(name),
        }
    }
    parts.join("/")
}

fn without_code(text: &str) -> String {
    let mut inside = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start().starts_with("```");
        inside ^= fence;
        !inside && !fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn headings(text: &str) -> BTreeSet<String> {
    let text = without_code(text);
    let titles = text.lines().filter(|l| l.starts_with('#'));
    titles.map(|l| anchor(l.trim_start_matches('#'))).collect()
}

/// (code, status that its kind gives it) of every literal in the text.
fn codes_made(text: &str) -> BTreeSet<(String, u16)> {
    let pattern = Regex::new(MADE).expect("a pattern");
    let all = pattern.captures_iter(text).map(|c| c.expect("no backtrack limit"));
    all.map(|c| {
        let kind = match (&c[1], c.get(2).map(|k| k.as_str())) {
            (_, Some(kind)) => kind,
            ("not_found", None) => "NotFound",
            ("unprocessable", None) => "Unprocessable",
            _ => "Invalid",
        };
        let status = STATUSES.iter().find(|(k, _)| *k == kind).expect("a kind").1;
        (c[3].to_owned(), status)
    })
    .collect()
}

#[test]
fn every_error_code_has_a_row_with_its_status_and_every_row_is_used() {
    let rows: Vec<_> = GROUPS.iter().flat_map(|g| g.codes).collect();
    let mut wrong = Vec::new();
    let mut source = String::new();
    for (path, text) in files("src", &[".rs"]) {
        if path == "src/error/codes.rs" {
            continue;
        }
        for (code, status) in codes_made(&text) {
            match rows.iter().find(|r| r.code == code) {
                None => wrong.push(format!("{path}: {code} has no row in src/error/codes.rs")),
                // These only stop a command or a start, or `api::errors` gives them a status.
                Some(row) if row.statuses.iter().all(|s| matches!(s, 405 | 408 | 415)) => {}
                Some(row) if row.statuses.contains(&status) => {}
                Some(_) => wrong.push(format!("{path}: {code} is made with {status}")),
            }
        }
        source += &text;
    }
    let unused = |code: &str| !source.contains(&format!("\"{code}\""));
    wrong.extend(rows.iter().filter(|r| unused(r.code)).map(|r| format!("{} is unused", r.code)));
    for (i, row) in rows.iter().enumerate() {
        if rows[..i].iter().any(|r| r.code == row.code) || row.meaning.is_empty() {
            wrong.push(format!("{} has two rows, or no meaning", row.code));
        }
    }
    assert!(rows.len() > 100, "the table of codes is read");
    none(wrong);
}

#[test]
fn the_rules_for_pages_find_what_they_forbid() {
    let wide = format!("short\n{}\n", "ä".repeat(121));
    assert_eq!(too_long("docs/a.md", &wide), ["docs/a.md:2: 121 columns"]);
    assert!(too_long("docs/a.md", &"ä".repeat(120)).is_empty());
    assert_eq!(too_long("README.md", &"a\n".repeat(201)), ["README.md: 201 lines, at most 200"]);

    let text = "# A `b` c_d\n[ok](#a-b-c_d) [no](#x) [no](gone.md)\n```\n[code](gone.md)\n```\n\
                [up](../README.md) [web](https://example.com/)";
    let pages = BTreeMap::from([("docs/a.md".to_owned(), text.to_owned())]);
    let wrong = broken_links("docs/a.md", text, &pages);
    assert_eq!(
        wrong,
        ["docs/a.md: docs/a.md has no heading #x", "docs/a.md: gone.md is not there"]
    );

    let tests = "`tests/tidy.rs` `tests/gone.rs` `tests/{tidy,gone}` in tests/prose";
    let gone = ["docs/a.md: tests/gone.rs is not there", "docs/a.md: tests/gone is not there"];
    assert_eq!(missing_tests("docs/a.md", tests), gone);

    let made = "Error::new(\n Kind::Busy,\n \"queue_full\", m); Error::invalid(\"bad_thing\", m)";
    let made: Vec<_> = codes_made(made).into_iter().collect();
    assert_eq!(made, [("bad_thing".to_owned(), 400), ("queue_full".to_owned(), 429)]);

    let page = "By hand.\n<!-- x: made from the code -->\n\nold\n\n<!-- end -->\nMore.\n";
    let right = with_part(page, "x", "new\n").expect("marks");
    assert_eq!(right, page.replace("old", "new"));
    assert_eq!(with_part(page, "y", ""), None);
}
