//! Python regular expressions over module paths, as PEFT applies them.
//!
//! Owns the translation from Python's `re` and the three ways PEFT matches. Never guesses: syntax
//! that means something else here, or nothing, is refused by name. The thing to know: what can be
//! matched in linear time is (`regex`), and look-around and back-references, which cannot, by a
//! matcher that counts its steps (`backtracking`); so a hostile pattern is an error and not a hang.

use super::backtracking::Backtracking;
use crate::error::{Error, Result, brief};
use fancy_regex::Expr;
use regex::{Regex, RegexBuilder};

/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 4096;
/// Most that `{n}` may say, and most times that repetitions within each other may come to.
const REPEAT_MAX: usize = 1000;
/// Bytes of a compiled pattern, and of what matching it keeps.
const COMPILED_BYTES_MAX: usize = 512 << 10;

/// One compiled pattern and the text it came from.
#[derive(Debug)]
pub struct Pattern {
    text: String,
    matcher: Matcher,
}

#[derive(Debug)]
enum Matcher {
    /// A name, perhaps behind others, whose dots stand for any character.
    Name {
        name: String,
        suffix: bool,
    },
    Linear(Regex),
    Backtracking(Backtracking),
}

impl Pattern {
    /// `re.fullmatch(text, path)`
    pub fn full(field: &str, text: &str) -> Result<Self> {
        Self::build(field, text, Some(false), |t| format!("^(?:{t})$"))
    }

    /// `re.match(rf"(.*\.)?({text})$", path)`: keys of `rank_pattern` and `alpha_pattern`.
    pub fn suffix(field: &str, text: &str) -> Result<Self> {
        Self::build(field, text, Some(true), |t| format!("^(.*\\.)?({t})$"))
    }

    /// `re.match(rf".*\.{text}\.(\d+)\.", path)`: entries of `layers_pattern`.
    pub fn layer(field: &str, text: &str) -> Result<Self> {
        Self::build(field, text, None, |t| format!("^.*\\.{t}\\.(\\d+)\\."))
    }

    /// `suffix`: how a plain name is matched, if it can be.
    fn build(
        field: &str,
        text: &str,
        suffix: Option<bool>,
        frame: impl Fn(&str) -> String,
    ) -> Result<Self> {
        let refuse = |why: String| {
            Error::unprocessable(
                "invalid_adapter_config",
                format!("`{field}`: cannot use the pattern `{}`: {why}", brief(text)),
            )
            .param(field)
        };
        if text.len() > PATTERN_BYTES_MAX {
            return Err(refuse(format!("it is longer than {PATTERN_BYTES_MAX} bytes")));
        }
        if let Some(suffix) = suffix
            && let Some((name, suffix)) = name(text, suffix)
        {
            return Ok(Self { text: text.to_owned(), matcher: Matcher::Name { name, suffix } });
        }
        let translated = translate(text).map_err(refuse)?;
        let tree = Expr::parse_tree(&frame(&translated)).map_err(|e| refuse(e.to_string()))?;
        repeats(&tree.expr, 1).map_err(refuse)?;
        let matcher = match linear(&tree.expr) {
            Some(plain) => {
                let regex = RegexBuilder::new(&plain)
                    .size_limit(COMPILED_BYTES_MAX)
                    .dfa_size_limit(COMPILED_BYTES_MAX)
                    .build();
                Matcher::Linear(regex.map_err(|e| refuse(e.to_string()))?)
            }
            None => Matcher::Backtracking(Backtracking::new(tree.expr).map_err(refuse)?),
        };
        Ok(Self { text: text.to_owned(), matcher })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it takes in memory and time to match, against others: nothing where it is a name.
    pub fn cost(&self) -> usize {
        match self.matcher {
            Matcher::Name { .. } => 0,
            Matcher::Linear(_) => 1,
            Matcher::Backtracking(_) => 16,
        }
    }

    /// Whether the path matches. Errors: `invalid_adapter_config` when it takes too many steps.
    pub fn matches(&self, path: &str) -> Result<bool> {
        match &self.matcher {
            Matcher::Name { name, suffix } => Ok(names(name, path, *suffix)),
            Matcher::Linear(regex) => Ok(regex.is_match(path)),
            Matcher::Backtracking(matcher) => {
                Ok(matcher.captures(path).map_err(|e| self.gave_up(e))?.is_some())
            }
        }
    }

    /// The layer number that a `Pattern::layer` finds in the path (its last group).
    pub fn layer_of(&self, path: &str) -> Result<Option<usize>> {
        let found = match &self.matcher {
            Matcher::Name { .. } => None,
            Matcher::Linear(regex) => {
                regex.captures(path).and_then(|c| Some(c.get(c.len() - 1)?.range()))
            }
            Matcher::Backtracking(matcher) => {
                let groups = matcher.captures(path).map_err(|e| self.gave_up(e))?;
                groups.and_then(|groups| groups.last().cloned().flatten())
            }
        };
        Ok(found.and_then(|range| path[range].parse().ok()))
    }

    fn gave_up(&self, e: &str) -> Error {
        Error::unprocessable(
            "invalid_adapter_config",
            format!("the pattern `{}` could not be matched: {e}", brief(&self.text)),
        )
    }
}

/// Stands for an escaped dot in a name; no path has it.
const DOT: char = '\u{1}';

/// The name that a pattern is, if it is no more than one, and whether it may have something before
/// it: a leading `^` lets nothing come before, `\.` is a dot.
fn name(text: &str, suffix: bool) -> Option<(String, bool)> {
    let (text, suffix) = match text.strip_prefix('^') {
        Some(rest) => (rest, false),
        None => (text, suffix),
    };
    let text = text.strip_suffix('$').unwrap_or(text);
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_' || c == DOT;
    let name = text.replace("\\.", &DOT.to_string());
    let is_name = !name.is_empty() && !text.contains(DOT) && name.chars().all(plain);
    is_name.then_some((name, suffix))
}

/// Whether `path` is the name, or with `suffix` ends with it behind a dot.
fn names(name: &str, path: &str, suffix: bool) -> bool {
    let mut left = path.chars().rev();
    let same = |c: char, other: char| match c {
        '.' => other != '\n',
        DOT => other == '.',
        c => c == other,
    };
    let ends = name.chars().rev().all(|c| left.next().is_some_and(|other| same(c, other)));
    ends && match left.next() {
        None => true,
        Some(before) => suffix && before == '.' && !left.any(|c| c == '\n'),
    }
}

/// Refuses repetitions that come to more than `REPEAT_MAX`, inner ones times outer ones.
fn repeats(expr: &Expr, outer: usize) -> Result<(), String> {
    let mut times = outer;
    if let Expr::Repeat { lo, hi, .. } = expr {
        let most = if *hi == usize::MAX { *lo } else { *hi };
        times = outer.saturating_mul(most.max(1));
        if times > REPEAT_MAX {
            return Err(format!("it repeats more than {REPEAT_MAX} times"));
        }
    }
    expr.children_iter().try_for_each(|child| repeats(child, times))
}

/// The expression as `regex` reads it, if all of it can be matched in linear time.
fn linear(expr: &Expr) -> Option<String> {
    fn is_plain(expr: &Expr) -> bool {
        use fancy_regex::Assertion::{EndLine, EndText, StartLine, StartText};
        let own = match expr {
            Expr::Empty | Expr::Any { .. } | Expr::Literal { .. } | Expr::Concat(_) => true,
            Expr::Alt(_) | Expr::Group(_) | Expr::Repeat { .. } | Expr::Delegate { .. } => true,
            Expr::Assertion(a) => {
                matches!(a, StartText | EndText | StartLine { .. } | EndLine { .. })
            }
            _ => false,
        };
        own && expr.children_iter().all(is_plain)
    }
    is_plain(expr).then(|| {
        let mut text = String::new();
        expr.to_str(&mut text, 0);
        text
    })
}

/// Rewrites Python syntax to fancy-regex's, or says what cannot be rewritten.
fn translate(text: &str) -> Result<String, String> {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len() + 16);
    let mut i = 0;
    while i < chars.len() {
        match chars[i] {
            '\\' => i = escape(&chars, i, false, &mut out)?,
            '[' => i = class(&chars, i, &mut out)?,
            '(' => {
                if chars.get(i + 1) == Some(&'?') {
                    check_group(&chars[i + 2..])?;
                }
                out.push('(');
                i += 1;
            }
            '{' => i = braces(&chars, i, &mut out),
            '}' => {
                out.push_str("\\}");
                i += 1;
            }
            c => {
                out.push(c);
                i += 1;
            }
        }
    }
    Ok(out)
}

/// Allows the group heads that mean the same on both sides. `rest` follows `(?`.
fn check_group(rest: &[char]) -> Result<(), String> {
    let head: String = rest.iter().take(3).collect();
    let same = ["<=", "<!", "P<", "P=", ":", "=", "!", ">"];
    if same.iter().any(|s| head.starts_with(s)) {
        return Ok(());
    }
    let flags: String = rest.iter().take_while(|&&c| c != ')' && c != ':').collect();
    if !flags.is_empty() && flags.len() <= 3 && flags.chars().all(|c| "ims".contains(c)) {
        return Ok(());
    }
    Err(format!("the group `(?{head}` is not supported"))
}

/// A bracketed set: in Python `[`, `&&` and `~~` inside it are plain characters, here they are not.
fn class(chars: &[char], open: usize, out: &mut String) -> Result<usize, String> {
    out.push('[');
    let mut i = open + 1;
    if chars.get(i) == Some(&'^') {
        out.push('^');
        i += 1;
    }
    let first = i;
    while let Some(&c) = chars.get(i) {
        match c {
            ']' if i > first => {
                out.push(']');
                return Ok(i + 1);
            }
            '\\' => {
                i = escape(chars, i, true, out)?;
                continue;
            }
            '-' if chars.get(i + 1) == Some(&'-') => {
                return Err("`--` inside a set is ambiguous".into());
            }
            '[' | ']' | '&' | '~' | '^' => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
        i += 1;
    }
    Err("a set is not closed".into())
}

/// `{m}`, `{m,}`, `{,n}`, `{m,n}` repeat; any other brace is a plain character in Python.
fn braces(chars: &[char], open: usize, out: &mut String) -> usize {
    let close = chars[open..].iter().position(|&c| c == '}');
    let inside: String = match close {
        Some(n) => chars[open + 1..open + n].iter().collect(),
        None => String::new(),
    };
    let (low, high) = inside.split_once(',').unwrap_or((&inside, &inside));
    let digits = |s: &str| s.chars().all(|c| c.is_ascii_digit());
    let repeats = !inside.is_empty() && inside != "," && digits(low) && digits(high);
    match close {
        Some(n) if repeats => {
            let low = if low.is_empty() { "0" } else { low };
            if inside.contains(',') {
                out.push_str(&format!("{{{low},{high}}}"));
            } else {
                out.push_str(&format!("{{{low}}}"));
            }
            open + n + 1
        }
        _ => {
            out.push_str("\\{");
            open + 1
        }
    }
}

/// One backslash sequence; returns the index after it.
fn escape(chars: &[char], at: usize, in_class: bool, out: &mut String) -> Result<usize, String> {
    let Some(&c) = chars.get(at + 1) else {
        return Err("it ends in a backslash".into());
    };
    let hex = |n: usize| -> Result<String, String> {
        let digits: String = chars.iter().skip(at + 2).take(n).collect();
        if digits.chars().count() == n && digits.chars().all(|c| c.is_ascii_hexdigit()) {
            Ok(format!("\\x{{{digits}}}"))
        } else {
            Err(format!("`\\{c}` needs {n} hexadecimal digits"))
        }
    };
    match c {
        'd' | 'D' | 'w' | 'W' | 's' | 'S' | 'n' | 't' | 'r' | 'f' | 'v' => {
            out.push('\\');
            out.push(c);
        }
        'b' if in_class => out.push_str("\\x08"),
        'b' | 'B' | 'A' if !in_class => {
            out.push('\\');
            out.push(c);
        }
        'Z' if !in_class => out.push_str("\\z"),
        'a' => out.push_str("\\x07"),
        'x' => {
            out.push_str(&hex(2)?);
            return Ok(at + 4);
        }
        'u' => {
            out.push_str(&hex(4)?);
            return Ok(at + 6);
        }
        '1'..='9' if !in_class && !chars.get(at + 2).is_some_and(char::is_ascii_digit) => {
            out.push('\\');
            out.push(c);
        }
        c if c.is_ascii_alphanumeric() => return Err(format!("`\\{c}` is not supported")),
        '<' | '>' | '_' => out.push(c),
        c if c.is_ascii_punctuation() => {
            out.push('\\');
            out.push(c);
        }
        c => out.push(c),
    }
    Ok(at + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_matched_as_the_expressions_that_they_are() {
        let paths =
            ["q_proj", "a.q_proj", "layers.1.q_proj", "layers.11.q_proj", "layersX1.q_proj"];
        for (text, matched) in [
            ("q_proj", [true, true, true, true, true]),
            ("^q_proj", [true, false, false, false, false]),
            ("q_proj$", [true, true, true, true, true]),
            ("1.q_proj", [false, false, true, false, false]),
            ("^layers.1.q_proj", [false, false, true, false, true]),
            ("^layers\\.1\\.q_proj$", [false, false, true, false, false]),
        ] {
            let pattern = Pattern::suffix("rank_pattern", text).unwrap();
            assert_eq!(pattern.cost(), 0, "{text}");
            let regex = Regex::new(&format!("^(.*\\.)?({text})$")).unwrap();
            for (path, expected) in paths.into_iter().zip(matched) {
                assert_eq!(pattern.matches(path).unwrap(), expected, "{text} on {path}");
                assert_eq!(regex.is_match(path), expected, "{text} on {path}");
            }
        }
        for text in ["q_(proj)", "\u{1}", "q_proj\\", "a|b"] {
            let pattern = Pattern::suffix("rank_pattern", text);
            assert!(pattern.is_err() || pattern.unwrap().cost() > 0, "{text:?}");
        }
    }
}
