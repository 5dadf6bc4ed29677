//! What flags and variables, or a file, say: texts by key.
//!
//! Owns where settings come from, and who wins. Never knows a type: `table.rs` does. The thing to
//! know: each source is checked before they are joined, so that an error can say where the text
//! stands.

use super::gone::{GONE, Gone};
use super::settings::{SETTINGS, Setting, named};
use super::table::variable;
use super::value::Kind;
use crate::error::{Error, Result};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::collections::BTreeMap;
use std::path::Path;
use toml::{Spanned, Value as Toml};

/// Texts by key. What is not in it was not said.
#[derive(Debug, Clone, Default)]
pub struct Given {
    said: BTreeMap<&'static str, Vec<String>>,
    /// A setting of an earlier version.
    gone: Option<&'static str>,
}

impl Given {
    /// As if by flags.
    ///
    /// # Panics
    /// On a key that is none.
    pub fn of(said: &[(&str, &str)]) -> Self {
        let entry = |(key, text): &(&str, &str)| {
            let row = named(key).unwrap_or_else(|| panic!("{key} is no setting"));
            (row.key, vec![(*text).to_owned()])
        };
        Self { said: said.iter().map(entry).collect(), gone: None }
    }

    /// What was said of a key, if anything was.
    pub(super) fn texts(&self, key: &str) -> Option<&[String]> {
        self.said.get(key).map(Vec::as_slice)
    }

    /// Self where it says something, `below` elsewhere. Adapters add up; ours win a name.
    pub(super) fn over(mut self, below: Self) -> Self {
        let name = |text: &str| text.split('=').next().unwrap_or_default().to_owned();
        for (key, texts) in below.said {
            let adds_up = named(key).is_some_and(|row| row.kind == Kind::Adapters);
            let ours = self.said.entry(key).or_default();
            if ours.is_empty() {
                *ours = texts;
            } else if adds_up {
                let taken: Vec<String> = ours.iter().map(|t| name(t)).collect();
                ours.extend(texts.into_iter().filter(|t| !taken.contains(&name(t))));
            }
        }
        self
    }

    /// Errors: the key, and why its text cannot be.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if let Some(gone) = self.gone.and_then(Gone::named) {
            return Err((gone.key, gone.why()));
        }
        for row in SETTINGS {
            if let Some(texts) = self.texts(row.key) {
                row.check(texts).map_err(|why| (row.key, why))?;
            }
        }
        Ok(())
    }
}

fn arg(row: &Setting) -> Arg {
    let help = match (row.kind, row.expected()) {
        // The placeholder says it.
        (Kind::Choice(_), _) | (_, None) => row.help().to_owned(),
        (_, Some(expected)) => format!("{} [{expected}]", row.help()),
    };
    let arg = Arg::new(row.key)
        .long(row.flag())
        .visible_aliases(row.aliases.iter().copied())
        .env(row.env())
        .hide_env_values(true)
        .value_name(row.kind.placeholder())
        .help(help);
    match row.kind {
        kind if kind.is_list() => arg.action(ArgAction::Append).value_delimiter(','),
        Kind::Switch => arg.num_args(0..=1).default_missing_value("true"),
        _ => arg,
    }
}

/// Catches a setting of an earlier version, so that it can be said what became of it.
fn gone_arg(gone: &Gone) -> Arg {
    let flag = gone.key.replace('_', "-");
    Arg::new(gone.key).long(flag).env(variable(gone.key)).hide(true).num_args(0..)
}

impl clap::Args for Given {
    fn augment_args(command: Command) -> Command {
        command.args(SETTINGS.iter().map(arg)).args(GONE.iter().map(gone_arg))
    }
    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let is_said = |key: &str| {
            let source = matches.value_source(key);
            matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable))
        };
        let texts = |key: &str| matches.get_many::<String>(key).into_iter().flatten().cloned();
        let said = SETTINGS.iter().filter(|row| is_said(row.key));
        Ok(Self {
            said: said.map(|row| (row.key, texts(row.key).collect())).collect(),
            gone: GONE.iter().map(|gone| gone.key).find(|key| is_said(key)),
        })
    }
    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?.over(std::mem::take(self));
        Ok(())
    }
}

/// Reads a TOML file. Errors: `FILE:LINE: key: what was expected`.
pub(super) fn read_file(path: &Path) -> Result<Given> {
    let shown = path.display();
    let wrong = |message: String| Error::invalid("invalid_config", message);
    let text = std::fs::read_to_string(path)
        .map_err(|e| wrong(format!("{shown}: cannot be read: {e}")))?;
    let line = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    let table: BTreeMap<Spanned<String>, Toml> = toml::from_str(&text).map_err(|e| {
        let line = line(e.span().map_or(0, |s| s.start));
        let key = text.lines().nth(line - 1).and_then(|l| l.split_once('='));
        let key = key.map_or(String::new(), |(key, _)| format!("{}: ", key.trim()));
        wrong(format!("{shown}:{line}: {key}{}", e.message().replace('\n', " ")))
    })?;
    let mut table: Vec<_> = table.into_iter().collect();
    table.sort_by_key(|(name, _)| name.span().start);
    let mut given = Given::default();
    for (name, value) in table {
        let at = |why: String| {
            let number = line(name.span().start);
            wrong(format!("{shown}:{number}: {} {why}", name.get_ref()))
        };
        if let Some(gone) = Gone::named(name.get_ref()) {
            return Err(at(gone.why()));
        }
        let row = named(name.get_ref()).ok_or_else(|| {
            let keys: Vec<&str> = SETTINGS.iter().map(|row| row.key).collect();
            at(format!("is no setting; there are {}", keys.join(", ")))
        })?;
        let texts = texts(value).map_err(|what| at(format!("is {what}, which no setting is")))?;
        if texts.is_empty() && row.kind.is_list() {
            continue; // as if it were not said
        }
        if texts.len() != 1 && !row.kind.is_list() {
            return Err(at("is a list or a table; expected one value".to_owned()));
        }
        row.check(&texts).map_err(&at)?;
        if given.said.insert(row.key, texts).is_some() {
            return Err(at(format!("is {} once more", row.key)));
        }
    }
    Ok(given)
}

/// The texts that a flag would have. Errors: what the value is.
fn texts(value: Toml) -> Result<Vec<String>, &'static str> {
    Ok(match value {
        Toml::String(text) => vec![text],
        Toml::Integer(n) => vec![n.to_string()],
        Toml::Float(n) => vec![n.to_string()],
        Toml::Boolean(b) => vec![b.to_string()],
        Toml::Array(all) => {
            let one = |value| match value {
                Toml::Array(_) | Toml::Table(_) => Err("a list of lists or tables"),
                plain => texts(plain)?.pop().ok_or("empty"),
            };
            all.into_iter().map(one).collect::<Result<_, _>>()?
        }
        Toml::Table(all) => {
            let one = |(name, value)| match value {
                Toml::String(dir) => Ok(format!("{name}={dir}")),
                _ => Err("a table of something other than texts"),
            };
            all.into_iter().map(one).collect::<Result<_, _>>()?
        }
        Toml::Datetime(_) => return Err("a date"),
    })
}
