//! `polylora key`: keys in the data directory of a server that is down.
//!
//! Owns the words for a key's fields. Never talks to a running server: that takes `/v1/keys`. The
//! thing to know: it takes the directory's lock, so a server that runs on it makes this refuse
//! rather than be changed behind its back.

use crate::access::{Access, Key, Limits, NewKey, Scope, Secret};
use crate::cli::calls::bad_argument;
use crate::clock::Now;
use crate::config::{Config, Given};
use crate::database::Storage;
use crate::error::Result;
use crate::terminal::say;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  polylora key add --label ops --scope inference,admin,metrics      an operator's, the first one
  polylora key add --tenant acme --scope inference --adapters 'acme-*' --tokens-per-day 1000000
  polylora key add --tenant acme --scope admin --adapters 'acme-*,shared-*' --manage 'acme-*'
  polylora key list
  polylora key rotate key-0123456789abcdef --overlap-seconds 86400
  polylora key revoke key-0123456789abcdef

The secret is printed once, and only its hash is kept. While the server runs, use POST /v1/keys.";

/// Options of `key`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct KeyArgs {
    #[command(subcommand)]
    verb: Verb,
    /// The server's settings file, for its data_dir
    #[arg(long, global = true, env = "POLYLORA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Base model, whose default data directory it is
    #[arg(long, global = true, env = "POLYLORA_MODEL", value_name = "MODEL")]
    model: Option<String>,
    /// Data directory of the server
    #[arg(long, global = true, env = "POLYLORA_DATA_DIR", value_name = "PATH")]
    data_dir: Option<String>,
}

#[derive(Subcommand)]
enum Verb {
    /// Make a key and print its secret
    Add(Box<AddArgs>),
    /// List keys, revoked ones too
    List,
    /// Give a key a new secret and print it
    Rotate {
        /// Id of the key, as `list` shows it
        id: String,
        /// Seconds that the old secret stays good
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        overlap_seconds: u64,
    },
    /// End a key
    Revoke {
        /// Id of the key, as `list` shows it
        id: String,
    },
}

/// What a new key is to be.
#[derive(Args)]
struct AddArgs {
    /// A note for people: what the key is for
    #[arg(long, default_value = "")]
    label: String,
    /// What the key may do: inference, admin, metrics, with commas
    #[arg(long, required = true, value_delimiter = ',', value_parser = scope)]
    scope: Vec<Scope>,
    /// Tenant that the key belongs to; without one it is an operator's and sees every adapter
    #[arg(long)]
    tenant: Option<String>,
    /// Names that a tenant's key may see and use; * stands for any characters, ? for one
    #[arg(long, value_delimiter = ',', value_name = "PATTERN")]
    adapters: Vec<String>,
    /// Names that it may create and change, whoever owns them; without: its tenant's own, and new
    /// ones that match --adapters
    #[arg(long, value_delimiter = ',', value_name = "PATTERN")]
    manage: Option<Vec<String>>,
    /// Share of the engine against other tenants
    #[arg(long, default_value_t = 1)]
    weight: u32,
    /// Seconds until it ends; without: never
    #[arg(long, value_name = "SECONDS")]
    lifetime_seconds: Option<u64>,
    /// Completions in a minute
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<u64>,
    /// Tokens in a minute, prompt and answer together
    #[arg(long, value_name = "TOKENS")]
    tokens_per_minute: Option<u64>,
    /// Completions being answered at once
    #[arg(long, value_name = "N")]
    concurrent_max: Option<u64>,
    /// Tokens from midnight to midnight UTC
    #[arg(long, value_name = "TOKENS")]
    tokens_per_day: Option<u64>,
    /// Tokens of a calendar month UTC
    #[arg(long, value_name = "TOKENS")]
    tokens_per_month: Option<u64>,
    /// Names of adapters and aliases that its tenant may own
    #[arg(long, value_name = "N")]
    adapters_max: Option<u64>,
    /// Bytes that its tenant's adapters may have on disk
    #[arg(long, value_name = "BYTES")]
    disk_bytes_max: Option<u64>,
    /// Bytes that its tenant's adapters may have in memory, pinned ones too
    #[arg(long, value_name = "BYTES")]
    resident_bytes_max: Option<u64>,
    /// Uploads of its tenant at once
    #[arg(long, value_name = "N")]
    uploads_max: Option<u64>,
    /// Merges of its tenant that are not over
    #[arg(long, value_name = "N")]
    merges_max: Option<u64>,
}

fn scope(text: &str) -> Result<Scope, String> {
    let found = Scope::ALL.into_iter().find(|s| s.name() == text);
    found.ok_or_else(|| format!("'{text}' is no scope; expected inference, admin or metrics"))
}

pub fn run(args: KeyArgs) -> Result<()> {
    // Nothing is listened on here.
    let mut settings = vec![("host", "127.0.0.1")];
    settings.extend(args.model.as_deref().map(|model| ("model", model)));
    settings.extend(args.data_dir.as_deref().map(|dir| ("data_dir", dir)));
    let dir = Config::load(args.config.as_deref(), Given::of(&settings))?.data_dir;
    let now = Now::read().wall;
    crate::cli::calls::block_on(async {
        let storage = Storage::of(&dir);
        storage.lock()?;
        let access = Access::open_in(&storage, None).await?;
        match args.verb {
            Verb::Add(add) => {
                say(&made(&access.create(add.key(), now).await.map_err(as_argument)?));
            }
            Verb::List => say(&list(&access.keys(), now)),
            Verb::Rotate { id, overlap_seconds } => {
                let rotated = access.rotate(&id, overlap_seconds, now).await;
                say(&made(&rotated.map_err(as_argument)?));
            }
            Verb::Revoke { id } => {
                let key = access.revoke(&id, now).await?;
                say(&format!("revoked {}\n", key.id));
            }
        }
        storage.close().await;
        Ok(())
    })
}

impl AddArgs {
    fn key(self) -> NewKey {
        NewKey {
            label: self.label,
            scopes: self.scope,
            tenant: self.tenant,
            adapters: self.adapters,
            manage: self.manage,
            weight: self.weight,
            limits: Limits {
                requests_per_minute: self.requests_per_minute,
                tokens_per_minute: self.tokens_per_minute,
                concurrent_max: self.concurrent_max,
                tokens_per_day: self.tokens_per_day,
                tokens_per_month: self.tokens_per_month,
                adapters_max: self.adapters_max,
                disk_bytes_max: self.disk_bytes_max,
                resident_bytes_max: self.resident_bytes_max,
                uploads_max: self.uploads_max,
                merges_max: self.merges_max,
            },
            lifetime_seconds: self.lifetime_seconds,
        }
    }
}

/// A value that cannot be is a mistake in the arguments: exit code 2.
fn as_argument(e: crate::error::Error) -> crate::error::Error {
    match e.code {
        "invalid_value" => bad_argument(e.message),
        _ => e,
    }
}

/// The id on stderr, the secret alone on stdout: `KEY=$(polylora key add …)`.
fn made((key, secret): &(Key, Secret)) -> String {
    eprintln!("{}: keep the secret, it is not shown again", key.id);
    format!("{}\n", secret.reveal())
}

fn list(keys: &[Key], now: Duration) -> String {
    if keys.is_empty() {
        return "no keys; make one with 'polylora key add'\n".to_owned();
    }
    keys.iter().map(|key| line(key, now) + "\n").collect()
}

/// One key on one line: `key-…  good  inference,admin  tenant acme  acme-*  label`.
fn line(key: &Key, now: Duration) -> String {
    let state = match (key.revoked.is_some(), key.is_good(now)) {
        (true, _) => "revoked",
        (false, true) => "good",
        (false, false) => "expired",
    };
    let scopes: Vec<&str> = key.scopes.iter().map(|s| s.name()).collect();
    let tenant = key.tenant.as_ref().map_or("operator".to_owned(), |t| format!("tenant {t}"));
    let parts = [
        key.id.clone(),
        state.to_owned(),
        scopes.join(","),
        tenant,
        key.adapters.join(","),
        key.manage.as_ref().map_or(String::new(), |given| format!("manages {}", given.join(","))),
        key.label.clone(),
    ];
    parts.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join("  ")
}
