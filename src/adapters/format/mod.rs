//! From files to deltas: PEFT directories and GGUF adapters become one `Parsed`, then `Prepared`.
//!
//! Owns every rule about file formats. Never guesses: each tensor and each config field is consumed or the adapter is
//! refused with a code that names it. The thing to know: scale is computed in one function (`peft::scale`).

use super::{BaseBias, BaseRows, bank::Prepared};
use crate::error::Result;
use crate::shape::ModelShape;
use polylora_kernels::Dtype;
use std::path::Path;

/// What an adapter says of itself, for `GET /v1/adapters`.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// `lora`, `rslora`, `dora`, …, or `gguf-lora`.
    pub method: String,
    pub rank_max: usize,
    /// Number of sites changed, e.g. 210.
    pub sites: usize,
    /// Projection names touched, e.g. ["q_proj", "v_proj"].
    pub targets: Vec<String>,
    pub parameters: u64,
    /// `base_model_name_or_path` of the config, informative.
    pub base_model: Option<String>,
}

/// Reads the adapter in `dir` (`adapter_config.json` + `adapter_model.safetensors`, or one `*.gguf`) and checks it in full
/// against the shape, without preparing it. Errors: every refusal code of README's table.
pub fn check(_dir: &Path, _shape: &ModelShape) -> Result<Summary> {
    unimplemented!()
}

/// Reads, checks and prepares the adapter for the bank: factors in `dtype`, scale folded in, DoRA gains computed.
pub fn prepare(
    _dir: &Path,
    _shape: &ModelShape,
    _dtype: Dtype,
    _rows: &BaseRows,
    _bias: &BaseBias,
) -> Result<(Summary, Prepared)> {
    unimplemented!()
}
