//! The types that a setting may have, and how each is read and shown.
//!
//! Owns reading texts of flags, variables and files. Never knows a setting's name or bounds. The
//! thing to know: an error follows the key in a sentence: "is 'int3'; expected …".

use super::size::Size;
use polylora_kernels::DeviceChoice;
use std::fmt;
use std::path::PathBuf;

/// How a setting is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Path,
    Switch,
    Number,
    Fraction,
    Size,
    Choice(&'static [&'static str]),
    Texts,
    Paths,
    /// A table in the file; what sources say adds up.
    Adapters,
}

impl Kind {
    /// Whether a flag and a variable take several, with commas between.
    pub fn is_list(self) -> bool {
        matches!(self, Self::Texts | Self::Paths | Self::Adapters)
    }

    /// What `--help` shows for a value.
    pub fn placeholder(self) -> String {
        let plain = match self {
            Self::Choice(names) => return names.join("|"),
            Self::Text => "TEXT",
            Self::Path => "PATH",
            Self::Switch => "BOOL",
            Self::Number => "N",
            Self::Fraction => "0.N",
            Self::Size => "SIZE",
            Self::Texts => "TEXT,…",
            Self::Paths => "PATH,…",
            Self::Adapters => "NAME=DIR",
        };
        plain.to_owned()
    }
}

pub trait Value: Sized {
    const KIND: Kind;
    /// At least one text; more than one where the kind is a list.
    fn read(texts: &[String]) -> Result<Self, String>;
    /// As the file has it.
    fn shown(&self) -> Option<String>;
}

/// The text, which must not be empty.
fn text(texts: &[String]) -> Result<&str, String> {
    match texts.last() {
        Some(text) if !text.trim().is_empty() => Ok(text),
        _ => Err("is empty; expected a value or no such setting".to_owned()),
    }
}

/// A TOML basic string; JSON's escapes are a subset of its.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn list(texts: impl IntoIterator<Item = String>) -> String {
    format!("[{}]", texts.into_iter().collect::<Vec<_>>().join(", "))
}

impl Value for String {
    const KIND: Kind = Kind::Text;
    fn read(texts: &[String]) -> Result<Self, String> {
        text(texts).map(str::to_owned)
    }
    fn shown(&self) -> Option<String> {
        Some(quoted(self))
    }
}

impl Value for PathBuf {
    const KIND: Kind = Kind::Path;
    fn read(texts: &[String]) -> Result<Self, String> {
        text(texts).map(Self::from)
    }
    fn shown(&self) -> Option<String> {
        Some(quoted(&self.to_string_lossy()))
    }
}

impl<T: Value> Value for Option<T> {
    const KIND: Kind = T::KIND;
    fn read(texts: &[String]) -> Result<Self, String> {
        T::read(texts).map(Some)
    }
    fn shown(&self) -> Option<String> {
        self.as_ref()?.shown()
    }
}

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Hidden(pub String);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl Value for Hidden {
    const KIND: Kind = Kind::Text;
    fn read(texts: &[String]) -> Result<Self, String> {
        String::read(texts).map(Self)
    }
    fn shown(&self) -> Option<String> {
        None
    }
}

impl Value for bool {
    const KIND: Kind = Kind::Switch;
    fn read(texts: &[String]) -> Result<Self, String> {
        let text = text(texts)?;
        text.parse().map_err(|_| format!("is '{text}'; expected true or false"))
    }
    fn shown(&self) -> Option<String> {
        Some(self.to_string())
    }
}

macro_rules! numbers {
    ($($number:ty),+) => {
        $(impl Value for $number {
            const KIND: Kind = Kind::Number;
            fn read(texts: &[String]) -> Result<Self, String> {
                let text = text(texts)?.trim();
                text.parse().map_err(|_| format!("is '{text}'; expected a whole number"))
            }
            fn shown(&self) -> Option<String> {
                Some(self.to_string())
            }
        })+
    };
}
numbers!(u16, u64, usize);

/// A part of a whole that keeps the larger half: from 0 to 0.5.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fraction(pub f64);

impl Value for Fraction {
    const KIND: Kind = Kind::Fraction;
    fn read(texts: &[String]) -> Result<Self, String> {
        let text = text(texts)?.trim();
        let wrong = || format!("is '{text}'; expected a number from 0 to 0.5");
        let number = text.parse().ok().filter(|n| (0.0..=0.5).contains(n));
        number.map(Self).ok_or_else(wrong)
    }
    fn shown(&self) -> Option<String> {
        Some(format!("{:?}", self.0))
    }
}

impl Value for Size {
    const KIND: Kind = Kind::Size;
    fn read(texts: &[String]) -> Result<Self, String> {
        text(texts)?.parse()
    }
    fn shown(&self) -> Option<String> {
        Some(self.0.to_string())
    }
}

impl Value for DeviceChoice {
    const KIND: Kind = Kind::Text;
    fn read(texts: &[String]) -> Result<Self, String> {
        let text = text(texts)?;
        text.parse().map_err(|e| format!("is '{text}'; expected {e}"))
    }
    fn shown(&self) -> Option<String> {
        Some(match self {
            Self::Auto => quoted("auto"),
            Self::Cpu => quoted("cpu"),
            Self::Cuda(n) => quoted(&format!("cuda:{n}")),
        })
    }
}

impl Value for Vec<String> {
    const KIND: Kind = Kind::Texts;
    fn read(texts: &[String]) -> Result<Self, String> {
        texts.iter().map(|t| text(std::slice::from_ref(t)).map(str::to_owned)).collect()
    }
    fn shown(&self) -> Option<String> {
        Some(list(self.iter().map(|t| quoted(t))))
    }
}

impl Value for Vec<PathBuf> {
    const KIND: Kind = Kind::Paths;
    fn read(texts: &[String]) -> Result<Self, String> {
        Ok(Vec::<String>::read(texts)?.into_iter().map(PathBuf::from).collect())
    }
    fn shown(&self) -> Option<String> {
        Some(list(self.iter().map(|d| quoted(&d.to_string_lossy()))))
    }
}

/// Names and directories.
pub type Adapters = Vec<(String, PathBuf)>;

impl Value for Adapters {
    const KIND: Kind = Kind::Adapters;
    fn read(texts: &[String]) -> Result<Self, String> {
        let mut all = Self::new();
        for text in texts {
            let (name, dir) = match text.split_once('=') {
                Some((name, dir)) if !name.is_empty() && !dir.is_empty() => (name, dir),
                _ => {
                    return Err(format!(
                        "has '{text}'; expected NAME=DIR, e.g. pirate=adapters/pirate"
                    ));
                }
            };
            if all.iter().any(|(n, _)| n == name) {
                return Err(format!("names '{name}' twice"));
            }
            all.push((name.to_owned(), PathBuf::from(dir)));
        }
        Ok(all)
    }
    fn shown(&self) -> Option<String> {
        let one = |(n, d): &(String, PathBuf)| quoted(n) + " = " + &quoted(&d.to_string_lossy());
        let all: Vec<String> = self.iter().map(one).collect();
        Some(if all.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", all.join(", ")) })
    }
}

/// Types whose values have names: `Type { Variant = "name", … }`, each name written once.
macro_rules! choices {
    ($($(#[$doc:meta])+ $choice:ident { $($variant:ident = $name:literal),+ })+) => {
        $($(#[$doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $choice { $($variant),+ }

        impl Value for $choice {
            const KIND: Kind = Kind::Choice(&[$($name),+]);
            fn read(texts: &[String]) -> Result<Self, String> {
                match texts.last().map(String::as_str) {
                    $(Some($name) => Ok(Self::$variant),)+
                    other => Err(format!(
                        "is '{}'; expected one of {}",
                        other.unwrap_or_default(),
                        [$($name),+].join(", ")
                    )),
                }
            }
            fn shown(&self) -> Option<String> {
                let name = match self { $(Self::$variant => $name),+ };
                Some(format!("\"{name}\""))
            }
        })+
    };
}
pub(super) use choices;
