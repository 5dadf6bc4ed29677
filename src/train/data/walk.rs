//! Line after line of a file.
//!
//! Owns the file's bounds, and that it holds one kind of lines. Never looks into a line. The thing
//! to know: a wrong line is noted and the next one read.

use super::form::{Kind, Record, wrong};
use super::lines::{Line, Lines};
use super::problems::{Problems, Stop};
use crate::error::{Error, Kind as ErrorKind, Result};
use std::io::BufRead;

/// How much one file may hold. Whatever is held of it follows from these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub lines: u64,
    pub line_bytes: usize,
    /// Ids of all examples: 8 bytes each are held.
    pub tokens: u64,
}

impl Default for Limits {
    /// A line holds a context of 128 Ki tokens, escaped; all examples take 512 MiB.
    fn default() -> Self {
        Self { lines: 1_000_000, line_bytes: 2 << 20, tokens: 64 << 20 }
    }
}

/// A file whose form is good; nothing was rendered or encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    pub kind: Kind,
    pub lines: u64,
}

/// Checks every line's form. `None`: `over` said that nobody waits for it any more. Errors:
/// `invalid_training_file`.
pub fn check(
    from: impl BufRead,
    kind: Option<Kind>,
    limits: Limits,
    over: &dyn Fn() -> bool,
) -> Result<Option<Checked>> {
    let walked = walk(from, kind, limits, over, |_, _, _| Ok(true))?;
    Ok(walked.map(|(kind, lines)| Checked { kind, lines }))
}

/// Reads all lines and hands on the good ones, until `each` says that it has enough. The kind, and
/// how many lines are not blank; `None` where it was over before.
pub fn walk(
    from: impl BufRead,
    mut kind: Option<Kind>,
    limits: Limits,
    over: &dyn Fn() -> bool,
    mut each: impl FnMut(u64, &str, Record) -> Result<bool, Stop>,
) -> Result<Option<(Kind, u64)>> {
    let mut lines = Lines::new(from, limits.line_bytes, limits.lines);
    let (mut problems, mut count) = (Problems::default(), 0);
    loop {
        if over() {
            return Ok(None);
        }
        let next = lines.next().map_err(|e| Error::fault(format!("reading the data: {e}")))?;
        let Some((number, line)) = next else { break };
        let text = match line {
            Line::Text(text) => text,
            Line::TooMany => {
                problems.add(number, format!("more than {} lines", limits.lines));
                break;
            }
            Line::TooLong(bytes) => {
                let most = limits.line_bytes;
                problems.add(number, format!("{bytes} bytes; a line has at most {most}"));
                continue;
            }
            Line::NotUtf8(byte) => {
                problems.add(number, format!("byte {byte} is not UTF-8"));
                continue;
            }
        };
        count += 1;
        let read = Record::read(text).map_err(Stop::from).and_then(|record| {
            let expected = *kind.get_or_insert(record.kind());
            match record.kind() == expected {
                true => each(number, text, record),
                false => {
                    let (found, wanted) = (record.kind().words(), expected.words());
                    Err(wrong(format!("{found} where {wanted} is expected")).into())
                }
            }
        });
        match read {
            Ok(true) => {}
            Ok(false) => break,
            Err(Stop::Over) => return Ok(None),
            Err(Stop::Wrong(e)) if e.kind == ErrorKind::Fault => return Err(e),
            Err(Stop::Wrong(e)) => problems.add(number, e.message),
            Err(Stop::Last(e)) => {
                problems.add(number, e.message);
                break;
            }
        }
    }
    problems.none()?;
    match kind.filter(|_| count > 0) {
        Some(kind) => Ok(Some((kind, count))),
        None => Err(wrong("the file has no examples")),
    }
}
