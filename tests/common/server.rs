//! The real program as a child process on a free port, stopped when dropped.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub struct Server {
    child: Child,
    /// `http://127.0.0.1:<port>`
    pub url: String,
}

impl Server {
    /// Starts `polylora serve --model MODEL …` and waits until it listens.
    pub fn start(model: &Path, data_dir: &Path, more: &[&str]) -> Self {
        Self::start_logging(model, data_dir, more, Stdio::inherit())
    }

    /// The same, with its log going to `log`.
    pub fn start_logging(model: &Path, data_dir: &Path, more: &[&str], log: Stdio) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_polylora"))
            .args(["serve", "--port", "0", "--model"])
            .arg(model)
            .arg("--data-dir")
            .arg(data_dir)
            .args(more)
            .env("POLYLORA_LOG_FILTER", "warn")
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        let out = child.stdout.take().expect("stdout is piped");
        let mut url = None;
        for line in BufReader::new(out).lines() {
            let line = line.expect("the banner is text");
            if let Some(at) = line.find("http://") {
                url = line[at..].split_whitespace().next().map(str::to_owned);
                break;
            }
        }
        let url = url.expect("the server ended before it listened");
        Self { child, url }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to stop, as an operator would, and waits.
    pub fn terminate(mut self) -> std::process::ExitStatus {
        let pid = self.child.id().to_string();
        Command::new("kill").arg(pid).status().expect("kill");
        self.child.wait().expect("it ends")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
