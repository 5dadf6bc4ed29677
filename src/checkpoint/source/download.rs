//! One file over HTTP, resumed and shown.
//!
//! Owns the part file's growth and the progress line. Never decides what to fetch. The thing to
//! know: a part file is only ever appended to or started anew, so an interrupted download continues
//! where it stopped, in the same process or the next; the checksum at the end decides whether it is
//! the file that was wanted.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Client, Response, StatusCode};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::time::Duration;

/// Attempts in a row that brought not one byte.
const BARREN_ATTEMPTS_MAX: u32 = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest silence of a server that is sending.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// What is to be fetched.
pub struct Remote<'a> {
    pub url: &'a str,
    /// Hexadecimal; `None` where the server's word is all there is.
    pub sha256: Option<&'a str>,
    /// A longer file is refused: it cannot be the right one.
    pub bytes_max: u64,
    /// What the progress line calls it.
    pub label: &'a str,
}

impl Remote<'_> {
    /// Continues `part` until it is whole, then checks it; a part with the wrong checksum is
    /// removed. Errors say why, for a person.
    pub fn fetch(&self, part: &Path) -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| format!("no runtime for the download: {e}"))?;
        // Driven, and dropped, on a thread of its own: the caller's may drive a runtime already, as
        // a starting server's does.
        let fetched = std::thread::scope(|scope| {
            scope.spawn(move || runtime.block_on(self.fetch_all(part))).join()
        });
        fetched.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let Some(expected) = self.sha256 else {
            return Ok(());
        };
        let found = sha256_of(part)?;
        if found != expected {
            remove(part);
            return Err(format!(
                "the downloaded file has SHA-256 {found}, not {expected}, and was removed"
            ));
        }
        Ok(())
    }

    async fn fetch_all(&self, part: &Path) -> Result<(), String> {
        let client = crate::tls::client()
            .user_agent(concat!("polylora/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .map_err(|e| format!("no HTTP client: {}", chain(&e)))?;
        let mut progress = Progress::new(self.label);
        let mut barren = 0;
        let mut pause = FIRST_PAUSE;
        loop {
            let before = length(part);
            match self.attempt(&client, part, &mut progress).await {
                Ok(()) => {
                    progress.finish();
                    return Ok(());
                }
                Err(Failure::Final(why)) => return Err(why),
                Err(Failure::Passing(why)) => {
                    if length(part) > before {
                        barren = 0;
                        pause = FIRST_PAUSE;
                    }
                    barren += 1;
                    if barren == BARREN_ATTEMPTS_MAX {
                        return Err(format!("{why} ({barren} attempts)"));
                    }
                    tracing::warn!("download of {}: {why}; trying again", self.label);
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            }
        }
    }

    async fn attempt(
        &self,
        client: &Client,
        part: &Path,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let have = length(part);
        let mut request = client.get(self.url);
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        let response = request.send().await.map_err(passing)?;
        let start = match self.start(&response, have)? {
            Some(start) => start,
            None => return Ok(()),
        };
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(part)
            .map_err(|e| unwritable(part, &e))?;
        file.set_len(start).map_err(|e| unwritable(part, &e))?;
        let total = response.content_length().map(|rest| start + rest);
        if total.is_some_and(|total| total > self.bytes_max) {
            return Err(self.too_long());
        }
        progress.start(start, total);
        self.copy(response, &mut file, part, progress, start).await
    }

    /// The byte the answer starts with; `None`: `have` is all there is.
    fn start(&self, response: &Response, have: u64) -> Result<Option<u64>, Failure> {
        let range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned();
        match response.status() {
            StatusCode::OK => Ok(Some(0)),
            StatusCode::PARTIAL_CONTENT if range.starts_with(&format!("bytes {have}-")) => {
                Ok(Some(have))
            }
            StatusCode::RANGE_NOT_SATISFIABLE if range == format!("bytes */{have}") => Ok(None),
            status @ (StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE) => {
                Err(Failure::Final(format!(
                    "the server answers {status} with range `{range}` to a request from byte {have}"
                )))
            }
            status
                if status.is_server_error()
                    || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS]
                        .contains(&status) =>
            {
                Err(Failure::Passing(format!("the server answers {status}")))
            }
            status => Err(Failure::Final(format!("the server answers {status}"))),
        }
    }

    async fn copy(
        &self,
        mut response: Response,
        file: &mut File,
        part: &Path,
        progress: &mut Progress,
        start: u64,
    ) -> Result<(), Failure> {
        let mut have = start;
        while let Some(bytes) = response.chunk().await.map_err(passing)? {
            have += bytes.len() as u64;
            if have > self.bytes_max {
                return Err(self.too_long());
            }
            file.write_all(&bytes).map_err(|e| unwritable(part, &e))?;
            progress.advance(bytes.len() as u64);
        }
        Ok(())
    }

    fn too_long(&self) -> Failure {
        Failure::Final(format!(
            "the file is longer than the {} bytes expected at most",
            self.bytes_max
        ))
    }
}

/// Whether to try again.
enum Failure {
    Passing(String),
    Final(String),
}

fn passing(e: reqwest::Error) -> Failure {
    Failure::Passing(chain(&e))
}

fn unwritable(path: &Path, e: &std::io::Error) -> Failure {
    Failure::Final(format!("cannot write {}: {e}", path.display()))
}

/// An error and its causes: reqwest's own words end where it gets interesting.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

fn length(path: &Path) -> u64 {
    path.metadata().map_or(0, |m| m.len())
}

/// Removes a file that is not what it should be; one that stays is met again by the next checksum.
pub fn remove(path: &Path) {
    if let Err(e) = std::fs::remove_file(path) {
        tracing::warn!("cannot remove {}: {e}", path.display());
    }
}

/// SHA-256 of a file, hexadecimal.
pub fn sha256_of(path: &Path) -> Result<String, String> {
    let unreadable = |e: std::io::Error| format!("cannot read {}: {e}", path.display());
    let mut file = File::open(path).map_err(unreadable)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(unreadable)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// A bar on a terminal; elsewhere a log line for every tenth.
pub struct Progress {
    label: String,
    bar: Option<ProgressBar>,
    done: u64,
    total: Option<u64>,
    tenths: u64,
}

impl Progress {
    pub fn new(label: &str) -> Self {
        Self { label: label.into(), bar: None, done: 0, total: None, tenths: 0 }
    }

    /// `done` of `total` bytes are there.
    pub fn start(&mut self, done: u64, total: Option<u64>) {
        self.done = done;
        self.total = total;
        self.tenths = total.map_or(0, |total| done * 10 / total.max(1));
        if !std::io::stderr().is_terminal() {
            tracing::info!(
                "downloading {} from byte {done} of {}",
                self.label,
                total.map_or("an unknown number".into(), |t| t.to_string())
            );
            return;
        }
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr())
            .with_message(self.label.clone())
            .with_position(done);
        let line = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(line) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.reset_eta();
        if let Some(old) = self.bar.replace(bar) {
            old.finish_and_clear();
        }
    }

    pub fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        if let Some(bar) = &self.bar {
            return bar.set_position(self.done);
        }
        let Some(total) = self.total else { return };
        let tenths = self.done * 10 / total.max(1);
        if tenths > self.tenths {
            self.tenths = tenths;
            tracing::info!("downloading {}: {}0 %", self.label, tenths);
        }
    }

    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

impl hf_hub::api::Progress for Progress {
    fn init(&mut self, size: usize, _filename: &str) {
        self.start(0, Some(size as u64));
    }
    fn update(&mut self, size: usize) {
        self.advance(size as u64);
    }
    fn finish(&mut self) {
        Progress::finish(self);
    }
}
