//! From files to deltas: PEFT directories and GGUF adapters become one `Parsed`, then `Prepared`.
//!
//! Owns every rule about file formats. Never guesses: each tensor and each config field is consumed
//! or the adapter is refused with a code that names it. The thing to know: a PEFT scale is computed
//! in one function (`PeftConfig::scale`), a GGUF scale in one (`gguf::scale`), and both are folded
//! in once, in `prepare`.

mod backtracking;
pub mod bundle;
pub mod config;
pub mod factors;
pub mod files;
pub mod generation;
mod gguf;
mod json;
pub mod large;
mod modules;
pub mod names;
mod parsed;
mod pattern;
mod peft;
mod prepare;
mod safetensors;
mod summary;
pub mod template;
mod tensors;
mod tokenizer_config;
mod vocabulary;
pub mod write;

use super::{BaseBias, BaseRows, BaseText, Digest, bank::Prepared};
use crate::error::Result;
use crate::shape::ModelShape;
use config::PeftConfig;
use files::{AdapterFiles, FactorFiles};
use parsed::Parsed;
use polylora_kernels::{FactorDtype, Memory};
use std::path::Path;
pub use summary::Summary;

/// Reads the adapter in `dir` (`adapter_config.json` + `adapter_model.safetensors`, or one
/// `*.gguf`) and checks it in full against the shape, values included, without preparing it.
/// Errors: every refusal code of `docs/errors.md`.
pub fn check(dir: &Path, shape: &ModelShape) -> Result<Summary> {
    let parsed = parse(&AdapterFiles::find(dir)?, shape)?;
    parsed.file.check_finite()?;
    Ok(parsed.summary)
}

/// As `check`, and what lies beside the factors: an upload in full. Blocking.
/// Errors: as `check` and `bundle::read_bundle`.
pub fn check_upload(dir: &Path, shape: &ModelShape, base: &BaseText) -> Result<Summary> {
    let summary = check(dir, shape)?;
    let bundle = bundle::read_bundle(dir, &AdapterFiles::find(dir)?, base)?;
    Ok(Summary {
        chat_template: bundle.template.is_some(),
        generation: bundle.generation,
        ..summary
    })
}

/// Reads, checks and prepares the adapter for the bank: factors in `dtype`, scale folded in, DoRA
/// gains computed. The digest in the result is of the files as they are now. Errors: as `check`,
/// and `base_weights_changed`.
pub fn prepare(
    dir: &Path,
    shape: &ModelShape,
    dtype: impl Into<FactorDtype>,
    rows: &BaseRows,
    bias: &BaseBias,
) -> Result<(Summary, Prepared)> {
    let files = AdapterFiles::find(dir)?;
    let read = || prepare_as(Digest([0; 32]), dir, shape, dtype, rows, bias);
    let (digest, (summary, mut prepared)) = large::beside(files.bytes()?, || files.digest(), read)?;
    prepared.digest = digest;
    Ok((summary, prepared))
}

/// The same of files that the caller knows by `digest`, and looks at itself.
pub fn prepare_as(
    digest: Digest,
    dir: &Path,
    shape: &ModelShape,
    dtype: impl Into<FactorDtype>,
    rows: &BaseRows,
    bias: &BaseBias,
) -> Result<(Summary, Prepared)> {
    let parsed = parse(&AdapterFiles::find(dir)?, shape)?;
    // Every model runs on the CPU so far: the registry, which calls this, knows no other memory.
    let memory = &Memory::Cpu;
    let target = prepare::Target { shape, dtype: dtype.into(), memory, rows, bias };
    let prepared = prepare::prepare(&parsed, digest, &target)?;
    Ok((parsed.summary, prepared))
}

fn parse(files: &AdapterFiles, shape: &ModelShape) -> Result<Parsed> {
    match &files.factors {
        FactorFiles::Gguf { path } => gguf::parse(path, shape),
        FactorFiles::Peft { config, tensors } => {
            let json = std::fs::read(config).map_err(|e| names::unreadable(config, &e))?;
            let config = PeftConfig::parse(&json)?;
            peft::parse(&config, safetensors::open(tensors)?, shape)
        }
    }
}
