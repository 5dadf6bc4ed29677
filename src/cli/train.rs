//! `polylora train`: a file of examples becomes an adapter in a directory, without a server.
//!
//! Owns reading the file, the bar, and what is printed and written. Never computes: `train` does.
//! The thing to know: what an interrupted run had done stays beside `--out`, and the same command
//! goes on from there to the same bytes.

use crate::adapters::format::factors;
use crate::adapters::format::files::AdapterFiles;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::source::{self, Located};
use crate::cli::calls::{TRAINING, bad_argument, bar, check_new, made_whole, put, threads};
use crate::config::{MODEL, human, memory_available};
use crate::error::{Error, Kind, Result};
use crate::model::weights::Weights;
use crate::shape::Projection;
use crate::terminal::{on_terminal, say};
use crate::text::Text;
use crate::train::asked::{self, Asked};
use crate::train::data::{self, Dataset, Limits, Preview, Reading};
use crate::train::{
    Advance, Decay, Init, OptimiserKind, StepReport, Steps, TrainSpec, Trainer, figures,
};
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use polylora_kernels::{Device, WeightDtype};
use serde_json::Value;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

const EXAMPLES: &str = "\
Examples:
  polylora train adapters/butler/train.jsonl --out butler       the demo model, in a minute or so
  polylora train data.jsonl --preview 3                         which tokens are learnt
  polylora train data.jsonl --validation held-out.jsonl --epochs 3 --rank 16 --out support
  polylora train pairs.jsonl --method dpo --beta 0.1 --out polite

A line of the file is {\"messages\": [...]}, or {\"prompt\": ..., \"completion\": ...}; of DPO
{\"input\": ..., \"preferred_output\": ..., \"non_preferred_output\": ...}.

Writes adapter_config.json and adapter_model.safetensors (plain PEFT), every step's figures as
training_steps.csv, and the loss as training_loss.svg. An interrupted run leaves OUT.state; the
same command goes on from there.";

/// Time after which the state is written again.
const KEEP_TIME: Duration = Duration::from_secs(30);

/// Options of `train`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainArgs {
    /// Examples as JSON lines
    #[arg(value_name = "DATA.jsonl")]
    data: PathBuf,
    /// Directory to make for the adapter
    #[arg(long, value_name = "DIR", required_unless_present = "preview")]
    out: Option<PathBuf>,
    /// Train nothing: print the first N examples, what is learnt of them marked
    #[arg(long, value_name = "N", conflicts_with = "out")]
    preview: Option<usize>,
    /// A directory, a .gguf file, a Hub id or the demo's name
    #[arg(long, env = "POLYLORA_MODEL", default_value = MODEL)]
    model: String,
    /// Go on from this adapter, with its rank, alpha and targets
    #[arg(long, value_name = "DIR")]
    #[arg(conflicts_with_all = ["rank", "alpha", "rslora", "dora", "targets", "eva"])]
    from: Option<PathBuf>,
    /// Examples that are only measured, at the ends of epochs
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// What the examples are: answers to imitate, or pairs of which one is preferred
    #[arg(long, default_value = "supervised")]
    method: MethodArg,
    /// DPO: how close the model stays to what it was (default: 0.1)
    #[arg(long, value_parser = above_0(asked::BETA_BY_LENGTH_MAX))]
    beta: Option<f64>,
    /// Times that the examples are read (default: 3, more for few examples)
    #[arg(long, value_parser = within(asked::EPOCHS))]
    epochs: Option<usize>,
    /// Examples of an optimizer step (default: a sixteenth of them, at most 16)
    #[arg(long, value_parser = within(asked::BATCHES))]
    batch_size: Option<usize>,
    /// Learning rate (default: what fits the model's width)
    #[arg(long, value_name = "RATE", value_parser = above_0(asked::RATE_MAX))]
    learning_rate: Option<f64>,
    /// Rank of the adapter
    #[arg(long, default_value_t = asked::RANK, value_parser = within(asked::RANKS))]
    rank: usize,
    /// The factors' product is scaled by alpha/rank (default: twice the rank)
    #[arg(long, value_parser = above_0(asked::ALPHA_MAX))]
    alpha: Option<f64>,
    /// Scale by alpha/√rank
    #[arg(long)]
    rslora: bool,
    /// Train magnitudes beside directions (DoRA)
    #[arg(long)]
    dora: bool,
    /// Linears that get an adapter (default: all)
    #[arg(long, value_delimiter = ',', value_name = "NAME,…", value_parser = projections())]
    targets: Vec<String>,
    /// B learns at so many times the rate of A (LoRA+)
    #[arg(long, value_name = "TIMES", default_value_t = 1.0)]
    #[arg(value_parser = above_0(asked::RATIO_MAX))]
    loraplus_ratio: f64,
    /// A stays as it starts (LoRA-FA)
    #[arg(long)]
    freeze_a: bool,
    /// A starts at what the examples vary most in (EVA)
    #[arg(long)]
    eva: bool,
    /// What makes a step out of gradients
    #[arg(long, default_value = "adamw", value_parser = optimisers())]
    optimizer: String,
    /// Any first ranks of the result are an adapter of their own (DyLoRA)
    #[arg(long)]
    nested_ranks: bool,
    /// DPO: log-probabilities are means over an answer's tokens (LN-DPO)
    #[arg(long)]
    length_normalized: bool,
    /// How the rate falls
    #[arg(long, default_value = "linear")]
    decay: DecayArg,
    /// Part of the steps in which the rate rises from 0
    #[arg(long, default_value_t = 0.0, value_name = "PART", value_parser = part)]
    warmup_ratio: f64,
    /// AdamW's decoupled weight decay
    #[arg(long, default_value_t = 0.0, value_parser = part)]
    weight_decay: f64,
    /// Gradients are scaled down to this norm; 0: never
    #[arg(long, default_value_t = 1.0, value_name = "NORM", value_parser = from_0)]
    max_grad_norm: f64,
    /// Measure the validation examples every so many steps too
    #[arg(long, default_value_t = 0, value_name = "STEPS")]
    eval_steps: u32,
    /// Cut examples at the context instead of refusing the file
    #[arg(long)]
    truncate: bool,
    /// Decides every random choice
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Storage of the weights: as the file has them, or f32
    #[arg(long, default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    dtype: String,
    /// Memory that training may take beside the weights, in MiB (default: half of what is free)
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Threads (default: every core)
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    Supervised,
    Dpo,
}

#[derive(Clone, Copy, ValueEnum)]
enum DecayArg {
    Constant,
    Linear,
    Cosine,
}

fn projections() -> PossibleValuesParser {
    PossibleValuesParser::new(Projection::ALL.map(Projection::name))
}

fn optimisers() -> PossibleValuesParser {
    PossibleValuesParser::new(OptimiserKind::ALL.map(OptimiserKind::name))
}

fn within(
    range: std::ops::RangeInclusive<usize>,
) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync {
    move |text| {
        let asked = text.parse().ok().filter(|n| range.contains(n));
        asked.ok_or_else(|| format!("expected {} to {}", range.start(), range.end()))
    }
}

fn above_0(most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync {
    move |text| {
        let asked = text.parse().ok().filter(|n| *n > 0.0 && *n <= most);
        asked.ok_or_else(|| format!("expected a number above 0 and at most {most}"))
    }
}

fn part(text: &str) -> Result<f64, String> {
    let asked = text.parse().ok().filter(|n| (0.0..=1.0).contains(n));
    asked.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

fn from_0(text: &str) -> Result<f64, String> {
    let asked = text.parse().ok().filter(|n| (0.0..=asked::NORM_MAX).contains(n));
    asked.ok_or_else(|| "expected a number from 0".to_owned())
}

impl TrainArgs {
    fn asked(&self) -> Asked {
        let named = |name: &String| Projection::ALL.into_iter().find(|p| p.name() == name);
        let mut targets: Vec<Projection> = self.targets.iter().filter_map(named).collect();
        targets.sort_unstable();
        targets.dedup();
        if targets.is_empty() {
            targets = Projection::ALL.to_vec();
        }
        Asked {
            epochs: self.epochs.map(|n| n as u32),
            batch: self.batch_size,
            lr_multiplier: None,
            lr: self.learning_rate,
            beta: (self.method == MethodArg::Dpo).then(|| self.beta.unwrap_or(asked::BETA)),
            rank: self.rank,
            alpha: self.alpha.unwrap_or(2.0 * self.rank as f64),
            rslora: self.rslora,
            dora: self.dora,
            targets,
            loraplus_ratio: self.loraplus_ratio,
            decay: match self.decay {
                DecayArg::Constant => Decay::Constant,
                DecayArg::Linear => Decay::Linear,
                DecayArg::Cosine => Decay::Cosine,
            },
            warmup_ratio: self.warmup_ratio,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
            truncate: self.truncate,
            eval_steps: self.eval_steps,
            seed: self.seed,
            freeze_a: self.freeze_a,
            optimiser: OptimiserKind::ALL
                .into_iter()
                .find(|kind| kind.name() == self.optimizer)
                .unwrap_or_default(),
            nested: self.nested_ranks,
            init: if self.eva { Init::Eva } else { Init::Random },
            by_length: self.length_normalized,
        }
    }

    fn kind(&self) -> data::Kind {
        match self.method {
            MethodArg::Supervised => data::Kind::Supervised,
            MethodArg::Dpo => data::Kind::Preference,
        }
    }
}

pub fn run(args: TrainArgs) -> Result<()> {
    if args.beta.is_some() && args.method != MethodArg::Dpo {
        return Err(bad_argument("--beta is of --method dpo"));
    }
    if !args.length_normalized && args.beta.is_some_and(|beta| beta > asked::BETA_MAX) {
        return Err(bad_argument(format!("--beta is at most {}", asked::BETA_MAX)));
    }
    if args.length_normalized && args.method != MethodArg::Dpo {
        return Err(bad_argument("--length-normalized is of --method dpo"));
    }
    args.out.as_deref().map_or(Ok(()), check_new)?;
    let file = opened(&args.data)?;
    let Located { path, name } = source::locate(&args.model)?;
    // Opened once more for its weights, after the examples are found good.
    let Checkpoint { shape, text, .. } = Checkpoint::open(&path)?;
    let text = Text::new(text)?;
    let reading = Reading {
        text: &text,
        own: None,
        kind: Some(args.kind()),
        context: shape.context,
        truncate: args.truncate,
        drop_unsupervised: false,
        now: SystemTime::now(),
        limits: Limits::default(),
    };
    let Some(out) = &args.out else {
        let most = args.preview.unwrap_or(1).max(1);
        let shown = reading.preview(BufReader::new(file), most, &|| false);
        for example in shown.map_err(|e| of_file(e, &args.data))?.unwrap_or_default() {
            say(&shown_as_text(&example));
        }
        return Ok(());
    };
    let data = read(&reading, file, &args.data)?;
    let validation = match &args.validation {
        Some(path) => Some(read(&reading, opened(path)?, path)?),
        None => None,
    };
    let device = Device::cpu(threads(args.threads));
    let dtype = match args.dtype.as_str() {
        "f32" => Some(WeightDtype::F32),
        "bf16" => Some(WeightDtype::Bf16),
        _ => None,
    };
    let weights = Arc::new(Weights::load(&Checkpoint::open(&path)?, dtype, &device, &|_, _| ())?);
    let count = data.examples.len() / data.kind.group();
    let mut asked = args.asked();
    let mut start = None;
    if let Some(dir) = &args.from {
        asked = asked.shaped_like(&factors::open(dir, &weights.shape)?)?;
        start = Some(AdapterFiles::find(dir)?.digest()?.to_string());
    }
    let spec = TrainSpec { start, ..asked.resolve(count, weights.shape.hidden) };
    let rows = rows(&args, &spec, (&data, validation.as_ref()), &weights, &device)?;
    say(&format!(
        "{count} examples of {} tokens; epochs {}, batches of {}, learning rate {:.2e}, rank {}\n",
        data.examples.tokens(),
        spec.epochs,
        spec.batch,
        spec.lr,
        spec.rank
    ));
    let validation = validation.map(|data| Arc::new(data.examples));
    let examples = Arc::new(data.examples);
    let trainer =
        Trainer::new(weights, &device, spec, rows, examples, validation, args.from.as_deref())?;
    trained(trainer, &device, out, &name)
}

fn opened(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| bad_argument(format!("{} cannot be read: {e}", path.display())))
}

fn of_file(e: Error, path: &Path) -> Error {
    Error { message: format!("{}: {}", path.display(), e.message), ..e }
}

fn read(reading: &Reading<'_>, file: File, path: &Path) -> Result<Dataset> {
    let read = reading.read(BufReader::new(file), &|| false).map_err(|e| of_file(e, path))?;
    read.ok_or_else(|| Error::fault("reading was ended"))
}

/// Rows of a pass that fit into the memory.
fn rows(
    args: &TrainArgs,
    spec: &TrainSpec,
    (data, validation): (&Dataset, Option<&Dataset>),
    weights: &Weights,
    device: &Device,
) -> Result<usize> {
    let longest = validation.map_or(0, |data| data.examples.longest());
    let longest = longest.max(data.examples.longest());
    let most = args.memory.map_or_else(|| memory_available() / 2, |mib| mib << 20);
    Trainer::rows(weights, spec, longest, device.threads(), most).map_err(|needed| {
        let message = format!(
            "training needs {}, and may take {} (--memory); the longest example has {longest} \
             tokens",
            human(needed),
            human(most)
        );
        Error::new(Kind::Capacity, "training_memory_exhausted", message)
    })
}

/// Trains to the end and writes what came out.
fn trained(mut trainer: Trainer, device: &Device, out: &Path, base: &str) -> Result<()> {
    let mut state = out.as_os_str().to_owned();
    state.push(".state");
    let state = PathBuf::from(state);
    let bar = bar(TRAINING, trainer.steps())?;
    let mut all: Vec<Value> = Vec::new();
    if state.exists() {
        let anew = |e: Error| bad_argument(format!("{}; remove it to begin anew", e.message));
        trainer.restore(&state).map_err(anew)?;
        all = told(&state, trainer.step());
        say(&format!("going on after step {}\n", trainer.step()));
    }
    let (mut begun, mut kept) = (Instant::now(), Instant::now());
    loop {
        match trainer.advance(device)? {
            Advance::Running => {}
            Advance::Done => break,
            Advance::Stepped(report) => {
                all.push(figures(&report, begun.elapsed()));
                show(&bar, &report);
                begun = Instant::now();
                if kept.elapsed() > KEEP_TIME {
                    trainer.save(&state)?;
                    put(&figures_of(&state), &Value::from(all.clone()).to_string())?;
                    kept = Instant::now();
                }
            }
        }
    }
    bar.finish_and_clear();
    let steps = Steps::of(all.into_iter());
    made_whole(out, |dir| {
        trainer.export(dir, base)?;
        put(&dir.join("training_steps.csv"), &steps.csv())?;
        put(&dir.join("training_loss.svg"), &steps.picture())
    })?;
    for left in [figures_of(&state), state].iter().filter(|file| file.exists()) {
        let kept = |e| Error::fault(format!("cannot remove {}: {e}", left.display()));
        std::fs::remove_file(left).map_err(kept)?;
    }
    let digest = AdapterFiles::find(out)?.digest()?;
    say(&format!("{}  {digest}\n", out.display()));
    Ok(())
}

/// Where the figures of the steps before a state are kept.
fn figures_of(state: &Path) -> PathBuf {
    state.with_extension("state.json")
}

/// The figures up to a step. They only fill a table: what of them cannot be read is left out.
fn told(state: &Path, step: u64) -> Vec<Value> {
    let read = std::fs::read_to_string(figures_of(state)).unwrap_or_default();
    let mut all: Vec<Value> = serde_json::from_str(&read).unwrap_or_default();
    all.retain(|figures| figures["step"].as_u64().is_some_and(|n| n <= step));
    all
}

/// A step on the bar; without a terminal, a line at the ends of epochs.
fn show(bar: &ProgressBar, report: &StepReport) {
    let valid = report.valid.as_ref().map(|v| format!(", held out {:.4}", v.loss));
    let loss = format!("loss {:.4}{}", report.loss, valid.unwrap_or_default());
    bar.set_position(report.step);
    if bar.is_hidden() && (report.epoch_end || report.step == report.steps) {
        say(&format!("step {}/{}  {loss}\n", report.step, report.steps));
    }
    bar.set_message(loss);
}

/// An example with what is learnt between `⟦` and `⟧`.
fn shown_as_text(example: &Preview) -> String {
    let cut = if example.cut { ", cut at the context" } else { "" };
    let mut text = format!(
        "line {}: {} tokens, {} learnt{cut}\n",
        example.line, example.tokens, example.supervised
    );
    for span in &example.spans {
        let shown = on_terminal(&span.text);
        text += &if span.supervised { format!("⟦{shown}⟧") } else { shown };
    }
    text + "\n\n"
}
