//! `polylora jobs`: training jobs of a running server.
//!
//! Owns how a file becomes a job and how a job is shown. Never trains: the server does, when its
//! requests leave it time.

use super::client::{Client, ServerArgs};
use crate::cli::calls::{TRAINING, bad_argument, bar, block_on, check_new, put};
use crate::error::{Error, Result};
use crate::terminal::{on_terminal, say};
use crate::train::Steps;
use clap::{Args, Subcommand};
use reqwest::{Method, multipart};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  polylora jobs create adapters/butler/train.jsonl --name butler --watch
  polylora jobs create data.jsonl --name support --validation held-out.jsonl \\
    --options '{\"r\": 16, \"use_dora\": true}'
  polylora jobs list
  polylora jobs watch ftjob-…                        a bar until it is over
  polylora jobs pause ftjob-…                        and resume, cancel
  polylora jobs plot ftjob-… --out loss.svg

The result is the adapter NAME: chat with it as with any other.";

/// A request; a job that is watched may take longer.
const TIMEOUT: Duration = Duration::from_secs(600);
/// A stream that the server ends after its own longest time is opened again.
const WATCH_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// Events that a page may have.
const PAGE: usize = 100;

/// Options of `jobs`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct JobsArgs {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Subcommand)]
enum Verb {
    /// Upload a file of examples and order a training job
    Create(Box<CreateArgs>),
    /// List training jobs, newest first
    List,
    /// Show one job in full, as JSON
    Show {
        /// Id of the job
        id: String,
    },
    /// Follow a job until it is over
    Watch {
        /// Id of the job
        id: String,
    },
    /// Stop a job after the step that it is at; what it has done is kept
    Pause {
        /// Id of the job
        id: String,
    },
    /// Let a paused job go on
    Resume {
        /// Id of the job
        id: String,
    },
    /// End a job whose result is not published yet
    Cancel {
        /// Id of the job
        id: String,
    },
    /// Draw a job's loss so far as an SVG
    Plot {
        /// Id of the job
        id: String,
        /// File to make
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

#[derive(Args)]
struct CreateArgs {
    /// Examples as JSON lines
    #[arg(value_name = "DATA.jsonl")]
    data: PathBuf,
    /// Name of the adapter that comes out
    #[arg(long)]
    name: String,
    /// What is trained (default: the server's base)
    #[arg(long)]
    model: Option<String>,
    /// Examples that are only measured
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// supervised or dpo
    #[arg(long, default_value = "supervised", value_parser = ["supervised", "dpo"])]
    method: String,
    /// Times that the examples are read (default: the server's choice)
    #[arg(long)]
    epochs: Option<u32>,
    /// Examples of an optimizer step (default: the server's choice)
    #[arg(long)]
    batch_size: Option<u32>,
    /// Decides every random choice
    #[arg(long)]
    seed: Option<u64>,
    /// More, as the `polylora` object of the API has it: {"r": 16, "lr": 1e-3}
    #[arg(long, value_name = "JSON")]
    options: Option<String>,
    /// Follow the job until it is over
    #[arg(long)]
    watch: bool,
}

pub fn run(args: JobsArgs) -> Result<()> {
    let follows = matches!(&args.verb, Verb::Watch { .. })
        || matches!(&args.verb, Verb::Create(args) if args.watch);
    let client = Client::new(&args.server, if follows { WATCH_TIMEOUT } else { TIMEOUT })?;
    block_on(async {
        match args.verb {
            Verb::Create(args) => create(&client, *args).await,
            Verb::List => list(&client).await,
            Verb::Show { id } => {
                let job = client.json(client.request(Method::GET, &route(&id, "")?)).await?;
                say(&format!("{job:#}\n"));
                Ok(())
            }
            Verb::Watch { id } => watch(&client, &id).await,
            Verb::Pause { id } => change(&client, &id, "/pause").await,
            Verb::Resume { id } => change(&client, &id, "/resume").await,
            Verb::Cancel { id } => change(&client, &id, "/cancel").await,
            Verb::Plot { id, out } => plot(&client, &id, &out).await,
        }
    })
}

/// The route of a job; an id that would lead elsewhere is refused here.
fn route(id: &str, rest: &str) -> Result<String> {
    if id.is_empty() || !id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        return Err(bad_argument(format!("'{id}' is no id of a job; see polylora jobs list")));
    }
    Ok(format!("/v1/fine_tuning/jobs/{id}{rest}"))
}

async fn create(client: &Client, args: CreateArgs) -> Result<()> {
    let options = match &args.options {
        None => Value::Null,
        Some(text) => match serde_json::from_str(text) {
            Ok(options @ Value::Object(_)) => options,
            _ => return Err(bad_argument(format!("--options '{text}' is no JSON object"))),
        },
    };
    let model = match args.model {
        Some(model) => model,
        None => client.models().await?.into_iter().next().unwrap_or_default(),
    };
    let mut hyperparameters = Map::new();
    for (name, given) in [("n_epochs", args.epochs), ("batch_size", args.batch_size)] {
        hyperparameters.extend(given.map(|n| (name.to_owned(), json!(n))));
    }
    let training = upload(client, &args.data).await?;
    let mut body = json!({
        "model": model,
        "training_file": training,
        "suffix": args.name,
        "method": {"type": args.method, args.method: {"hyperparameters": hyperparameters}},
    });
    if let Some(file) = &args.validation {
        body["validation_file"] = json!(upload(client, file).await?);
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    if !options.is_null() {
        body["polylora"] = options;
    }
    let request = client.request(Method::POST, "/v1/fine_tuning/jobs").json(&body);
    let job = client.json(request).await?;
    say(&format!("{}\n", line(&job)));
    match (args.watch, job["id"].as_str()) {
        (true, Some(id)) => watch(client, id).await,
        _ => Ok(()),
    }
}

/// Uploads a file; its id. Errors: what the server says of its first lines.
async fn upload(client: &Client, file: &Path) -> Result<String> {
    let unreadable = |e| bad_argument(format!("{} cannot be read: {e}", file.display()));
    let bytes = tokio::fs::read(file).await.map_err(unreadable)?;
    let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let part = multipart::Part::bytes(bytes).file_name(name);
    let form = multipart::Form::new().text("purpose", "fine-tune").part("file", part);
    let request = client.request(Method::POST, "/v1/files").multipart(form);
    let shown = client.json(request).await?;
    if let Some(why) = shown["status_details"].as_str() {
        return Err(bad_argument(format!("{}: {why}", file.display())));
    }
    Ok(shown["id"].as_str().unwrap_or_default().to_owned())
}

async fn list(client: &Client) -> Result<()> {
    let route = format!("/v1/fine_tuning/jobs?limit={PAGE}");
    let page = client.json(client.request(Method::GET, &route)).await?;
    let rows: Vec<&Value> = page["data"].as_array().into_iter().flatten().collect();
    if rows.is_empty() {
        say("no training jobs; order one with 'polylora jobs create DATA.jsonl --name NAME'\n");
    }
    for row in rows {
        say(&format!("{}\n", line(row)));
    }
    if page["has_more"] == true {
        say(&format!("and more than these {PAGE}\n"));
    }
    Ok(())
}

async fn change(client: &Client, id: &str, what: &str) -> Result<()> {
    let job = client.json(client.request(Method::POST, &route(id, what)?)).await?;
    say(&format!("{}\n", line(&job)));
    Ok(())
}

/// A bar of the steps on a terminal, else a line for each message; at the end the job.
async fn watch(client: &Client, id: &str) -> Result<()> {
    let events = route(id, "/events?stream=true")?;
    let bar = bar(TRAINING, 0)?;
    let mut stream = client.events(client.request(Method::GET, &events)).await?;
    while let Some(event) = stream.next().await? {
        let message = event["message"].as_str().unwrap_or_default();
        let data = &event["data"];
        match (data["step"].as_u64(), data["total_steps"].as_u64()) {
            (Some(step), Some(steps)) => {
                bar.set_length(steps);
                bar.set_position(step);
                bar.set_message(format!("loss {:.4}", data["train_loss"].as_f64().unwrap_or(0.0)));
                if bar.is_hidden() {
                    say(&format!("{message}\n"));
                }
            }
            _ => bar.suspend(|| say(&format!("{message}\n"))),
        }
    }
    bar.finish_and_clear();
    let job = client.json(client.request(Method::GET, &route(id, "")?)).await?;
    say(&format!("{}\n", line(&job)));
    match job["error"]["message"].as_str() {
        Some(why) => Err(Error::invalid("refused", on_terminal(why))),
        None => Ok(()),
    }
}

async fn plot(client: &Client, id: &str, out: &Path) -> Result<()> {
    check_new(out)?;
    let mut figures = Vec::new();
    let mut after = String::new();
    loop {
        let page = route(id, &format!("/events?limit={PAGE}{after}"))?;
        let page = client.json(client.request(Method::GET, &page)).await?;
        let events: Vec<&Value> = page["data"].as_array().into_iter().flatten().collect();
        let steps = events.iter().map(|event| event["data"].clone());
        figures.extend(steps.filter(|data| data["step"].is_u64()));
        match events.last().and_then(|event| event["id"].as_str()) {
            Some(last) if page["has_more"] == true => after = format!("&after={last}"),
            _ => break,
        }
    }
    figures.reverse();
    put(out, &Steps::of(figures.into_iter()).picture())
}

/// One job on one line: `ftjob-…  running 12/36  support  support@4`.
fn line(job: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let extra = &job["polylora"];
    let mut state = text(&job["status"]);
    if extra["paused"] == true {
        state = "paused".to_owned();
    }
    if let (Some(step), Some(steps)) = (extra["step"].as_u64(), extra["steps"].as_u64()) {
        state += &format!(" {step}/{steps}");
    }
    [text(&job["id"]), state, text(&extra["name"]), text(&job["fine_tuned_model"])]
        .into_iter()
        .filter(|t| !t.is_empty())
        .collect::<Vec<_>>()
        .join("  ")
}
