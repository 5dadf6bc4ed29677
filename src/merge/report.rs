//! What a merge says of itself: how far from the exact sum, at each site and in all.
//!
//! Owns the measures and the report's form. Never makes a product: norms, errors and spectra come
//! from factors. The thing to know: errors are against `cat` with the same weights, whatever the
//! method, so reports of different methods compare.

use super::spec::Spec;
use super::stack::{Part, Product, Stack};
use crate::adapters::format::factors::{FactorSite, ModuleFactors};
use crate::error::Result;
use faer::Mat;
use serde::Serialize;

/// Leading singular directions that alignment looks at.
const DIRECTIONS: usize = 4;

/// The report of a whole merge.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub spec: Spec,
    pub overall: Overall,
    pub sites: Vec<SiteReport>,
}

/// All sites as if they were one matrix.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Overall {
    pub sites: usize,
    pub parameters: usize,
    /// ‖merged − exact‖ / ‖exact‖
    pub relative_error: f64,
    pub norm_exact: f64,
    pub norm: f64,
    /// Means over sites, weighted by ‖exact‖².
    pub effective_rank_exact: f64,
    pub effective_rank: f64,
    pub alignment: Option<f64>,
    pub cosine: Option<f64>,
}

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteReport {
    /// Module path, e.g. `model.layers.3.self_attn.q_proj`.
    pub site: String,
    pub projection: &'static str,
    pub layer: Option<usize>,
    pub inputs: usize,
    pub outputs: usize,
    /// Rank of the result.
    pub rank: usize,
    /// Frobenius norm of the result.
    pub norm: f64,
    /// ‖merged − exact‖ / ‖exact‖; 0 where both are zero.
    pub relative_error: f64,
    /// exp of the entropy of the normalised singular values.
    pub effective_rank: f64,
    #[serde(flatten)]
    pub survey: Survey,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lego: Option<LegoReport>,
}

/// What is known of a site before anything is merged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Survey {
    /// One a source; 0 where it has no factors here.
    pub source_ranks: Vec<usize>,
    /// ‖s·B·A‖ of each source, without its weight.
    pub source_norms: Vec<f64>,
    /// Frobenius norm of the exact weighted sum.
    pub norm_exact: f64,
    pub effective_rank_exact: f64,
    /// How much the sources' leading singular directions overlap, inputs and outputs, mean over
    /// pairs: 0 they do not meet and merge without loss of either, 1 they use the same ones.
    pub alignment: Option<f64>,
    /// ⟨ΔW_i, ΔW_j⟩ / ‖ΔW_i‖‖ΔW_j‖, mean over pairs: where directions meet, do they agree?
    pub cosine: Option<f64>,
}

/// What LEGO did at a site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LegoReport {
    pub clusters: Vec<ClusterReport>,
    /// Sum of squared distances of units to their centroids.
    pub inertia: f64,
    /// The same as a share of the units' squared norms.
    pub inertia_relative: f64,
    /// What the product was multiplied with.
    pub output_scale: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClusterReport {
    pub size: usize,
    pub inertia: f64,
    /// Units of each source that has factors at the site.
    pub origins: Vec<usize>,
}

/// Looks at a site before it is merged.
pub fn survey(stack: &Stack, parts: &[Part<'_>], sources: usize) -> Result<Survey> {
    let worth = stack.worth(&parts.iter().map(Part::coefficient).collect::<Vec<_>>());
    let spectrum = stack.core(&worth)?.values();
    let mut source_ranks = vec![0; sources];
    let mut source_norms = vec![0.0; sources];
    let mut directions = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let (left, right, values) = stack.directions(i)?;
        source_ranks[part.source] = part.factors.dims.rank;
        let scale = f64::from(part.factors.scale).abs();
        source_norms[part.source] = scale * norm(&values);
        let top = values.iter().take(DIRECTIONS).filter(|v| **v > 1e-9 * values[0]).count();
        directions.push((left, right, top));
    }
    let (alignment, cosine) = pairs(stack, parts, &directions, &source_norms);
    Ok(Survey {
        source_ranks,
        source_norms,
        norm_exact: norm(&spectrum),
        effective_rank_exact: effective_rank(&spectrum),
        alignment,
        cosine,
    })
}

type Directions = (Mat<f64>, Mat<f64>, usize);

/// Means over pairs of sources that both change something here.
fn pairs(
    stack: &Stack,
    parts: &[Part<'_>],
    directions: &[Directions],
    norms: &[f64],
) -> (Option<f64>, Option<f64>) {
    let overlap = |x: &Mat<f64>, y: &Mat<f64>, top: usize| {
        let cosines = x.subcols(0, top).transpose() * y.subcols(0, top);
        cosines.squared_norm_l2() / top as f64
    };
    let (mut alignment, mut cosine, mut count) = (0.0, 0.0, 0usize);
    for i in 0..parts.len() {
        for j in i + 1..parts.len() {
            let ((left, right, n), (other_left, other_right, m)) = (&directions[i], &directions[j]);
            let top = (*n).min(*m);
            if top == 0 {
                continue;
            }
            alignment += overlap(left, other_left, top) / 2.0;
            alignment += overlap(right, other_right, top) / 2.0;
            let scales = f64::from(parts[i].factors.scale) * f64::from(parts[j].factors.scale);
            let both = norms[parts[i].source] * norms[parts[j].source];
            cosine += scales * stack.inner(i, j) / both;
            count += 1;
        }
    }
    let mean = |sum: f64| (count > 0).then(|| sum / count as f64);
    (mean(alignment), mean(cosine))
}

/// What was measured of the result of one site.
pub struct Measured {
    pub norm: f64,
    /// Frobenius norm of merged − exact.
    pub error: f64,
    pub effective_rank: f64,
}

/// Measures the rounded result against the exact sum, in f64 and in factors.
pub fn measure(stack: &Stack, parts: &[Part<'_>], merged: &Product) -> Result<Measured> {
    let coefficients: Vec<f64> = parts.iter().map(Part::coefficient).collect();
    let worth = stack.worth(&coefficients);
    let (n, k) = (stack.ranks(), merged.a.ncols());
    // exact − merged is itself a product of stacked factors, and its norm the sum over their Grams.
    // Squares cancel to 1e-16 of ‖exact‖², so errors are right to about 1e-8.
    let exact = stack.grams();
    let own = (merged.a.transpose() * &merged.a, merged.b.transpose() * &merged.b);
    let cross = (stack.a.transpose() * &merged.a, stack.b.transpose() * &merged.b);
    let mut squares = [0.0; 3];
    for i in 0..n {
        for j in 0..n {
            squares[0] += worth[i] * worth[j] * exact.0[(i, j)] * exact.1[(i, j)];
        }
        for c in 0..k {
            squares[1] += worth[i] * cross.0[(i, c)] * cross.1[(i, c)];
        }
    }
    for c in 0..k {
        for d in 0..k {
            squares[2] += own.0[(c, d)] * own.1[(c, d)];
        }
    }
    let [exact, cross, own] = squares;
    Ok(Measured {
        norm: own.max(0.0).sqrt(),
        error: (exact - 2.0 * cross + own).max(0.0).sqrt(),
        effective_rank: effective_rank(&merged.values()?),
    })
}

impl SiteReport {
    pub fn new(
        site: FactorSite,
        merged: &Product,
        survey: Survey,
        measured: &Measured,
        lego: Option<LegoReport>,
    ) -> Self {
        let relative = |x: f64| if x == 0.0 { 0.0 } else { x / survey.norm_exact };
        Self {
            site: site.path(),
            projection: site.name(),
            layer: site.layer(),
            inputs: merged.a.nrows(),
            outputs: merged.b.nrows(),
            rank: merged.a.ncols(),
            norm: measured.norm,
            relative_error: relative(measured.error),
            effective_rank: measured.effective_rank,
            survey,
            lego,
        }
    }
}

impl Overall {
    pub fn of(sites: &[SiteReport]) -> Self {
        let square = |s: &SiteReport| s.survey.norm_exact.powi(2);
        let exact: f64 = sites.iter().map(square).sum();
        let error: f64 = sites.iter().map(|s| s.relative_error.powi(2) * square(s)).sum();
        let all = |of: &dyn Fn(&SiteReport) -> f64| {
            sites.iter().map(|s| square(s) * of(s)).sum::<f64>() / exact.max(f64::MIN_POSITIVE)
        };
        let some = |of: &dyn Fn(&SiteReport) -> Option<f64>| {
            let known: Vec<(f64, f64)> =
                sites.iter().filter_map(|s| Some((square(s), of(s)?))).collect();
            let weight: f64 = known.iter().map(|(w, _)| w).sum();
            (weight > 0.0).then(|| known.iter().map(|(w, v)| w * v).sum::<f64>() / weight)
        };
        Self {
            sites: sites.len(),
            parameters: sites.iter().map(|s| s.rank * (s.inputs + s.outputs)).sum(),
            relative_error: if error == 0.0 { 0.0 } else { (error / exact).sqrt() },
            norm_exact: exact.sqrt(),
            norm: sites.iter().map(|s| s.norm.powi(2)).sum::<f64>().sqrt(),
            effective_rank_exact: all(&|s| s.survey.effective_rank_exact),
            effective_rank: all(&|s| s.effective_rank),
            alignment: some(&|s| s.survey.alignment),
            cosine: some(&|s| s.survey.cosine),
        }
    }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Of what a module's factors add to its weight, largest first.
pub fn singular_values(factors: &ModuleFactors) -> Result<Vec<f64>> {
    Product::of(factors).values()
}

/// exp(−Σ p·ln p) of the singular values as shares; 0 for a zero matrix.
pub fn effective_rank(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    if sum <= 0.0 {
        return 0.0;
    }
    let shares = values.iter().map(|v| v / sum).filter(|p| *p > 0.0);
    (-shares.map(|p| p * p.ln()).sum::<f64>()).exp()
}
