//! `polylora bench`: a load generator for any OpenAI-compatible server.
//!
//! Owns the options, the contenders and the order of rounds; `plan` decides what is sent, `load`
//! sends and times it, `report` sums up. Never speaks to anything but the public API. The thing to
//! know: contenders take turns within one run, so that a noisy machine is noisy for all of them,
//! the ratio is taken round by round, and each round tells what state the machine was in.

mod contender;
pub mod load;
pub mod plan;
pub mod report;

use super::client::{Client, ServerArgs};
use crate::cli::calls::bad_argument;
use crate::error::{Error, Result};
use crate::terminal::say;
use clap::Args;
use contender::Contender;
use plan::{Endpoint, Plan, Popularity, Target};
use polylora_kernels::{Machine, State};
use report::{Contest, Round};
use std::path::PathBuf;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  polylora bench
      16 streams on the base model of the local server
  polylora bench --models auto --popularity zipf:1.1
      every served model, some far more popular
  polylora bench --models pirate,sql --rate 4 --duration 60
      Poisson arrivals, four a second, for a minute
  polylora bench --rounds 5 --ignore-eos --max-tokens 64 \\
      --contender base=http://127.0.0.1:8080,model=smollm2-135m-instruct \\
      --contender mixed=http://127.0.0.1:8080,model=a1,model=a2,model=a3
      the price of mixing, as a ratio with its spread
  polylora bench --rounds 3 \\
      --contender ours=http://127.0.0.1:8080,model=a1,model=a2 \\
      --contender llama=http://127.0.0.1:8081,lora=0,lora=1
      another server beside it; llama-server knows its adapters by index
  polylora bench --machine
      no load; only the state of this machine

With --rate, times count from the moment a request was due, not from when it could be sent.
Prompts are random words, about one token each; the report has the server's own count.

Before each round the bench measures the machine that it runs on, while nobody computes: how long
a cache line takes from one core to another and back, and how fast all cores together read memory
(256 MiB, the fastest of three passes). On a shared host both change within minutes, by half and
more (two cores may or may not share a cache), and with them every rate: compare rates of rounds,
or of runs, in which they are alike. Ratios are taken within a round.";

const CONTENDER: &str = "NAME=URL[,model=M|,lora=N]...";

/// Options of `bench`.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Models to ask, with commas; auto: all that the server lists; default: the first that it
    /// lists
    #[arg(long, value_name = "A,B,C|auto", value_delimiter = ',')]
    models: Vec<String>,
    /// How requests choose among models: uniform, zipf:S (S > 0) or roundrobin
    #[arg(long, default_value = "roundrobin", value_name = "LAW")]
    popularity: Popularity,
    /// A server to compare, repeatable; the first is the one that ratios refer to. lora=N asks
    /// llama-server for its N-th adapter by the body's `lora` list, on the one model named or the
    /// first listed
    #[arg(long = "contender", value_name = CONTENDER)]
    contenders: Vec<String>,
    /// Requests in flight, each worker sending its next when the last one ended
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = within(1, 4096))]
    concurrency: u32,
    /// Requests per second instead, arriving as a Poisson process
    #[arg(long, value_name = "R", conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Requests per contender and round; default: 64, or as many as --duration allows
    #[arg(long, value_name = "N", value_parser = within(1, 1_000_000))]
    requests: Option<u32>,
    /// Seconds after which a round sends no more
    #[arg(long, value_name = "SECONDS", value_parser = within(1, 86_400))]
    duration: Option<u32>,
    /// Words of each prompt
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = within(1, 1_000_000))]
    prompt_tokens: u32,
    /// Prompts from a file instead, one a line
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_tokens")]
    prompt_file: Option<PathBuf>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = within(1, 1_000_000))]
    max_tokens: u32,
    /// Requests sent to each contender before anything is measured
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = within(0, 10_000))]
    warmup: u32,
    /// Turns of each contender
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = within(1, 1000))]
    rounds: u32,
    /// Which route to ask
    #[arg(long, value_enum, default_value_t = Endpoint::Chat)]
    endpoint: Endpoint,
    /// Go on past the end-of-text token, so that every answer has --max-tokens (not every server
    /// knows this)
    #[arg(long)]
    ignore_eos: bool,
    /// Same seed, same requests
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Seconds after which one request is given up
    #[arg(long, default_value_t = 600, value_name = "SECONDS", value_parser = within(1, 86_400))]
    timeout: u32,
    /// Only measure the machine's state, as before a round, and send nothing
    #[arg(long, conflicts_with = "contenders")]
    machine: bool,
    /// Write every figure as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn within(least: i64, most: i64) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(least..=most)
}

pub fn run(args: BenchArgs) -> Result<()> {
    if args.rate.is_some_and(|r| !r.is_finite() || r <= 0.0) {
        return Err(bad_argument("--rate must be above 0"));
    }
    if args.machine {
        let state = Machine::new(cores()).state();
        say(&format!("{state}\n"));
        return write(&args, report::state_json(&state));
    }
    crate::cli::calls::block_on(async {
        let contest = contest(&args).await?;
        say(&contest.table());
        write(&args, contest.json(options(&args)))?;
        match contest.answered() {
            0 => Err(Error::fault("no request was answered; see the errors above")),
            _ => Ok(()),
        }
    })
}

/// The report, where one is wanted.
fn write(args: &BenchArgs, report: serde_json::Value) -> Result<()> {
    let Some(path) = &args.json else { return Ok(()) };
    std::fs::write(path, format!("{report:#}\n"))
        .map_err(|e| bad_argument(format!("--json {}: {e}", path.display())))
}

/// What this process may use.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Warms up, then lets the contenders take turns.
pub async fn contest(args: &BenchArgs) -> Result<Contest> {
    let contenders = contenders(args).await?;
    let prompts = match &args.prompt_file {
        None => Vec::new(),
        Some(path) => lines_of(path)?,
    };
    let mut contest = Contest::new(&contenders);
    for (c, contender) in contenders.iter().enumerate() {
        let mut plan = plan(args, twins(&contenders, c), u32::MAX, contender, &prompts);
        (plan.rate, plan.duration) = (None, None);
        plan.requests = Some(args.warmup as usize);
        load::run(&contender.client, &plan).await;
    }
    let machine = Machine::new(cores());
    for round in 0..args.rounds {
        let state: State = machine.state();
        eprintln!("round {} machine: {state}", round + 1);
        contest.begin(state);
        for turn in 0..contenders.len() {
            // Each round begins with another contender: none always runs on the warmer machine.
            let c = (turn + round as usize) % contenders.len();
            let plan = plan(args, twins(&contenders, c), round, &contenders[c], &prompts);
            let (outcomes, wall) = load::run(&contenders[c].client, &plan).await;
            contest.add(c, Round::new(outcomes, wall));
            eprintln!("round {} {}: {}", round + 1, contenders[c].name, contest.last(c));
        }
    }
    Ok(contest)
}

/// How many contenders before this one ask the same server.
fn twins(contenders: &[Contender], c: usize) -> usize {
    contenders[..c].iter().filter(|other| other.client.url == contenders[c].client.url).count()
}

fn plan(args: &BenchArgs, twins: usize, round: u32, c: &Contender, prompts: &[String]) -> Plan {
    let requests = args.requests.map(|n| n as usize);
    Plan {
        // Other words each time: a prompt that its server has seen would be answered from a prefix
        // cache. Contenders on different servers get the same words and popularities.
        seed: plan::mix(&[args.seed, twins as u64, u64::from(round)]),
        targets: c.targets.clone(),
        popularity: args.popularity,
        prompts: prompts.to_vec(),
        prompt_words: args.prompt_tokens as usize,
        endpoint: args.endpoint,
        tokens_max: args.max_tokens,
        ignore_eos: args.ignore_eos,
        concurrency: args.concurrency as usize,
        rate: args.rate,
        requests: requests.or(if args.duration.is_none() { Some(64) } else { None }),
        duration: args.duration.map(|s| Duration::from_secs(u64::from(s))),
    }
}

/// A contender as it was written.
struct Wanted {
    name: String,
    url: String,
    models: Vec<String>,
    loras: Vec<u32>,
}

/// Those of `--contender`, or the one server of `--url`.
async fn contenders(args: &BenchArgs) -> Result<Vec<Contender>> {
    let mut wanted = Vec::new();
    if args.contenders.is_empty() {
        let (name, url) = ("bench".to_owned(), args.server.url.clone());
        wanted.push(Wanted { name, url, models: args.models.clone(), loras: Vec::new() });
    }
    for text in &args.contenders {
        wanted.push(contender(text, &args.models)?);
    }
    let mut contenders = Vec::new();
    for Wanted { name, url, models, loras } in wanted {
        let server = ServerArgs { url, api_key: args.server.api_key.clone() };
        let client = Client::new(&server, Duration::from_secs(u64::from(args.timeout)))?;
        let models = match models.as_slice() {
            [] => client.models().await?.into_iter().take(1).collect(),
            [auto] if auto == "auto" => client.models().await?,
            named => named.to_vec(),
        };
        if models.is_empty() {
            return Err(Error::not_found(
                "model_not_found",
                format!("{} serves no model", client.url),
            ));
        }
        contenders.push(Contender { name, client, targets: targets(&models, &loras) });
    }
    Ok(contenders)
}

/// Each adapter on the first model, else each model.
fn targets(models: &[String], loras: &[u32]) -> Vec<Target> {
    let target = |model: &String, lora| Target { model: model.clone(), lora };
    match loras {
        [] => models.iter().map(|m| target(m, None)).collect(),
        loras => loras.iter().map(|l| target(&models[0], Some(*l))).collect(),
    }
}

/// [`CONTENDER`] to name, address and targets; `models` when it names neither model nor adapter.
fn contender(text: &str, models: &[String]) -> Result<Wanted> {
    let wrong = || bad_argument(format!("--contender '{text}' is not {CONTENDER}"));
    let mut parts = text.split(',');
    let (name, url) = parts.next().and_then(|p| p.split_once('=')).ok_or_else(wrong)?;
    let (name, url) = (name.to_owned(), url.to_owned());
    let mut wanted = Wanted { name, url, models: Vec::new(), loras: Vec::new() };
    for part in parts {
        match part.split_once('=').ok_or_else(wrong)? {
            ("model", model) => wanted.models.push(model.to_owned()),
            ("lora", index) => wanted.loras.push(index.parse().map_err(|_| {
                bad_argument(format!("--contender '{text}': '{part}' is no adapter's index"))
            })?),
            _ => return Err(wrong()),
        }
    }
    if !wanted.loras.is_empty() && wanted.models.len() > 1 {
        return Err(bad_argument(format!("--contender '{text}': lora=N goes with one model=M")));
    }
    if wanted.loras.is_empty() && wanted.models.is_empty() {
        wanted.models = models.to_vec();
    }
    Ok(wanted)
}

fn lines_of(path: &PathBuf) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| bad_argument(format!("--prompt-file {}: {e}", path.display())))?;
    let lines: Vec<String> =
        text.lines().filter(|l| !l.trim().is_empty()).map(str::to_owned).collect();
    if lines.is_empty() {
        return Err(bad_argument(format!("--prompt-file {} has no lines", path.display())));
    }
    Ok(lines)
}

/// What was asked, for the JSON report; a key is not part of it.
fn options(args: &BenchArgs) -> serde_json::Value {
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "seed": args.seed,
        "rounds": args.rounds,
        "popularity": args.popularity.to_string(),
        "concurrency": if args.rate.is_none() { Some(args.concurrency) } else { None },
        "rate": args.rate,
        "requests": args.requests,
        "duration_seconds": args.duration,
        "prompt_words": if args.prompt_file.is_none() { Some(args.prompt_tokens) } else { None },
        "tokens_max": args.max_tokens,
        "warmup": args.warmup,
        "endpoint": args.endpoint.path(),
        "ignore_eos": args.ignore_eos,
        "cores": cores(),
    })
}
