//! `polylora merge` as a person runs it.

use polylora::adapters::format::{check, factors::infer_shape, files::AdapterFiles};
use polylora::merge::spec::Method;
use serde_json::Value;
use std::path::Path;
use support::command::{out, polylora, refused};
use support::golden_adapter;

fn sources() -> [String; 2] {
    let dir = |name: &str| golden_adapter(name).display().to_string();
    [format!("{}=0.7", dir("pirate")), format!("{}=0.3", dir("blurb"))]
}

fn merge(to: &Path, more: &[&str]) -> std::process::Output {
    let [a, b] = sources();
    let to = to.display().to_string();
    polylora(&[&["merge", &a, &b, "--out", &to], more].concat())
}

#[test]
fn the_same_order_makes_the_same_digest_and_another_seed_another() {
    let dir = tempfile::tempdir().expect("directory");
    let digest = |name: &str, more: &[&str]| {
        let to = dir.path().join(name);
        let done = merge(&to, more);
        let said = out(&done);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let digest = AdapterFiles::find(&to).and_then(|f| f.digest()).expect("an adapter");
        assert!(said.contains(&digest.to_string()) && said.contains("q_proj"), "{said}");
        digest
    };
    let lego = ["--method", "lego", "--rank", "6", "--restarts", "1"];
    let with = |seed: &'static str, threads: &'static str| {
        [&lego[..], &["--seed", seed, "--threads", threads]].concat()
    };
    let first = digest("a", &with("1", "1"));
    assert_eq!(first, digest("b", &with("1", "3")));
    assert_ne!(first, digest("c", &with("2", "2")));

    // blurb has its own rank at some sites, pirate other modules: patterns must say so.
    digest("cat", &["--method", "cat"]);
    digest("spread", &["--method", "svd", "--rank", "5", "--spread"]);
    for name in ["a", "cat", "spread"] {
        let to = dir.path().join(name);
        let shape = infer_shape(&[&to]).expect("a shape");
        let summary = check(&to, &shape).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(summary.sites, 30 * 5, "{name}");
        let report = std::fs::read(to.join("merge_report.json")).expect("the report");
        let report: Value = serde_json::from_slice(&report).expect("JSON");
        assert_eq!(report["sites"].as_array().map(Vec::len), Some(150));
        assert_eq!(report["spec"]["sources"][0]["name"], "pirate");
        let svg = std::fs::read_to_string(to.join("merge_report.svg")).expect("the picture");
        assert_eq!(svg.matches("<title>").count(), 300);
    }
    let leftovers = std::fs::read_dir(dir.path()).expect("directory").count();
    assert_eq!(leftovers, 5, "nothing but the results is left behind");
}

#[test]
fn mistakes_are_one_line_and_leave_nothing() {
    let dir = tempfile::tempdir().expect("directory");
    let to = dir.path().join("out");
    let said = refused(&merge(&to, &["--method", "sum"]), 2);
    assert!(said.contains("`sum`") && said.contains("lego"), "{said}");
    refused(&merge(&to, &["--method", "cat", "--rank", "4"]), 2);
    refused(&merge(&to, &["--density", "2"]), 2);
    refused(&merge(dir.path(), &[]), 2); // exists
    let said = refused(&merge(&to, &["--method", "linear"]), 1);
    assert!(said.contains("equal ranks"), "{said}");
    let to = to.display().to_string();
    let sql = golden_adapter("sql").display().to_string();
    let said = refused(&polylora(&["merge", &sql, "--out", &to]), 1);
    assert!(said.contains("DoRA"), "{said}");
    let [a, _] = sources();
    refused(&polylora(&["merge", &format!("{a}=x"), "--out", &to]), 2);
    let said = refused(&polylora(&["merge", "no/such-directory", "--out", &to]), 2);
    assert_eq!(said, "error: no/such-directory is no directory on this machine\n");
    let empty = tempfile::tempdir().expect("directory");
    let empty = empty.path().display().to_string();
    let said = refused(&polylora(&["merge", &empty, "--out", &to]), 1);
    assert!(said.starts_with(&format!("error: {empty}: ")), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).expect("directory").count(), 0);
}

#[test]
fn without_a_method_several_are_summed_by_ties_and_one_is_truncated() {
    let asked = |name, sources| Method::asked(name, sources).map(Method::name);
    assert_eq!(asked(None, 1).expect("a method"), "svd");
    assert_eq!(asked(None, 2).expect("a method"), "ties_svd");
    assert_eq!(asked(Some("cat"), 1).expect("a method"), "cat");
    asked(Some("sum"), 2).expect_err("no method");
}
