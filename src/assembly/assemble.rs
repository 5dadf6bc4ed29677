//! A server out of a configuration.
//!
//! Owns the order of a start. Never serves a request itself. The thing to know: everything that can
//! be refused is refused before the port opens: settings, model, memory, adapters, in that order.

use super::adapters::{load_adapters, settle_owners};
use super::dtypes::{device_name, dtype_names, factor_dtype, kv_dtype, weight_dtype};
use super::ledger::{self, Ledger};
use super::progress::Progress;
use crate::access::Access;
use crate::adapters::BaseText;
use crate::adapters::registry::{Registry, RegistryOptions};
use crate::api::{Api, Requests};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::source::{self, Located};
use crate::config::limits::{
    FILE_BYTES_MAX, FILE_UPLOADS_MAX, FILES_MAX, MERGES_KEPT, MERGES_MAX, USAGE_COMMIT_TIME,
};
use crate::config::{Config, PrefixShare, memory_available};
use crate::database::{FULL, Storage};
use crate::engine::EngineOptions;
use crate::engine::{EngineHandle, probe};
use crate::error::{Error, Result};
use crate::files::{FileLimits, Files};
use crate::jobs::{JobLimits, Jobs, Means};
use crate::metrics::Metrics;
use crate::model::weights::Weights;
use crate::model::{Model, ModelOptions};
use crate::text::Text;
use crate::text::sandbox::{Sandbox, TemplateSource};
use crate::train::data;
use crate::usage::{UsageLog, UsageOptions};
use polylora_kernels::{Device, KvCache};
use std::sync::Arc;
use std::time::Duration;

/// Directory of the states of training jobs.
const TRAINING: &str = "training";
/// Usage records that may wait for their commit beside the requests under way.
const USAGE_QUEUE_SPARE: usize = 4096;
/// A whole server but its port, with the adapters named at start; and how the weights are stored,
/// in words. Blocks while the model loads.
pub async fn assemble(config: Config) -> Result<(Api, String)> {
    let device = device(&config)?;
    let storage = Storage::of(&config.data_dir);
    storage.lock()?;
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
    ) -> Result<(Api, String)> {
        let device = self.model.device().name();
        let shape = Arc::new(self.weights.shape.clone());
        let metrics = Arc::new(Metrics::bounded(config.metric_adapters_max));
        let options = engine_options(&config, self.kv_pages, self.context, &self.text)?;
        let engine =
            EngineHandle::start(self.model, self.weights.digest, options, metrics.clone())?;
        let sandbox = Arc::new(Sandbox::of_this_program()?);
        let files = Files::open(&storage, file_limits()).await?;
        let beside = files.clone();
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
                load_wait_max: config.adapter_wait_max(),
                load_patience: Duration::from_millis(config.adapter_patience_ms),
                upload_bytes_max: config.upload_bytes_max.0,
                versions_kept: config.versions_kept,
                adapters_max: config.adapters_max,
                other_bytes: Arc::new(move |tenant| beside.bytes_of(tenant)),
                metrics: metrics.clone(),
            },
            self.weights.base_rows(),
            self.weights.base_bias(),
            engine.bank(),
        )
        .await?;
        let usage = UsageLog::open(usage_options(&config, &storage), metrics.clone()).await?;
        load_adapters(&registry, &config.adapters).await?;
        let base = (&self.weights, &self.text, &*self.base_name, self.context);
        let means = means(&config, base, &files, &engine);
        let jobs = Jobs::open(&storage, registry.clone(), means, job_limits()).await?;
        match settle_owners(&registry, &jobs, &access).await {
            // They are settled by the next start that can write.
            Err(error) if error.code == FULL => tracing::error!(%error, "owners are not settled"),
            settled => settled?,
        }

        let api = Api {
            requests: Requests::new(&config, self.context, &self.text),
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
            files,
            access,
            metrics,
            usage,
        };
        Ok((api, self.storage))
    }
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
        quantum_tokens: config.quantum_tokens(),
        waiting_max: config.waiting_max,
        waiting_tokens_max: config.waiting_tokens_max(context),
        kv_pages,
        context,
        stream_events_max: config.stream_events_max(),
        slots_max: config.resident_max,
        prefix_cache: config.prefix_cache,
        prefix_share: config.prefix_share == PrefixShare::All,
        background_share: config.train_share.0,
        probe_prompts: PROBES.iter().map(probe).collect::<Result<_>>()?,
    })
}

fn file_limits() -> FileLimits {
    FileLimits {
        file_bytes_max: FILE_BYTES_MAX,
        files_max: FILES_MAX,
        uploads_max: FILE_UPLOADS_MAX,
        check: |content| {
            // What can be said without a tokenizer: a job says the rest.
            let checked = data::check(content, None, data::Limits::default(), &|| false);
            checked.err().map(|error| error.message)
        },
    }
}

fn job_limits() -> JobLimits {
    JobLimits { unfinished_max: MERGES_MAX, kept_max: MERGES_KEPT }
}

/// What jobs work with; `base`: weights, text, served name and context.
fn means(
    config: &Config,
    (weights, text, base_name, context): (&Arc<Weights>, &Text, &str, usize),
    files: &Files,
    engine: &EngineHandle,
) -> Means {
    Means {
        weights: weights.clone(),
        text: text.clone(),
        files: files.clone(),
        engine: engine.clone(),
        base_name: base_name.to_owned(),
        context,
        threads: config.threads,
        train_bytes: config.train_bytes.0,
        directory: config.data_dir.join(TRAINING),
    }
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
