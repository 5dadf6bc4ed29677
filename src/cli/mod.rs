//! The command line: arguments to configuration to one of the commands.
//!
//! Owns help texts, exit codes and what a person sees in a terminal. Never computes: `serve` wires
//! modules together, the rest are clients of a running server. The thing to know: a failure is one
//! line on stderr, `error: …`, and exit code 1; arguments or settings that cannot be are exit code
//! 2.

pub mod adapter;
pub mod bench;
mod calls;
pub mod chat;
pub mod client;
pub mod jobs;
pub mod key;
pub mod merge;
pub mod serve;
pub mod sse;
pub mod train;
pub mod verify;

use crate::terminal::on_terminal;
use clap::{Args, Parser, Subcommand};
use polylora_kernels::Dtype;
use std::path::PathBuf;
use std::process::ExitCode;

const ABOUT: &str = "Serve one base model and thousands of LoRA adapters in one batch";

const EXAMPLES: &str = "\
Examples:
  polylora serve --adapter pirate=adapters/pirate   the demo model and an adapter, on port 8080
  polylora chat --model-name pirate                 talk to it
  polylora adapter push sql adapters/sql            add an adapter while it serves
  polylora merge a=0.7 b=0.3 --rank 16 --out both   two adapters into one
  polylora train data.jsonl --out support           an adapter out of examples
  polylora jobs create data.jsonl --name support    the same on a running server
  polylora bench --models auto --concurrency 16     load it

'polylora COMMAND --help' shows each command's options and examples.";

#[derive(Parser)]
#[command(name = "polylora", version, about = ABOUT, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a base model and its adapters over HTTP
    Serve(Box<serve::ServeArgs>),
    /// Chat with a running server in the terminal
    Chat(chat::ChatArgs),
    /// Push, list, show and remove adapters of a running server
    Adapter(adapter::AdapterArgs),
    /// Make, list, rotate and revoke API keys in the data directory of a server that is down
    Key(key::KeyArgs),
    /// Make one adapter of several, in directories, without a server
    Merge(Box<merge::MergeArgs>),
    /// Make an adapter of examples, in a directory, without a server
    Train(Box<train::TrainArgs>),
    /// Train adapters on a running server: order jobs, follow, pause and end them
    Jobs(jobs::JobsArgs),
    /// Compare this program's logits with an independent implementation's, on your model
    Verify(VerifyArgs),
    /// Load any OpenAI-compatible server and measure it
    Bench(Box<bench::BenchArgs>),
    /// Ask a server whether it is ready; for container health checks and scripts
    Health(client::HealthArgs),
    /// Render chat templates of adapters for a server that started this
    #[command(hide = true, name = crate::text::sandbox::COMMAND)]
    RenderTemplates,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  polylora verify --model smollm2-135m-instruct
  polylora verify --model ./Qwen3-0.6B --adapter ./my-adapter --dtype f32

Exit code 0: within tolerance. 1: not, or the model could not be opened.";

/// Options of `verify`.
#[derive(Args)]
#[command(after_help = VERIFY_EXAMPLES)]
struct VerifyArgs {
    /// A directory, a .gguf file, a Hub id or the demo's name
    #[arg(long, env = "POLYLORA_MODEL", default_value = crate::config::MODEL)]
    model: String,
    /// Adapter directory to apply on both sides
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Storage of the weights: auto, f32 or bf16
    #[arg(long, default_value = "auto", value_parser = ["auto", "f32", "bf16"])]
    dtype: String,
}

/// `auto` is `None`. The text was checked before.
fn dtype_named(name: &str) -> Option<Dtype> {
    match name {
        "f32" => Some(Dtype::F32),
        "bf16" => Some(Dtype::Bf16),
        _ => None,
    }
}

/// Runs the command line; the exit code is 0, 1 (failed) or 2 (bad arguments).
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return refuse(&e),
    };
    let done = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Chat(args) => chat::run(args),
        Command::Adapter(args) => adapter::run(args),
        Command::Key(args) => key::run(args),
        Command::Merge(args) => merge::run(*args),
        Command::Train(args) => train::run(*args),
        Command::Jobs(args) => jobs::run(args),
        Command::Verify(a) => {
            match verify::run(&a.model, a.adapter.as_deref(), dtype_named(&a.dtype)) {
                Ok(true) => Ok(()),
                Ok(false) => return ExitCode::from(1), // the table said what differs
                Err(e) => Err(e),
            }
        }
        Command::Bench(args) => bench::run(*args),
        Command::Health(args) => client::health(args),
        Command::RenderTemplates => crate::text::sandbox::work(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", on_terminal(&e.message.replace('\n', " ")));
            let bad_arguments =
                matches!(e.code, "invalid_config" | "invalid_arguments" | "invalid_merge");
            ExitCode::from(if bad_arguments { 2 } else { 1 })
        }
    }
}

/// Help and version are printed whole; a mistake becomes one line that says where to read on.
fn refuse(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() {
        let _ = e.print(); // a closed pipe is no failure of ours
        return ExitCode::SUCCESS;
    }
    let page = e.render().to_string();
    if !page.starts_with("error:") {
        eprint!("{page}"); // no command at all: the help itself
        return ExitCode::from(2);
    }
    let said: Vec<&str> = page
        .lines()
        .take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more"))
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    eprintln!("{}; see --help", said.join(" "));
    ExitCode::from(2)
}
