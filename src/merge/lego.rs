//! LoRA-LEGO (arXiv 2409.16167): adapters cut into rank-one units, clustered, put together again.
//!
//! Owns what a unit is, its centroid and both reweightings. Never touches a product: everything
//! follows from the Gram matrices of the stacked factors. The thing to know: a unit is a row of A
//! with its column of B, weight and scale folded in; a merged adapter has one unit a cluster.
//!
//! Reweighting, as we read the paper: a centroid of n members that differ is shorter than they are,
//! so it is scaled to their mean norm (`centroid_norms`); and k units do not give the output
//! variance of r, so the product is scaled by √(r̄/k), r̄ the sources' mean rank
//! (`OutputScale::Paper`). The paper merges without weights and aims at a mean; where the exact
//! weighted sum is wanted, `Fit` replaces the constant by the least-squares factor. It is 1 when no
//! unit was merged with another, so all units kept give the sum itself.

use super::cluster::{Clustering, Points};
use super::report::{ClusterReport, LegoReport};
use super::spec::{Options, OutputScale, Units};
use super::stack::{Part, Product, Stack};
use crate::random::word;
use faer::Mat;

/// What the clustering of a site is seeded with.
pub struct Seed<'a> {
    pub seed: u64,
    pub path: &'a str,
}

/// One unit: a column of the stack with what it is multiplied with.
struct Unit {
    column: usize,
    /// Number of the part it came from.
    part: usize,
    /// Factor of a, sign included.
    a: f64,
    /// Factor of b.
    b: f64,
}

/// Linear combinations of the stack's columns: one of `a` and one of `b` a cluster, `[N, k]`.
struct Mix {
    a: Mat<f64>,
    b: Mat<f64>,
}

/// Merges the site into at most `rank` units; also says what became of the units.
pub fn merged(
    stack: &Stack,
    parts: &[Part<'_>],
    rank: usize,
    options: &Options,
    seed: &Seed<'_>,
) -> (Product, LegoReport) {
    let grams = stack.grams();
    let units = units(stack, parts, &grams, options.units);
    let product = |m: &Mat<f64>, f: fn(&Unit) -> f64, i: usize, j: usize| {
        f(&units[i]) * f(&units[j]) * m[(units[i].column, units[j].column)]
    };
    let n = units.len();
    let gram = Mat::from_fn(n, n, |i, j| {
        product(&grams.0, |u| u.a, i, j) + product(&grams.1, |u| u.b, i, j)
    });
    let points = Points { gram, mirrored: options.units == Units::Canonical };
    let words = [seed.seed, word(seed.path)];
    let clustering = points.clustered(rank, options.restarts, &words);
    let mut report = described(&points, &clustering, &units, parts.len());
    let mix = mix(stack.ranks(), &units, &clustering, &points, options.centroid_norms);
    let scale = match options.output {
        OutputScale::One => 1.0,
        OutputScale::Paper => {
            let ranks = parts.iter().map(|p| p.factors.dims.rank).sum::<usize>();
            (ranks as f64 / parts.len() as f64 / clustering.clusters.len().max(1) as f64).sqrt()
        }
        OutputScale::Fit => fit(&mix, &grams, &worth(stack, parts)),
    };
    report.output_scale = scale;
    if clustering.clusters.is_empty() {
        let zero = |rows| Mat::zeros(rows, 1);
        return (Product { a: zero(stack.inputs), b: zero(stack.outputs) }, report);
    }
    (Product { a: &stack.a * &mix.a, b: &stack.b * &mix.b * faer::Scale(scale) }, report)
}

fn worth(stack: &Stack, parts: &[Part<'_>]) -> Vec<f64> {
    stack.worth(&parts.iter().map(Part::coefficient).collect::<Vec<_>>())
}

/// The units that are not zero, strongest first, so that their order in the files is forgotten.
fn units(
    stack: &Stack,
    parts: &[Part<'_>],
    grams: &(Mat<f64>, Mat<f64>),
    kind: Units,
) -> Vec<Unit> {
    let mut out: Vec<(f64, Unit)> = Vec::new();
    for (number, (part, columns)) in parts.iter().zip(&stack.columns).enumerate() {
        let coefficient = part.coefficient();
        let root = coefficient.abs().sqrt();
        for column in columns.clone() {
            let norm = |m: &Mat<f64>| m[(column, column)].max(0.0).sqrt();
            let (a, b) = (norm(&grams.0), norm(&grams.1));
            let strength = a * b * coefficient.abs();
            if strength == 0.0 {
                continue;
            }
            let balance = if kind == Units::Canonical { (b / a).sqrt() } else { 1.0 };
            let unit = Unit {
                column,
                part: number,
                a: root * coefficient.signum() * balance,
                b: root / balance,
            };
            out.push((strength, unit));
        }
    }
    let content = |u: &Unit| stack.a.col_as_slice(u.column);
    out.sort_by(|(x, u), (y, v)| {
        let tie = || content(u).partial_cmp(content(v)).unwrap_or(std::cmp::Ordering::Equal);
        y.total_cmp(x).then_with(tie)
    });
    out.into_iter().map(|(_, unit)| unit).collect()
}

/// The centroids as combinations of columns, with their norms restored if asked for.
fn mix(
    columns: usize,
    units: &[Unit],
    clustering: &Clustering,
    points: &Points,
    norms: bool,
) -> Mix {
    let k = clustering.clusters.len();
    let mut mix = Mix { a: Mat::zeros(columns, k), b: Mat::zeros(columns, k) };
    for (c, members) in clustering.clusters.iter().enumerate() {
        let n = members.len() as f64;
        let mean_norm = members.iter().map(|(i, _)| points.gram[(*i, *i)].sqrt()).sum::<f64>() / n;
        let norm = square(members, points).sqrt() / n;
        // Members that cancel leave nothing to restore.
        let restored = if norms && norm > 1e-9 * mean_norm { mean_norm / norm } else { 1.0 };
        for (i, sign) in members {
            let (unit, share) = (&units[*i], sign * restored / n);
            mix.a[(unit.column, c)] += share * unit.a;
            mix.b[(unit.column, c)] += share * unit.b;
        }
    }
    mix
}

/// ‖Σ sᵢ·uᵢ‖² over the members.
fn square(members: &[(usize, f64)], points: &Points) -> f64 {
    let row =
        |i: usize, s: f64| members.iter().map(|(j, t)| s * t * points.gram[(i, *j)]).sum::<f64>();
    members.iter().map(|(i, s)| row(*i, *s)).sum::<f64>().max(0.0)
}

/// ⟨M, T⟩ / ⟨M, M⟩ for the mixed product M and the weighted sum T.
fn fit(mix: &Mix, grams: &(Mat<f64>, Mat<f64>), worth: &[f64]) -> f64 {
    let (a, b) = (mix.a.transpose() * &grams.0, mix.b.transpose() * &grams.1);
    let (k, n) = (a.nrows(), a.ncols());
    let with_sum: f64 =
        (0..n).map(|j| worth[j] * (0..k).map(|c| a[(c, j)] * b[(c, j)]).sum::<f64>()).sum();
    let (aa, bb) = (&a * &mix.a, &b * &mix.b);
    let with_self: f64 = (0..k).map(|d| (0..k).map(|c| aa[(c, d)] * bb[(c, d)]).sum::<f64>()).sum();
    if with_self > 0.0 { with_sum / with_self } else { 1.0 }
}

fn described(points: &Points, clustering: &Clustering, units: &[Unit], parts: usize) -> LegoReport {
    let total: f64 = (0..units.len()).map(|i| points.gram[(i, i)]).sum();
    let clusters = clustering.clusters.iter().map(|members| {
        let mut origins = vec![0; parts];
        members.iter().for_each(|(i, _)| origins[units[*i].part] += 1);
        let own: f64 = members.iter().map(|(i, _)| points.gram[(*i, *i)]).sum();
        let n = members.len() as f64;
        let inertia = (own - square(members, points) / n).max(0.0);
        ClusterReport { size: members.len(), inertia, origins }
    });
    LegoReport {
        clusters: clusters.collect(),
        inertia: clustering.inertia,
        inertia_relative: if total > 0.0 { clustering.inertia / total } else { 0.0 },
        output_scale: 1.0,
    }
}
