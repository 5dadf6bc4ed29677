//! Runs the binary and reads what it said.

use std::process::{Command, Output};
use std::sync::LazyLock;

/// The program that cargo built beside the tests. `POLYLORA_PROGRAM` names another build, to see a
/// test fail on it.
pub fn program() -> &'static str {
    static PROGRAM: LazyLock<String> = LazyLock::new(|| {
        let named = std::env::var("POLYLORA_PROGRAM");
        let built = named.or_else(|_| std::env::var("CARGO_BIN_EXE_polylora"));
        built.expect("cargo test names the program, and POLYLORA_PROGRAM does by hand")
    });
    &PROGRAM
}

pub fn polylora(args: &[&str]) -> Output {
    polylora_with(args, &[])
}

/// Runs the binary without any setting of the surrounding environment.
pub fn polylora_with(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(program());
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("POLYLORA_")) {
        command.env_remove(name);
    }
    let given = variables.iter().copied();
    command.args(args).envs(given).output().expect("the binary runs")
}

pub fn out(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

/// Fails with exactly this code and one `error:` line; returns the line.
pub fn refused(o: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(code), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("error: "), "{said}");
    said
}
