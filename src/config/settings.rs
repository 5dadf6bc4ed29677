//! Every setting, one row each: help, key, type, default, range and other names.
//!
//! Owns what can be set and nothing else; limits that nobody sets are in `limits.rs`. The thing to
//! know: the flag, the variable, the key of the file, `--help`, docs/configuration.md, the checks
//! and the field of [`Config`] all come from the row.

use super::machine;
use super::size::{GIB, MIB, Size, TIB};
use super::table::{Row, settings};
use super::value::*;
use polylora_kernels::DeviceChoice;
use std::path::PathBuf;

/// Served when nobody names a model: `model::source::DEMO`, which a test holds equal (this module
/// is a leaf).
pub const MODEL: &str = "smollm2-135m-instruct";

/// A row of the table.
pub type Setting = Row<Config>;

choices! {
    /// Storage of weights.
    WeightStorage { Auto = "auto", F32 = "f32", Bf16 = "bf16", Q8 = "q8", Q4 = "q4" }
    /// Storage of the KV cache and of adapters.
    Storage { Auto = "auto", F32 = "f32", Bf16 = "bf16", Int8 = "int8" }
    /// Who may reuse KV pages of whom.
    PrefixShare { Tenant = "tenant", All = "all" }
    /// Form of log lines.
    LogFormat { Text = "text", Json = "json" }
}

// `key: type = default, in range, also "other-name";` A default may use the keys above it.
settings! {
    /// Base model: a directory, a .gguf file, a Hub id (org/name or org/name@revision) or the
    /// demo's name
    model: String = MODEL.to_owned();
    /// Name of the base model in the API; default: the demo's name, the Hub id, or the file's stem
    served_name: Option<String> = None, also "served-model-name";
    /// Storage of the weights; auto keeps GGUF's integers and f32 files as they are and makes the
    /// rest bf16; q8 and q4 round to integers in groups of 32
    dtype: WeightStorage = WeightStorage::Auto;
    /// Address to listen on; one that others can reach needs a key or allow_open
    host: String = "127.0.0.1".to_owned();
    /// Port to listen on; 0 takes a free one and prints it
    port: u16 = 8080, in 0..=65_535;
    /// Where uploaded adapters are kept, one directory for each base model; default:
    /// polylora/MODEL in $XDG_DATA_HOME or in ~/.local/share
    data_dir: PathBuf = machine::data_dir(&model);
    /// Key that opens everything, sent as "Authorization: Bearer KEY"; prefer the variable: other
    /// users of the machine can read flags
    api_key: Option<Hidden> = None;
    /// Listen on an address that others can reach without a key
    allow_open: bool = false;
    /// Where steps run: auto, cpu or cuda:N; auto is the CPU, and cuda:N is refused, because the
    /// steps of this version do not run on a GPU yet
    device: DeviceChoice = DeviceChoice::Auto;
    /// Threads of the engine; default: this machine's physical cores
    threads: usize = machine::cores(), in 1..=1024;
    /// Most tokens of prompt and answer together; 0: what the model and KV memory allow
    context: usize = 0, in 0..=16_777_216, also "max-model-len";
    /// Memory of the KV cache, taken at start; default: a quarter of available memory, at most 2
    /// GiB
    kv_bytes: Size = machine::memory_share(4, MIB..=2 * GIB), in MIB..=TIB;
    /// Storage of the KV cache; int8 is half of bf16's bytes, less exact; auto is f32 beside f32
    /// weights, else bf16
    kv_dtype: Storage = Storage::Auto;
    /// Rows of one step: prompt chunks and decoding sequences together; more is faster prefill,
    /// slower steps
    rows_max: usize = 256, in 1..=8192, also "max-num-batched-tokens";
    /// Sequences computed at once
    sequences_max: usize = 64, in 1..=4096, also "max-num-seqs";
    /// Sequences waiting; more are answered 429
    waiting_max: usize = 256, in 1..=65_536;
    /// Reuse KV pages of equal prompt beginnings under the same adapter version
    prefix_cache: bool = true;
    /// Who may reuse whose KV pages: tenant is each tenant its own; with all, the time to a first
    /// token can tell a tenant what another has asked the same adapter
    prefix_share: PrefixShare = PrefixShare::Tenant;
    /// Storage of adapters in memory; auto is f32 beside f32 weights, else bf16; int8 (a scale for
    /// each rank) takes half the memory of bf16 and rounds more
    adapter_dtype: Storage = Storage::Auto;
    /// Memory for adapters; default: an eighth of available memory, at most 1 GiB
    adapter_bytes_max: Size = machine::memory_share(8, MIB..=GIB), in MIB..=TIB;
    /// Adapter versions in memory at once, whatever their size; gateways are told it as max_lora
    resident_max: usize = 1024, in 1..=65_536;
    /// Milliseconds that a request waits before the adapter longest in memory takes no new
    /// requests, so that its memory comes free
    adapter_patience_ms: u64 = 500, in 0..=3_600_000;
    /// Largest adapter upload
    upload_bytes_max: Size = Size(512 * MIB), in 1024..=64 * GIB;
    /// Directories below which vLLM's load_lora_adapter may read adapters; none: nowhere
    adapter_dirs: Vec<PathBuf> = Vec::new();
    /// Adapter names kept
    adapters_max: usize = 10_000, in 1..=1_000_000;
    /// Versions of one name kept on disk, the current one included
    versions_kept: usize = 3, in 1..=1000;
    /// Memory of requests before they are queued: bodies, parsed JSON, prompts being encoded,
    /// archives; more are answered 429; default: a sixteenth of available memory, at most 1 GiB
    request_bytes_max: Size = machine::memory_share(16, 64 * MIB..=GIB), in 16 * MIB..=TIB;
    /// Memory for the work of training jobs; a job that needs more is refused, and 0 refuses all;
    /// default: an eighth of available memory, at most 1 GiB
    train_bytes: Size = machine::memory_share(8, 64 * MIB..=GIB), in 0..=TIB;
    /// Part of the engine's time that training may take while requests run, 0 to 0.5; while none
    /// runs it takes all
    train_share: Fraction = Fraction(0.05);
    /// Connections open at once; for one more, the one that is quiet longest is closed
    connections_max: usize = 1024, in 1..=65_536;
    /// Connections of one address; 0: three quarters of connections_max
    connections_per_address_max: usize = 0, in 0..=65_536;
    /// Host names that requests may be sent to while there is no key, beside loopback names and the
    /// address listened on: box.lan, *.lan, or * for all
    allow_hosts: Vec<String> = Vec::new();
    /// Origins (scheme, host and port) of web pages that may call the API from a browser; * for
    /// all, only with keys
    allow_origins: Vec<String> = Vec::new();
    /// Seconds that a client may stall: in a body, or with one slower than 4 KiB a second; a
    /// request's head may take as long, and bytes of an answer may lie unread twice as long
    body_seconds_max: u64 = 30, in 1..=3600;
    /// Seconds that a request may wait for its first step, half of them for memory for its adapter
    queue_seconds_max: u64 = 60, in 1..=86_400;
    /// Seconds after which a request is ended; a tenth without a finished step, while there is
    /// work, makes /live say stalled
    request_seconds_max: u64 = 600, in 1..=86_400;
    /// Seconds that running requests get after SIGTERM
    drain_seconds: u64 = 30, in 0..=3600;
    /// Adapters with series of their own in /metrics; the others are counted together
    metric_adapters_max: usize = 64, in 0..=10_000;
    /// Send the end of an answer only after its usage record is on disk
    usage_sync: bool = false;
    /// Days that usage records are kept
    usage_days_max: u64 = 90, in 1..=36_500;
    /// Usage records kept, about 400 bytes each
    usage_records_max: u64 = 2_000_000, in 1000..=1_000_000_000;
    /// Log lines as text or json
    log_format: LogFormat = LogFormat::Text;
    /// What to log: a level (error, warn, info, debug) or a filter such as
    /// info,polylora::engine=debug
    log_filter: String = "info".to_owned();
    /// Adapter to load at start, repeatable as a flag; a table of name = directory in the file
    adapters: Adapters = Adapters::new(), also "adapter";
}

/// The row that goes by this key or another name of it; `-` and `_` are the same.
pub(super) fn named(name: &str) -> Option<&'static Setting> {
    let name = name.replace('-', "_");
    let is = |s: &&Setting| s.key == name || s.aliases.iter().any(|a| a.replace('-', "_") == name);
    SETTINGS.iter().find(is)
}
