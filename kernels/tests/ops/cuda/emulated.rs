//! The tests beside this file, run once more on a driver without a GPU (`driver.cpp`), which the
//! loader finds first in a process of its own.
//!
//! Owns building that driver. Never a substitute for a GPU: the PTX itself is not run.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::say;

/// The directory of the driver, or nothing and a line where there is no C++ compiler.
fn driver() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT.get_or_init(build).as_deref()
}

fn build() -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated-driver");
    std::fs::create_dir_all(&dir).expect("a directory");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let built = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-Wno-unknown-pragmas"])
        .args(["-ffp-contract=off", "-fPIC", "-shared", "-o"])
        .arg(dir.join("libcuda.so.1"))
        .arg("-I")
        .arg(here.join("cuda"))
        .arg(here.join("tests/ops/cuda/driver.cpp"))
        .output();
    match built {
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success(), "the emulated driver does not build: {said}");
            Some(dir)
        }
        Err(why) => {
            say(&format!("SKIPPED, not passed: the emulated driver: {compiler}: {why}"));
            None
        }
    }
}

/// Runs tests of this program by name on the emulated driver; what they said, if they passed.
fn run(name: &str, settings: &[(&str, &str)]) -> Option<String> {
    let driver = driver()?;
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.env("LD_LIBRARY_PATH", driver).args([name, "--test-threads=2"]);
    let done = command.envs(settings.iter().copied()).output().expect("run");
    let said = [done.stdout, done.stderr].map(|s| String::from_utf8_lossy(&s).into_owned());
    let said = said.concat();
    assert!(done.status.success(), "{settings:?}: {said}");
    Some(said)
}

#[test]
fn every_test_of_a_gpu_passes_on_the_emulated_driver() {
    let Some(said) = run("cuda::gpu_", &[]) else { return };
    assert!(!said.contains("SKIPPED"), "{said}");
    assert!(said.contains("10 passed"), "all of them ran: {said}");
}

#[test]
fn what_is_wrong_with_a_driver_or_a_gpu_is_one_line() {
    let check = |settings: &[(&str, &str)], line: &str| {
        if let Some(said) = run("opening_a_gpu_gives_one_or_one_line", settings) {
            assert!(said.contains(&format!("OPENED {line}")), "{line}: {said}");
        }
    };
    check(&[], "cuda:0: emulated GPU");
    check(&[("EMULATED_OPEN", "1"), ("EMULATED_GPUS", "2")], "cuda:1: emulated GPU");
    let line = "there is no GPU 3: the NVIDIA driver finds one, number 0";
    check(&[("EMULATED_OPEN", "3")], line);
    let line = "there is no GPU 3: the NVIDIA driver finds 2, 0 to 1";
    check(&[("EMULATED_OPEN", "3"), ("EMULATED_GPUS", "2")], line);
    check(&[("EMULATED_GPUS", "0")], "the NVIDIA driver finds no GPU on this machine");
    let line = "the NVIDIA driver is too old: it knows CUDA 11.4, needed is 12.4";
    check(&[("EMULATED_CUDA", "11040")], line);
    let line = "emulated GPU is too old: its compute capability is 7.5, needed is 8.0";
    check(&[("EMULATED_CAPABILITY", "75")], line);
}
