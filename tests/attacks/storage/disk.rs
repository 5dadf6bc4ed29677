//! A disk that fails as a test says, for one server and one directory.
//!
//! Owns the library that is loaded into the server (`disk.c`, compiled here) and the file by which
//! it is told. Never needs root. The thing to know: only calls that change files below the
//! directory fail, and each failure is counted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// How the disk fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Full = 1,
    WriteError = 2,
    SyncError = 3,
    ReadOnly = 4,
    /// Not the disk: the process is killed at the call.
    Kill = 5,
}

impl Fault {
    pub const ALL: [Self; 4] = [Self::Full, Self::WriteError, Self::SyncError, Self::ReadOnly];
}

/// Offsets in the file, as in `struct control`.
const SKIP: u64 = 4;
const LEFT: u64 = 8;
const FAILED: u64 = 16;
const ONLY: u64 = 24;
const SIZE: u64 = 88;

pub struct Disk {
    control: File,
    path: PathBuf,
    dir: PathBuf,
    _own: TempDir,
}

impl Disk {
    /// A sound disk for what lies below `dir`, which is made.
    pub fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("a directory");
        let own = tempfile::tempdir().expect("a directory");
        let path = own.path().join("control");
        let control =
            File::options().read(true).write(true).create_new(true).open(&path).expect("a file");
        control.set_len(SIZE).expect("zeros");
        Self { control, path, dir: dir.canonicalize().expect("there"), _own: own }
    }

    /// The directory that it is for.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the server's environment needs.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        vec![
            ("LD_PRELOAD", text(library())),
            ("POLYLORA_TEST_DISK", text(&self.path)),
            ("POLYLORA_TEST_DIR", text(&self.dir)),
        ]
    }

    /// From now on it fails so; only for paths that contain `only`, and at most `times` times.
    pub fn fail(&self, fault: Fault, only: &str, times: Option<i64>) {
        self.set(fault, 0, only, times);
    }

    fn set(&self, fault: Fault, skip: u32, only: &str, times: Option<i64>) {
        self.heal();
        self.write(&skip.to_ne_bytes(), SKIP);
        let mut name = [0; 64];
        name[..only.len()].copy_from_slice(only.as_bytes());
        self.write(&name, ONLY);
        self.write(&times.unwrap_or(-1).to_ne_bytes(), LEFT);
        self.write(&0u64.to_ne_bytes(), FAILED);
        self.write(&(fault as u32).to_ne_bytes(), 0);
    }

    /// From the call after `calls` more on, it fails so for good.
    pub fn fail_after(&self, fault: Fault, calls: u32) {
        self.set(fault, calls, "", None);
    }

    /// It is sound again.
    pub fn heal(&self) {
        self.write(&0u32.to_ne_bytes(), 0);
    }

    /// Calls that failed since `fail`.
    pub fn failed(&self) -> u64 {
        let mut bytes = [0; 8];
        self.control.read_exact_at(&mut bytes, FAILED).expect("a number");
        u64::from_ne_bytes(bytes)
    }

    fn write(&self, bytes: &[u8], at: u64) {
        self.control.write_all_at(bytes, at).expect("told");
    }
}

/// The library, compiled once for this run.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory").keep();
        let (source, built) = (
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/attacks/storage/disk.c"),
            dir.join("disk.so"),
        );
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
        let mut command = Command::new(compiler);
        command.args(["-std=c11", "-O1", "-shared", "-fPIC", source, "-ldl", "-o"]).arg(&built);
        assert!(command.status().expect("a C compiler").success(), "disk.c compiles");
        built
    })
}
