//! Every limit in the program: what was asked (flags, environment, file) and what was checked.
//!
//! Owns the order in which sources win (flag, environment, file, default), and what only several
//! settings together can get wrong. Never opens a model or a port. The thing to know: the settings
//! are rows of `settings.rs`, and limits that nobody sets are in `limits.rs`.

mod derived;
mod given;
mod gone;
pub mod limits;
mod machine;
mod settings;
mod size;
mod table;
mod value;
mod web;

pub use given::Given;
pub use gone::{GONE, Gone};
pub use machine::memory_available;
pub use settings::{
    Config, LogFormat, MODEL, PrefixShare, SETTINGS, Setting, Storage, WeightStorage,
};
pub use size::{Size, human};
pub use value::{Adapters, Hidden};

use crate::error::{Error, Result};
use std::net::IpAddr;
use std::path::Path;

impl Config {
    /// `given` is what flags and environment said; `file` is read below it. Errors name the key,
    /// where it was set and what was expected (`invalid_config`).
    pub fn load(file: Option<&Path>, given: Given) -> Result<Self> {
        Ok(Self::sources(file, given)?.1)
    }

    /// The joined settings as asked, and what they come to.
    fn sources(file: Option<&Path>, given: Given) -> Result<(Given, Self)> {
        given.check().map_err(|(key, why)| blame(&origin(key), &why).param(key))?;
        let given = match file {
            None => given,
            Some(path) => given.over(given::read_file(path)?),
        };
        let mut config =
            settings::decide(|key| given.texts(key)).map_err(|(key, why)| blame(key, &why))?;
        if config.connections_per_address_max == 0 {
            config.connections_per_address_max = (config.connections_max * 3 / 4).max(1);
        }
        config.agree()?;
        Ok((given, config))
    }

    /// What only two settings together can get wrong.
    fn agree(&self) -> Result<()> {
        if self.sequences_max > self.rows_max {
            return Err(blame(
                "sequences_max",
                &format!(
                    "is {}, but a step has only rows_max = {} rows; expected at most rows_max",
                    self.sequences_max, self.rows_max
                ),
            ));
        }
        if let Some(why) = web::wrong_host(&self.allow_hosts) {
            return Err(blame("allow_hosts", &why));
        }
        // Keys that were made lie in the data directory, once in a file of their own; whoever opens
        // them asks `guarded` again.
        let made = |name: &&str| self.data_dir.join(name).exists();
        self.guarded(["polylora.db", "access.db"].iter().any(made))
    }

    /// Refuses an address that others can reach, or pages of any origin, where nobody needs a key;
    /// `keyed` says that some key was made. Errors: `invalid_config`.
    pub fn guarded(&self, keyed: bool) -> Result<()> {
        let keyed = keyed || self.api_key.is_some();
        if let Some(why) = web::wrong_origin(&self.allow_origins, keyed) {
            return Err(blame("allow_origins", &why));
        }
        if keyed || self.allow_open || is_loopback(&self.host) {
            return Ok(());
        }
        Err(blame(
            "host",
            &format!(
                "is {}, which others can reach, and there is no key; set POLYLORA_API_KEY, make \
                 one with `polylora key add`, or set allow_open if a proxy guards the port",
                self.host
            ),
        ))
    }

    /// Every key as a TOML file with its help above it. What was set stands plain, defaults stand
    /// commented out, the key itself is never shown.
    pub fn print(file: Option<&Path>, given: Given) -> Result<String> {
        let (given, config) = Self::sources(file, given)?;
        let mut page = String::from(
            "# Configuration of polylora serve. \
             Commented-out keys show their defaults on this machine.\n",
        );
        for row in SETTINGS {
            let expected = row.expected().map_or(String::new(), |e| format!("; {e}"));
            let names = format!("flag --{}, environment {}", row.flag(), row.env());
            page += &format!("\n# {}\n# {names}{expected}\n", row.help());
            let shown = row.shown(&config);
            let mark = if shown.is_some() && given.texts(row.key).is_some() { "" } else { "# " };
            let value = shown.unwrap_or_else(|| format!("\"{}\"", row.kind.placeholder()));
            page += &format!("{mark}{} = {value}\n", row.key);
        }
        Ok(page)
    }
}

/// Where a flag or variable of this key is set, in words.
fn origin(key: &str) -> String {
    format!("{key} (--{} or {})", key.replace('_', "-"), table::variable(key))
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn blame(key: &str, why: &str) -> Error {
    Error::invalid("invalid_config", format!("{key} {why}")).param(key)
}
