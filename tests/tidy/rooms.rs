//! Who may know whom: modules of the crate, files, crates; and how much a room may hold.
//!
//! Owns the table of imports and the budgets. Never judges a file's inside. The thing to know: a
//! new arrow between modules is a row changed here, and rare.

use crate::graph::Graph;
use crate::none;
use crate::source::{code_of, files, imports, rust_files};
use fancy_regex::Regex;
use std::collections::{BTreeMap, BTreeSet};

/// Which modules of the crate a module may name, beside `error`. What is not here may name none;
/// what is here and is not named must go.
const IMPORTS: &[(&str, &[&str])] = &[
    ("access", &["clock", "database"]),
    ("database", &["clock"]),
    ("files", &["blocking", "clock", "database", "share"]),
    ("adapters", &["blocking", "clock", "database", "header", "metrics", "shape", "share"]),
    ("merge", &["adapters", "random"]),
    (
        "jobs",
        &[
            "merge", "train", "engine", "files", "model", "text", "adapters", "blocking", "clock",
            "database", "share",
        ],
    ),
    ("train", &["model", "adapters", "database", "random", "shape", "text"]),
    ("model", &["adapters", "checkpoint", "shape"]),
    ("checkpoint", &["adapters", "header", "shape", "tls"]),
    ("text", &["checkpoint", "clock"]),
    ("engine", &["model", "adapters", "ending", "metrics"]),
    ("metrics", &["ending"]),
    ("usage", &["clock", "database", "ending", "metrics"]),
    (
        "api",
        &[
            "access", "jobs", "files", "engine", "text", "merge", "train", "adapters", "usage",
            "blocking", "clock", "config", "database", "ending", "metrics", "shape", "share",
        ],
    ),
    (
        "assembly",
        &[
            "access",
            "api",
            "jobs",
            "files",
            "engine",
            "text",
            "train",
            "model",
            "checkpoint",
            "adapters",
            "usage",
            "config",
            "database",
            "metrics",
            "shape",
            "terminal",
            "tls",
        ],
    ),
    (
        "cli",
        &[
            "access",
            "assembly",
            "text",
            "merge",
            "train",
            "model",
            "checkpoint",
            "adapters",
            "clock",
            "config",
            "database",
            "shape",
            "terminal",
            "tls",
        ],
    ),
];

/// Crates that only some modules may name: (crate, paths it may stand in).
const CRATES: &[(&str, &[&str])] = &[
    ("axum", &["src/api/"]),
    ("utoipa", &["src/api/"]),
    ("clap", &["src/cli/", "src/config"]),
    (
        "sqlx",
        &["src/access/", "src/adapters/", "src/files/", "src/jobs/", "src/usage/", "src/database"],
    ),
    ("candle_core", &["src/checkpoint/", "src/header/", "src/adapters/", "src/cli/verify"]),
    ("candle_nn", &["src/cli/verify"]),
    ("candle_transformers", &["src/cli/verify"]),
    ("tokenizers", &["src/text/", "src/checkpoint/"]),
    ("minijinja", &["src/text/"]),
    ("cudarc", &[]),
    ("rustls", &["src/tls.rs"]),
    ("faer", &["src/merge/"]),
    ("rlimit", &["src/text/", "src/assembly/listen.rs"]),
    ("rustix", &["src/api/", "src/jobs/", "src/text/", "src/adapters/store/"]),
];

/// Beside `kernels/src/cuda` itself the only files that may name it: where an operand is made for a
/// device, and where an op ends in an arm for each.
const TWIN_PATHS: &[&str] = &[
    "kernels/src/lib.rs",
    "kernels/src/device.rs",
    "kernels/src/act/mod.rs",
    "kernels/src/delta.rs",
    "kernels/src/matrix/mod.rs",
    "kernels/src/plane.rs",
    "kernels/src/linear/mod.rs",
];

/// (what, directories and files, most lines of Rust in all): growth beyond is argued here.
const BUDGETS: &[(&str, &[&str], usize)] = &[
    ("hot path", &["engine/", "model/", "adapters/bank.rs", "adapters/composition.rs"], 5000),
    ("api/http", &["api/http/"], 3500),
    ("api/inference", &["api/inference/"], 4000),
    ("api/adapters", &["api/adapters/"], 2000),
    ("api/admin", &["api/admin/"], 1000),
    // Merges, training jobs, and files with their forms.
    ("api/jobs", &["api/jobs/"], 2600),
    ("api/wire", &["api/wire/"], 2400),
    // Patience and rights of tenants are a fifth of it.
    ("registry and store", &["adapters/registry/", "adapters/store/"], 3250),
    // Shares of tenants, and a check of it all.
    ("ledger", &["adapters/ledger.rs"], 500),
    // Two file formats, and every refusal by name.
    ("format", &["adapters/format/"], 4800),
    ("merge", &["merge/"], 2600),
    // A pass with every gradient, and a job with its state, pairs and export; and data. Each method
    // of training is a few lines here or nowhere.
    ("train", &["train/"], 5600),
    // Three formats, and every refusal by line.
    ("train/data", &["train/data/"], 1500),
    // Two kinds of work, events, and what survives a restart of each.
    ("jobs", &["jobs/"], 4600),
    // Contents, uploads in parts, and a look at every line.
    ("files", &["files/"], 1800),
    ("checkpoint", &["checkpoint/"], 3500),
    ("header", &["header/"], 500),
    ("text", &["text/"], 2200),
    ("access", &["access/"], 2300),
    ("usage", &["usage/"], 800),
    ("metrics", &["metrics/"], 800),
    ("config", &["config/"], 1400),
    ("error", &["error/"], 500),
    // The tables of adapters, access, jobs and files are in it, and what becomes of orphans.
    ("database", &["database/"], 1400),
    ("assembly", &["assembly/"], 1300),
    ("cli", &["cli/"], 4200),
];

/// Modules that a module names, itself and `error` left out.
fn named(files: &[(String, String)]) -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, text) in files {
        let module = path["src/".len()..].split(['/', '.']).next().unwrap_or_default();
        let code = code_of(text);
        let mut names = imports(&code);
        names.retain(|name| name != module && name != "error");
        all.entry(module.to_owned()).or_default().extend(names);
    }
    all
}

/// What a table of permissions forbids, and what it allows for nothing.
fn against(table: &[(&str, &[&str])], files: &[(String, String)]) -> Vec<String> {
    let all = named(files);
    let mut wrong = Vec::new();
    for (module, names) in &all {
        let may = table.iter().find(|(m, _)| m == module).map_or(&[][..], |(_, may)| may);
        let known = |name: &str| all.contains_key(name);
        let over = names.iter().filter(|name| known(name) && !may.contains(&name.as_str()));
        wrong.extend(over.map(|name| format!("{module} must not know {name}")));
    }
    for (module, may) in table {
        let names = all.get(*module);
        let idle = may.iter().filter(|name| !names.is_some_and(|all| all.contains(**name)));
        wrong.extend(idle.map(|name| format!("{module} may know {name}, and does not")));
    }
    wrong
}

#[test]
fn imports_go_one_way_and_every_permission_is_used() {
    let files = files("src", &[".rs"]);
    none(against(IMPORTS, &files));
    let planted = [
        ("src/model/mod.rs".to_owned(), "use crate::api::routes;".to_owned()),
        ("src/api/mod.rs".to_owned(), "use crate::error::Error;".to_owned()),
    ];
    let wrong = against(&[("model", &["shape"])], &planted);
    assert_eq!(wrong, ["model must not know api", "model may know shape, and does not"]);
}

#[test]
fn crates_are_named_where_they_belong() {
    let mut wrong = Vec::new();
    for (path, text) in files("src", &[".rs"]) {
        let code = code_of(&text);
        for (name, places) in CRATES {
            let pattern = Regex::new(&format!(r"(?<![\w:.]){name}::")).expect("a pattern");
            let here = places.iter().any(|p| path.starts_with(p));
            if !here && pattern.is_match(&code).expect("no backtrack limit") {
                wrong.push(format!("{path}: only {places:?} may name the crate {name}"));
            }
        }
    }
    for (path, text) in files("kernels", &["Cargo.toml", ".rs"]) {
        for name in ["candle", "axum", "tokio", "safetensors"] {
            if code_of(&text).contains(name) {
                wrong.push(format!("{path}: the kernels know no {name}"));
            }
        }
        if !path.starts_with("kernels/src/cuda/") && code_of(&text).contains("cudarc::") {
            wrong.push(format!("{path}: only kernels/src/cuda knows cudarc"));
        }
    }
    none(wrong);
}

/// What breaks [`TWIN_PATHS`].
fn strays(files: &[(String, String)]) -> Vec<String> {
    let pattern = Regex::new(r"\bcuda::").expect("a pattern");
    let mut wrong = Vec::new();
    for (path, text) in files.iter().filter(|(p, _)| !p.starts_with("kernels/src/cuda/")) {
        let may = TWIN_PATHS.contains(&path.as_str());
        match pattern.is_match(&code_of(text)).expect("no backtrack limit") {
            true if !may => wrong.push(format!("{path} must not name cuda::")),
            false if may => wrong.push(format!("{path} may name cuda::, and does not")),
            _ => {}
        }
    }
    wrong
}

#[test]
fn the_paths_of_cpu_and_gpu_part_in_few_places() {
    none(strays(&rust_files()));
    let file = |path: &str, text: &str| (path.to_owned(), text.to_owned());
    let wrong = strays(&[
        file("kernels/src/glu.rs", "fn op() { crate::cuda::linear(gpu); }"),
        file("kernels/src/norm.rs", "fn op() { On::Cuda(x.cuda()) } // cuda::linear"),
        file("kernels/src/act/mod.rs", "use crate::cuda::{self, Gpu};"),
        file("kernels/src/plane.rs", "struct Plane;"),
    ]);
    let plane = "kernels/src/plane.rs may name cuda::, and does not";
    assert_eq!(wrong, ["kernels/src/glu.rs must not name cuda::", plane]);
}

#[test]
fn no_file_names_one_that_names_it() {
    let circles = |files: &[(String, String)]| -> Vec<String> {
        Graph::of(files).circles().iter().map(|circle| circle.join(" ↔ ")).collect()
    };
    let mut found = circles(&files("src", &[".rs"]));
    let kernels = files("kernels/src", &[".rs"]).into_iter();
    let kernels = kernels.map(|(path, text)| (path["kernels/".len()..].to_owned(), text));
    found.extend(circles(&kernels.collect::<Vec<_>>()));
    none(found);
    let planted = |b: &str| {
        let file = |path: &str, text: &str| (path.to_owned(), text.to_owned());
        [
            file("src/lib.rs", "pub mod room;"),
            file("src/room/mod.rs", "mod a;\nmod b;\nmod c;\npub use a::Lamp;"),
            file("src/room/a.rs", "use super::c::table;\npub struct Lamp;"),
            file("src/room/b.rs", b),
            file("src/room/c.rs", "pub fn table() {\n    super::b::chair();\n}"),
        ]
    };
    assert!(circles(&planted("pub fn chair() {}")).is_empty());
    let closed = planted("use crate::room::Lamp;\npub fn chair() {}");
    let all = "crate::room::a ↔ crate::room::b ↔ crate::room::c";
    assert_eq!(circles(&closed), [all], "by way of what the directory shows");
}

#[test]
fn a_directory_has_its_first_page_inside() {
    let paths: Vec<String> = rust_files().into_iter().map(|(path, _)| path).collect();
    none(beside(&paths));
    let planted = |paths: &[&str]| beside(&paths.iter().map(|p| p.to_string()).collect::<Vec<_>>());
    assert!(planted(&["src/room/mod.rs", "src/room/a.rs", "tests/api.rs"]).is_empty());
    assert_eq!(planted(&["src/room.rs", "src/room/a.rs"]), ["src/room.rs: belongs in mod.rs"]);
    assert!(planted(&["tests/api.rs", "tests/api/keys.rs"]).is_empty(), "a binary and its parts");
}

/// Files that stand beside the directory they are the first page of.
fn beside(paths: &[String]) -> Vec<String> {
    let doubled = |path: &&String| {
        let inside = format!("{}/", path.trim_end_matches(".rs"));
        // A test binary is named by its file; its parts are beside it.
        !path.starts_with("tests/")
            && !path.contains("/tests/")
            && paths.iter().any(|other| other.starts_with(&inside))
    };
    paths.iter().filter(doubled).map(|path| format!("{path}: belongs in mod.rs")).collect()
}

#[test]
fn areas_keep_their_budgets() {
    let files = files("src", &[".rs"]);
    none(over_budget(BUDGETS, &files));
    let planted = [("src/model/mod.rs".to_owned(), "a\n".repeat(11))];
    assert_eq!(over_budget(&[("model", &["model/"], 10)], &planted), ["model: 11 lines of 10"]);
    let directories = files.iter().filter_map(|(path, _)| path["src/".len()..].split_once('/'));
    let directories: BTreeSet<&str> = directories.map(|(directory, _)| directory).collect();
    let counted = |d: &&str| {
        let inside = |part: &&str| part.starts_with(&format!("{d}/"));
        BUDGETS.iter().any(|(_, parts, _)| parts.iter().any(inside))
    };
    none(
        directories.iter().filter(|d| !counted(d)).map(|d| format!("{d} has no budget")).collect(),
    );
}

fn over_budget(budgets: &[(&str, &[&str], usize)], files: &[(String, String)]) -> Vec<String> {
    let mut over = Vec::new();
    for (area, parts, most) in budgets {
        let of = |path: &str| parts.iter().any(|part| path["src/".len()..].starts_with(part));
        let lines: usize =
            files.iter().filter(|(p, _)| of(p)).map(|(_, text)| text.lines().count()).sum();
        if lines > *most {
            over.push(format!("{area}: {lines} lines of {most}"));
        }
    }
    over
}
