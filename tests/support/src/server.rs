//! The real program as a child process on a free port, stopped when dropped.

use crate::command::program;
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
        Self::start_in(model, data_dir, more, log, &[])
    }

    /// The same with more in its environment.
    pub fn start_in(
        model: &Path,
        data_dir: &Path,
        more: &[&str],
        log: Stdio,
        environment: &[(&str, String)],
    ) -> Self {
        let mut child = Command::new(program())
            .args(["serve", "--port", "0", "--model"])
            .arg(model)
            .arg("--data-dir")
            .arg(data_dir)
            .args(more)
            .env("POLYLORA_LOG_FILTER", "warn")
            .envs(environment.iter().map(|(name, value)| (name, value)))
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

    /// Asks it to stop, as an operator would, and waits.
    pub fn terminate(self) -> std::process::ExitStatus {
        self.ask_to_stop();
        self.wait()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM.
    pub fn ask_to_stop(&self) {
        let pid = self.child.id().to_string();
        Command::new("kill").arg(pid).status().expect("kill");
    }

    /// Waits for its end.
    pub fn wait(mut self) -> std::process::ExitStatus {
        self.child.wait().expect("it ends")
    }
}

/// A line of `/proc/<pid>/status` in kB, such as `VmRSS:`.
pub fn kilobytes(pid: u32, line: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let found = status.lines().find_map(|l| l.strip_prefix(line));
    found.map_or(0, |l| l.trim().trim_end_matches(" kB").parse().expect("kilobytes"))
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
