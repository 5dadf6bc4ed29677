//! `polylora verify`: our logits against candle-transformers' on the user's own model and adapter.
//!
//! Owns the comparison and its table. Never decides how the server computes: it drives `Model` as
//! the engine does and an independent implementation beside it, from the same files. The thing to
//! know: both see the same stored weights, the reference always in f32 on the CPU; what candle's
//! model of a family lacks is refused by name, not papered over.

mod merge;
mod reference;

use crate::adapters::bank::{AdapterMix, Bank, Slot};
use crate::adapters::format;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::source;
use crate::error::{Error, Result};
use crate::model::weights::Weights;
use crate::model::{Batch, Model, ModelOptions};
use polylora_kernels::{Device, Dtype, KvCache};
use reference::Reference;
use std::path::Path;
use std::sync::Arc;

/// What is asked of both. Short, so that the check takes seconds; in different scripts, so that it
/// sees many tokens.
const PROMPTS: [&str; 4] = [
    "The capital of France is",
    "fn main() {\n    let x = 3;\n",
    "Write one sentence about 1234567 old bicycles in São Paulo.",
    "用一句话介绍你自己。",
];
/// Tokens generated greedily after each prompt and compared one by one.
const STEPS: usize = 12;
/// Tokens less likely than this in the reference are left out: their logprobs say nothing.
const LOGPROB_MIN: f32 = -12.0;

/// One prompt's result.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub prompt: String,
    /// Positions compared.
    pub positions: usize,
    /// Largest |Δ logprob| over positions and likely tokens.
    pub difference_max: f32,
    /// Positions where both put the same token first.
    pub agreed: usize,
}

/// All prompts' results and what they are held to.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub rows: Vec<Row>,
    pub tolerance: f32,
}

impl Report {
    pub fn passed(&self) -> bool {
        let good = |row: &Row| row.difference_max <= self.tolerance;
        !self.rows.is_empty() && self.rows.iter().all(good)
    }

    /// The table, one prompt a line, with the verdict under it.
    pub fn table(&self) -> String {
        let mut out = format!(
            "{:<44} {:>9} {:>15} {:>9}\n",
            "prompt", "positions", "max |Δlogprob|", "top-1"
        );
        for row in &self.rows {
            let prompt: String = row.prompt.chars().take(40).collect();
            out += &format!(
                "{:<44} {:>9} {:>15.6} {:>9}\n",
                format!("{prompt:?}"),
                row.positions,
                row.difference_max,
                format!("{}/{}", row.agreed, row.positions)
            );
        }
        let verdict = if self.passed() { "equal" } else { "DIFFERENT" };
        out + &format!("{verdict} within {} (max |Δlogprob|)\n", self.tolerance)
    }
}

/// Locates and opens the model, compares and prints the table. `Ok(false)`: beyond tolerance, the
/// exit code is 1. `dtype` None: our side in f32 too; bf16 shows what rounding costs.
pub fn run(model: &str, adapter: Option<&Path>, dtype: Option<Dtype>) -> Result<bool> {
    let located = source::locate(model)?;
    let checkpoint = Checkpoint::open(&located.path)?;
    eprintln!("{}: {}", located.name, checkpoint.storage);
    let report = compare(&checkpoint, adapter, dtype.unwrap_or(Dtype::F32))?;
    print!("{}", report.table());
    Ok(report.passed())
}

/// Compares on the built-in prompts. Errors: `unsupported_reference` when candle has no such model,
/// and those of loading.
pub fn compare(c: &Checkpoint, adapter: Option<&Path>, dtype: Dtype) -> Result<Report> {
    let mut ours = Ours::new(c, adapter, dtype)?;
    let mut reference = Reference::new(c, adapter)?;
    let mut rows = Vec::new();
    for prompt in PROMPTS {
        let encoded = c.text.tokenizer.encode(prompt, false);
        let encoded = encoded.map_err(|e| Error::fault(format!("tokenizer: {e}")))?;
        let bos = c.text.bos.filter(|_| c.text.add_bos);
        let ids = bos.into_iter().chain(encoded.get_ids().iter().copied());
        let mut tokens: Vec<u32> = ids.collect();
        // Windows of candle's models differ from Hugging Face's by one; below the window there is
        // none to differ.
        let room = reference.positions_max().saturating_sub(STEPS);
        tokens.truncate(room);
        if !tokens.is_empty() {
            rows.push(compare_prompt(prompt, tokens, &mut ours, &mut reference)?);
        }
    }
    let tolerance = match dtype {
        Dtype::F32 => 5e-3,
        Dtype::Bf16 => 0.5,
    };
    Ok(Report { rows, tolerance })
}

fn compare_prompt(
    prompt: &str,
    mut fed: Vec<u32>,
    ours: &mut Ours,
    reference: &mut Reference,
) -> Result<Row> {
    let mut row = Row { prompt: prompt.to_owned(), positions: 0, difference_max: 0.0, agreed: 0 };
    reference.reset()?;
    let mut position = 0;
    for _ in 0..STEPS {
        let ours = log_softmax(ours.logits(&fed, position)?);
        let theirs = log_softmax(&reference.logits(&fed, position)?);
        let likely = ours.iter().zip(&theirs).filter(|(_, t)| **t > LOGPROB_MIN);
        let difference = likely.map(|(o, t)| (o - t).abs());
        // NaN must not pass for small.
        row.difference_max = difference
            .fold(row.difference_max, |a, b| if b.is_nan() { f32::INFINITY } else { a.max(b) });
        let best = argmax(&theirs);
        row.positions += 1;
        row.agreed += usize::from(argmax(&ours) == best);
        position += fed.len();
        fed = vec![best as u32];
    }
    Ok(row)
}

fn argmax(values: &[f32]) -> usize {
    let best = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(i, _)| i)
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = logits.iter().map(|&x| f64::from(x - max).exp());
    let log_sum = exp.sum::<f64>().ln() as f32;
    logits.iter().map(|&x| x - max - log_sum).collect()
}

/// Our model with one sequence, its pages in order, and at most one adapter.
struct Ours {
    model: Model,
    bank: Bank,
    slot: Option<Slot>,
}

impl Ours {
    fn new(c: &Checkpoint, adapter: Option<&Path>, dtype: Dtype) -> Result<Self> {
        let device = Device::cpu(std::thread::available_parallelism().map_or(1, usize::from));
        let weights = Arc::new(Weights::load(c, Some(dtype.into()), &device, &|_, _| ())?);
        let mut bank = Bank::new(1);
        let slot = match adapter {
            None => None,
            Some(dir) => {
                let (rows, bias) = (weights.base_rows(), weights.base_bias());
                let (_, prepared) = format::prepare(dir, &c.shape, dtype, &rows, &bias)?;
                let installed = bank.install(prepared);
                Some(installed.map_err(|_| Error::fault("an empty bank took no adapter"))?)
            }
        };
        let context = c.shape.context.min(256);
        let options = ModelOptions {
            threads: device.threads(),
            rows_max: context,
            logit_rows_max: 1,
            kv_pages: context.div_ceil(KvCache::PAGE),
            kv_dtype: dtype.into(),
            context,
        };
        let model = Model::new(weights, device, &options)?;
        Ok(Self { model, bank, slot })
    }

    /// Logits `[V]` of the last of `tokens`, which start at `position`.
    fn logits(&mut self, tokens: &[u32], position: usize) -> Result<&[f32]> {
        let (rows, end) = (tokens.len() as u32, position + tokens.len());
        let pages = end.div_ceil(KvCache::PAGE) as u32;
        let (segment_indptr, logit_indptr) = match self.slot {
            Some(_) => (vec![0, rows], vec![0, 1]),
            None => (vec![0], vec![0]),
        };
        let mixes: Vec<AdapterMix> = self.slot.map(AdapterMix::from).into_iter().collect();
        let batch = Batch {
            tokens: tokens.to_vec(),
            positions: (position as u32..end as u32).collect(),
            sequences: vec![0; tokens.len()],
            pages: (0..pages).collect(),
            page_indptr: vec![0, pages],
            segment_indptr,
            segment_mixes: mixes.clone(),
            logit_rows: vec![rows - 1],
            logit_indptr,
            logit_mixes: mixes,
        };
        let logits = self.model.forward(&batch, &self.bank)?;
        Ok(logits)
    }
}
