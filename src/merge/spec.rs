//! What a merge is asked to do: method, sources, options, and which of them fit together.
//!
//! Owns the names that the command line, a job and a report share, and every check that needs no
//! factors. Never computes. The thing to know: a spec with its seed decides the result to the last
//! bit, so all of it goes into the report.

use crate::adapters::format::config::RANK_MAX;
use crate::error::{Error, Result, brief};
use serde::{Deserialize, Serialize};

/// How adapters become one. `docs/merging.md` has a line on each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Concatenated ranks: exactly Σ w·s·B·A.
    Cat,
    /// The best rank-k approximation of that sum.
    Svd,
    /// Weighted sums of A and of B, as PEFT does it: not the sum of the products.
    Linear,
    Ties,
    DareLinear,
    DareTies,
    MagnitudePrune,
    /// As the four above, on the products instead of the factors, then truncated.
    TiesSvd,
    DareLinearSvd,
    DareTiesSvd,
    MagnitudePruneSvd,
    /// Products without their largest and their smallest entries, summed and truncated.
    Breadcrumbs,
    /// Spherical interpolation of two adapters' products, site by site.
    Slerp,
    /// Straight interpolation of two versions of an adapter.
    Interpolate,
    /// Rank-one units clustered; a centroid of each cluster (LoRA-LEGO).
    Lego,
    /// Sources that share all A, or all B: the sum at their own rank.
    Family,
}

/// Which entries a method keeps of each source, and how it adds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    Sum,
    /// Largest magnitudes kept, then summed.
    Prune,
    /// Largest magnitudes kept, one sign elected per entry, mean of those that have it.
    Ties,
    /// Random entries kept and rescaled, then summed.
    DareSum,
    /// Random entries kept and rescaled, then as in TIES.
    DareTies,
    /// Neither the largest nor the smallest magnitudes, summed.
    Crumbs,
}

/// What an entrywise rule is applied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A and B each for itself.
    Factors,
    /// The product s·B·A, which is made in full.
    Products,
}

impl Method {
    pub const ALL: [Self; 16] = [
        Self::Cat,
        Self::Svd,
        Self::Linear,
        Self::Ties,
        Self::DareLinear,
        Self::DareTies,
        Self::MagnitudePrune,
        Self::TiesSvd,
        Self::DareLinearSvd,
        Self::DareTiesSvd,
        Self::MagnitudePruneSvd,
        Self::Breadcrumbs,
        Self::Slerp,
        Self::Interpolate,
        Self::Lego,
        Self::Family,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Cat => "cat",
            Self::Svd => "svd",
            Self::Linear => "linear",
            Self::Ties => "ties",
            Self::DareLinear => "dare_linear",
            Self::DareTies => "dare_ties",
            Self::MagnitudePrune => "magnitude_prune",
            Self::TiesSvd => "ties_svd",
            Self::DareLinearSvd => "dare_linear_svd",
            Self::DareTiesSvd => "dare_ties_svd",
            Self::MagnitudePruneSvd => "magnitude_prune_svd",
            Self::Breadcrumbs => "breadcrumbs",
            Self::Slerp => "slerp",
            Self::Interpolate => "interpolate",
            Self::Lego => "lego",
            Self::Family => "family",
        }
    }

    /// What an order asks for. Without a name: several sources by what keeps most of them without
    /// tuned weights (`benches/merge_table.py`); one is best cut to its largest singular values.
    /// Errors: as `named`.
    pub fn asked(name: Option<&str>, sources: usize) -> Result<Self> {
        match name {
            Some(name) => Self::named(name),
            None if sources > 1 => Ok(Self::TiesSvd),
            None => Ok(Self::Svd),
        }
    }

    /// Errors: `invalid_merge`, with the names there are.
    pub fn named(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|m| m.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            let shown = brief(name);
            refuse(format!("`{shown}` is no merge method; there are {names}")).param("method")
        })
    }

    /// The entrywise rule of the methods that have one.
    pub fn entrywise(self) -> Option<(Rule, Form)> {
        Some(match self {
            Self::Linear => (Rule::Sum, Form::Factors),
            Self::Ties => (Rule::Ties, Form::Factors),
            Self::DareLinear => (Rule::DareSum, Form::Factors),
            Self::DareTies => (Rule::DareTies, Form::Factors),
            Self::MagnitudePrune => (Rule::Prune, Form::Factors),
            Self::TiesSvd => (Rule::Ties, Form::Products),
            Self::DareLinearSvd => (Rule::DareSum, Form::Products),
            Self::DareTiesSvd => (Rule::DareTies, Form::Products),
            Self::MagnitudePruneSvd => (Rule::Prune, Form::Products),
            Self::Breadcrumbs => (Rule::Crumbs, Form::Products),
            _ => return None,
        })
    }

    /// Whether the rank of the result can be chosen.
    pub fn takes_rank(self) -> bool {
        let of_sources = matches!(self, Self::Cat | Self::Family);
        !of_sources && !matches!(self.entrywise(), Some((_, Form::Factors)))
    }
}

/// One adapter of a merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its name in the report; unlike those of the others.
    pub name: String,
    /// May be negative.
    pub weight: f64,
}

/// How TIES chooses the sign of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Election {
    /// The sign of the sum of values.
    Total,
    /// The sign that most values have.
    Frequency,
}

/// What LEGO takes as the same unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Units {
    /// Rows of A and columns of B as they are in the files.
    Raw,
    /// ‖a‖ = ‖b‖, and (a, b) equals (−a, −b): what the product cannot tell apart is one unit.
    Canonical,
}

/// What LEGO multiplies its result with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputScale {
    /// The factor that brings the result nearest to the exact sum (least squares, per site).
    Fit,
    /// √(mean source rank / k), the paper's.
    Paper,
    One,
}

/// Everything that may be chosen beside method and sources. Options that a method does not use are
/// left at their defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Rank of the result at each site; the sources' largest when not said.
    pub rank: Option<usize>,
    /// Takes `rank` as the mean and gives sites more or less by effective rank.
    pub spread: bool,
    /// Share of entries kept by TIES, DARE, pruning and breadcrumbs: (0, 1].
    pub density: f64,
    /// Share of the largest entries that breadcrumbs drops: [0, 1).
    pub outliers: f64,
    pub election: Election,
    pub units: Units,
    /// Whether a LEGO centroid regains the mean norm of its members.
    pub centroid_norms: bool,
    pub output: OutputScale,
    /// Starts of LEGO's clustering; the best one counts.
    pub restarts: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rank: None,
            spread: false,
            density: 0.5,
            outliers: 0.01,
            election: Election::Total,
            units: Units::Canonical,
            centroid_norms: true,
            output: OutputScale::Fit,
            restarts: 8,
        }
    }
}

/// A whole order for a merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub method: Method,
    pub sources: Vec<Source>,
    #[serde(default)]
    pub options: Options,
    #[serde(default)]
    pub seed: u64,
}

/// Most sources of one merge.
pub const SOURCES_MAX: usize = 256;
/// Most starts of a clustering.
const RESTARTS_MAX: usize = 1000;

impl Spec {
    /// Checks all that needs no factors. Errors: `invalid_merge`, naming the option.
    pub fn check(&self) -> Result<()> {
        self.check_sources().map_err(|e| e.param("sources"))?;
        let (o, method) = (&self.options, self.method);
        if o.rank == Some(0) {
            return Err(refuse("`rank` must be at least 1").param("options.rank"));
        }
        if let Some(rank) = o.rank.filter(|rank| *rank > RANK_MAX) {
            let why = format!("`rank` is {rank}, not 1 to {RANK_MAX}");
            return Err(refuse(why).param("options.rank"));
        }
        if o.rank.is_some() && !method.takes_rank() {
            return Err(refuse(format!(
                "`rank` has no meaning for {}: the sources decide it; svd and lego truncate",
                method.name()
            ))
            .param("options.rank"));
        }
        if o.spread && (o.rank.is_none() || !method.takes_rank()) {
            let why = "`spread` needs `rank` and a method that takes one";
            return Err(refuse(why).param("options.spread"));
        }
        if !(o.density > 0.0 && o.density <= 1.0) {
            let why = format!("`density` is {}, not above 0 and up to 1", o.density);
            return Err(refuse(why).param("options.density"));
        }
        if !(o.outliers >= 0.0 && o.outliers < 1.0) {
            let why = format!("`outliers` is {}, not from 0 to below 1", o.outliers);
            return Err(refuse(why).param("options.outliers"));
        }
        if method == Method::Breadcrumbs && o.density + o.outliers > 1.0 {
            let why = "`density` and `outliers` are together more than 1";
            return Err(refuse(why).param("options.density"));
        }
        if !(1..=RESTARTS_MAX).contains(&o.restarts) {
            let why = format!("`restarts` is {}, not 1 to {RESTARTS_MAX}", o.restarts);
            return Err(refuse(why).param("options.restarts"));
        }
        Ok(())
    }

    fn check_sources(&self) -> Result<()> {
        let n = self.sources.len();
        if n == 0 || n > SOURCES_MAX {
            return Err(refuse(format!("{n} sources; expected 1 to {SOURCES_MAX}")));
        }
        for (i, s) in self.sources.iter().enumerate() {
            if !s.weight.is_finite() || s.weight.abs() > 1e6 {
                return Err(refuse(format!("the weight of {} is {}", s.name, s.weight)));
            }
            if self.sources[..i].iter().any(|other| other.name == s.name) {
                return Err(refuse(format!("two sources are named {}", s.name)));
            }
        }
        if matches!(self.method, Method::Slerp | Method::Interpolate) {
            let sum: f64 = self.sources.iter().map(|s| s.weight).sum();
            let inside = self.sources.iter().all(|s| (0.0..=1.0).contains(&s.weight));
            if n != 2 || !inside || (sum - 1.0).abs() > 1e-6 {
                return Err(refuse(format!(
                    "{} is between two sources: weights such as 0.3 and 0.7 that add up to 1",
                    self.method.name()
                )));
            }
        }
        Ok(())
    }
}

/// What cannot be asked for.
pub(super) fn refuse(why: impl Into<String>) -> Error {
    Error::invalid("invalid_merge", why)
}
