//! A matcher for look-around and back-references, which no engine matches in linear time.
//!
//! Owns the walk over a parsed pattern. Never parses. The thing to know: every step is counted,
//! over all paths that a pattern is held against, and so is how deep the walk stands; a pattern
//! that takes more is given up.

use fancy_regex::{Assertion, Expr, LookAround};
use regex::{Regex, RegexBuilder};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Steps of one pattern, over all paths: some tenths of a second.
const STEPS_MAX: u64 = 4_000_000;
/// Steps within each other: they stand on the thread's stack, about 1 KiB each.
const DEPTH_MAX: usize = 800;

/// A pattern, ready to be matched at the beginning of a text.
#[derive(Debug)]
pub struct Backtracking {
    /// Never moved, since its nodes are known by their places.
    expr: Box<Expr>,
    /// Number of each group by the place of its node in the tree.
    groups: HashMap<usize, usize>,
    /// Sets of characters by the place of their node.
    sets: HashMap<usize, Regex>,
    steps: AtomicU64,
}

/// Groups of a match by number, the first being 1.
pub type Groups = Vec<Option<Range<usize>>>;

/// What is left to be matched, innermost first.
enum Rest<'a> {
    Nothing,
    /// The expressions, then the rest.
    All(&'a [Expr], &'a Rest<'a>),
    /// A group ends that began there.
    Group(usize, usize, &'a Rest<'a>),
    /// Another round of a repetition that has had so many, the last begun there.
    Round(&'a Expr, usize, usize, &'a Rest<'a>),
}

/// One match on its way.
struct Walk<'a> {
    pattern: &'a Backtracking,
    text: &'a str,
    groups: Groups,
    depth: usize,
    /// Where a match of an inner expression ended.
    end: usize,
}

const TOO_MUCH: &str = "it takes too many steps";

impl Backtracking {
    /// Errors: what of the pattern is not supported.
    pub fn new(expr: Expr) -> Result<Self, String> {
        let mut pattern = Self {
            expr: Box::new(expr),
            groups: HashMap::new(),
            sets: HashMap::new(),
            steps: AtomicU64::new(0),
        };
        let (mut groups, mut sets) = (HashMap::new(), HashMap::new());
        prepare(&pattern.expr, &mut groups, &mut sets)?;
        (pattern.groups, pattern.sets) = (groups, sets);
        Ok(pattern)
    }

    /// The groups of a match that begins where the text does. Errors: it takes too many steps.
    pub fn captures(&self, text: &str) -> Result<Option<Groups>, &'static str> {
        let groups = vec![None; self.groups.len()];
        let mut walk = Walk { pattern: self, text, groups, depth: 0, end: 0 };
        Ok(walk.go(&self.expr, 0, &Rest::Nothing)?.then_some(walk.groups))
    }
}

/// The place of a node: the tree does not move while its pattern lives.
fn place(expr: &Expr) -> usize {
    std::ptr::from_ref(expr) as usize
}

/// Numbers groups as they open, compiles sets, and refuses what cannot be walked.
fn prepare(
    expr: &Expr,
    groups: &mut HashMap<usize, usize>,
    sets: &mut HashMap<usize, Regex>,
) -> Result<(), String> {
    match expr {
        Expr::Group(_) => {
            groups.insert(place(expr), groups.len());
        }
        Expr::Delegate { inner, casei } => {
            let set = RegexBuilder::new(&format!("^(?:{inner})")).case_insensitive(*casei).build();
            sets.insert(place(expr), set.map_err(|e| e.to_string())?);
        }
        Expr::LookAround(child, LookAround::LookBehind | LookAround::LookBehindNeg) => {
            width(child).ok_or("a look-behind has no fixed width")?;
        }
        Expr::Assertion(
            Assertion::StartText
            | Assertion::EndText
            | Assertion::StartLine { .. }
            | Assertion::EndLine { .. }
            | Assertion::WordBoundary
            | Assertion::NotWordBoundary,
        ) => {}
        Expr::Empty
        | Expr::Any { .. }
        | Expr::Literal { .. }
        | Expr::Concat(_)
        | Expr::Alt(_)
        | Expr::Repeat { .. }
        | Expr::LookAround(..)
        | Expr::Backref { .. }
        | Expr::AtomicGroup(_) => {}
        _ => return Err("it uses syntax that is not supported".into()),
    }
    expr.children_iter().try_for_each(|child| prepare(child, groups, sets))
}

/// Characters that an expression matches, where the number is fixed, as Python wants it behind.
fn width(expr: &Expr) -> Option<usize> {
    match expr {
        Expr::Empty | Expr::Assertion(_) | Expr::LookAround(..) => Some(0),
        Expr::Any { .. } | Expr::Delegate { .. } => Some(1),
        Expr::Literal { val, .. } => Some(val.chars().count()),
        Expr::Concat(all) => all.iter().map(width).sum(),
        Expr::Alt(all) => {
            let first = width(all.first()?)?;
            all.iter().all(|other| width(other) == Some(first)).then_some(first)
        }
        Expr::Group(child) => width(child),
        Expr::AtomicGroup(child) => width(child),
        Expr::Repeat { child, lo, hi, .. } if lo == hi => width(child)?.checked_mul(*lo),
        _ => None,
    }
}

fn is_word(c: Option<char>) -> bool {
    c.is_some_and(|c| c.is_alphanumeric() || c == '_')
}

/// Parts of an expression, itself included.
fn size(expr: &Expr) -> u64 {
    1 + expr.children_iter().map(size).sum::<u64>()
}

impl<'a> Walk<'a> {
    /// Counts steps. Errors: when they are too many.
    fn charge(&self, steps: u64) -> Result<(), &'static str> {
        let before = self.pattern.steps.fetch_add(steps, Ordering::Relaxed);
        if before >= STEPS_MAX { Err(TOO_MUCH) } else { Ok(()) }
    }

    fn go(&mut self, expr: &Expr, at: usize, rest: &Rest) -> Result<bool, &'static str> {
        self.charge(1)?;
        if self.depth >= DEPTH_MAX {
            return Err(TOO_MUCH);
        }
        self.depth += 1;
        let matched = self.step(expr, at, rest);
        self.depth -= 1;
        matched
    }

    fn step(&mut self, expr: &Expr, at: usize, rest: &Rest) -> Result<bool, &'static str> {
        let after = &self.text[at..];
        match expr {
            Expr::Empty => self.on(at, rest),
            Expr::Any { newline, .. } => match after.chars().next() {
                Some(c) if *newline || c != '\n' => self.on(at + c.len_utf8(), rest),
                _ => Ok(false),
            },
            Expr::Literal { val, casei } => self.literal(val, *casei, at, rest),
            Expr::Delegate { .. } => match self.pattern.sets[&place(expr)].find(after) {
                Some(found) => self.on(at + found.end(), rest),
                None => Ok(false),
            },
            Expr::Assertion(assertion) if self.holds(assertion, at) => self.on(at, rest),
            Expr::Assertion(_) => Ok(false),
            Expr::Concat(all) => self.on(at, &Rest::All(all, rest)),
            Expr::Alt(all) => {
                for one in all {
                    if self.go(one, at, rest)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Expr::Group(child) => {
                let number = self.pattern.groups[&place(expr)];
                self.go(child, at, &Rest::Group(number, at, rest))
            }
            Expr::Repeat { .. } => self.round(expr, 0, at, rest),
            Expr::Backref { group, casei } => match self.groups.get(group.wrapping_sub(1)) {
                Some(Some(range)) => {
                    let text = self.text;
                    self.literal(&text[range.clone()], *casei, at, rest)
                }
                _ => Ok(false),
            },
            Expr::AtomicGroup(child) => {
                let groups = self.groups.clone();
                if self.go(child, at, &Rest::Nothing)? && self.on(self.end, rest)? {
                    return Ok(true);
                }
                self.groups = groups;
                Ok(false)
            }
            Expr::LookAround(child, kind) => self.look(child, kind, at, rest),
            _ => Ok(false),
        }
    }

    fn literal(
        &mut self,
        val: &str,
        casei: bool,
        at: usize,
        rest: &Rest,
    ) -> Result<bool, &'static str> {
        let mut after = self.text[at..].chars();
        let same = |a: char, b: char| a == b || casei && a.to_lowercase().eq(b.to_lowercase());
        match val.chars().all(|c| after.next().is_some_and(|other| same(c, other))) {
            true => self.on(self.text.len() - after.as_str().len(), rest),
            false => Ok(false),
        }
    }

    fn holds(&self, assertion: &Assertion, at: usize) -> bool {
        let (before, after) = (self.text[..at].chars().next_back(), self.text[at..].chars().next());
        let border = is_word(before) != is_word(after);
        match assertion {
            Assertion::StartText => at == 0,
            Assertion::EndText => at == self.text.len(),
            Assertion::StartLine { .. } => before.is_none_or(|c| c == '\n'),
            Assertion::EndLine { .. } => after.is_none_or(|c| c == '\n'),
            Assertion::WordBoundary => border,
            Assertion::NotWordBoundary => !border,
            _ => false,
        }
    }

    /// Looks ahead or behind, then goes on from where it stands.
    fn look(
        &mut self,
        child: &Expr,
        kind: &LookAround,
        at: usize,
        rest: &Rest,
    ) -> Result<bool, &'static str> {
        // The copy of the groups, and the look at the child's width.
        self.charge(self.groups.len() as u64 / 4 + size(child))?;
        let groups = self.groups.clone();
        let (behind, wanted) = match kind {
            LookAround::LookAhead => (false, true),
            LookAround::LookAheadNeg => (false, false),
            LookAround::LookBehind => (true, true),
            LookAround::LookBehindNeg => (true, false),
        };
        let from = match behind {
            false => Some(at),
            true => {
                let back = width(child).unwrap_or(0);
                let mut places = self.text[..at].char_indices().rev().map(|(i, _)| i);
                if back == 0 { Some(at) } else { places.nth(back - 1) }
            }
        };
        let found = match from {
            Some(from) => self.go(child, from, &Rest::Nothing)?,
            None => false,
        };
        if !(found && wanted) {
            self.groups.clone_from(&groups);
        }
        if found == wanted && self.on(at, rest)? {
            return Ok(true);
        }
        self.groups = groups;
        Ok(false)
    }

    /// One more round of a repetition, or what comes behind it.
    fn round(
        &mut self,
        repeat: &Expr,
        rounds: usize,
        at: usize,
        rest: &Rest,
    ) -> Result<bool, &'static str> {
        let Expr::Repeat { child, lo, hi, greedy } = repeat else {
            return Ok(false);
        };
        let again = Rest::Round(repeat, rounds + 1, at, rest);
        if rounds < *lo {
            return self.go(child, at, &again);
        }
        if !greedy && self.on(at, rest)? {
            return Ok(true);
        }
        if rounds < *hi && self.go(child, at, &again)? {
            return Ok(true);
        }
        if *greedy { self.on(at, rest) } else { Ok(false) }
    }

    /// Goes on with the rest.
    fn on(&mut self, at: usize, rest: &Rest) -> Result<bool, &'static str> {
        match rest {
            Rest::Nothing => {
                self.end = at;
                Ok(true)
            }
            Rest::All([], rest) => self.on(at, rest),
            Rest::All([last], rest) => self.go(last, at, rest),
            Rest::All([first, others @ ..], rest) => self.go(first, at, &Rest::All(others, rest)),
            Rest::Group(number, from, rest) => {
                let before = self.groups[*number].replace(*from..at);
                if self.on(at, rest)? {
                    return Ok(true);
                }
                self.groups[*number] = before;
                Ok(false)
            }
            // A round that matched nothing would match nothing for ever: it counts as all of them.
            Rest::Round(_, _, from, rest) if *from == at => self.on(at, rest),
            Rest::Round(repeat, rounds, _, rest) => self.round(repeat, *rounds, at, rest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(pattern: &str, text: &str) -> Result<Option<Groups>, String> {
        let expr = Expr::parse_tree(pattern).map_err(|e| e.to_string())?.expr;
        Backtracking::new(expr)?.captures(text).map_err(str::to_owned)
    }

    #[test]
    fn it_matches_what_the_other_engine_matches() {
        let texts = [
            "",
            "a",
            "aa",
            "ab",
            "abab",
            "a.b",
            "model.layers.3.mlp.up_proj",
            "q_proj",
            "xq_proj",
            "layers.12.self_attn.q_proj",
            "aaab",
            "A",
            "käse",
        ];
        for pattern in [
            "(?=a)a*b?$",
            "(a|ab)(?!b)",
            "(?:(a)|b)*\\1?$",
            "(a+)(?=b|$)\\1?",
            "(?<=^a)b",
            "(?<!a)b",
            "^(?!.*mlp).*_proj$",
            "(?>a+)b",
            "(?>a|ab)$",
            "(?i)(?=A)a",
            "(?=(a+))a*b",
            "(\\w+)\\.\\1",
            ".*\\.(?=\\d)(\\d+)\\.",
            "(?:(?=a)|b)*a",
            "\\b(?=q)q_proj$",
            "a{2,3}?(?=a|b)",
            "(?=.)[^.]*",
            "(?:a(?=b)b)+$",
            "()(?:\\1){3}a",
            "(?!)a|a",
        ] {
            let other = fancy_regex::Regex::new(&format!("^(?:{pattern})")).unwrap();
            for text in texts {
                let theirs = other
                    .captures(text)
                    .unwrap()
                    .map(|c| (1..c.len()).map(|i| c.get(i).map(|m| m.range())).collect::<Groups>());
                assert_eq!(found(pattern, text).unwrap(), theirs, "{pattern} on {text:?}");
            }
        }
    }

    #[test]
    fn what_takes_too_many_steps_is_given_up() {
        let text = "model.layers.17.self_attn.q_proj";
        for pattern in [
            "(?=m)(?:(?:[a-z._0-9]*)*)*X",
            "(?=m)(?:.*.*.*.*.*.*)*X",
            "(?=m)(.*)(.*)(.*)(.*)(.*)(.*)X",
            "(?:(?=(?:.*.*.*)*)(?:.*.*.*)*)*X",
            "(?=m)(.|..)*(.|..)*(.|..)*X",
        ] {
            assert_eq!(found(pattern, text), Err(TOO_MUCH.to_owned()), "{pattern}");
        }
        assert!(found("(?<=a*)b", "ab").is_err(), "no fixed width");
    }
}
