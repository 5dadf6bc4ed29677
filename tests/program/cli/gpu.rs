//! `--device` where a driver is missing, too old, without that GPU, or fine: always one line. The
//! driver is the emulated one of the kernels' tests.

use std::path::{Path, PathBuf};
use std::process::Command;
use support::command::{polylora_with, refused};

/// The directory of the emulated driver, or nothing and a line where there is no C++ compiler.
fn driver() -> Option<PathBuf> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-emulated-driver");
    std::fs::create_dir_all(&dir).expect("a directory");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let built = Command::new(&compiler)
        .args(["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o"])
        .arg(dir.join("libcuda.so.1"))
        .arg("-I")
        .arg(kernels.join("cuda"))
        .arg(kernels.join("tests/ops/cuda/driver.cpp"))
        .status();
    match built {
        Ok(status) => {
            assert!(status.success(), "the emulated driver builds");
            Some(dir)
        }
        Err(why) => {
            eprintln!("SKIPPED, not passed: the emulated driver: {compiler}: {why}");
            None
        }
    }
}

/// What `serve --device` says on a machine with these variables. It says it before it looks for a
/// model.
fn said(device: &str, variables: &[(&str, &str)]) -> String {
    let data = tempfile::tempdir().expect("a directory");
    let data = data.path().to_str().expect("UTF-8");
    let args = ["serve", "--model", "/no/such/model", "--data-dir", data, "--device", device];
    refused(&polylora_with(&args, variables), 2)
}

#[test]
fn a_gpu_that_cannot_be_had_is_one_line() {
    // Whatever this machine has, no version serves on it yet.
    let said = said("cuda:0", &[]);
    assert!(said.starts_with("error: device is cuda:0, but "), "{said}");
}

#[test]
fn what_is_wrong_with_a_driver_or_a_gpu_is_said_before_the_model_loads() {
    let Some(dir) = driver() else { return };
    let path = ("LD_LIBRARY_PATH", dir.to_str().expect("UTF-8"));
    let check = |device: &str, settings: &[(&str, &str)], parts: &[&str]| {
        let said = said(device, &[&[path], settings].concat());
        assert!(parts.iter().all(|p| said.contains(p)), "{said} should say {parts:?}");
    };
    check("cuda:0", &[("EMULATED_CUDA", "11040")], &["too old", "CUDA 11.4", "12.4"]);
    check("cuda:0", &[("EMULATED_GPUS", "0")], &["finds no GPU"]);
    check("cuda:4", &[("EMULATED_GPUS", "3")], &["no GPU 4", "finds 3, 0 to 2"]);
    check("cuda:0", &[("EMULATED_CAPABILITY", "75")], &["emulated GPU", "7.5"]);
    check("cuda:0", &[], &["do not run on a GPU yet", "cuda:0: emulated GPU", "auto or cpu"]);
}
