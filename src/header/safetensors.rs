//! The header of a safetensors file: JSON, by which tensors fill the rest of the file.
//!
//! Owns the rules of that format. Never takes a map for the entries: it would hide the first of two
//! of one name.

use super::{Entry, Wrong, check_layout, invalid, values};
use crate::error::brief;
use safetensors::Dtype;
use serde::de::value::{Error as NoType, StrDeserializer};
use serde::de::{Deserialize, Deserializer, IgnoredAny, IntoDeserializer, MapAccess, Visitor};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// What a header may be.
pub struct Limits {
    pub bytes: u64,
    pub tensors: usize,
    pub dimensions: usize,
}

/// Reads the header of a file of `len` bytes: its entries, in their order. A type for which
/// `stored` has nothing is refused, before anything else is said of its tensor.
pub fn read<T>(
    file: &File,
    len: u64,
    limits: &Limits,
    stored: impl Fn(Dtype) -> Option<T>,
) -> Result<Vec<Entry<T>>, Wrong> {
    let mut size = [0; 8];
    if len < 8 {
        return Err(invalid(format!("{len} bytes are too few for a header")));
    }
    file.read_exact_at(&mut size, 0).map_err(Wrong::Unreadable)?;
    let size = u64::from_le_bytes(size);
    if size > limits.bytes || size > len - 8 {
        return Err(invalid(format!(
            "the header claims {size} bytes; the file has {} after its length and the limit is {}",
            len - 8,
            limits.bytes
        )));
    }
    let mut header = vec![0; size as usize];
    file.read_exact_at(&mut header, 8).map_err(Wrong::Unreadable)?;
    let Header(raw) = serde_json::from_slice(&header).map_err(invalid)?;
    if raw.len() > limits.tensors {
        return Err(invalid(format!("{} tensors; the limit is {}", raw.len(), limits.tensors)));
    }
    let data = 8 + size..len;
    let entries = raw
        .into_iter()
        .map(|(name, raw)| entry(name, raw, data.start, limits.dimensions, &stored))
        .collect::<Result<Vec<_>, _>>()?;
    check_layout(&entries, data.clone())?;
    let used: u64 = entries.iter().map(|t| t.range.end - t.range.start).sum();
    match data.end - data.start - used {
        0 => Ok(entries),
        left => Err(invalid(format!("{left} bytes of data belong to no tensor"))),
    }
}

fn entry<T>(
    name: String,
    raw: Raw,
    start: u64,
    most: usize,
    stored: impl Fn(Dtype) -> Option<T>,
) -> Result<Entry<T>, Wrong> {
    let word: StrDeserializer<'_, NoType> = raw.dtype.as_str().into_deserializer();
    let dtype = Dtype::deserialize(word).ok();
    let Some((dtype, stored)) = dtype.and_then(|dtype| Some((dtype, stored(dtype)?))) else {
        return Err(Wrong::Stored { tensor: name, word: raw.dtype });
    };
    let bits = values(&raw.shape).and_then(|n| n.checked_mul(dtype.bitsize() as u64));
    let bytes = bits.filter(|n| n.is_multiple_of(8)).map(|n| n / 8);
    let [begin, end] = raw.data_offsets;
    if raw.shape.len() > most || bytes.is_none() || end.checked_sub(begin) != bytes {
        return Err(invalid(format!(
            "tensor `{}` of shape {:?} as {dtype:?} cannot lie at bytes {begin}..{end}",
            brief(&name),
            raw.shape
        )));
    }
    match (start.checked_add(begin), start.checked_add(end)) {
        (Some(begin), Some(end)) => Ok(Entry { name, stored, shape: raw.shape, range: begin..end }),
        _ => Err(invalid(format!("the offsets of tensor `{}` overflow", brief(&name)))),
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

struct Header(Vec<(String, Raw)>);

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
