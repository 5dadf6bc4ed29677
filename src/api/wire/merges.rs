//! `/v1/merges`: orders, jobs, progress.

use crate::merge::spec::{Election, Options, OutputScale, Units};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// A merge as it is to be.
#[derive(Deserialize, ToSchema)]
pub struct MergeFields {
    /// Adapters to merge, two at least.
    pub sources: Vec<MergeSource>,
    /// Default `ties_svd`, of one source `svd`.
    #[schema(example = "lego")]
    pub method: Option<String>,
    pub options: Option<MergeOptions>,
    /// Decides every random choice; default 0.
    pub seed: Option<u64>,
    /// Of the adapter that comes out: a new name, or a new version of one. Needed unless `dry_run`.
    #[schema(example = "both")]
    pub name: Option<String>,
    /// Held-out examples, a list for each source that has some; their losses join the report.
    pub evaluation: Option<Vec<EvaluationFields>>,
    /// Merge sources whose configs name different base models.
    pub any_base: Option<bool>,
    /// Answer how much the sources are in each other's way, and make no job.
    pub dry_run: Option<bool>,
}

/// An adapter and its share.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeSource {
    /// A name, `name@version`, or an alias (the version of its largest weight). The version is
    /// fixed when the job comes in.
    #[schema(example = "pirate@2")]
    pub model: String,
    /// May be negative; default 1.
    pub weight: Option<f64>,
}

/// As the options of `polylora merge`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeOptions {
    /// Rank of the result; default: the sources' largest.
    pub rank: Option<usize>,
    /// Take `rank` as the mean and give sites more or less by their effective rank.
    pub spread: Option<bool>,
    /// Share of entries kept by ties, dare, magnitude_prune and breadcrumbs.
    pub density: Option<f64>,
    /// Share of the largest entries that breadcrumbs drops.
    pub outliers: Option<f64>,
    /// How ties elects signs: `total` or `frequency`.
    #[schema(value_type = Option<String>)]
    pub election: Option<Election>,
    /// What lego clusters: `raw` or `canonical` units.
    #[schema(value_type = Option<String>)]
    pub units: Option<Units>,
    /// Leave lego's centroids as short as averaging makes them.
    pub plain_centroids: Option<bool>,
    /// What lego scales its result with: `fit`, `paper` or `one`.
    #[schema(value_type = Option<String>)]
    pub output_scale: Option<OutputScale>,
    /// Starts of lego's clustering.
    pub restarts: Option<usize>,
}

impl MergeOptions {
    /// With the defaults of what was not said.
    pub fn options(&self) -> Options {
        let usual = Options::default();
        Options {
            rank: self.rank,
            spread: self.spread.unwrap_or(usual.spread),
            density: self.density.unwrap_or(usual.density),
            outliers: self.outliers.unwrap_or(usual.outliers),
            election: self.election.unwrap_or(usual.election),
            units: self.units.unwrap_or(usual.units),
            centroid_norms: self.plain_centroids.map_or(usual.centroid_norms, |plain| !plain),
            output: self.output_scale.unwrap_or(usual.output),
            restarts: self.restarts.unwrap_or(usual.restarts),
        }
    }
}

/// What a source was trained for, held out.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluationFields {
    /// One of the sources, as it is called there. Its chat template renders the examples.
    pub model: String,
    pub data: Vec<EvaluationExample>,
}

/// A conversation that ends with the right answer.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvaluationExample {
    /// A conversation that ends with the answer to be judged.
    pub messages: Vec<Value>,
}

#[derive(Serialize, ToSchema)]
pub struct MergeList {
    #[schema(example = "list")]
    pub object: &'static str,
    /// Newest first.
    pub data: Vec<MergeShown>,
}

/// One job.
#[derive(Serialize, ToSchema)]
pub struct MergeShown {
    #[schema(example = "merge")]
    pub object: &'static str,
    pub id: String,
    pub name: String,
    /// `queued`, `running`, `done`, `failed` or `cancelled`
    pub state: &'static str,
    /// Of a running one: `merging`, `publishing` or `evaluating`.
    pub stage: Option<&'static str>,
    /// Of the merging, since it last began.
    pub progress: Option<MergeProgress>,
    pub method: &'static str,
    pub sources: Vec<MergeSourceShown>,
    /// Of what the method draws; the same seed gives the same bytes.
    pub seed: u64,
    /// How often it began anew because the server had ended under it.
    pub restarted: u64,
    /// Unix seconds
    pub created: u64,
    /// Unix seconds
    pub started: Option<u64>,
    /// Unix seconds
    pub ended: Option<u64>,
    /// What came out; servable at once.
    pub result: Option<MergeResult>,
    /// Why it failed.
    pub error: Option<MergeFailure>,
}

#[derive(Serialize, ToSchema)]
pub struct MergeProgress {
    /// Sites done; with `spread` each counts twice.
    pub done: usize,
    /// Sites in all, counted alike.
    pub total: usize,
}

#[derive(Serialize, ToSchema)]
pub struct MergeSourceShown {
    /// As it was asked for.
    pub model: String,
    /// `name@version` that it was.
    pub id: String,
    /// Of the version that was current when the job was made.
    pub digest: String,
    pub weight: f64,
}

#[derive(Serialize, ToSchema)]
pub struct MergeResult {
    /// `name@version`
    pub id: String,
    pub digest: String,
}

#[derive(Serialize, ToSchema)]
pub struct MergeFailure {
    /// As in an error response.
    pub code: String,
    pub message: String,
}
