//! Headers of weight files, of adapters and of models alike: what lies where.
//!
//! Owns every rule of safetensors and GGUF headers: sizes, types, offsets, no overlap, no name
//! twice. Never reads a value. The thing to know: no size in a file is believed before it is
//! compared with the file.

pub mod gguf;
pub mod safetensors;

use crate::error::brief;
use std::fmt;
use std::io;
use std::ops::Range;

/// A tensor of the file, stored as `T`.
#[derive(Debug, Clone)]
pub struct Entry<T> {
    pub name: String,
    pub stored: T,
    /// Row-major, slowest first.
    pub shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub range: Range<u64>,
}

impl<T> Entry<T> {
    /// How many it has.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// The same, if `of` knows what to do with how it is stored.
    pub fn stored_as<U>(self, of: impl Fn(&T) -> Option<U>) -> Result<Entry<U>, Wrong>
    where
        T: fmt::Debug,
    {
        match of(&self.stored) {
            Some(stored) => {
                Ok(Entry { name: self.name, stored, shape: self.shape, range: self.range })
            }
            None => Err(Wrong::Stored { tensor: self.name, word: format!("{:?}", self.stored) }),
        }
    }
}

/// Why a header is refused.
#[derive(Debug)]
pub enum Wrong {
    Unreadable(io::Error),
    /// It breaks a rule of its format.
    Invalid(String),
    /// A tensor is in it twice.
    Twice(String),
    /// The word for a type that is not known, or not read.
    Stored {
        tensor: String,
        word: String,
    },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(e) => write!(f, "{e}"),
            Self::Invalid(why) => f.write_str(why),
            Self::Twice(tensor) => write!(f, "tensor `{}` is in the file twice", brief(tensor)),
            Self::Stored { tensor, word } => {
                write!(f, "tensor `{}` is stored as {}", brief(tensor), brief(word))
            }
        }
    }
}

fn invalid(why: impl fmt::Display) -> Wrong {
    Wrong::Invalid(why.to_string())
}

/// Values of a tensor, if they can be counted.
fn values(shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(1, |n: u64, &d| n.checked_mul(d as u64))
}

/// Checks that tensors lie in `data` of the file, do not overlap and are not named twice.
fn check_layout<T>(entries: &[Entry<T>], data: Range<u64>) -> Result<(), Wrong> {
    let mut order: Vec<&Entry<T>> = entries.iter().collect();
    order.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = order.windows(2).find(|p| p[0].name == p[1].name) {
        return Err(Wrong::Twice(pair[0].name.clone()));
    }
    order.sort_by_key(|t| (t.range.start, t.range.end));
    let mut free = data.start;
    for t in order {
        if t.range.start < free || t.range.end > data.end {
            return Err(invalid(format!(
                "tensor `{}` lies at bytes {}..{}, outside the file's data ({}..{}) or on another \
                 tensor",
                brief(&t.name),
                t.range.start,
                t.range.end,
                data.start,
                data.end
            )));
        }
        free = t.range.end;
    }
    Ok(())
}
