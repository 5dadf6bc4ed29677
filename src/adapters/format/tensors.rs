//! Tensors in a file: where each one lies, and its values as f32.
//!
//! Owns the storage types and the reading of values, in blocks and finite or refused. Knows neither
//! safetensors nor GGUF headers. The thing to know: every value of a tensor that is read is
//! checked, so no NaN ever reaches a step.

use super::large;
use super::names::unreadable;
use crate::error::{Error, Result};
use crate::header::{Entry, Wrong};
use half::{bf16, f16};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Most tensors in one adapter file.
pub const TENSORS_MAX: usize = 65_536;
/// Values read at a time when a tensor is only looked at. A multiple of `Q8_BLOCK`.
const BLOCK_VALUES: usize = 1 << 18;
/// Bytes read at a time: whole values and blocks of every storage, and little enough that the
/// allocator keeps the memory.
const PIECE_BYTES: usize = 34 << 10;
/// Values of a GGUF Q8_0 block: one f16 factor and 32 signed bytes.
const Q8_BLOCK: usize = 32;

/// How values lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    F32,
    F16,
    Bf16,
    /// GGUF only.
    Q8_0,
}

impl Storage {
    /// Bytes of `values` values; `None` when they do not fill whole blocks or overflow.
    pub fn bytes(self, values: usize) -> Option<usize> {
        match self {
            Self::F32 => values.checked_mul(4),
            Self::F16 | Self::Bf16 => values.checked_mul(2),
            Self::Q8_0 if values.is_multiple_of(Q8_BLOCK) => (values / Q8_BLOCK).checked_mul(34),
            Self::Q8_0 => None,
        }
    }

    fn decode(self, bytes: &[u8], out: &mut Vec<f32>) {
        let pairs = || bytes.as_chunks::<2>().0.iter();
        match self {
            Self::F32 => {
                out.extend(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)))
            }
            Self::F16 => out.extend(pairs().map(|&b| f16::from_le_bytes(b).to_f32())),
            Self::Bf16 => out.extend(pairs().map(|&b| bf16::from_le_bytes(b).to_f32())),
            Self::Q8_0 => {
                for block in bytes.as_chunks::<34>().0 {
                    let factor = f16::from_le_bytes([block[0], block[1]]).to_f32();
                    out.extend(block[2..].iter().map(|&q| factor * f32::from(q as i8)));
                }
            }
        }
    }
}

/// One tensor of the file.
pub type Tensor = Entry<Storage>;

/// Index of a tensor in its file.
pub type TensorId = usize;

/// An open file whose header was read and checked.
pub struct TensorFile {
    file: File,
    path: PathBuf,
    pub tensors: Vec<Tensor>,
}

impl TensorFile {
    /// `tensors` must lie inside the file: the header's reader has checked it.
    pub fn new(file: File, path: &Path, tensors: Vec<Tensor>) -> Self {
        Self { file, path: path.to_owned(), tensors }
    }

    /// Of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.range.end - t.range.start).sum()
    }

    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id]
    }

    /// All values. Errors: `non_finite_values`.
    pub fn read(&self, id: TensorId) -> Result<Vec<f32>> {
        let mut out = Vec::with_capacity(self.tensors[id].values());
        self.read_values(id, 0..self.tensors[id].values(), &mut out)?;
        Ok(out)
    }

    /// Replaces `out` by the values of a range (whole blocks of a blocked storage). Errors:
    /// `non_finite_values`.
    pub fn read_values(
        &self,
        id: TensorId,
        values: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let tensor = &self.tensors[id];
        let sizes = (tensor.stored.bytes(values.start), tensor.stored.bytes(values.len()));
        let (Some(skip), Some(len)) = sizes else {
            return Err(Error::fault(format!(
                "values {values:?} of tensor `{}` are not whole blocks",
                tensor.name
            )));
        };
        out.clear();
        out.reserve(values.len());
        let mut piece = vec![0; len.min(PIECE_BYTES)];
        let end = tensor.range.start + (skip + len) as u64;
        let mut offset = tensor.range.start + skip as u64;
        while offset < end {
            let n = piece.len().min((end - offset) as usize);
            let read = self.file.read_exact_at(&mut piece[..n], offset);
            read.map_err(|e| unreadable(&self.path, &e))?;
            tensor.stored.decode(&piece[..n], out);
            offset += n as u64;
        }
        match out.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(i) => Err(Error::unprocessable(
                "non_finite_values",
                format!(
                    "tensor `{}` holds {} at index {}; every value must be finite",
                    tensor.name,
                    out[i],
                    values.start + i
                ),
            )),
        }
    }

    /// Looks at every value of every tensor. Errors: `non_finite_values`.
    pub fn check_finite(&self) -> Result<()> {
        let ids: Vec<TensorId> = (0..self.tensors.len()).collect();
        let checked = large::each(self.bytes(), &ids, |&id| {
            let (values, mut block) = (self.tensors[id].values(), Vec::new());
            for start in (0..values).step_by(BLOCK_VALUES) {
                let end = values.min(start + BLOCK_VALUES);
                self.read_values(id, start..end, &mut block)?;
            }
            Ok(())
        });
        checked.map(|_| ())
    }
}

/// A header's refusal: `unsupported_dtype` with the types that are served, `duplicate_tensor`, or
/// the code for the rest, and the file's name.
pub fn refused(
    wrong: Wrong,
    path: &Path,
    (code, file): (&'static str, &str),
    types: &str,
) -> Error {
    match wrong {
        Wrong::Unreadable(e) => unreadable(path, &e),
        Wrong::Twice(_) => Error::unprocessable("duplicate_tensor", wrong.to_string()),
        Wrong::Stored { .. } => {
            Error::unprocessable("unsupported_dtype", format!("{wrong}; {types} are supported"))
        }
        Wrong::Invalid(_) => Error::unprocessable(code, format!("{file}: {wrong}")),
    }
}
