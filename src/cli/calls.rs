//! What several commands do alike: run a future to its end, refuse an argument, make a directory
//! whole, show a bar.
//!
//! Owns these. Never prints a line.

use crate::error::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::future::Future;
use std::path::Path;

/// An argument that clap alone cannot check.
pub fn bad_argument(message: impl Into<String>) -> Error {
    Error::invalid("invalid_arguments", message)
}

/// Runs a client's future to its end; clients need one thread and leave the cores to the server.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::fault(format!("cannot start the runtime: {e}")))?
        .block_on(future)
}

/// Threads to work with: every core, where nobody says.
pub fn threads(asked: Option<usize>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    asked.unwrap_or_else(cores).clamp(1, 64)
}

/// Errors: what a command is to make is there already.
pub fn check_new(out: &Path) -> Result<()> {
    match out.exists() {
        true => Err(bad_argument(format!("{} exists already", out.display()))),
        false => Ok(()),
    }
}

/// Makes the directory `out`, filled by `fill`, whole or not at all: it is made beside its place
/// and renamed.
pub fn made_whole(out: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fault = |e: std::io::Error| Error::fault(format!("cannot write {}: {e}", out.display()));
    let mut stage = tempfile::Builder::new();
    #[cfg(unix)]
    stage.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755));
    std::fs::create_dir_all(parent).map_err(fault)?;
    let staged = stage.prefix(".polylora-").tempdir_in(parent).map_err(fault)?;
    fill(staged.path())?;
    std::fs::rename(staged.path(), out).map_err(fault)?;
    let _ = staged.keep(); // it is no longer there to be removed
    Ok(())
}

/// Writes a file.
pub fn put(file: &Path, text: &str) -> Result<()> {
    let fault = |e| Error::fault(format!("cannot write {}: {e}", file.display()));
    std::fs::write(file, text).map_err(fault)
}

/// The form of a bar of training steps.
pub const TRAINING: &str = "training {bar:30} {pos}/{len} {msg} {eta} left";

/// A bar on a terminal, and nothing elsewhere.
pub fn bar(template: &str, length: u64) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template(template);
    let style = style.map_err(|e| Error::fault(format!("the bar: {e}")))?;
    Ok(ProgressBar::new(length).with_style(style))
}
