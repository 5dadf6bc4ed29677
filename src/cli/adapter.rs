//! `polylora adapter`: adapters, versions and aliases of a running server.
//!
//! Owns how a directory or file becomes an upload and how the answer is shown. Never checks an
//! adapter: the server does, and its refusal is printed. The thing to know: only the files that
//! count in a PEFT directory, one .gguf, or one archive are ever sent.

use super::client::{Client, ServerArgs};
use crate::adapters::format::files::is_archive;
use crate::adapters::format::names::{
    CONFIG, GENERATION, TEMPLATE, TENSORS, TOKENIZER, TOKENIZER_CONFIG,
};
use crate::cli::calls::bad_argument;
use crate::config::human;
use crate::error::{Error, Result};
use crate::terminal::say;
use clap::{Args, Subcommand};
use reqwest::{Method, multipart};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  polylora adapter push pirate adapters/pirate       a directory that PEFT saved
  polylora adapter push pirate pirate.zip            an archive of it (.zip, .tar), or a .gguf
  polylora adapter list
  polylora adapter show pirate
  polylora adapter rm pirate --drain-seconds 30      wait for running requests, then cut them
  polylora adapter rollback pirate                   the version before, or --version N
  polylora adapter pin pirate                        never evicted
  polylora adapter alias prod pirate@1=95 pirate@2=5 one user always gets the same version

Pushing onto a name that exists makes a new version; running requests finish on the old one.";

/// Options of `adapter`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct AdapterArgs {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Subcommand)]
enum Verb {
    /// Upload an adapter under a name
    Push {
        /// Name that requests will ask for
        name: String,
        /// Directory with adapter_config.json and adapter_model.safetensors, or a .gguf, .zip,
        /// .tar, .tar.gz or .tgz file
        #[arg(value_name = "DIR|FILE")]
        from: PathBuf,
        /// Serve it even if it changes nothing on the probe's prompts
        #[arg(long)]
        force: bool,
    },
    /// List adapters and their versions
    List,
    /// Show one adapter in full, as JSON
    Show {
        /// Name of the adapter
        name: String,
    },
    /// Remove an adapter; running requests finish
    Rm {
        /// Name of the adapter
        name: String,
        /// Seconds to wait for running requests; then they are ended
        #[arg(long, value_name = "SECONDS")]
        drain_seconds: Option<u64>,
    },
    /// Move a name back to the version before, or to any version that is kept
    Rollback(VersionArgs),
    /// Keep a version in memory, restarts included
    Pin(VersionArgs),
    /// Undo a pin
    Unpin(VersionArgs),
    /// Spread a name's requests over versions by weight; without weights, show it
    Alias {
        /// Name that requests will ask for
        name: String,
        /// Versions with their weights, each as NAME@VERSION=WEIGHT
        #[arg(value_name = "WEIGHT")]
        weights: Vec<String>,
        /// Remove it
        #[arg(long, conflicts_with = "weights")]
        rm: bool,
    },
}

#[derive(Args)]
struct VersionArgs {
    /// Name of the adapter
    name: String,
    /// Which version; default: for a rollback the one before, else the current one
    #[arg(long, value_name = "N")]
    version: Option<u64>,
}

pub fn run(args: AdapterArgs) -> Result<()> {
    let client = Client::new(&args.server, Duration::from_secs(600))?;
    crate::cli::calls::block_on(async {
        match args.verb {
            Verb::Push { name, from, force } => push(&client, &name, &from, force).await,
            Verb::List => list(&client).await,
            Verb::Show { name } => {
                let shown = client.json(client.request(Method::GET, &path(&name)?)).await?;
                say(&format!("{shown:#}\n"));
                Ok(())
            }
            Verb::Rm { name, drain_seconds } => remove(&client, &name, drain_seconds).await,
            Verb::Rollback(args) => change(&client, "rollback", args).await,
            Verb::Pin(args) => change(&client, "pin", args).await,
            Verb::Unpin(args) => change(&client, "unpin", args).await,
            Verb::Alias { name, weights, rm } => alias(&client, &name, &weights, rm).await,
        }
    })
}

async fn remove(client: &Client, name: &str, drain_seconds: Option<u64>) -> Result<()> {
    let query = drain_seconds.map_or(String::new(), |s| format!("?drain_seconds={s}"));
    let route = format!("{}{query}", path(name)?);
    let done = match client.json(client.request(Method::DELETE, &route)).await {
        Err(refused) if refused.label.starts_with("404 ") => {
            let alias = path(name)?.replace("/v1/adapters/", "/v1/aliases/");
            let found = client.json(client.request(Method::GET, &alias)).await;
            return Err(found.map_or_else(|_| refused.into(), |_| is_alias(name)));
        }
        done => done?,
    };
    let freed = &done["freed_bytes"];
    let bytes = |key: &str| human(freed[key].as_u64().unwrap_or(0));
    let state = done["state"].as_str().unwrap_or_default();
    say(&format!(
        "removed {name}  {state}, freed {} of memory and {} of disk\n",
        bytes("resident"),
        bytes("file")
    ));
    Ok(())
}

fn is_alias(name: &str) -> Error {
    bad_argument(format!(
        "{name} is an alias, not an adapter: 'polylora adapter alias {name} --rm' removes it"
    ))
}

/// One of the routes that take a version and answer with one.
async fn change(client: &Client, what: &str, args: VersionArgs) -> Result<()> {
    let route = format!("{}/{what}", path(&args.name)?);
    let body = match args.version {
        Some(version) => json!({ "version": version }),
        None => json!({}),
    };
    let done = client.json(client.request(Method::POST, &route).json(&body)).await?;
    say(&format!("{}\n", line(&done)));
    Ok(())
}

async fn alias(client: &Client, name: &str, weights: &[String], rm: bool) -> Result<()> {
    let route = path(name)?.replace("/v1/adapters/", "/v1/aliases/");
    let mut body = serde_json::Map::new();
    for weight in weights {
        let parts = weight.split_once('=').and_then(|(id, w)| Some((id, w.parse::<u32>().ok()?)));
        let (id, weight) = parts.ok_or_else(|| {
            bad_argument(format!("'{weight}' is not NAME@VERSION=WEIGHT, e.g. pirate@2=5"))
        })?;
        body.insert(id.to_owned(), json!(weight));
    }
    let request = match (rm, body.is_empty()) {
        (true, _) => client.request(Method::DELETE, &route),
        (false, true) => client.request(Method::GET, &route),
        (false, false) => client.request(Method::PUT, &route).json(&json!({ "weights": body })),
    };
    let done = client.json(request).await?;
    if rm {
        say(&format!("removed {name}\n"));
        return Ok(());
    }
    let targets = done["targets"].as_array().into_iter().flatten();
    let shares: Vec<String> = targets
        .map(|t| {
            let id = t["id"].as_str().unwrap_or_default();
            format!("{id} {:.1} %", 100.0 * t["share"].as_f64().unwrap_or(0.0))
        })
        .collect();
    say(&format!("{name}  {}\n", shares.join(", ")));
    Ok(())
}

/// The route of a name; a name that would lead elsewhere is refused here.
fn path(name: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || !name.chars().all(plain) || name.starts_with('.') {
        return Err(bad_argument(format!(
            "'{name}' is no adapter name; expected letters, digits and . _ -"
        )));
    }
    Ok(format!("/v1/adapters/{name}"))
}

/// Files of an upload: those of a PEFT directory that count, or the one file.
fn files(from: &Path) -> Result<Vec<PathBuf>> {
    if !from.exists() {
        let from = from.display();
        return Err(bad_argument(format!("{from} is no directory or file on this machine")));
    }
    if from.is_file() {
        let name = from.to_string_lossy().to_ascii_lowercase();
        let one = name.ends_with(".gguf") || is_archive(&name);
        return if one {
            Ok(vec![from.to_owned()])
        } else {
            Err(bad_argument(format!(
                "{} is no adapter; expected a directory or a .gguf, .zip, .tar, .tar.gz or .tgz \
                 file",
                from.display()
            )))
        };
    }
    let mut files: Vec<PathBuf> = [CONFIG, TENSORS].iter().map(|f| from.join(f)).collect();
    if let Some(missing) = files.iter().find(|f| !f.is_file()) {
        return Err(bad_argument(format!("{} is missing", missing.display())));
    }
    let more = [TEMPLATE, TOKENIZER_CONFIG, GENERATION, TOKENIZER].iter().map(|f| from.join(f));
    files.extend(more.filter(|f| f.is_file()));
    Ok(files)
}

async fn push(client: &Client, name: &str, from: &Path, force: bool) -> Result<()> {
    let query = if force { "?force=true" } else { "" };
    let route = format!("{}{query}", path(name)?);
    let mut form = multipart::Form::new();
    for file in files(from)? {
        let unreadable = |e| bad_argument(format!("{} cannot be read: {e}", file.display()));
        let bytes = tokio::fs::read(&file).await.map_err(unreadable)?;
        let part = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        form = form.part(part.clone(), multipart::Part::bytes(bytes).file_name(part));
    }
    let request = client.request(Method::PUT, &route).multipart(form);
    let done = client.json(request).await?;
    say(&format!("{}\n", line(&done)));
    Ok(())
}

async fn list(client: &Client) -> Result<()> {
    let page = client.json(client.request(Method::GET, "/v1/adapters")).await?;
    let rows: Vec<&Value> = page["data"].as_array().into_iter().flatten().collect();
    if rows.is_empty() {
        say("no adapters; add one with 'polylora adapter push NAME DIR'\n");
    }
    for row in rows {
        say(&format!("{}\n", line(row)));
    }
    Ok(())
}

/// One version on one line: `pirate@1  ready, current  lora r8  1.8 MiB  sha256:…`.
fn line(v: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let mut state = text(&v["state"]);
    for mark in ["current", "pinned"].into_iter().filter(|mark| v[*mark] == true) {
        state += &format!(", {mark}");
    }
    let method = text(&v["method"]);
    let rank = v["rank_max"].as_u64().map_or(String::new(), |r| format!(" r{r}"));
    let size = v["file_bytes"].as_u64().map_or(String::new(), human);
    [text(&v["id"]), text(&v["result"]), state, method + &rank, size, text(&v["digest"])]
        .into_iter()
        .filter(|t| !t.is_empty())
        .collect::<Vec<_>>()
        .join("  ")
}
