//! The header of a safetensors file, read with limits.
//!
//! Owns the checks of that format: sizes, types, offsets, no overlap, no gap, no name twice. Never
//! reads values. The thing to know: the file is untrusted, so no size in it is believed before
//! it is compared with the file's own.

use super::names::unreadable;
use super::tensors::{Storage, TENSORS_MAX, Tensor, TensorFile, check_layout};
use crate::error::{Error, Result};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

const HEADER_BYTES_MAX: u64 = 16 << 20;
const DIMENSIONS_MAX: usize = 4;

fn invalid(why: impl fmt::Display) -> Error {
    Error::unprocessable("invalid_safetensors", format!("adapter_model.safetensors: {why}"))
}

/// Opens the file and reads its header. Errors: `invalid_safetensors`, `unsupported_dtype`,
/// `duplicate_tensor`.
pub fn open(path: &Path) -> Result<TensorFile> {
    let mut file = File::open(path).map_err(|e| unreadable(path, &e))?;
    let len = file.metadata().map_err(|e| unreadable(path, &e))?.len();
    let mut size = [0; 8];
    if len < 8 {
        return Err(invalid(format!("{len} bytes are too few for a header")));
    }
    file.read_exact(&mut size).map_err(|e| unreadable(path, &e))?;
    let size = u64::from_le_bytes(size);
    if size > HEADER_BYTES_MAX || size > len - 8 {
        return Err(invalid(format!(
            "the header claims {size} bytes; the file has {} after its length and the limit is \
             {HEADER_BYTES_MAX}",
            len - 8
        )));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(|e| unreadable(path, &e))?;
    let Header(entries) = serde_json::from_slice(&header).map_err(invalid)?;
    if entries.len() > TENSORS_MAX {
        return Err(invalid(format!("{} tensors; the limit is {TENSORS_MAX}", entries.len())));
    }
    let data = 8 + size..len;
    let tensors = entries
        .into_iter()
        .map(|(name, raw)| tensor(name, raw, data.start))
        .collect::<Result<Vec<_>>>()?;
    check_layout(&tensors, data.clone(), "invalid_safetensors")?;
    let used: u64 = tensors.iter().map(|t| t.range.end - t.range.start).sum();
    if used != data.end - data.start {
        return Err(invalid(format!(
            "{} bytes of data belong to no tensor",
            data.end - data.start - used
        )));
    }
    Ok(TensorFile::new(file, path, tensors))
}

fn tensor(name: String, raw: RawTensor, start: u64) -> Result<Tensor> {
    let storage = match raw.dtype.as_str() {
        "F32" => Storage::F32,
        "F16" => Storage::F16,
        "BF16" => Storage::Bf16,
        other => {
            return Err(Error::unprocessable(
                "unsupported_dtype",
                format!("tensor `{name}` is stored as {other}; F32, F16 and BF16 are supported"),
            ));
        }
    };
    let values = raw.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let bytes = values.and_then(|n| storage.bytes(n)).map(|n| n as u64);
    let [begin, end] = raw.data_offsets;
    if raw.shape.len() > DIMENSIONS_MAX || bytes.is_none() || end.checked_sub(begin) != bytes {
        return Err(invalid(format!(
            "tensor `{name}` of shape {:?} as {} cannot lie at bytes {begin}..{end}",
            raw.shape, raw.dtype
        )));
    }
    let (Some(begin), Some(end)) = (start.checked_add(begin), start.checked_add(end)) else {
        return Err(invalid(format!("the offsets of tensor `{name}` overflow")));
    };
    Ok(Tensor { name, storage, shape: raw.shape, range: begin..end })
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Entries in file order, names twice included: a map type would hide the first of two.
struct Header(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Header, M::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(Header(entries))
    }
}
