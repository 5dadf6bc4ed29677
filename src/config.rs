//! Every limit in the program: what was asked (flags, environment, file) and what was checked.
//!
//! Owns the keys, their defaults and ranges, and the order in which sources win: flag, environment,
//! file, default. Never opens a model or a port. The thing to know: two stages. [`RawConfig`] is
//! what was typed, every field optional; [`Config`] is what holds, every field decided. Nobody else
//! parses or checks a setting.

mod machine;
mod raw;
mod size;
mod web;

pub use machine::memory_available;
pub use raw::{MODEL, RANGES, RawConfig};
pub use size::{Size, human};

use crate::error::{Error, Result};
use clap::Args;
use polylora_kernels::Place;
use serde::Serialize;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The checked configuration of `serve`.
#[derive(Debug, Clone, Serialize)]
pub struct Config {
    pub model: String,
    pub served_name: Option<String>,
    /// `None` is auto.
    pub dtype: Option<String>,
    pub host: String,
    pub port: u16,
    pub data_dir: PathBuf,
    /// (name, directory) loaded at start
    pub adapters: Vec<(String, PathBuf)>,
    /// Opens every route. With it, or with any key ever made, all but /live, /ready and /health
    /// want `Authorization: Bearer <key>`.
    pub api_key: Option<String>,
    /// Serve beyond this machine without a key: the operator said so.
    pub allow_open: bool,
    /// `auto`, `cpu` or `cuda:N`
    pub device: String,
    pub threads: usize,
    /// Prompt plus output of one request, in tokens; 0: the model's own context (bounded by KV
    /// memory).
    pub context: usize,
    pub kv_bytes: u64,
    /// `None`: the model's own.
    pub kv_dtype: Option<String>,
    pub rows_max: usize,
    pub sequences_max: usize,
    pub turn_tokens: usize,
    pub waiting_max: usize,
    pub waiting_tokens_max: usize,
    pub stream_events_max: usize,
    pub prefix_cache: bool,
    /// `tenant` or `all`
    pub prefix_share: String,
    pub adapter_dtype: Option<String>,
    pub adapter_bytes_max: u64,
    /// Slots of the bank: adapter versions in memory at once.
    pub resident_max: usize,
    /// A request for an adapter that has no room waits so long, and then gets 507.
    pub adapter_wait_seconds: u64,
    /// It waits so long before adapters in use take no new requests for its sake.
    pub adapter_patience_ms: u64,
    pub upload_bytes_max: u64,
    /// Directories below which `load_lora_adapter` may read.
    pub adapter_dirs: Vec<PathBuf>,
    pub body_bytes_max: usize,
    /// Bodies, parsed JSON, prompts being encoded and archives, of all requests together.
    pub request_bytes_max: u64,
    pub adapters_max: usize,
    pub versions_kept: usize,
    /// n, stop strings, logit_bias entries, messages per request
    pub choices_max: usize,
    pub stops_max: usize,
    pub messages_max: usize,
    pub logit_bias_max: usize,
    /// Connections open at once; newcomers take the place of quiet ones.
    pub connections_max: usize,
    /// Of one address; never 0 here.
    pub connections_per_address_max: usize,
    /// Host names that an open server answers to, beside its own and loopback's.
    pub allow_hosts: Vec<String>,
    /// Origins of web pages that may call the API.
    pub allow_origins: Vec<String>,
    /// Uploads received at once; more are told 429.
    pub uploads_max: usize,
    /// Merges waiting or running, and finished ones still listed.
    pub merges_max: usize,
    pub merges_kept: usize,
    pub request_seconds_max: u64,
    /// In the queue, before the first step.
    pub queue_seconds_max: u64,
    /// For the head of a request, and for a write that the client does not take.
    pub head_seconds_max: u64,
    /// Without progress in a body.
    pub body_seconds_max: u64,
    pub write_seconds_max: u64,
    /// Without a finished step while there is work: not live any more.
    pub stall_seconds_max: u64,
    pub drain_seconds: u64,
    /// Adapters with series of their own in /metrics.
    pub metric_adapters_max: usize,
    /// Answers wait for the commit of their usage record.
    pub usage_sync: bool,
    /// Records are gathered this long for one commit.
    pub usage_commit_ms: u64,
    pub usage_days_max: u64,
    pub usage_records_max: u64,
    pub log_format: String,
    /// `tracing` filter, e.g. `info` or `polylora=debug`.
    pub log_filter: String,
}

impl Config {
    /// `given` is what flags and environment said; `file` is read below it. Errors name the key,
    /// where it was set and what was expected (`invalid_config`).
    pub fn load(file: Option<&Path>, given: RawConfig) -> Result<Self> {
        Ok(Self::sources(file, given)?.1)
    }

    /// The merged settings as asked, and what they come to.
    fn sources(file: Option<&Path>, given: RawConfig) -> Result<(RawConfig, Self)> {
        raw::in_range(&given).map_err(|(key, why)| blame(&origin(key), &why))?;
        let raw = match file {
            None => given,
            Some(path) => given.over(raw::read_file(path)?),
        };
        let config = Self::check(&raw)?;
        Ok((raw, config))
    }

    fn check(raw: &RawConfig) -> Result<Self> {
        let model = raw.model.clone().unwrap_or_else(|| MODEL.to_owned());
        let number = |key: &str| raw::number(raw, key);
        let size = |key: &str| number(key) as usize;
        let config = Self {
            data_dir: raw.data_dir.clone().unwrap_or_else(|| machine::data_dir(&model)),
            model,
            served_name: raw.served_name.clone(),
            dtype: choice(raw.dtype.as_deref(), "dtype", WEIGHT_DTYPES)?,
            host: raw.host.clone().unwrap_or_else(|| "127.0.0.1".to_owned()),
            port: number("port") as u16,
            adapters: raw.adapters.clone(),
            api_key: raw.api_key.clone(),
            allow_open: raw.allow_open.unwrap_or(false),
            device: place(raw.device.as_deref())?,
            threads: size("threads"),
            context: size("context"),
            kv_bytes: number("kv_bytes"),
            kv_dtype: choice(raw.kv_dtype.as_deref(), "kv_dtype", STORED_DTYPES)?,
            rows_max: size("rows_max"),
            sequences_max: size("sequences_max"),
            turn_tokens: size("turn_tokens"),
            waiting_max: size("waiting_max"),
            waiting_tokens_max: size("waiting_tokens_max"),
            stream_events_max: size("stream_events_max"),
            prefix_cache: raw.prefix_cache.unwrap_or(true),
            prefix_share: choice(raw.prefix_share.as_deref(), "prefix_share", &["tenant", "all"])?
                .unwrap_or_else(|| "tenant".to_owned()),
            adapter_dtype: choice(raw.adapter_dtype.as_deref(), "adapter_dtype", STORED_DTYPES)?,
            adapter_bytes_max: number("adapter_bytes_max"),
            resident_max: size("resident_max"),
            adapter_wait_seconds: number("adapter_wait_seconds"),
            adapter_patience_ms: number("adapter_patience_ms"),
            upload_bytes_max: number("upload_bytes_max"),
            adapter_dirs: raw.adapter_dirs.clone().unwrap_or_default(),
            body_bytes_max: size("body_bytes_max"),
            request_bytes_max: number("request_bytes_max"),
            adapters_max: size("adapters_max"),
            versions_kept: size("versions_kept"),
            choices_max: size("choices_max"),
            stops_max: size("stops_max"),
            messages_max: size("messages_max"),
            logit_bias_max: size("logit_bias_max"),
            connections_max: size("connections_max"),
            connections_per_address_max: connections_per_address(raw),
            allow_hosts: raw.allow_hosts.clone().unwrap_or_default(),
            allow_origins: raw.allow_origins.clone().unwrap_or_default(),
            uploads_max: size("uploads_max"),
            merges_max: size("merges_max"),
            merges_kept: size("merges_kept"),
            request_seconds_max: number("request_seconds_max"),
            queue_seconds_max: number("queue_seconds_max"),
            head_seconds_max: number("head_seconds_max"),
            body_seconds_max: number("body_seconds_max"),
            write_seconds_max: number("write_seconds_max"),
            stall_seconds_max: number("stall_seconds_max"),
            drain_seconds: number("drain_seconds"),
            metric_adapters_max: size("metric_adapters_max"),
            usage_sync: raw.usage_sync.unwrap_or(false),
            usage_commit_ms: number("usage_commit_ms"),
            usage_days_max: number("usage_days_max"),
            usage_records_max: number("usage_records_max"),
            log_format: choice(raw.log_format.as_deref(), "log_format", &["text", "json"])?
                .unwrap_or_else(|| "text".to_owned()),
            log_filter: raw.log_filter.clone().unwrap_or_else(|| "info".to_owned()),
        };
        config.agree()?;
        Ok(config)
    }

    /// What only two settings together can get wrong.
    fn agree(&self) -> Result<()> {
        for (key, text) in [
            ("model", Some(&self.model)),
            ("host", Some(&self.host)),
            ("served_name", self.served_name.as_ref()),
            ("api_key", self.api_key.as_ref()),
        ] {
            if text.is_some_and(|t| t.trim().is_empty()) {
                return Err(blame(key, "is empty; expected a value or no such setting"));
            }
        }
        if self.sequences_max > self.rows_max {
            return Err(blame(
                "sequences_max",
                &format!(
                    "is {}, but a step has only rows_max = {} rows; expected at most rows_max",
                    self.sequences_max, self.rows_max
                ),
            ));
        }
        if self.stream_events_max < self.rows_max {
            return Err(blame(
                "stream_events_max",
                &format!(
                    "is {}, but one step can bring rows_max = {} events; \
                     expected at least rows_max",
                    self.stream_events_max, self.rows_max
                ),
            ));
        }
        if let Some(why) = web::wrong_host(&self.allow_hosts) {
            return Err(blame("allow_hosts", &why));
        }
        // Keys that were made lie in the data directory; whoever opens them asks `guarded` again.
        self.guarded(self.data_dir.join("access.db").exists())?;
        for (i, (name, _)) in self.adapters.iter().enumerate() {
            if self.adapters[..i].iter().any(|(n, _)| n == name) {
                return Err(blame("adapters", &format!("names '{name}' twice")));
            }
        }
        Ok(())
    }

    /// Refuses an address that others can reach, or pages of any origin, where nobody needs a key;
    /// `keyed` says that some key was made. Errors: `invalid_config`.
    pub fn guarded(&self, keyed: bool) -> Result<()> {
        let keyed = keyed || self.api_key.is_some();
        if let Some(why) = web::wrong_origin(&self.allow_origins, keyed) {
            return Err(blame("allow_origins", &why));
        }
        if keyed || self.allow_open || is_loopback(&self.host) {
            return Ok(());
        }
        Err(blame(
            "host",
            &format!(
                "is {}, which others can reach, and there is no key; set POLYLORA_API_KEY, make \
                 one with `polylora key add`, or set allow_open if a proxy guards the port",
                self.host
            ),
        ))
    }

    /// Every key as a TOML file with its help above it. What was set stands plain, defaults stand
    /// commented out, the key itself is never shown.
    pub fn print(file: Option<&Path>, given: RawConfig) -> Result<String> {
        let (raw, config) = Self::sources(file, given)?;
        let asked = serde_json::to_value(&raw).map_err(|e| Error::fault(e.to_string()))?;
        let holds = serde_json::to_value(&config).map_err(|e| Error::fault(e.to_string()))?;
        let mut page = String::from(
            "# Configuration of polylora serve. \
             Commented-out keys show their defaults on this machine.\n",
        );
        for key in keys() {
            page += &format!("\n# {}\n# {}\n", key.help, key.origin());
            if key.name == "adapters" {
                let mark = if config.adapters.is_empty() { "# " } else { "" };
                page += &format!("{mark}[adapters]\n");
                for (name, dir) in &config.adapters {
                    page += &format!("{} = {}\n", quoted(name), quoted(&dir.to_string_lossy()));
                }
                if config.adapters.is_empty() {
                    page += "# pirate = \"adapters/pirate\"\n";
                }
                continue;
            }
            let set = !asked[&key.name].is_null() && key.name != "api_key";
            let value = match (&holds[&key.name], key.name.as_str()) {
                (_, "api_key") => quoted("a-long-secret"),
                (serde_json::Value::Null, "served_name") => quoted("my-model"),
                (serde_json::Value::Null, _) => quoted("auto"),
                (serde_json::Value::String(s), _) => quoted(s),
                (other, _) => other.to_string(),
            };
            let mark = if set { "" } else { "# " };
            page += &format!("{mark}{} = {value}\n", key.name);
        }
        Ok(page)
    }
}

const WEIGHT_DTYPES: &[&str] = &["auto", "f32", "bf16", "q8", "q4"];
const STORED_DTYPES: &[&str] = &["auto", "f32", "bf16", "int8"];

/// One setting, for tables and help: name in the file, flag and environment variable follow from
/// it.
#[derive(Debug, Clone)]
pub struct Key {
    pub name: String,
    pub help: String,
    pub flag: String,
    pub env: String,
}

impl Key {
    fn origin(&self) -> String {
        let range = RANGES.iter().find(|r| r.key == self.name);
        let range = range.map_or(String::new(), |r| format!("; {}", r.expected()));
        format!("flag --{}, environment {}{range}", self.flag, self.env)
    }
}

/// Every setting, in the order of the printed file.
pub fn keys() -> Vec<Key> {
    let command = RawConfig::augment_args(clap::Command::new("keys"));
    command
        .get_arguments()
        .map(|a| Key {
            name: a.get_id().to_string(),
            help: a.get_help().map(ToString::to_string).unwrap_or_default(),
            flag: a.get_long().unwrap_or_default().to_owned(),
            env: a.get_env().map(|e| e.to_string_lossy().into_owned()).unwrap_or_default(),
        })
        .collect()
}

/// Where a flag or variable of this key is set, in words.
fn origin(key: &str) -> String {
    keys()
        .iter()
        .find(|k| k.name == key)
        .map_or_else(|| key.to_owned(), |k| format!("{key} (--{} or {})", k.flag, k.env))
}

/// `auto` and nothing are the same.
fn choice(value: Option<&str>, key: &str, all: &[&str]) -> Result<Option<String>> {
    match value {
        None | Some("auto") => Ok(None),
        Some(v) if all.contains(&v) => Ok(Some(v.to_owned())),
        Some(v) => Err(blame(key, &format!("is '{v}'; expected one of {}", all.join(", ")))),
    }
}

/// As it was said, or three quarters of all connections.
fn connections_per_address(raw: &RawConfig) -> usize {
    match raw::number(raw, "connections_per_address_max") as usize {
        0 => (raw::number(raw, "connections_max") as usize * 3 / 4).max(1),
        said => said,
    }
}

/// A device's name as it was said.
fn place(value: Option<&str>) -> Result<String> {
    let text = value.unwrap_or("auto");
    let place = text.parse::<Place>();
    place.map_err(|e| blame("device", &format!("is '{text}'; expected {e}")))?;
    Ok(text.to_owned())
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn blame(key: &str, why: &str) -> Error {
    Error::invalid("invalid_config", format!("{key} {why}")).param(key)
}

/// A TOML basic string; JSON's escapes are a subset of its.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
