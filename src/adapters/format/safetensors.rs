//! The safetensors file of a PEFT adapter.
//!
//! Owns its limits and the types that are served. Never reads values.

use super::names::unreadable;
use super::tensors::{Storage, TENSORS_MAX, TensorFile, refused};
use crate::error::Result;
use crate::header::safetensors::{Limits, read};
use safetensors::Dtype;
use std::fs::File;
use std::path::Path;

const LIMITS: Limits = Limits { bytes: 16 << 20, tensors: TENSORS_MAX, dimensions: 4 };

/// Opens the file and reads its header. Errors: `invalid_safetensors`, `unsupported_dtype`,
/// `duplicate_tensor`.
pub fn open(path: &Path) -> Result<TensorFile> {
    let file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let len = file.metadata().map_err(|e| unreadable(path, &e))?.len();
    let storage = |dtype: Dtype| match dtype {
        Dtype::F32 => Some(Storage::F32),
        Dtype::F16 => Some(Storage::F16),
        Dtype::BF16 => Some(Storage::Bf16),
        _ => None,
    };
    let tensors = read(&file, len, &LIMITS, storage).map_err(|wrong| {
        let code = ("invalid_safetensors", "adapter_model.safetensors");
        refused(wrong, path, code, "F32, F16 and BF16")
    })?;
    Ok(TensorFile::new(file, path, tensors))
}
