//! `polylora serve`: wires the modules together and listens.
//!
//! Owns the order of a start. Never serves a request itself. The thing to know: everything that can
//! be refused is refused before the port opens: settings, model, memory, adapters, in that order.

mod adapters;
mod dtypes;

use self::dtypes::{device_name, dtype_names, factor_dtype, kv_dtype, weight_dtype};
use super::banner::Banner;
use super::ledger::{self, Ledger};
use super::progress::Progress;
use super::{log, say};
use crate::access::Access;
use crate::adapters::BaseText;
use crate::adapters::registry::{Registry, RegistryOptions};
use crate::api::{self, App};
use crate::config::limits::{MERGES_KEPT, MERGES_MAX, USAGE_COMMIT_TIME};
use crate::config::{Config, Given, PrefixShare, memory_available};
use crate::database::{FULL, Storage};
use crate::engine::step::EngineOptions;
use crate::engine::{EngineHandle, probe};
use crate::error::{Error, Kind, Result};
use crate::jobs::{JobLimits, Jobs};
use crate::metrics::Metrics;
use crate::model::checkpoint::Checkpoint;
use crate::model::source::{self, Located};
use crate::model::weights::Weights;
use crate::model::{Model, ModelOptions};
use crate::text::Text;
use crate::text::sandbox::{Sandbox, TemplateSource};
use crate::usage::{UsageLog, UsageOptions};
use clap::Args;
use polylora_kernels::{Device, KvCache, Place, gpus};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, lookup_host};
use tokio::sync::mpsc;

/// Usage records that may wait for their commit beside the requests under way.
const USAGE_QUEUE_SPARE: usize = 4096;
/// File descriptors for everything but `connections_max`: databases, uploads, blobs being read,
/// pipes to templates, the reserve of connections.
const OTHER_FILES: usize = 160;

/// Connections that wait to be accepted; the system may hold it down. With fewer, a flood of new
/// ones makes others try again after a second.
const BACKLOG: u32 = 4096;

/// Threads for files and for work that blocks, each with two megabytes of stack. What clients cause
/// has places of its own, which are fewer.
const BLOCKING_THREADS_MAX: usize = 64;

const EXAMPLES: &str = "\
Examples:
  polylora serve                                          the demo model on 127.0.0.1:8080
  polylora serve --model ./Llama-3.2-1B-Instruct --adapter support=./adapters/support
  polylora serve --model Qwen/Qwen3-0.6B --dtype bf16 --port 9000
  POLYLORA_API_KEY=secret polylora serve --host 0.0.0.0   for others, with a key
  polylora serve --config polylora.toml
  polylora serve --print-config > polylora.toml           every setting with its default, explained

A flag wins over its environment variable, that over the file, that over the default.
SIGTERM or Ctrl-C: no new requests, running ones finish (--drain-seconds), exit code 0.
A second one ends what still runs.";

/// Options of `serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    /// Settings from a TOML file
    #[arg(long, env = "POLYLORA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print every setting as a TOML file, explained, and end
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    settings: Given,
}

pub fn run(args: ServeArgs) -> Result<()> {
    let file = args.config.as_deref();
    if args.print_config {
        say(&Config::print(file, args.settings)?);
        return Ok(());
    }
    polylora_kernels::return_large_blocks();
    let mut config = Config::load(file, args.settings)?;
    let _log = log::start(&config)?;
    fit_descriptors(&mut config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2) // the engine's threads compute; these only move bytes and text
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()
        .map_err(|e| Error::fault(format!("cannot start the runtime: {e}")))?;
    runtime.block_on(async {
        let (app, storage) = assemble(config).await?;
        listen(app, &storage).await
    })
}

/// Lets the process open as many files as it may, and no more connections than these allow: one
/// that cannot be accepted would wait in the listener's backlog, health probes too.
fn fit_descriptors(config: &mut Config) {
    let Ok(files) = rlimit::increase_nofile_limit(u64::MAX) else { return };
    let connections = usize::try_from(files).unwrap_or(usize::MAX).saturating_sub(OTHER_FILES);
    let connections = connections.max(8);
    if connections < config.connections_max {
        tracing::warn!(
            files,
            asked = config.connections_max,
            connections,
            "connections_max is lowered: the process may not open more files"
        );
        config.connections_max = connections;
        let of_address = &mut config.connections_per_address_max;
        *of_address = (*of_address).min(connections);
    }
}

/// A whole server but its port, with the adapters named at start; and how the weights are stored,
/// in words. Blocks while the model loads.
pub async fn assemble(config: Config) -> Result<(App, String)> {
    let device = device(&config)?;
    let storage = Storage::of(&config.data_dir);
    let access =
        Access::open_in(&storage, config.api_key.as_ref().map(|key| key.0.as_str())).await?;
    config.guarded(access.required())?;
    Prepared::new(&config, device)?.start(config, access, storage).await
}

/// Everything that holds big memory, made and checked.
struct Prepared {
    base_name: String,
    weights: Arc<Weights>,
    model: Model,
    kv_pages: usize,
    context: usize,
    storage: String,
    text: Text,
}

impl Prepared {
    fn new(config: &Config, device: Device) -> Result<Self> {
        let Located { path, name } = source::locate(&config.model)?;
        let checkpoint = Checkpoint::open(&path)?;
        let dtype = weight_dtype(config);
        let least = ledger::weights_at_least(&checkpoint, dtype);
        ledger::check_weights(least, memory_available())?;
        let progress = Progress::begin();
        let told = |done, total| progress.show(done, total);
        let weights = Arc::new(Weights::load(&checkpoint, dtype, &device, &told)?);
        progress.end();

        let kv_dtype = kv_dtype(config).unwrap_or(weights.dtype.into());
        let page_bytes = Model::page_bytes(&weights.shape, kv_dtype);
        let kv_pages = config.kv_bytes.0 as usize / page_bytes;
        let context = context(config, weights.shape.context, kv_pages)?;
        let (probe_rows, probe_logit_rows) = probe::rows_needed(PROBES.len());
        let options = ModelOptions {
            threads: config.threads,
            rows_max: config.rows_max.max(probe_rows),
            logit_rows_max: logit_rows_max(config).max(probe_logit_rows),
            kv_pages: kv_pages + probe::pages_needed(PROBES.len()),
            kv_dtype,
            context,
        };
        let ledger = Ledger::new(
            config,
            (weights.bytes() as u64, checkpoint.storage.clone()),
            (options.kv_pages as u64, page_bytes as u64, KvCache::PAGE as u64),
            Model::buffer_bytes(&weights.shape, &options) as u64,
        );
        let available = memory_available();
        eprint!("{}", ledger.table(available));
        ledger.check(available, config)?;

        let model = Model::new(weights.clone(), device, &options)?;
        Ok(Self {
            base_name: config.served_name.clone().unwrap_or(name),
            storage: format!("{} ({})", dtype_names(&weights), checkpoint.storage),
            text: Text::new(checkpoint.text)?,
            weights,
            model,
            kv_pages,
            context,
        })
    }

    /// Starts the engine, opens the registry, loads the adapters named at start.
    async fn start(
        self,
        config: Config,
        access: Access,
        storage: Storage,
    ) -> Result<(App, String)> {
        let device = self.model.device().name();
        let shape = Arc::new(self.weights.shape.clone());
        let metrics = Arc::new(Metrics::bounded(config.metric_adapters_max));
        let options = engine_options(&config, self.kv_pages, self.context, &self.text)?;
        let engine =
            EngineHandle::start(self.model, self.weights.digest, options, metrics.clone())?;
        let sandbox = Arc::new(Sandbox::of_this_program()?);
        let registry = Registry::open(
            RegistryOptions {
                storage: storage.clone(),
                base_name: self.base_name.clone(),
                base_digest: self.weights.digest,
                shape: shape.clone(),
                factors: factor_dtype(&config, self.weights.dtype),
                text: base_text(&self.text, &sandbox, shape.vocab, self.context),
                resident_bytes_max: config.adapter_bytes_max.0,
                residents_max: config.resident_max,
                room_wait_max: config.adapter_wait_max(),
                room_patience: Duration::from_millis(config.adapter_patience_ms),
                upload_bytes_max: config.upload_bytes_max.0,
                versions_kept: config.versions_kept,
                adapters_max: config.adapters_max,
                metrics: metrics.clone(),
            },
            self.weights.base_rows(),
            self.weights.base_bias(),
            engine.bank(),
        )
        .await?;
        let usage = UsageLog::open(usage_options(&config, &storage), metrics.clone()).await?;
        for (name, dir) in &config.adapters {
            match adapters::load_adapter(&registry, name, dir).await {
                // What is on disk is served all the same.
                Err(error) if error.code == FULL => tracing::error!(%error, "not brought in"),
                loaded => drop(loaded?),
            }
        }
        let limits = JobLimits { unfinished_max: MERGES_MAX, kept_max: MERGES_KEPT };
        let jobs = Jobs::open(&storage, registry.clone(), engine.clone(), limits).await?;
        match adapters::settle_owners(&registry, &jobs, &access).await {
            // They are settled by the next start that can write.
            Err(error) if error.code == FULL => tracing::error!(%error, "owners are not settled"),
            settled => settled?,
        }

        let app = App {
            config: Arc::new(config),
            base_name: self.base_name.into(),
            base_digest: self.weights.digest.to_string().into(),
            device: device.into(),
            context: self.context,
            vocab: shape.vocab,
            text: self.text,
            sandbox,
            engine,
            storage,
            registry,
            jobs,
            access,
            metrics,
            usage,
        };
        Ok((app, self.storage))
    }
}

/// Opens the port, says so, and serves until told to stop.
async fn listen(app: App, storage: &str) -> Result<()> {
    let listener = bind(&app.config).await?;
    let address =
        listener.local_addr().map_err(|e| Error::fault(format!("cannot tell the address: {e}")))?;
    // What `auto` passed over; a driver that cannot say is none to use.
    let gpus = match app.config.device {
        Place::Auto => gpus().unwrap_or_default(),
        _ => Vec::new(),
    };
    let banner = Banner {
        url: &format!("http://{address}"),
        base: &app.base_name,
        device: &app.device,
        gpus: &gpus,
        storage,
        context: app.context,
        adapters: &app.registry.list(),
        program: &std::env::args().next().unwrap_or_else(|| "polylora".to_owned()),
        locked: app.access.required(),
    };
    say(&banner.page());
    api::serve(app, listener, told_to_stop()?).await
}

/// Where the steps will run. A GPU that was asked for is opened, so that whatever is wrong with it
/// is said first, and then refused.
fn device(config: &Config) -> Result<Device> {
    let wrong = |why: String| {
        let message = format!("device is {}, but {why}", device_name(config.device));
        Error::invalid("invalid_config", message).param("device")
    };
    let device = Device::open(config.device, config.threads).map_err(|e| wrong(e.to_string()))?;
    if !device.is_cpu() {
        return Err(wrong(format!(
            "the steps of this version do not run on a GPU yet ({}); expected auto or cpu",
            device.name()
        )));
    }
    Ok(device)
}

/// Most tokens of one sequence: the model's, the operator's, and what all pages together hold.
fn context(config: &Config, of_model: usize, kv_pages: usize) -> Result<usize> {
    let held = kv_pages * KvCache::PAGE;
    let asked = if config.context > 0 { config.context } else { of_model };
    if config.context > of_model {
        let message = format!(
            "context is {}, but the model was made for {of_model} tokens; expected at most that",
            config.context
        );
        return Err(Error::invalid("invalid_config", message).param("context"));
    }
    if config.context > held || held < KvCache::PAGE {
        let message = format!(
            "kv_bytes is {}, which holds {held} tokens; expected room for at least {} (context)",
            config.kv_bytes.0,
            config.context.max(KvCache::PAGE)
        );
        return Err(Error::invalid("invalid_config", message).param("kv_bytes"));
    }
    Ok(asked.min(held))
}

/// What the probe of a new adapter asks. Prose and code: what an adapter changes shows on one of
/// them.
const PROBES: [&str; 2] = [
    "The old lighthouse keeper climbed the winding stairs every evening to",
    "def total(items):\n    return sum(item.price for item in",
];

/// Rows of a step that may have logits: one for each running sequence, and some more so that echoed
/// prompts, which want them for every row, go on in chunks.
fn logit_rows_max(config: &Config) -> usize {
    config.rows_max.min(2 * config.sequences_max)
}

fn engine_options(
    config: &Config,
    kv_pages: usize,
    context: usize,
    text: &Text,
) -> Result<EngineOptions> {
    let probe = |p: &&str| {
        let mut tokens = text.encode(p, true)?;
        tokens.truncate(KvCache::PAGE.min(context));
        Ok(tokens)
    };
    Ok(EngineOptions {
        rows_max: config.rows_max,
        logit_rows_max: logit_rows_max(config),
        sequences_max: config.sequences_max,
        turn_tokens: config.turn_tokens(),
        waiting_max: config.waiting_max,
        waiting_tokens_max: config.waiting_tokens_max(context),
        kv_pages,
        context,
        stream_events_max: config.stream_events_max(),
        slots_max: config.resident_max,
        prefix_cache: config.prefix_cache,
        prefix_share: config.prefix_share == PrefixShare::All,
        probe_prompts: PROBES.iter().map(probe).collect::<Result<_>>()?,
    })
}

fn usage_options(config: &Config, storage: &Storage) -> UsageOptions {
    UsageOptions {
        storage: storage.clone(),
        // A connection has one request at a time; the rest is for those that ended.
        queue_max: config.connections_max + USAGE_QUEUE_SPARE,
        commit_time: USAGE_COMMIT_TIME,
        days_max: config.usage_days_max,
        records_max: config.usage_records_max,
    }
}

/// What the text side says of bundles.
fn base_text(text: &Text, sandbox: &Arc<Sandbox>, vocab: usize, context: usize) -> BaseText {
    let (sandbox, (bos, eos)) = (sandbox.clone(), text.template_tokens());
    let tokenizer = text.tokenizer.clone();
    BaseText {
        check_template: Arc::new(move |template| {
            sandbox.check(&TemplateSource {
                text: template.text.clone(),
                bos_token: template.bos_token.clone().or_else(|| bos.clone()),
                eos_token: template.eos_token.clone().or_else(|| eos.clone()),
            })
        }),
        token_id: Arc::new(move |token| tokenizer.token_to_id(token)),
        vocab,
        context,
    }
}

async fn bind(config: &Config) -> Result<TcpListener> {
    let (host, port) = (config.host.as_str(), config.port);
    listener(host, port).await.map_err(|e| {
        let message =
            format!("cannot listen on {host}:{port}: {e}; choose another --port or --host");
        Error::new(Kind::Unavailable, "port_unavailable", message)
    })
}

/// The first address of `host` that can be had.
async fn listener(host: &str, port: u16) -> std::io::Result<TcpListener> {
    let mut failure = std::io::Error::other("it has no address");
    for address in lookup_host((host, port)).await? {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        // As a listener of std's does: a restart need not wait for old connections to be forgotten.
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(e) => failure = e,
        }
    }
    Err(failure)
}

/// Says so at each SIGTERM and Ctrl-C. The program listens for them when this returns.
fn told_to_stop() -> Result<mpsc::Receiver<()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |e| Error::fault(format!("cannot wait for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let (told, stop) = mpsc::channel(2);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to stop: running requests may finish, unless told again");
            if told.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(stop)
}
