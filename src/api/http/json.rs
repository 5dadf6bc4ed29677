//! JSON bodies before they are parsed: counted, checked for syntax, cut into their fields.
//!
//! Owns the bound on values and depth, and where each field of the outermost object lies. Never
//! makes a tree. The thing to know: a body is looked at three times without allocating anything,
//! and only then read, field by field, into the type that wants it.

use super::intake::Bounds;
use crate::error::{Error, Result, brief};
use serde::de::IgnoredAny;
use std::ops::Range;

/// Depth of lists and objects within each other, as serde_json has it.
const DEPTH_MAX: usize = 127;
/// Fields of the outermost object.
const FIELDS_MAX: usize = 256;
/// Fields that may be long lists of token ids.
const ID_FIELDS: [&str; 2] = ["prompt", "tokens"];

/// A field of the outermost object: its name, where its value lies, and about how many values are
/// in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    pub name: String,
    pub value: Range<usize>,
    pub values: u64,
}

impl Field {
    /// Whether it may be a list of token ids.
    pub fn holds_ids(&self) -> bool {
        ID_FIELDS.contains(&self.name.as_str())
    }
}

/// The fields of the object that `body` is, each name once (the last of several counts), nulls left
/// out. Errors: `invalid_json`.
pub fn fields(body: &[u8], bounds: &Bounds) -> Result<Vec<Field>> {
    count(body, bounds)?;
    let text = std::str::from_utf8(body).map_err(|e| {
        let (line, column) = place(&body[..e.valid_up_to()]);
        invalid(format!("invalid unicode code point at line {line} column {column}"))
    })?;
    serde_json::from_str::<IgnoredAny>(text).map_err(invalid)?;
    let begin = text.len() - text.trim_ascii_start().len();
    match body.get(begin) {
        Some(b'{') => {}
        first => {
            let kind = first.map_or("nothing", |&first| kind_of(first));
            let message = format!("the body must be a JSON object, not {kind}");
            return Err(Error::invalid("invalid_json", message));
        }
    }
    let mut fields: Vec<Field> = Vec::new();
    for (name, value, values) in cut(text, begin)? {
        if fields.len() == FIELDS_MAX {
            let message = format!("the body has more than {FIELDS_MAX} fields");
            return Err(Error::invalid("invalid_json", message));
        }
        let field = Field { name, value, values };
        within(&field, bounds)?;
        match fields.iter_mut().find(|f| f.name == field.name) {
            Some(earlier) => *earlier = field,
            None => fields.push(field),
        }
    }
    fields.retain(|f| &text[f.value.clone()] != "null");
    Ok(fields)
}

fn invalid(why: impl std::fmt::Display) -> Error {
    Error::invalid("invalid_json", format!("the body is not valid JSON: {why}"))
}

pub fn too_many(what: &str, most: u64) -> Error {
    let message = format!("{what} has more than {most} values, which is the limit");
    Error::invalid("invalid_json", message)
}

fn within(field: &Field, bounds: &Bounds) -> Result<()> {
    let most = if field.holds_ids() { bounds.ids } else { bounds.tree_values };
    if field.values <= most {
        return Ok(());
    }
    let shown = brief(&field.name);
    Err(too_many(&format!("`{shown}`"), most).param(shown))
}

/// One pass: values and depth. What is no JSON is counted somehow.
fn count(body: &[u8], bounds: &Bounds) -> Result<()> {
    let most = bounds.tree_values + bounds.ids;
    let (mut values, mut depth) = (0u64, 0usize);
    let mut at = 0;
    while let Some(&byte) = body.get(at) {
        match byte {
            b'"' => at = after_string(body, at),
            b',' | b'[' | b'{' => {
                values += 1;
                depth += usize::from(byte != b',');
                if depth > DEPTH_MAX {
                    let (line, column) = place(&body[..at]);
                    let at = format!("line {line} column {column}");
                    return Err(invalid(format!("recursion limit exceeded at {at}")));
                }
                at += 1;
            }
            b']' | b'}' => {
                depth = depth.saturating_sub(1);
                at += 1;
            }
            _ => at += 1,
        }
    }
    if values > most {
        return Err(too_many("the body", most));
    }
    Ok(())
}

/// The index after the string that begins at `open`.
fn after_string(body: &[u8], open: usize) -> usize {
    let mut at = open + 1;
    while let Some(&byte) = body.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    body.len()
}

/// Connection and column of what follows `before`, as serde_json counts them.
fn place(before: &[u8]) -> (usize, usize) {
    let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
    let begun = before.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
    (line, before.len() - begun + 1)
}

fn kind_of(first: u8) -> &'static str {
    match first {
        b'[' => "a list",
        b'"' => "a string",
        b't' | b'f' => "a boolean",
        b'n' => "null",
        _ => "a number",
    }
}

/// Name, value and number of values of each field of the object that opens at `open`. The text is
/// JSON.
fn cut(text: &str, open: usize) -> Result<Vec<(String, Range<usize>, u64)>> {
    let body = text.as_bytes();
    let mut fields = Vec::new();
    let mut at = skip_space(body, open + 1);
    while body.get(at) == Some(&b'"') {
        let name_end = after_string(body, at);
        let name = serde_json::from_str(&text[at..name_end]).map_err(invalid)?;
        // Behind the colon.
        let begin = skip_space(body, skip_space(body, name_end) + 1);
        let (end, values) = after_value(body, begin);
        fields.push((name, begin..end, values));
        if fields.len() > 2 * FIELDS_MAX {
            let message = format!("the body has more than {FIELDS_MAX} fields");
            return Err(Error::invalid("invalid_json", message));
        }
        // Behind the comma, or at the end.
        at = skip_space(body, skip_space(body, end) + 1);
    }
    Ok(fields)
}

fn skip_space(body: &[u8], mut at: usize) -> usize {
    while body.get(at).is_some_and(u8::is_ascii_whitespace) {
        at += 1;
    }
    at
}

/// The index after the value at `begin`, and how many values are in it.
fn after_value(body: &[u8], begin: usize) -> (usize, u64) {
    let (mut at, mut depth, mut values) = (begin, 0usize, 1);
    while let Some(&byte) = body.get(at) {
        match byte {
            b'"' => {
                at = after_string(body, at);
                if depth == 0 {
                    break;
                }
                continue;
            }
            b'[' | b'{' => {
                depth += 1;
                values += 1;
            }
            b']' | b'}' if depth == 0 => break,
            b']' | b'}' => {
                depth -= 1;
                if depth == 0 {
                    at += 1;
                    break;
                }
            }
            b',' if depth == 0 => break,
            b',' => values += 1,
            b if depth == 0 && b.is_ascii_whitespace() => break,
            _ => {}
        }
        at += 1;
    }
    (at, values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(tree_values: u64, ids: u64) -> Bounds {
        Bounds {
            body_bytes: 1 << 20,
            tree_values,
            ids,
            text_bytes: 1 << 20,
            held_down: false,
            context: 64,
        }
    }

    fn cut_up(text: &str) -> Vec<(String, String)> {
        let fields = fields(text.as_bytes(), &bounds(100, 100)).unwrap();
        fields.into_iter().map(|f| (f.name, text[f.value].to_owned())).collect()
    }

    #[test]
    fn a_body_is_cut_into_its_fields_whatever_stands_between_and_in_them() {
        let text = " {\n \"a\" : 1.5e3 ,\"b\":[1, {\"x]\": \"}\\\"\"} ] , \
                    \"c\\u0041\":\"{\\\\\",\"d\":null,\"a\":\ttrue}\r\n";
        let expected = [("a", "true"), ("b", "[1, {\"x]\": \"}\\\"\"} ]"), ("cA", "\"{\\\\\"")];
        let expected: Vec<_> =
            expected.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
        assert_eq!(cut_up(text), expected);
        assert!(cut_up("{}").is_empty() && cut_up("{ }").is_empty());
    }

    #[test]
    fn values_depth_and_fields_are_bounded_before_anything_is_made_of_them() {
        let refused = |text: &str, bounds: &Bounds| {
            fields(text.as_bytes(), bounds).err().map(|e| (e.code, e.message, e.param))
        };
        let list = |n: usize| format!("[0{}]", ",0".repeat(n - 1));
        let small = bounds(20, 40);
        assert_eq!(refused(&format!("{{\"x\":{}}}", list(19)), &small), None);
        let (code, message, param) =
            refused(&format!("{{\"x\":{}}}", list(20)), &small).expect("too many");
        assert_eq!((code, param.as_deref()), ("invalid_json", Some("x")));
        assert!(message.contains("more than 20 values"), "{message}");
        assert_eq!(refused(&format!("{{\"prompt\":{}}}", list(39)), &small), None);
        assert!(refused(&format!("{{\"prompt\":{}}}", list(50)), &small).is_some());
        let deep = |n: usize| format!("{{\"x\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert_eq!(refused(&deep(126), &bounds(1000, 0)), None);
        let (_, message, _) = refused(&deep(127), &bounds(1000, 0)).expect("too deep");
        assert!(message.contains("recursion limit exceeded at line 1 column 132"), "{message}");
        let many: Vec<String> = (0..300).map(|i| format!("\"f{i}\":1")).collect();
        let many = format!("{{{}}}", many.join(","));
        assert!(refused(&many, &bounds(1000, 0)).unwrap().1.contains("256 fields"));
        assert!(refused("{\"a\":\"\u{0}\"}", &small).is_some());
    }
}
