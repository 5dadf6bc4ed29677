//! `polylora merge`: adapters in directories become one adapter in a directory.
//!
//! Owns reading the sources, the bar and what is printed and written. Never computes: `merge` does.
//! The thing to know: the result appears whole or not at all.

use crate::adapters::format::factors::{OpenAdapter, infer_shape, open};
use crate::adapters::format::{files::AdapterFiles, write};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::source;
use crate::cli::calls::{bad_argument, bar, check_new, made_whole, put, threads};
use crate::error::{Error, Result};
use crate::merge::compatibility::{Compatibility, CompatibilityReport};
use crate::merge::report::{Overall, Report, SiteReport};
use crate::merge::spec::{Election, Method, Options, OutputScale, Source, Spec, Units};
use crate::merge::{Merge, Merged, Progress, check_sources, picture};
use crate::shape::ModelShape;
use crate::terminal::say;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  polylora merge adapters/pirate adapters/ticket-json --out both            one for both tasks
  polylora merge a=0.7 b=0.3 --method svd --rank 8 --out ab                 best rank-8 sum
  polylora merge a=1 b=1 c=1 --method lego --rank 16 --seed 7 --out abc     clustered units
  polylora merge a=0.5 b=0.5 --method cat --out ab                          exact, ranks add up
  polylora merge big --method svd --rank 8 --out small                      compress one adapter
  polylora merge a b --survey                                               do they conflict?

Methods:
  cat                  exactly the weighted sum; ranks add up
  svd                  its best approximation of a given rank
  lego                 LoRA-LEGO: rank-one units clustered, a centroid of each cluster
  family               exact at the sources' rank, where they share A or B
  linear ties dare_linear dare_ties magnitude_prune
                       on A and B as PEFT does it: not the sum of the products
  ties_svd dare_linear_svd dare_ties_svd magnitude_prune_svd breadcrumbs
                       on the products made in full, then truncated; slow for large models
  slerp interpolate    between two adapters, weights adding up to 1

Writes adapter_config.json and adapter_model.safetensors (plain PEFT, alpha = r), and the report as
merge_report.json and merge_report.svg. Held-out losses need a model that runs: a server's
POST /v1/merges takes evaluation sets and adds them to the same report.";

/// Options of `merge`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct MergeArgs {
    /// Adapter directories, each with its weight (default 1)
    #[arg(value_name = "DIR[=WEIGHT]", required = true)]
    sources: Vec<String>,
    /// Directory to make for the result
    #[arg(long, value_name = "DIR", required_unless_present = "survey")]
    out: Option<PathBuf>,
    /// Merge nothing: print how much the sources overlap and disagree
    #[arg(long, conflicts_with = "out")]
    survey: bool,
    /// How to merge, see below (default: ties_svd, of one source svd)
    #[arg(long)]
    method: Option<String>,
    /// Rank of the result (default: the sources' largest)
    #[arg(long)]
    rank: Option<usize>,
    /// Take --rank as the mean and give sites more or less by their effective rank
    #[arg(long)]
    spread: bool,
    /// Share of entries kept by ties, dare, magnitude_prune and breadcrumbs
    #[arg(long, default_value_t = Options::default().density)]
    density: f64,
    /// Share of the largest entries that breadcrumbs drops
    #[arg(long, default_value_t = Options::default().outliers)]
    outliers: f64,
    /// How ties elects signs
    #[arg(long, default_value = "total")]
    election: ElectionArg,
    /// What lego clusters: units as in the files, or balanced and with aligned signs
    #[arg(long, default_value = "canonical")]
    units: UnitsArg,
    /// Leave lego's centroids as short as averaging makes them
    #[arg(long)]
    plain_centroids: bool,
    /// What lego scales its result with: least squares, the paper's √(r/k), or one
    #[arg(long, default_value = "fit")]
    output_scale: OutputScaleArg,
    /// Starts of lego's clustering
    #[arg(long, default_value_t = Options::default().restarts)]
    restarts: usize,
    /// Decides every random choice
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Base model to check the adapters against; without it their own shapes must agree
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Merge adapters whose configs name different base models
    #[arg(long)]
    any_base: bool,
    /// Sites merged at once (default: every core)
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ElectionArg {
    Total,
    Frequency,
}

#[derive(Clone, Copy, ValueEnum)]
enum UnitsArg {
    Raw,
    Canonical,
}

#[derive(Clone, Copy, ValueEnum)]
enum OutputScaleArg {
    Fit,
    Paper,
    One,
}

pub fn run(args: MergeArgs) -> Result<()> {
    args.out.as_deref().map_or(Ok(()), check_new)?;
    let (dirs, sources) = sources(&args.sources)?;
    let spec = Spec {
        method: Method::asked(args.method.as_deref(), sources.len())?,
        sources,
        options: options(&args),
        seed: args.seed,
    };
    spec.check()?;
    let paths: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
    let shape = shape(args.model.as_deref(), &paths)?;
    let (adapters, base_model) = opened(&spec, &paths, &shape, args.any_base)?;
    let modules: Vec<_> = adapters.iter().map(OpenAdapter::modules).collect();
    let mut merge = Merge::new(spec, &modules)?;
    let threads = threads(args.threads);
    let read = &mut |source: usize, place| adapters[source].read(place);
    let Some(out) = args.out else {
        advanced("looking", || merge.look(threads, read))?;
        say(&prospects(&merge.compatibility()));
        return Ok(());
    };
    advanced("merging", || merge.step(threads, read))?;
    let merged = merge.finish()?;
    publish(&out, &merged, base_model.as_deref())?;
    let digest = AdapterFiles::find(&out)?.digest()?;
    say(&format!("{}{}  {digest}\n", table(&merged.report), out.display()));
    Ok(())
}

/// `DIR=WEIGHT` of each; named by the last part of the path, in full where two are alike.
fn sources(given: &[String]) -> Result<(Vec<PathBuf>, Vec<Source>)> {
    let mut dirs = Vec::new();
    let mut sources: Vec<Source> = Vec::new();
    for text in given {
        let (dir, weight) = match text.rsplit_once('=') {
            Some((dir, weight)) => {
                let parsed = weight.parse::<f64>();
                let why = |_| bad_argument(format!("'{text}': {weight} is no weight"));
                (dir, parsed.map_err(why)?)
            }
            None => (text.as_str(), 1.0),
        };
        if !Path::new(dir).is_dir() {
            return Err(bad_argument(format!("{dir} is no directory on this machine")));
        }
        let short = Path::new(dir).file_name().map(|n| n.to_string_lossy().into_owned());
        let name = short.filter(|n| sources.iter().all(|s| s.name != *n));
        sources.push(Source { name: name.unwrap_or_else(|| dir.to_owned()), weight });
        dirs.push(PathBuf::from(dir));
    }
    Ok((dirs, sources))
}

fn options(args: &MergeArgs) -> Options {
    Options {
        rank: args.rank,
        spread: args.spread,
        density: args.density,
        outliers: args.outliers,
        election: match args.election {
            ElectionArg::Total => Election::Total,
            ElectionArg::Frequency => Election::Frequency,
        },
        units: match args.units {
            UnitsArg::Raw => Units::Raw,
            UnitsArg::Canonical => Units::Canonical,
        },
        centroid_norms: !args.plain_centroids,
        output: match args.output_scale {
            OutputScaleArg::Fit => OutputScale::Fit,
            OutputScaleArg::Paper => OutputScale::Paper,
            OutputScaleArg::One => OutputScale::One,
        },
        restarts: args.restarts,
    }
}

fn shape(model: Option<&str>, dirs: &[&Path]) -> Result<ModelShape> {
    match model {
        None => infer_shape(dirs),
        Some(name) => Ok(Checkpoint::open(&source::locate(name)?.path)?.shape),
    }
}

fn opened(
    spec: &Spec,
    dirs: &[&Path],
    shape: &ModelShape,
    any_base: bool,
) -> Result<(Vec<OpenAdapter>, Option<String>)> {
    let mut adapters = Vec::with_capacity(dirs.len());
    for dir in dirs {
        let named = |e: Error| Error { message: format!("{}: {}", dir.display(), e.message), ..e };
        adapters.push(open(dir, shape).map_err(named)?);
    }
    let hint = |e: Error| match e.code {
        "base_mismatch" => {
            let message = format!("{}; --any-base merges them all the same", e.message);
            Error { message, ..e }
        }
        _ => e,
    };
    let base_model = check_sources(spec, &adapters, any_base).map_err(hint)?;
    Ok((adapters, base_model))
}

/// Runs `step` until it is through, with a bar on a terminal.
fn advanced(what: &'static str, mut step: impl FnMut() -> Result<Progress>) -> Result<()> {
    let bar = bar("{msg} {bar:30} {pos}/{len} sites {eta}", 0)?.with_message(what);
    loop {
        let progress = step()?;
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
        if progress.done == progress.total {
            bar.finish_and_clear();
            return Ok(());
        }
    }
}

/// Writes the adapter and its report.
fn publish(out: &Path, merged: &Merged, base_model: Option<&str>) -> Result<()> {
    made_whole(out, |dir| {
        write::write(dir, &merged.modules, base_model)?;
        let json = serde_json::to_string_pretty(&merged.report)
            .map_err(|e| Error::fault(format!("the report: {e}")))?;
        put(&dir.join("merge_report.json"), &(json + "\n"))?;
        put(&dir.join("merge_report.svg"), &picture::heat_map(&merged.report))
    })
}

/// Names of projections in the order of sites, each once.
fn projections(all: impl Iterator<Item = &'static str>) -> Vec<&'static str> {
    let mut names = Vec::new();
    for name in all {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// `8`, or `4-12`.
fn span(ranks: impl Iterator<Item = usize> + Clone) -> String {
    let (least, most) = (ranks.clone().min().unwrap_or(0), ranks.max().unwrap_or(0));
    if least == most { least.to_string() } else { format!("{least}-{most}") }
}

fn number(v: Option<f64>) -> String {
    v.map_or("-".to_owned(), |v| format!("{v:.3}"))
}

/// One line a projection, then one for all.
fn table(report: &Report) -> String {
    let mut out = format!(
        "{:<14} {:>5} {:>9} {:>9} {:>10} {:>9} {:>8}\n",
        "projection", "sites", "rank", "error", "eff. rank", "alignment", "cosine"
    );
    for name in projections(report.sites.iter().map(|s| s.projection)) {
        let sites: Vec<SiteReport> =
            report.sites.iter().filter(|s| s.projection == name).cloned().collect();
        out += &line(name, &span(sites.iter().map(|s| s.rank)), &Overall::of(&sites));
    }
    out + &line("all", "", &report.overall)
}

fn line(name: &str, ranks: &str, of: &Overall) -> String {
    format!(
        "{name:<14} {:>5} {ranks:>9} {:>9.4} {:>10.2} {:>9} {:>8}\n",
        of.sites,
        of.relative_error,
        of.effective_rank,
        number(of.alignment),
        number(of.cosine)
    )
}

/// The same before anything is merged.
fn prospects(outlook: &CompatibilityReport) -> String {
    let mut out = format!(
        "{:<14} {:>5} {:>9} {:>10} {:>9} {:>8}\n",
        "projection", "sites", "rank", "eff. rank", "alignment", "cosine"
    );
    let mut line = |name: &str, ranks: &str, of: &Compatibility| {
        out += &format!(
            "{name:<14} {:>5} {ranks:>9} {:>10.2} {:>9} {:>8}\n",
            of.sites,
            of.effective_rank_exact,
            number(of.alignment),
            number(of.cosine)
        );
    };
    for name in projections(outlook.sites.iter().map(|s| s.projection)) {
        let sites = outlook.sites.iter().filter(|s| s.projection == name);
        line(name, &span(sites.clone().map(|s| s.rank)), &Compatibility::of(sites));
    }
    line("all", "", &outlook.overall);
    out
}
