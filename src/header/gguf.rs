//! The header of a GGUF file: metadata, then entries of tensors, all little-endian.
//!
//! Owns the rules of versions 2 and 3. Never knows what a key means, but for the alignment. The
//! thing to know: what a value takes in memory is bounded by the file's own bytes, unless arrays
//! are kept.

use super::{Entry, Wrong, check_layout, invalid, values};
use crate::error::brief;
use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek};

const DIMENSIONS_MAX: u32 = 4;
/// The type of an array's value.
const ARRAY: u32 = 9;

/// What a header may be.
pub struct Limits {
    pub tensors: u64,
    pub keys: u64,
    pub string_bytes: u64,
    pub array_values: u64,
    /// Whether arrays are kept; else they are read, checked, and empty.
    pub keeps_arrays: bool,
    /// Whether text that is not UTF-8 is mended, and ends before zeros; else it is refused.
    pub mends_text: bool,
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    String(String),
    Bool(bool),
    U32(u32),
    /// Of any other width.
    Number(f64),
    Array(Vec<Value>),
}

impl Value {
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::U32(n) => Some(f64::from(*n)),
            Self::Number(n) => Some(*n),
            Self::String(_) | Self::Bool(_) | Self::Array(_) => None,
        }
    }
}

pub type Metadata = BTreeMap<String, Value>;

/// Reads the header of a file of `len` bytes from where the file stands, which is its front.
pub fn read(
    file: &File,
    len: u64,
    limits: &Limits,
) -> Result<(Metadata, Vec<Entry<GgmlDType>>), Wrong> {
    let mut r = Reader { from: BufReader::new(file), len, limits };
    if r.array::<4>()? != *b"GGUF" {
        return Err(invalid("it does not begin with GGUF"));
    }
    let version = r.u32()?;
    if !(2..=3).contains(&version) {
        return Err(invalid(format!("version {version}; 2 and 3 are supported")));
    }
    let (tensors, keys) = (r.u64()?, r.u64()?);
    if tensors > limits.tensors || keys > limits.keys {
        return Err(invalid(format!(
            "{tensors} tensors and {keys} keys; the limits are {} and {}",
            limits.tensors, limits.keys
        )));
    }
    let mut metadata = Metadata::new();
    for _ in 0..keys {
        let (key, kind) = (r.string()?, r.u32()?);
        let value = r.value(kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(invalid(format!("the key `{}` is there twice", brief(&key))));
        }
    }
    let mut entries = (0..tensors).map(|_| r.entry()).collect::<Result<Vec<_>, _>>()?;
    let alignment = alignment(&metadata)?;
    let header = r.from.stream_position().map_err(Wrong::Unreadable)?;
    let start = header.next_multiple_of(alignment).min(len);
    for t in &mut entries {
        let ends = (t.range.start.checked_add(start), t.range.end.checked_add(start));
        let (Some(from), Some(to)) = ends else {
            return Err(invalid(format!("the offset of tensor `{}` overflows", brief(&t.name))));
        };
        if !t.range.start.is_multiple_of(alignment) {
            return Err(invalid(format!("tensor `{}` is not aligned", brief(&t.name))));
        }
        t.range = from..to;
    }
    check_layout(&entries, start..len)?;
    Ok((metadata, entries))
}

fn alignment(metadata: &Metadata) -> Result<u64, Wrong> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::U32(n)) if n.is_power_of_two() && (8..=65536).contains(n) => Ok(u64::from(*n)),
        Some(_) => Err(invalid(
            "`general.alignment` is not a power of two from 8 to 65536, stored as a uint32",
        )),
    }
}

/// GGML's number of a type. Those that are missing are not in files, or nothing here reads them.
fn stored(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// The header's primitive values.
struct Reader<'a> {
    from: BufReader<&'a File>,
    len: u64,
    limits: &'a Limits,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Wrong> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(|_| invalid("it ends within the header"))?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, Wrong> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Wrong> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<String, Wrong> {
        let len = self.u64()?;
        if len > self.limits.string_bytes.min(self.len) {
            return Err(invalid(format!("a string of {len} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        self.from.read_exact(&mut bytes).map_err(|_| invalid("it ends within a string"))?;
        if !self.limits.mends_text {
            return String::from_utf8(bytes).map_err(|_| invalid("a string is not UTF-8"));
        }
        bytes.truncate(bytes.iter().rposition(|&b| b != 0).map_or(0, |at| at + 1));
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn value(&mut self, kind: u32) -> Result<Value, Wrong> {
        if kind != ARRAY {
            return self.scalar(kind);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        if kind == ARRAY || count > self.limits.array_values {
            return Err(invalid(format!("an array of {count} values of type {kind}")));
        }
        let mut all = Vec::new();
        for _ in 0..count {
            let value = self.scalar(kind)?;
            if self.limits.keeps_arrays {
                all.push(value);
            }
        }
        Ok(Value::Array(all))
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, Wrong> {
        Ok(Value::Number(match kind {
            0 => f64::from(u8::from_le_bytes(self.array()?)),
            1 => f64::from(i8::from_le_bytes(self.array()?)),
            2 => f64::from(u16::from_le_bytes(self.array()?)),
            3 => f64::from(i16::from_le_bytes(self.array()?)),
            4 => return self.u32().map(Value::U32),
            5 => f64::from(i32::from_le_bytes(self.array()?)),
            6 => f64::from(f32::from_le_bytes(self.array()?)),
            7 => {
                return match self.array()? {
                    [flag @ 0..=1] => Ok(Value::Bool(flag == 1)),
                    [other] => Err(invalid(format!("a flag of {other}"))),
                };
            }
            8 => return self.string().map(Value::String),
            10 => self.u64()? as f64,
            11 => i64::from_le_bytes(self.array()?) as f64,
            12 => f64::from_le_bytes(self.array()?),
            _ => return Err(invalid(format!("unknown value type {kind}"))),
        }))
    }

    /// A tensor's entry, its range still relative to the data.
    fn entry(&mut self) -> Result<Entry<GgmlDType>, Wrong> {
        let (name, dimensions) = (self.string()?, self.u32()?);
        if dimensions > DIMENSIONS_MAX {
            return Err(invalid(format!("tensor `{}` has {dimensions} dimensions", brief(&name))));
        }
        let mut shape = Vec::with_capacity(dimensions as usize);
        for _ in 0..dimensions {
            let dim = self.u64()?;
            shape.push(usize::try_from(dim).map_err(invalid)?);
        }
        shape.reverse(); // GGUF lists the fastest dimension first
        let number = self.u32()?;
        let Some(stored) = stored(number) else {
            let word = format!("GGML type {number}");
            return Err(Wrong::Stored { tensor: name, word });
        };
        let (block, block_bytes) = (stored.block_size() as u64, stored.type_size() as u64);
        let blocks = values(&shape).filter(|n| n.is_multiple_of(block)).map(|n| n / block);
        let bytes = blocks.and_then(|n| n.checked_mul(block_bytes));
        let start = self.u64()?;
        match bytes.and_then(|n| start.checked_add(n)) {
            Some(end) => Ok(Entry { name, stored, shape, range: start..end }),
            None => {
                let name = brief(&name);
                Err(invalid(format!("tensor `{name}` has shape {shape:?} as {stored:?}")))
            }
        }
    }
}
