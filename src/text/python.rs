//! What Python prints: chat templates are written for Jinja in Python and their output is compared
//! with it byte for byte.
//!
//! Owns `str`, `json.dumps` and `strftime` on template values. Never reads a clock. The thing to
//! know: it follows Python's spacing, escapes and float digits, since a model was trained on text
//! with them.

use crate::clock::date;
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Levels of lists and maps that are printed; JSON bodies have at most 128. A `namespace` can hold
/// itself.
const LEVELS_MAX: usize = 160;
/// Spaces per level of a JSON text.
const INDENT_MAX: usize = 64;
/// Bytes of one JSON text, about.
const TEXT_BYTES_MAX: usize = 32 << 20;

/// `str(value)`; undefined is empty.
pub(super) fn write_str(out: &mut impl Write, value: &Value) -> std::fmt::Result {
    match (value.kind(), value.as_str()) {
        (ValueKind::Undefined, _) => Ok(()),
        (_, Some(text)) => out.write_str(text),
        _ => write_repr(out, value, 0),
    }
}

/// `repr(value)`, at some level of an outer value. Errors: too many levels.
fn write_repr(out: &mut impl Write, value: &Value, level: usize) -> std::fmt::Result {
    if level > LEVELS_MAX {
        return Err(std::fmt::Error);
    }
    match value.kind() {
        ValueKind::Undefined => out.write_str("Undefined"),
        ValueKind::None => out.write_str("None"),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => write_number(out, value),
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            out.write_char('[')?;
            for (i, item) in items(value).enumerate() {
                out.write_str(if i > 0 { ", " } else { "" })?;
                write_repr(out, &item, level + 1)?;
            }
            out.write_char(']')
        }
        ValueKind::Map => {
            out.write_char('{')?;
            for (i, key) in items(value).enumerate() {
                out.write_str(if i > 0 { ", " } else { "" })?;
                write_repr(out, &key, level + 1)?;
                out.write_str(": ")?;
                write_repr(out, &value.get_item(&key).unwrap_or_default(), level + 1)?;
            }
            out.write_char('}')
        }
        _ => write!(out, "{value}"),
    }
}

fn items(value: &Value) -> impl Iterator<Item = Value> {
    value.try_iter().into_iter().flatten()
}

/// A string literal: single quotes unless that means more escapes.
fn write_quoted(out: &mut impl Write, text: &str) -> std::fmt::Result {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    out.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            c if c == quote || c == '\\' => write!(out, "\\{c}")?,
            c if (c as u32) < 0x100 && c.is_control() => write!(out, "\\x{:02x}", c as u32)?,
            c => out.write_char(c)?,
        }
    }
    out.write_char(quote)
}

fn write_number(out: &mut impl Write, value: &Value) -> std::fmt::Result {
    match f64::try_from(value.clone()) {
        Ok(number) if !value.is_integer() => write_float(out, number),
        _ => write!(out, "{value}"),
    }
}

/// `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from
/// 1e16.
fn write_float(out: &mut impl Write, number: f64) -> std::fmt::Result {
    if !number.is_finite() {
        return match number {
            n if n.is_nan() => out.write_str("nan"),
            n if n > 0.0 => out.write_str("inf"),
            _ => out.write_str("-inf"),
        };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse().unwrap_or(0) {
        -4..16 => write!(out, "{number:?}"),
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            write!(out, "{digits}e{sign}{:02}", i32::abs(exponent))
        }
    }
}

/// The arguments of `json.dumps` that templates use.
pub(super) struct Json {
    /// Spaces per level; `None` is one line.
    pub indent: Option<usize>,
    pub item_separator: String,
    pub key_separator: String,
    pub ensure_ascii: bool,
    pub sort_keys: bool,
}

impl Json {
    /// `json.dumps(value)`. Errors: a value that JSON does not have.
    pub fn dumps(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(&mut out, value, 1)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, value: &Value, level: usize) -> Result<(), Error> {
        let indent = self.indent.unwrap_or(0);
        if level > LEVELS_MAX || indent > INDENT_MAX || out.len() > TEXT_BYTES_MAX {
            let message = "the value is too deep or too large for JSON";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => write_number(out, value).map_err(unwritable)?,
            ValueKind::String => self.write_string(out, value.as_str().unwrap_or_default())?,
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = items(value).collect();
                self.write_block(out, ['[', ']'], &items, level, |out, item| {
                    self.write(out, item, level + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = items(value).collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_block(out, ['{', '}'], &keys, level, |out, key| {
                    self.write_string(out, &key.to_string())?;
                    out.push_str(&self.key_separator);
                    self.write(out, &value.get_item(key)?, level + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("a value of type {kind} cannot be written as JSON"),
                ));
            }
        }
        Ok(())
    }

    fn write_block(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: &[Value],
        level: usize,
        mut write_item: impl FnMut(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, level: usize| {
            if let Some(indent) = self.indent
                && !items.is_empty()
            {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * level));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item_separator);
            }
            line(out, level);
            write_item(out, item)?;
        }
        line(out, level - 1);
        out.push(close);
        Ok(())
    }

    fn write_string(&self, out: &mut String, text: &str) -> Result<(), Error> {
        // JSON's escapes are the same in both languages.
        let quoted = serde_json::to_string(text).map_err(|e| {
            Error::new(ErrorKind::InvalidOperation, "a string is not JSON").with_source(e)
        })?;
        if !self.ensure_ascii {
            out.push_str(&quoted);
            return Ok(());
        }
        for c in quoted.chars() {
            match c {
                ' '..='~' => out.push(c),
                _ => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").map_err(unwritable)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn unwritable(e: std::fmt::Error) -> Error {
    Error::new(ErrorKind::WriteFailure, "out of room").with_source(e)
}

/// `now.strftime(format)` in UTC and English: the same prompt on every server. Errors: a directive
/// that is not among `%Y %y %m %d %e %B %b %A %a %j %H %I %M %S %p %F %T %%`, each also with `-`.
pub(super) fn strftime(now: SystemTime, format: &str) -> Result<String, Error> {
    let now = date(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    let (year, month) = (now.year() as u64, u64::from(u8::from(now.month())));
    let (day, day_of_year) = (u64::from(now.day()), u64::from(now.ordinal()));
    let (month_name, weekday) = (now.month().to_string(), now.weekday().to_string());
    let (hour, minute, second) = now.to_hms();
    let [hour, minute, second] = [hour, minute, second].map(u64::from);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next().unwrap_or('%');
        let padded = directive != '-';
        if !padded {
            directive = chars.next().unwrap_or('-');
        }
        let mut number = |value: u64, width: usize| match padded {
            true => write!(out, "{value:0width$}"),
            false => write!(out, "{value}"),
        };
        match directive {
            'Y' => number(year, 4),
            'y' => number(year % 100, 2),
            'm' => number(month, 2),
            'd' => number(day, 2),
            'j' => number(day_of_year, 3),
            'H' => number(hour, 2),
            'I' => number(hour12, 2),
            'M' => number(minute, 2),
            'S' => number(second, 2),
            'e' if padded => write!(out, "{day:2}"),
            'e' => write!(out, "{day}"),
            'B' => out.write_str(&month_name),
            'b' => out.write_str(&month_name[..3]),
            'A' => out.write_str(&weekday),
            'a' => out.write_str(&weekday[..3]),
            'p' => out.write_str(if hour < 12 { "AM" } else { "PM" }),
            'F' => write!(out, "{year:04}-{month:02}-{day:02}"),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            '%' => out.write_char('%'),
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know the directive %{other}"),
                ));
            }
        }
        .map_err(unwritable)?;
    }
    Ok(out)
}
