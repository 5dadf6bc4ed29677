//! What a row of the table of settings becomes.
//!
//! Owns [`Row`] and the macro that makes rows, fields of `Config` and the reading of all. Never
//! names a setting. The thing to know: `settings.rs` is the table.

use super::size::{Size, human};
use super::value::Kind;
use std::ops::RangeInclusive;

/// One setting of a `C`: flag and environment variable follow from the key.
pub struct Row<C> {
    /// The name in the file.
    pub key: &'static str,
    /// Other names of the flag, and of the key.
    pub aliases: &'static [&'static str],
    pub(super) kind: Kind,
    /// Bounds of a number, both inside.
    pub(super) range: Option<RangeInclusive<u64>>,
    pub(super) lines: &'static str,
    pub(super) read: fn(&[String]) -> Result<(), String>,
    pub(super) shown: fn(&C) -> Option<String>,
}

impl<C> Row<C> {
    /// What it is, without a full stop.
    pub fn help(&self) -> &'static str {
        self.lines.trim()
    }

    pub fn flag(&self) -> String {
        self.key.replace('_', "-")
    }

    pub fn env(&self) -> String {
        variable(self.key)
    }

    /// `1 to 4096`, `1.0 MiB to 1.0 TiB`, `auto, f32 or bf16`.
    pub fn expected(&self) -> Option<String> {
        if let Kind::Choice(names) = self.kind {
            let (last, others) = names.split_last()?;
            return Some(format!("{} or {last}", others.join(", ")));
        }
        let (least, most) = self.range.clone()?.into_inner();
        Some(match self.kind {
            Kind::Size => format!("{} to {}", human(least), human(most)),
            _ => format!("{least} to {most}"),
        })
    }

    /// What it is in `config`, as the file has it; `None` is nothing, or nothing to be shown.
    pub fn shown(&self, config: &C) -> Option<String> {
        (self.shown)(config)
    }

    /// The same for people: sizes with units, texts without quotes.
    pub fn told(&self, config: &C) -> Option<String> {
        let shown = self.shown(config)?;
        Some(match self.kind {
            Kind::Size => shown.parse().map_or(shown, human),
            _ => shown.trim_matches('"').to_owned(),
        })
    }

    /// Whether these texts are one of its values. The error follows the key in a sentence.
    pub(super) fn check(&self, texts: &[String]) -> Result<(), String> {
        let Some(range) = &self.range else { return (self.read)(texts) };
        let text = texts.last().map_or("", String::as_str);
        let number = match self.kind {
            Kind::Size => Some(text.parse::<Size>()?.0),
            _ => text.trim().parse().ok(),
        };
        match number.filter(|n| range.contains(n)) {
            Some(_) => Ok(()),
            None => Err(format!("is {text}; expected {}", self.expected().unwrap_or_default())),
        }
    }
}

/// The environment variable of a key.
pub(super) fn variable(key: &str) -> String {
    format!("POLYLORA_{}", key.to_uppercase())
}

/// Rows `/// help`, `key: type = default, in range, also "other-name";`.
macro_rules! settings {
    ($($(#[doc = $help:literal])+
       $key:ident: $kind:ty = $default:expr $(, in $range:expr)? $(, also $alias:literal)?;)+) => {
        /// The settings of `serve` as they hold.
        #[derive(Debug, Clone)]
        pub struct Config {
            $($(#[doc = $help])+ pub $key: $kind,)+
        }

        /// Every setting, in the order of the printed file.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            key: stringify!($key),
            aliases: &[$($alias)?],
            kind: <$kind as Value>::KIND,
            range: settings!(@range $($range)?),
            lines: concat!($($help),+),
            read: |texts| <$kind as Value>::read(texts).map(drop),
            shown: |config| config.$key.shown(),
        },)+];

        /// What was said, and the defaults of the rest. Errors: the key, and why.
        pub(super) fn decide<'a>(
            said: impl Fn(&str) -> Option<&'a [String]>,
        ) -> Result<Config, (&'static str, String)> {
            $(let $key: $kind = match said(stringify!($key)) {
                Some(texts) => Value::read(texts).map_err(|why| (stringify!($key), why))?,
                None => $default,
            };)+
            Ok(Config { $($key),+ })
        }
    };
    (@range) => { None };
    (@range $range:expr) => { Some($range) };
}
pub(super) use settings;
