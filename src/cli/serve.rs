//! `polylora serve`: its options.
//!
//! Owns the help and what only prints. Never starts a server: `assembly` does.

use crate::assembly;
use crate::config::{Config, Given};
use crate::error::Result;
use crate::terminal::say;
use clap::Args;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  polylora serve                                          the demo model on 127.0.0.1:8080
  polylora serve --model ./Llama-3.2-1B-Instruct --adapter support=./adapters/support
  polylora serve --model Qwen/Qwen3-0.6B --dtype bf16 --port 9000
  POLYLORA_API_KEY=secret polylora serve --host 0.0.0.0   for others, with a key
  polylora serve --config polylora.toml
  polylora serve --print-config > polylora.toml           every setting with its default, explained

A flag wins over its environment variable, that over the file, that over the default.
SIGTERM or Ctrl-C: no new requests, running ones finish (--drain-seconds), exit code 0.
A second one ends what still runs.";

/// Options of `serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    /// Settings from a TOML file
    #[arg(long, env = "POLYLORA_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print every setting as a TOML file, explained, and end
    #[arg(long)]
    print_config: bool,
    #[command(flatten)]
    settings: Given,
}

pub fn run(args: ServeArgs) -> Result<()> {
    let file = args.config.as_deref();
    if args.print_config {
        say(&Config::print(file, args.settings)?);
        return Ok(());
    }
    assembly::serve(Config::load(file, args.settings)?)
}
