//! Settings as typed: one struct for flags, environment and file, every field optional.
//!
//! Owns the keys' names, help and ranges. Never decides a default that needs more than a number.
//! The thing to know: the doc comment of a field is its `--help` and its comment in the printed
//! file.

use super::machine;
use super::size::{Size, human};
use crate::error::{Error, Result};
use clap::Args;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Served when nobody names a model: `model::source::DEMO`, which a test holds equal (this module
/// is a leaf).
pub const MODEL: &str = "smollm2-135m-instruct";

/// What flags and environment, or a file, say. `None` is: not said here.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    /// Base model: a directory, a .gguf file, a Hub id (org/name or org/name@revision) or the
    /// demo's name
    #[arg(long, env = "POLYLORA_MODEL", value_name = "MODEL")]
    pub model: Option<String>,
    /// Name of the base model in the API; default: the demo's name, the Hub id, or the file's stem
    #[arg(long, env = "POLYLORA_SERVED_NAME", value_name = "NAME")]
    pub served_name: Option<String>,
    /// Storage of the weights: auto, f32, bf16, q8 or q4; auto keeps GGUF's integers and f32 files
    /// as they are and makes the rest bf16; q8 and q4 round to integers in groups of 32
    #[arg(long, env = "POLYLORA_DTYPE", value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// Address to listen on; one that others can reach needs a key or allow_open
    #[arg(long, env = "POLYLORA_HOST", value_name = "HOST")]
    pub host: Option<String>,
    /// Port to listen on; 0 takes a free one and prints it
    #[arg(long, env = "POLYLORA_PORT", value_name = "PORT")]
    pub port: Option<u64>,
    /// Where uploaded adapters are kept, one directory for each base model; default:
    /// polylora/MODEL in $XDG_DATA_HOME or in ~/.local/share
    #[arg(long, env = "POLYLORA_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Key that opens everything, sent as "Authorization: Bearer KEY"; prefer the variable: other
    /// users of the machine can read flags
    #[arg(long, env = "POLYLORA_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Listen on an address that others can reach without a key
    #[arg(long, env = "POLYLORA_ALLOW_OPEN", value_name = "BOOL")]
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    pub allow_open: Option<bool>,
    /// Where steps run: auto, cpu or cuda:N; auto is the CPU, and cuda:N is refused, because the
    /// steps of this version do not run on a GPU yet
    #[arg(long, env = "POLYLORA_DEVICE", value_name = "DEVICE")]
    pub device: Option<String>,
    /// Threads of the engine; default: this machine's physical cores
    #[arg(long, env = "POLYLORA_THREADS", value_name = "N")]
    pub threads: Option<u64>,
    /// Most tokens of prompt and answer together; 0: what the model and KV memory allow
    #[arg(long, env = "POLYLORA_CONTEXT", value_name = "TOKENS")]
    pub context: Option<u64>,
    /// Memory of the KV cache, taken at start; default: a quarter of available memory, at most 2
    /// GiB
    #[arg(long, env = "POLYLORA_KV_BYTES", value_name = "SIZE")]
    pub kv_bytes: Option<Size>,
    /// Storage of the KV cache: auto, f32, bf16 or int8 (half of bf16's bytes, less exact); auto is
    /// f32 beside f32 weights, else bf16
    #[arg(long, env = "POLYLORA_KV_DTYPE", value_name = "DTYPE")]
    pub kv_dtype: Option<String>,
    /// Rows of one step: prompt chunks and decoding sequences together; more is faster prefill,
    /// slower steps
    #[arg(long, env = "POLYLORA_ROWS_MAX", value_name = "N")]
    pub rows_max: Option<u64>,
    /// Sequences computed at once
    #[arg(long, env = "POLYLORA_SEQUENCES_MAX", value_name = "N")]
    pub sequences_max: Option<u64>,
    /// Tokens that a tenant, or an adapter, may get ahead of another one that waits
    #[arg(long, env = "POLYLORA_TURN_TOKENS", value_name = "TOKENS")]
    pub turn_tokens: Option<u64>,
    /// Sequences waiting; more are answered 429
    #[arg(long, env = "POLYLORA_WAITING_MAX", value_name = "N")]
    pub waiting_max: Option<u64>,
    /// Prompt tokens of waiting sequences together; more are answered 429
    #[arg(long, env = "POLYLORA_WAITING_TOKENS_MAX", value_name = "TOKENS")]
    pub waiting_tokens_max: Option<u64>,
    /// Unread events of one stream; a reader that is further behind loses its stream
    #[arg(long, env = "POLYLORA_STREAM_EVENTS_MAX", value_name = "N")]
    pub stream_events_max: Option<u64>,
    /// Reuse KV pages of equal prompt beginnings under the same adapter version
    #[arg(long, env = "POLYLORA_PREFIX_CACHE", value_name = "BOOL")]
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    pub prefix_cache: Option<bool>,
    /// Who may reuse whose KV pages: tenant (each tenant its own) or all; with all, the time to a
    /// first token can tell a tenant what another has asked the same adapter
    #[arg(long, env = "POLYLORA_PREFIX_SHARE", value_name = "WHO")]
    pub prefix_share: Option<String>,
    /// Storage of adapters in memory: auto, f32, bf16 or int8; auto is f32 beside f32
    /// weights, else bf16; int8 (a scale for each rank) takes half the memory of bf16 and rounds
    /// more
    #[arg(long, env = "POLYLORA_ADAPTER_DTYPE", value_name = "DTYPE")]
    pub adapter_dtype: Option<String>,
    /// Memory for adapters; default: an eighth of available memory, at most 1 GiB
    #[arg(long, env = "POLYLORA_ADAPTER_BYTES_MAX", value_name = "SIZE")]
    pub adapter_bytes_max: Option<Size>,
    /// Adapter versions in memory at once, whatever their size
    #[arg(long, env = "POLYLORA_RESIDENT_MAX", value_name = "N")]
    pub resident_max: Option<u64>,
    /// Seconds that a request waits when all adapters in memory are in use; then it gets 507
    #[arg(long, env = "POLYLORA_ADAPTER_WAIT_SECONDS", value_name = "S")]
    pub adapter_wait_seconds: Option<u64>,
    /// Milliseconds that it waits before the adapter longest in memory takes no new requests, so
    /// that its memory comes free
    #[arg(long, env = "POLYLORA_ADAPTER_PATIENCE_MS", value_name = "MS")]
    pub adapter_patience_ms: Option<u64>,
    /// Largest adapter upload
    #[arg(long, env = "POLYLORA_UPLOAD_BYTES_MAX", value_name = "SIZE")]
    pub upload_bytes_max: Option<Size>,
    /// Directories below which vLLM's load_lora_adapter may read adapters; none: nowhere
    #[arg(long, env = "POLYLORA_ADAPTER_DIRS", value_name = "DIR", value_delimiter = ',')]
    pub adapter_dirs: Option<Vec<PathBuf>>,
    /// Largest body of any other request
    #[arg(long, env = "POLYLORA_BODY_BYTES_MAX", value_name = "SIZE")]
    pub body_bytes_max: Option<Size>,
    /// Memory of requests before they are queued: bodies, parsed JSON, prompts being encoded,
    /// archives; more are answered 429; default: a sixteenth of available memory, at most 1 GiB
    #[arg(long, env = "POLYLORA_REQUEST_BYTES_MAX", value_name = "SIZE")]
    pub request_bytes_max: Option<Size>,
    /// Seconds that a body may stall, or come slower than 4 KiB a second, before it is given up
    #[arg(long, env = "POLYLORA_BODY_SECONDS_MAX", value_name = "SECONDS")]
    pub body_seconds_max: Option<u64>,
    /// Adapter names kept
    #[arg(long, env = "POLYLORA_ADAPTERS_MAX", value_name = "N")]
    pub adapters_max: Option<u64>,
    /// Versions of one name kept on disk, the current one included
    #[arg(long, env = "POLYLORA_VERSIONS_KEPT", value_name = "N")]
    pub versions_kept: Option<u64>,
    /// Most answers to one request (n)
    #[arg(long, env = "POLYLORA_CHOICES_MAX", value_name = "N")]
    pub choices_max: Option<u64>,
    /// Most stop strings of one request
    #[arg(long, env = "POLYLORA_STOPS_MAX", value_name = "N")]
    pub stops_max: Option<u64>,
    /// Most messages of one chat request
    #[arg(long, env = "POLYLORA_MESSAGES_MAX", value_name = "N")]
    pub messages_max: Option<u64>,
    /// Most logit_bias entries of one request
    #[arg(long, env = "POLYLORA_LOGIT_BIAS_MAX", value_name = "N")]
    pub logit_bias_max: Option<u64>,
    /// Connections open at once; for one more, the one that is quiet longest is closed
    #[arg(long, env = "POLYLORA_CONNECTIONS_MAX", value_name = "N")]
    pub connections_max: Option<u64>,
    /// Connections of one address; 0: three quarters of connections_max
    #[arg(long, env = "POLYLORA_CONNECTIONS_PER_ADDRESS_MAX", value_name = "N")]
    pub connections_per_address_max: Option<u64>,
    /// Host names that requests may be sent to while there is no key, beside loopback names and the
    /// address listened on: box.lan, *.lan, or * for all
    #[arg(long, env = "POLYLORA_ALLOW_HOSTS", value_name = "HOST", value_delimiter = ',')]
    pub allow_hosts: Option<Vec<String>>,
    /// Origins (scheme, host and port) of web pages that may call the API from a browser; * for
    /// all, only with keys
    #[arg(long, env = "POLYLORA_ALLOW_ORIGINS", value_name = "ORIGIN", value_delimiter = ',')]
    pub allow_origins: Option<Vec<String>>,
    /// Uploads received at once; more are answered 429
    #[arg(long, env = "POLYLORA_UPLOADS_MAX", value_name = "N")]
    pub uploads_max: Option<u64>,
    /// Merges waiting or running; more are answered 429
    #[arg(long, env = "POLYLORA_MERGES_MAX", value_name = "N")]
    pub merges_max: Option<u64>,
    /// Finished merges that are listed, with their reports
    #[arg(long, env = "POLYLORA_MERGES_KEPT", value_name = "N")]
    pub merges_kept: Option<u64>,
    /// Seconds after which a request is ended
    #[arg(long, env = "POLYLORA_REQUEST_SECONDS_MAX", value_name = "SECONDS")]
    pub request_seconds_max: Option<u64>,
    /// Seconds that a request may wait for its first step
    #[arg(long, env = "POLYLORA_QUEUE_SECONDS_MAX", value_name = "SECONDS")]
    pub queue_seconds_max: Option<u64>,
    /// Seconds that a client may take to send the head of a request
    #[arg(long, env = "POLYLORA_HEAD_SECONDS_MAX", value_name = "SECONDS")]
    pub head_seconds_max: Option<u64>,
    /// Seconds that a client may leave bytes of its answer unread before it is cut off
    #[arg(long, env = "POLYLORA_WRITE_SECONDS_MAX", value_name = "SECONDS")]
    pub write_seconds_max: Option<u64>,
    /// Seconds without a finished step, while there is work, after which /live says stalled
    #[arg(long, env = "POLYLORA_STALL_SECONDS_MAX", value_name = "SECONDS")]
    pub stall_seconds_max: Option<u64>,
    /// Seconds that running requests get after SIGTERM
    #[arg(long, env = "POLYLORA_DRAIN_SECONDS", value_name = "SECONDS")]
    pub drain_seconds: Option<u64>,
    /// Adapters with series of their own in /metrics; the others are counted together
    #[arg(long, env = "POLYLORA_METRIC_ADAPTERS_MAX", value_name = "N")]
    pub metric_adapters_max: Option<u64>,
    /// Send the end of an answer only after its usage record is on disk
    #[arg(long, env = "POLYLORA_USAGE_SYNC", value_name = "BOOL")]
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    pub usage_sync: Option<bool>,
    /// Milliseconds over which usage records are gathered into one commit; a crash loses at most
    /// these
    #[arg(long, env = "POLYLORA_USAGE_COMMIT_MS", value_name = "MS")]
    pub usage_commit_ms: Option<u64>,
    /// Days that usage records are kept
    #[arg(long, env = "POLYLORA_USAGE_DAYS_MAX", value_name = "DAYS")]
    pub usage_days_max: Option<u64>,
    /// Usage records kept, about 400 bytes each
    #[arg(long, env = "POLYLORA_USAGE_RECORDS_MAX", value_name = "N")]
    pub usage_records_max: Option<u64>,
    /// Log lines as text or json
    #[arg(long, env = "POLYLORA_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// What to log: a level (error, warn, info, debug) or a filter such as
    /// info,polylora::engine=debug
    #[arg(long, env = "POLYLORA_LOG_FILTER", value_name = "FILTER")]
    pub log_filter: Option<String>,
    /// Adapter to load at start, repeatable as a flag; a table of name = directory in the file
    #[arg(long = "adapter", env = "POLYLORA_ADAPTERS", value_name = "NAME=DIR")]
    #[arg(value_delimiter = ',', value_parser = named_dir)]
    #[serde(deserialize_with = "table")]
    pub adapters: Vec<(String, PathBuf)>,
}

impl RawConfig {
    /// Self where it says something, `below` elsewhere. Adapters add up; ours win a name.
    pub(super) fn over(self, below: Self) -> Self {
        let mut adapters = self.adapters;
        for (name, dir) in below.adapters {
            if !adapters.iter().any(|(n, _)| *n == name) {
                adapters.push((name, dir));
            }
        }
        Self {
            model: self.model.or(below.model),
            served_name: self.served_name.or(below.served_name),
            dtype: self.dtype.or(below.dtype),
            host: self.host.or(below.host),
            port: self.port.or(below.port),
            data_dir: self.data_dir.or(below.data_dir),
            api_key: self.api_key.or(below.api_key),
            allow_open: self.allow_open.or(below.allow_open),
            device: self.device.or(below.device),
            threads: self.threads.or(below.threads),
            context: self.context.or(below.context),
            kv_bytes: self.kv_bytes.or(below.kv_bytes),
            kv_dtype: self.kv_dtype.or(below.kv_dtype),
            rows_max: self.rows_max.or(below.rows_max),
            sequences_max: self.sequences_max.or(below.sequences_max),
            turn_tokens: self.turn_tokens.or(below.turn_tokens),
            waiting_max: self.waiting_max.or(below.waiting_max),
            waiting_tokens_max: self.waiting_tokens_max.or(below.waiting_tokens_max),
            stream_events_max: self.stream_events_max.or(below.stream_events_max),
            prefix_cache: self.prefix_cache.or(below.prefix_cache),
            prefix_share: self.prefix_share.or(below.prefix_share),
            adapter_dtype: self.adapter_dtype.or(below.adapter_dtype),
            adapter_bytes_max: self.adapter_bytes_max.or(below.adapter_bytes_max),
            resident_max: self.resident_max.or(below.resident_max),
            adapter_wait_seconds: self.adapter_wait_seconds.or(below.adapter_wait_seconds),
            adapter_patience_ms: self.adapter_patience_ms.or(below.adapter_patience_ms),
            upload_bytes_max: self.upload_bytes_max.or(below.upload_bytes_max),
            adapter_dirs: self.adapter_dirs.or(below.adapter_dirs),
            body_bytes_max: self.body_bytes_max.or(below.body_bytes_max),
            request_bytes_max: self.request_bytes_max.or(below.request_bytes_max),
            body_seconds_max: self.body_seconds_max.or(below.body_seconds_max),
            adapters_max: self.adapters_max.or(below.adapters_max),
            versions_kept: self.versions_kept.or(below.versions_kept),
            choices_max: self.choices_max.or(below.choices_max),
            stops_max: self.stops_max.or(below.stops_max),
            messages_max: self.messages_max.or(below.messages_max),
            logit_bias_max: self.logit_bias_max.or(below.logit_bias_max),
            connections_max: self.connections_max.or(below.connections_max),
            connections_per_address_max: self
                .connections_per_address_max
                .or(below.connections_per_address_max),
            allow_hosts: self.allow_hosts.or(below.allow_hosts),
            allow_origins: self.allow_origins.or(below.allow_origins),
            uploads_max: self.uploads_max.or(below.uploads_max),
            merges_max: self.merges_max.or(below.merges_max),
            merges_kept: self.merges_kept.or(below.merges_kept),
            request_seconds_max: self.request_seconds_max.or(below.request_seconds_max),
            queue_seconds_max: self.queue_seconds_max.or(below.queue_seconds_max),
            head_seconds_max: self.head_seconds_max.or(below.head_seconds_max),
            write_seconds_max: self.write_seconds_max.or(below.write_seconds_max),
            stall_seconds_max: self.stall_seconds_max.or(below.stall_seconds_max),
            drain_seconds: self.drain_seconds.or(below.drain_seconds),
            metric_adapters_max: self.metric_adapters_max.or(below.metric_adapters_max),
            usage_sync: self.usage_sync.or(below.usage_sync),
            usage_commit_ms: self.usage_commit_ms.or(below.usage_commit_ms),
            usage_days_max: self.usage_days_max.or(below.usage_days_max),
            usage_records_max: self.usage_records_max.or(below.usage_records_max),
            log_format: self.log_format.or(below.log_format),
            log_filter: self.log_filter.or(below.log_filter),
            adapters,
        }
    }
}

/// The bounds of a number, both inside, and its default.
pub struct Range {
    pub key: &'static str,
    pub min: u64,
    pub max: u64,
    pub default: fn() -> u64,
    given: fn(&RawConfig) -> Option<u64>,
    /// Bytes, to be shown with units.
    bytes: bool,
}

impl Range {
    /// `1 to 4096`, `1.0 MiB to 1.0 TiB`
    pub fn expected(&self) -> String {
        match self.bytes {
            true => format!("{} to {}", human(self.min), human(self.max)),
            false => format!("{} to {}", self.min, self.max),
        }
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// `key: least, most, default` of plain numbers, then of sizes in bytes.
macro_rules! ranges {
    (numbers { $($key:ident: $min:expr, $max:expr, $default:expr;)* }
     sizes { $($size:ident: $least:expr, $most:expr, $usual:expr;)* }) => {
        &[
            $(Range {
                key: stringify!($key),
                min: $min,
                max: $max,
                default: || $default,
                given: |raw| raw.$key,
                bytes: false,
            },)*
            $(Range {
                key: stringify!($size),
                min: $least,
                max: $most,
                default: || $usual,
                given: |raw| raw.$size.map(|s| s.0),
                bytes: true,
            },)*
        ]
    };
}

/// Every number among the settings.
pub const RANGES: &[Range] = ranges! {
    numbers {
        port: 0, 65_535, 8080;
        threads: 1, 1024, machine::cores();
        context: 0, 16_777_216, 0;
        rows_max: 1, 8192, 256;
        sequences_max: 1, 4096, 64;
        turn_tokens: 1, 1_048_576, 512;
        waiting_max: 1, 65_536, 256;
        waiting_tokens_max: 1, 1_073_741_824, 524_288;
        stream_events_max: 16, 65_536, 1024;
        resident_max: 1, 65_536, 1024;
        adapter_wait_seconds: 0, 3600, 30;
        adapter_patience_ms: 0, 3_600_000, 500;
        adapters_max: 1, 1_000_000, 10_000;
        versions_kept: 1, 1000, 3;
        choices_max: 1, 128, 16;
        stops_max: 0, 64, 16;
        messages_max: 1, 65_536, 1024;
        logit_bias_max: 0, 65_536, 1024;
        connections_max: 1, 65_536, 1024;
        connections_per_address_max: 0, 65_536, 0;
        uploads_max: 1, 256, 4;
        merges_max: 1, 1024, 16;
        merges_kept: 1, 10_000, 100;
        request_seconds_max: 1, 86_400, 600;
        queue_seconds_max: 1, 86_400, 60;
        head_seconds_max: 1, 3600, 30;
        body_seconds_max: 1, 3600, 30;
        write_seconds_max: 1, 3600, 60;
        stall_seconds_max: 1, 3600, 60;
        drain_seconds: 0, 3600, 30;
        metric_adapters_max: 0, 10_000, 64;
        usage_commit_ms: 1, 10_000, 100;
        usage_days_max: 1, 36_500, 90;
        usage_records_max: 1000, 1_000_000_000, 2_000_000;
    }
    sizes {
        kv_bytes: MIB, TIB, (machine::memory_available() / 4).clamp(MIB, 2 * GIB);
        adapter_bytes_max: MIB, TIB, (machine::memory_available() / 8).clamp(MIB, GIB);
        upload_bytes_max: 1024, 64 * GIB, 512 * MIB;
        body_bytes_max: 1024, GIB, 4 * MIB;
        request_bytes_max: 16 * MIB, TIB,
            (machine::memory_available() / 16).clamp(64 * MIB, GIB);
    }
};

/// The number that holds for `key`: said, or its default.
pub(super) fn number(raw: &RawConfig, key: &str) -> u64 {
    let range = RANGES.iter().find(|r| r.key == key).expect("a key of RANGES");
    (range.given)(raw).unwrap_or_else(range.default)
}

/// The first number out of bounds: its key and what was expected.
pub(super) fn in_range(raw: &RawConfig) -> Result<(), (&'static str, String)> {
    for r in RANGES {
        if let Some(n) = (r.given)(raw).filter(|n| !(r.min..=r.max).contains(n)) {
            return Err((r.key, format!("is {n}; expected {}", r.expected())));
        }
    }
    Ok(())
}

/// Reads a TOML file. Errors: `FILE:LINE: key: what was expected`.
pub(super) fn read_file(path: &Path) -> Result<RawConfig> {
    let shown = path.display();
    let wrong = |message: String| Error::invalid("invalid_config", message);
    let text = std::fs::read_to_string(path)
        .map_err(|e| wrong(format!("{shown}: cannot be read: {e}")))?;
    let raw: RawConfig = toml::from_str(&text).map_err(|e| {
        let at = e.span().map_or(0, |s| s.start.min(text.len()));
        let line = text[..at].matches('\n').count();
        let key = text.lines().nth(line).and_then(|l| l.split_once('='));
        let key = key.map_or(String::new(), |(k, _)| format!("{}: ", k.trim()));
        let why = e.message().replace('\n', " ");
        wrong(format!("{shown}:{}: {key}{why}", line + 1))
    })?;
    in_range(&raw).map_err(|(key, why)| {
        let line = text.lines().position(|l| {
            let l = l.trim_start();
            l.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
        });
        wrong(format!("{shown}:{}: {key} {why}", line.map_or(1, |l| l + 1)))
    })?;
    Ok(raw)
}

fn named_dir(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => {
            Ok((name.to_owned(), PathBuf::from(dir)))
        }
        _ => Err(format!("'{text}' is not NAME=DIR, e.g. pirate=adapters/pirate")),
    }
}

fn table<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<(String, PathBuf)>, D::Error> {
    Ok(BTreeMap::<String, PathBuf>::deserialize(d)?.into_iter().collect())
}
