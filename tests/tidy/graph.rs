//! The graph of imports: which file names which, by the code itself.
//!
//! Owns the reading of `use` and of paths, re-exports followed to the file that defines a name.
//! Never judges style.

use crate::source::{code_of, leaves};
use fancy_regex::Regex;
use std::collections::{BTreeMap, BTreeSet};

/// A file of the crate, by the path of its module: `crate::api::http::auth`.
pub type Module = String;

/// Every file and what it names.
pub struct Graph {
    pub names: BTreeMap<Module, BTreeSet<Module>>,
}

struct File {
    code: String,
    /// (path, name it has here, whether others may take it from here)
    uses: Vec<(Vec<String>, String, bool)>,
}

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a pattern")
}

/// `src/api/http/mod.rs` is `crate::api::http`.
pub fn module_of(path: &str) -> Module {
    let inner = path.trim_start_matches("src/").trim_end_matches(".rs");
    let inner = inner.trim_end_matches("/mod");
    match inner {
        "lib" => "crate".to_owned(),
        _ => format!("crate::{}", inner.replace('/', "::")),
    }
}

impl Graph {
    /// Of files as (path from the root, text); their unit tests left out.
    pub fn of(files: &[(String, String)]) -> Self {
        let modules: BTreeSet<Module> = files.iter().map(|(path, _)| module_of(path)).collect();
        let parsed: BTreeMap<Module, File> = files
            .iter()
            .map(|(path, text)| {
                let module = module_of(path);
                let file = File::of(&module, text, &modules);
                (module, file)
            })
            .collect();
        let mut names = BTreeMap::new();
        for (module, file) in &parsed {
            let mut named = BTreeSet::new();
            for (path, _, exported) in &file.uses {
                // A module that shows its children's names does not use them.
                if !exported {
                    named.extend(defining(path, &parsed, 0));
                }
            }
            for path in file.paths(module, &modules) {
                named.extend(defining(&path, &parsed, 0));
            }
            named.remove(module);
            names.insert(module.clone(), named);
        }
        Self { names }
    }

    /// Groups of files that name each other, directly or around a corner.
    pub fn circles(&self) -> Vec<Vec<Module>> {
        let reach: BTreeMap<&Module, BTreeSet<&Module>> = self
            .names
            .keys()
            .map(|from| {
                let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
                while let Some(at) = next.pop() {
                    let more = self.names.get(at).into_iter().flatten();
                    next.extend(more.filter(|to| seen.insert(*to)));
                }
                (from, seen)
            })
            .collect();
        let mut circles: Vec<Vec<Module>> = Vec::new();
        for (from, seen) in &reach {
            if !seen.contains(from) || circles.iter().any(|circle| circle.contains(from)) {
                continue;
            }
            let both = |to: &&&Module| reach[**to].contains(from);
            circles.push(seen.iter().filter(both).map(|to| (**to).clone()).collect());
        }
        circles
    }
}

impl File {
    fn of(module: &str, text: &str, modules: &BTreeSet<Module>) -> Self {
        let code = code_of(text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default());
        let statement = pattern(r"(?m)^[ \t]*(pub(?:\([^)]*\))?\s+)?use\s+([^;]+);");
        let mut uses = Vec::new();
        let all = statement.captures_iter(code.as_str());
        for found in all.map(|c| c.expect("no backtrack limit")) {
            for (path, name) in leaves(&found[2]) {
                if let Some(path) = absolute(&path, module, modules) {
                    uses.push((path, name, found.get(1).is_some()));
                }
            }
        }
        let code = statement.replace_all(code.as_str(), "").into_owned();
        Self { code, uses }
    }

    /// Paths outside `use`.
    fn paths(&self, module: &str, modules: &BTreeSet<Module>) -> Vec<Vec<String>> {
        let path = pattern(r"(?<![\w:])(\w+(?:::\w+)+)");
        let found = path.captures_iter(self.code.as_str()).map(|c| c.expect("no backtrack limit"));
        let parts = found.map(|c| c[1].split("::").map(str::to_owned).collect::<Vec<_>>());
        parts.filter_map(|parts| absolute(&parts, module, modules)).collect()
    }

    fn defines(&self, name: &str) -> bool {
        let item = r"(?m)^ *(?:pub(?:\([^)\n]*\))? )?(?:const |async |unsafe )*";
        let kind = r"(?:fn|struct|enum|const|type|static|trait|union|macro_rules!) ";
        pattern(&format!(r"{item}{kind}{name}\b")).is_match(&self.code).expect("no backtrack limit")
    }
}

/// A path from the root of the crate, if it leads into it.
fn absolute(path: &[String], module: &str, modules: &BTreeSet<Module>) -> Option<Vec<String>> {
    let mut at: Vec<String> = module.split("::").map(str::to_owned).collect();
    match path[0].as_str() {
        "crate" => return Some(path.to_vec()),
        "self" => at.extend_from_slice(&path[1..]),
        "super" => {
            let up = path.iter().take_while(|part| *part == "super").count();
            at.truncate(at.len().saturating_sub(up).max(1));
            at.extend_from_slice(&path[up..]);
        }
        child if modules.contains(&format!("{module}::{child}")) => at.extend_from_slice(path),
        _ => return None,
    }
    Some(at)
}

/// The file that defines what a path names.
fn defining(path: &[String], files: &BTreeMap<Module, File>, depth: usize) -> Option<Module> {
    let known = (1..=path.len()).rev().find(|n| files.contains_key(&path[..*n].join("::")))?;
    let module = path[..known].join("::");
    let (file, rest) = (&files[&module], &path[known..]);
    let Some(name) = rest.first().filter(|name| *name != "*") else { return Some(module) };
    if file.defines(name) || depth > 8 {
        return Some(module);
    }
    let on = |from: &[String], rest: &[String]| -> Vec<String> { [from, rest].concat() };
    for (from, called, _) in &file.uses {
        let next = match from.last().map(String::as_str) {
            Some("*") => on(&from[..from.len() - 1], rest),
            _ if called == name => on(from, &rest[1..]),
            _ => continue,
        };
        let glob = from.last().is_some_and(|last| last == "*");
        let there = defining(&next, files, depth + 1);
        match there {
            Some(there) if !glob || files[&there].defines(name) => return Some(there),
            _ => {}
        }
    }
    Some(module)
}
