//! `polylora merge`: adapters in directories become one adapter in a directory.
//!
//! Owns reading the sources, the bar and what is printed and written. Never computes: `merge` does.
//! The thing to know: the result appears whole or not at all: it is made beside its place and
//! renamed.

use super::{bad_argument, say};
use crate::adapters::format::factors::{OpenAdapter, infer_shape, open};
use crate::adapters::format::{files::AdapterFiles, write};
use crate::error::{Error, Result};
use crate::merge::report::{Overall, Report, SiteReport};
use crate::merge::spec::{Election, Method, Options, OutputScale, Source, Spec, Units};
use crate::merge::{Merge, Merged, check_bases, check_source, picture};
use crate::model::{checkpoint::Checkpoint, source};
use crate::shape::ModelShape;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  polylora merge adapters/pirate=0.7 adapters/ticket-json=0.3 --out both    best rank-8 sum
  polylora merge a=1 b=1 c=1 --method lego --rank 16 --seed 7 --out abc     clustered units
  polylora merge a=0.5 b=0.5 --method cat --out ab                          exact, ranks add up
  polylora merge big --method svd --rank 8 --out small                      compress one adapter

Methods:
  cat                  exactly the weighted sum; ranks add up
  svd                  its best approximation of a given rank
  lego                 LoRA-LEGO: rank-one units clustered, a centroid of each cluster
  family               exact at the sources' rank, where they share A or B
  linear ties dare_linear dare_ties magnitude_prune
                       on A and B as PEFT does it: not the sum of the products
  ties_svd dare_linear_svd dare_ties_svd magnitude_prune_svd breadcrumbs
                       on the products made in full, then truncated
  slerp interpolate    between two adapters, weights adding up to 1

Writes adapter_config.json and adapter_model.safetensors (plain PEFT, alpha = r), and the report as
merge_report.json and merge_report.svg.";

/// Options of `merge`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct MergeArgs {
    /// Adapter directories, each with its weight (default 1)
    #[arg(value_name = "DIR[=WEIGHT]", required = true)]
    sources: Vec<String>,
    /// Directory to make for the result
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How to merge; see below
    #[arg(long, default_value = "svd")]
    method: String,
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
    if args.out.exists() {
        return Err(bad_argument(format!("{} exists already", args.out.display())));
    }
    let (dirs, sources) = sources(&args.sources)?;
    let spec = Spec {
        method: Method::named(&args.method)?,
        sources,
        options: options(&args),
        seed: args.seed,
    };
    spec.check()?;
    let paths: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
    let shape = shape(args.model.as_deref(), &paths)?;
    let adapters = opened(&spec, &paths, &shape, args.any_base)?;
    let base_model = adapters.iter().find_map(|a| a.summary().base_model.clone());
    let threads = threads(args.threads);
    let merged = merged(spec, &adapters, threads)?;
    publish(&args.out, &merged, base_model.as_deref())?;
    let digest = AdapterFiles::find(&args.out)?.digest()?;
    say(&format!("{}{}  {digest}\n", table(&merged.report), args.out.display()));
    Ok(())
}

fn threads(asked: Option<usize>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    asked.unwrap_or_else(cores).clamp(1, 64)
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
) -> Result<Vec<OpenAdapter>> {
    let mut adapters = Vec::with_capacity(dirs.len());
    for (dir, source) in dirs.iter().zip(&spec.sources) {
        let named = |e: Error| Error { message: format!("{}: {}", dir.display(), e.message), ..e };
        let adapter = open(dir, shape).map_err(named)?;
        check_source(&source.name, &adapter)?;
        adapters.push(adapter);
    }
    if !any_base {
        let bases = spec.sources.iter().zip(&adapters);
        let bases: Vec<(&str, Option<&str>)> =
            bases.map(|(s, a)| (s.name.as_str(), a.summary().base_model.as_deref())).collect();
        let hint = |e: Error| Error {
            message: format!("{}; --any-base merges them all the same", e.message),
            ..e
        };
        check_bases(&bases).map_err(hint)?;
    }
    Ok(adapters)
}

/// Runs the merge with a bar on a terminal.
fn merged(spec: Spec, adapters: &[OpenAdapter], threads: usize) -> Result<Merged> {
    let modules: Vec<_> = adapters.iter().map(OpenAdapter::modules).collect();
    let mut merge = Merge::new(spec, &modules)?;
    let style = indicatif::ProgressStyle::with_template("merging {bar:30} {pos}/{len} sites {eta}")
        .map_err(|e| Error::fault(format!("the bar: {e}")))?;
    let bar = indicatif::ProgressBar::new(merge.progress().total as u64).with_style(style);
    loop {
        let progress = merge.step(threads, &mut |source, place| adapters[source].read(place))?;
        bar.set_position(progress.done as u64);
        if progress.done == progress.total {
            bar.finish_and_clear();
            return merge.finish();
        }
    }
}

/// Writes the adapter and its report beside `out`, then moves them there.
fn publish(out: &Path, merged: &Merged, base_model: Option<&str>) -> Result<()> {
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fault = |e: std::io::Error| Error::fault(format!("cannot write {}: {e}", out.display()));
    let mut stage = tempfile::Builder::new();
    #[cfg(unix)]
    stage.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755));
    std::fs::create_dir_all(parent).map_err(fault)?;
    let staged = stage.prefix(".merge-").tempdir_in(parent).map_err(fault)?;
    write::write(staged.path(), &merged.modules, base_model)?;
    let json = serde_json::to_string_pretty(&merged.report)
        .map_err(|e| Error::fault(format!("the report: {e}")))?;
    std::fs::write(staged.path().join("merge_report.json"), json + "\n").map_err(fault)?;
    let svg = picture::heat_map(&merged.report);
    std::fs::write(staged.path().join("merge_report.svg"), svg).map_err(fault)?;
    std::fs::rename(staged.path(), out).map_err(fault)?;
    let _ = staged.keep(); // it is no longer there to be removed
    Ok(())
}

/// One line a projection, then one for all.
fn table(report: &Report) -> String {
    let mut names: Vec<&str> = Vec::new();
    for site in &report.sites {
        if !names.contains(&site.projection) {
            names.push(site.projection);
        }
    }
    let mut out = format!(
        "{:<14} {:>5} {:>9} {:>9} {:>10} {:>9} {:>8}\n",
        "projection", "sites", "rank", "error", "eff. rank", "alignment", "cosine"
    );
    for name in names {
        let sites: Vec<SiteReport> =
            report.sites.iter().filter(|s| s.projection == name).cloned().collect();
        let ranks = || sites.iter().map(|s| s.rank);
        let (least, most) = (ranks().min().unwrap_or(0), ranks().max().unwrap_or(0));
        let ranks = if least == most { least.to_string() } else { format!("{least}-{most}") };
        out += &line(name, &ranks, &Overall::of(&sites));
    }
    out + &line("all", "", &report.overall)
}

fn line(name: &str, ranks: &str, of: &Overall) -> String {
    let number = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.3}"));
    format!(
        "{name:<14} {:>5} {ranks:>9} {:>9.4} {:>10.2} {:>9} {:>8}\n",
        of.sites,
        of.relative_error,
        of.effective_rank,
        number(of.alignment),
        number(of.cosine)
    )
}
