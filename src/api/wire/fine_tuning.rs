//! `/v1/fine_tuning`: jobs, events and checkpoints as OpenAI's clients type them; what is ours lies
//! under `polylora`.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// A training job as it is to be.
#[derive(Deserialize, ToSchema)]
pub struct FineTuningFields {
    /// The base model, or an adapter or version that the job goes on from.
    #[schema(example = "smollm2-135m-instruct")]
    pub model: String,
    /// A file of purpose `fine-tune`.
    #[schema(example = "file-3vXb0e9Qd2")]
    pub training_file: String,
    /// Another one, which the job only measures itself on.
    pub validation_file: Option<String>,
    /// Name of the adapter that comes out: a new name, or a new version of one. Default: `ft-` and
    /// the end of the job's id.
    #[schema(example = "support")]
    pub suffix: Option<String>,
    /// Decides every random choice; default 0.
    pub seed: Option<u64>,
    /// Default: supervised.
    pub method: Option<MethodFields>,
    /// Where older clients put the hyperparameters of supervised training.
    pub hyperparameters: Option<HyperparameterFields>,
    /// There are none: it must be empty.
    pub integrations: Option<Vec<Value>>,
    /// Notes of the client, at most 16.
    pub metadata: Option<BTreeMap<String, String>>,
    pub polylora: Option<LoraFields>,
}

/// What is learnt from.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MethodFields {
    /// `supervised` or `dpo`
    pub r#type: String,
    pub supervised: Option<MethodOptions>,
    pub dpo: Option<MethodOptions>,
    /// Refused by name.
    pub reinforcement: Option<Value>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MethodOptions {
    pub hyperparameters: Option<HyperparameterFields>,
}

/// A number, or `"auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Auto {
    Number(f64),
    Word(AutoWord),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AutoWord {
    Auto,
}

/// Each a number or `"auto"`.
#[derive(Default, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HyperparameterFields {
    /// 1 to 50.
    pub n_epochs: Option<Auto>,
    /// Examples of an optimizer step, 1 to 256.
    pub batch_size: Option<Auto>,
    /// Of the rate that fits the model's width.
    pub learning_rate_multiplier: Option<Auto>,
    /// Of DPO: how close the model stays to what it was, up to 2.
    pub beta: Option<Auto>,
}

/// What OpenAI's fields do not say.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraFields {
    /// Rank of the adapter, 1 to 256; default 8.
    pub r: Option<usize>,
    /// Default twice the rank.
    pub lora_alpha: Option<f64>,
    /// `"all-linear"` (the default), or some of `q_proj`, `k_proj`, `v_proj`, `o_proj`,
    /// `gate_proj`, `up_proj`, `down_proj`.
    #[schema(value_type = Option<Vec<String>>)]
    pub target_modules: Option<Value>,
    /// Divide `lora_alpha` by the root of the rank.
    pub use_rslora: Option<bool>,
    /// Train magnitudes beside directions.
    pub use_dora: Option<bool>,
    /// B learns at so many times the rate of A (LoRA+); default 1.
    pub loraplus_lr_ratio: Option<f64>,
    /// A stays as it starts (LoRA-FA); default false.
    pub freeze_a: Option<bool>,
    /// `adamw` (the default), `lion`, `adafactor` or `frugal`.
    pub optim: Option<String>,
    /// `true` (the default): A is random; `"eva"`: A reads what the examples vary most in.
    #[schema(value_type = Option<String>)]
    pub init_lora_weights: Option<Value>,
    /// Any first ranks of the result are an adapter of their own (DyLoRA); default false.
    pub nested_ranks: Option<bool>,
    /// DPO: log-probabilities are means over an answer's tokens (LN-DPO); default false.
    pub length_normalized: Option<bool>,
    /// The learning rate itself; then `learning_rate_multiplier` is not used.
    pub lr: Option<f64>,
    /// `constant`, `linear` (the default) or `cosine`.
    pub lr_scheduler_type: Option<String>,
    /// Share of all steps in which the rate rises from 0; default 0.
    pub warmup_ratio: Option<f64>,
    /// Default 0.
    pub weight_decay: Option<f64>,
    /// Gradients are scaled down to this norm; default 1, and 0 is none.
    pub max_grad_norm: Option<f64>,
    /// Cut examples at the context instead of refusing the file.
    pub truncate: Option<bool>,
    /// Steps between two looks at the validation file; default: at the ends of epochs.
    pub eval_steps: Option<u32>,
    /// `auto` (the default): the name means the result once the gate lets it through; `manual`: it
    /// means what it meant, and the job says how to move it; `never`: it means what it meant.
    pub promote: Option<String>,
    /// Share of the training file's different lines, above 0 and at most 0.5, that is not learnt
    /// but measured by; `seed` decides which. Default: none.
    pub validation_split: Option<f64>,
    pub gate: Option<GateFields>,
}

/// What must hold of the result before its name moves to it, measured on the validation file or on
/// what was held out.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GateFields {
    /// Most that the held-out loss may be, in nats a token (of pairs: DPO's loss).
    pub max_valid_loss: Option<f64>,
    /// The same as a part of the base's loss; below 1 the result must be better than the base.
    pub max_loss_ratio_to_base: Option<f64>,
    /// Least share of examples that greedy decoding answers exactly.
    pub min_exact_match: Option<f64>,
    /// Most examples that the version before answers exactly and the result does not.
    pub max_negative_flips: Option<u64>,
    /// The held-out loss may not be above that of the version that the name means.
    pub must_beat_current: Option<bool>,
}

/// One job.
#[derive(Serialize, ToSchema)]
pub struct FineTuningJob {
    #[schema(example = "fine_tuning.job")]
    pub object: &'static str,
    pub id: String,
    /// Unix seconds
    pub created_at: u64,
    /// Unix seconds
    pub finished_at: Option<u64>,
    /// Unix seconds; from the pace so far.
    pub estimated_finish: Option<u64>,
    pub model: String,
    /// `name@version`, once it is there.
    pub fine_tuned_model: Option<String>,
    /// `polylora`
    pub organization_id: &'static str,
    /// `validating_files`, `queued`, `running`, `succeeded`, `failed` or `cancelled`.
    pub status: &'static str,
    pub hyperparameters: Hyperparameters,
    pub method: Method,
    pub training_file: String,
    pub validation_file: Option<String>,
    /// A CSV of every step, once it is over.
    pub result_files: Vec<String>,
    /// Tokens read, all epochs together.
    pub trained_tokens: Option<u64>,
    pub error: Option<FineTuningError>,
    pub seed: u64,
    /// None.
    pub integrations: Vec<Value>,
    pub metadata: BTreeMap<String, String>,
    pub polylora: FineTuningExtra,
}

/// Resolved once the examples are read; `auto` before.
#[derive(Clone, Serialize, ToSchema)]
pub struct Hyperparameters {
    #[schema(value_type = Object)]
    pub n_epochs: Value,
    #[schema(value_type = Object)]
    pub batch_size: Value,
    #[schema(value_type = Object)]
    pub learning_rate_multiplier: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub beta: Option<Value>,
}

#[derive(Serialize, ToSchema)]
pub struct Method {
    pub r#type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub supervised: Option<MethodShown>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dpo: Option<MethodShown>,
}

#[derive(Serialize, ToSchema)]
pub struct MethodShown {
    pub hyperparameters: Hyperparameters,
}

#[derive(Serialize, ToSchema)]
pub struct FineTuningError {
    pub code: String,
    pub message: String,
    pub param: Option<&'static str>,
}

/// What OpenAI's object has no field for.
#[derive(Serialize, ToSchema)]
pub struct FineTuningExtra {
    /// Name of the adapter that comes out.
    pub name: String,
    /// `preparing`, `training`, `publishing`, `evaluating`, `publishing` again: of a running job.
    pub stage: Option<&'static str>,
    /// Somebody paused it; its status is `queued`.
    pub paused: bool,
    /// Optimizer steps done, and in all.
    pub step: Option<u64>,
    pub steps: Option<u64>,
    /// How often it began anew because the server had ended under it.
    pub restarted: u64,
    /// What training runs with, once the examples are read.
    #[schema(value_type = Option<Object>)]
    pub resolved: Option<Value>,
    pub promote: &'static str,
    pub validation_split: Option<f64>,
    /// How the result was judged, once it was.
    pub gate: Option<GateShown>,
}

/// A judgement.
#[derive(Serialize, ToSchema)]
pub struct GateShown {
    /// Whether every threshold holds; true where there is none.
    pub passed: bool,
    /// What does not hold, with both figures; or why the name did not move all the same.
    pub reasons: Vec<String>,
    /// Whether the job moved the name to the result.
    pub promoted: bool,
    /// As they were asked for.
    #[schema(value_type = Object)]
    pub thresholds: Value,
}

#[derive(Serialize, ToSchema)]
pub struct FineTuningJobList {
    #[schema(example = "list")]
    pub object: &'static str,
    /// Newest first.
    pub data: Vec<FineTuningJob>,
    pub has_more: bool,
}

#[derive(Serialize, ToSchema)]
pub struct FineTuningEvent {
    #[schema(example = "fine_tuning.job.event")]
    pub object: &'static str,
    pub id: String,
    /// Unix seconds
    pub created_at: u64,
    /// `info`, `warn` or `error`
    pub level: &'static str,
    pub message: String,
    /// `message` or `metrics`
    pub r#type: &'static str,
    /// Figures of a step; empty for a message.
    #[schema(value_type = Object)]
    pub data: Value,
}

#[derive(Serialize, ToSchema)]
pub struct FineTuningEventList {
    #[schema(example = "list")]
    pub object: &'static str,
    /// Newest first.
    pub data: Vec<FineTuningEvent>,
    pub has_more: bool,
}

#[derive(Serialize, ToSchema)]
pub struct FineTuningCheckpoint {
    #[schema(example = "fine_tuning.job.checkpoint")]
    pub object: &'static str,
    pub id: String,
    /// Unix seconds
    pub created_at: u64,
    pub fine_tuning_job_id: String,
    pub step_number: u64,
    /// `name@version`; loads and answers as any.
    pub fine_tuned_model_checkpoint: String,
    #[schema(value_type = Object)]
    pub metrics: Value,
}

#[derive(Serialize, ToSchema)]
pub struct FineTuningCheckpointList {
    #[schema(example = "list")]
    pub object: &'static str,
    /// Newest first.
    pub data: Vec<FineTuningCheckpoint>,
    pub has_more: bool,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
}

/// Whose training is asked for.
#[derive(Deserialize, ToSchema)]
pub struct SeenFields {
    /// A line of a training file, as an object or as the text of one.
    #[schema(value_type = Object)]
    pub record: Value,
}

#[derive(Serialize, ToSchema)]
pub struct SeenBy {
    #[schema(example = "list")]
    pub object: &'static str,
    /// By name then version.
    pub data: Vec<SeenVersion>,
    /// Versions that your key may not know of.
    pub others: usize,
}

/// A version that rests on a record.
#[derive(Serialize, ToSchema)]
pub struct SeenVersion {
    /// `name@version`
    pub id: String,
    /// `training`: a job that learnt it made the version; `descent`: it was made of such.
    pub by: &'static str,
    /// The jobs that learnt it.
    pub jobs: Vec<String>,
    /// Whether the bare name means it.
    pub current: bool,
}
