//! `polylora adapter`: push, list, show and rm against a running server.
//!
//! Owns how a directory or file becomes an upload and how the answer is shown. Never checks an
//! adapter: the server does, and its refusal is printed. The thing to know: only the files that
//! count in a PEFT directory, one .gguf, or one archive are ever sent.

use super::client::{Client, ServerArgs};
use super::{bad_argument, say};
use crate::adapters::format::files::{
    CONFIG, GENERATION, TEMPLATE, TENSORS, TOKENIZER, TOKENIZER_CONFIG,
};
use crate::config::human;
use crate::error::Result;
use clap::{Args, Subcommand};
use reqwest::{Method, multipart};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  polylora adapter push pirate adapters/pirate    a directory that PEFT saved
  polylora adapter push pirate pirate.zip            an archive of it (.zip, .tar), or a .gguf
  polylora adapter list
  polylora adapter show pirate
  polylora adapter rm pirate

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
        name: String,
        /// Directory with adapter_config.json and adapter_model.safetensors, or a .gguf, .zip or
        /// .tar file
        #[arg(value_name = "DIR|FILE")]
        from: PathBuf,
        /// Serve it even if it changes nothing on the probe's prompts
        #[arg(long)]
        force: bool,
    },
    /// List adapters and their versions
    List,
    /// Show one adapter in full, as JSON
    Show { name: String },
    /// Remove an adapter; running requests finish
    Rm { name: String },
}

pub fn run(args: AdapterArgs) -> Result<()> {
    let client = Client::new(&args.server, Duration::from_secs(600))?;
    super::block_on(async {
        match args.verb {
            Verb::Push { name, from, force } => push(&client, &name, &from, force).await,
            Verb::List => list(&client).await,
            Verb::Show { name } => {
                let shown = client.json(client.request(Method::GET, &path(&name)?)).await?;
                say(&format!("{shown:#}\n"));
                Ok(())
            }
            Verb::Rm { name } => {
                client.send(client.request(Method::DELETE, &path(&name)?)).await?;
                say(&format!("removed {name}\n"));
                Ok(())
            }
        }
    })
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
    if from.is_file() {
        let kind = from.extension().and_then(|e| e.to_str()).unwrap_or_default();
        return match kind.to_ascii_lowercase().as_str() {
            "gguf" | "zip" | "tar" => Ok(vec![from.to_owned()]),
            _ => Err(bad_argument(format!(
                "{} is no adapter; expected a directory or a .gguf, .zip or .tar file",
                from.display()
            ))),
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
    let current = if v["current"] == true { ", current" } else { "" };
    let method = text(&v["method"]);
    let rank = v["rank_max"].as_u64().map_or(String::new(), |r| format!(" r{r}"));
    let size = v["file_bytes"].as_u64().map_or(String::new(), human);
    [
        text(&v["id"]),
        text(&v["result"]),
        text(&v["state"]) + current,
        method + &rank,
        size,
        text(&v["digest"]),
    ]
    .into_iter()
    .filter(|t| !t.is_empty())
    .collect::<Vec<_>>()
    .join("  ")
}
