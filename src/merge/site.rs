//! One site merged, by any method.
//!
//! Owns the choice of algorithm and what a method refuses once it sees the factors. Never looks at
//! another site: whatever sites share (the rank, the seed) comes in. The thing to know: a product
//! O × I is made only by the methods whose rule is about its entries.

use super::entrywise::Tasks;
use super::lego;
use super::report::{self, SiteReport};
use super::spec::{Form, Method, Rule, Spec, refuse};
use super::stack::{Part, Product, Stack};
use crate::adapters::format::factors::{FactorDims, FactorSite, ModuleFactors};
use crate::error::{Error, Result};
use crate::random::{Stream, word};
use faer::{Mat, MatRef};

/// Everything that decides a site's result beside the factors.
pub struct Order<'a> {
    pub spec: &'a Spec,
    pub site: FactorSite,
    /// Rank of the result, for methods that take one.
    pub rank: usize,
}

/// One site of the merged adapter.
pub struct MergedSite {
    pub factors: ModuleFactors,
    pub report: SiteReport,
}

/// Merges what the sources have at one site. Errors: `ranks_differ`, `not_a_family`,
/// `invalid_merge`, `non_finite_values`.
pub fn merge(order: &Order<'_>, parts: &[Part<'_>]) -> Result<MergedSite> {
    let stack = Stack::new(parts);
    let survey = report::survey(&stack, parts, order.spec.sources.len())?;
    let path = order.site.path();
    let mut lego = None;
    let product = match order.spec.method {
        Method::Cat => weighted(&stack, parts),
        Method::Svd | Method::Interpolate => {
            let worth = stack.worth(&parts.iter().map(Part::coefficient).collect::<Vec<_>>());
            stack.truncated(&worth, order.rank)?
        }
        Method::Slerp => stack.truncated(&stack.worth(&spherical(&stack, parts)), order.rank)?,
        Method::Lego => {
            let seed = lego::Seed { seed: order.spec.seed, path: &path };
            let options = &order.spec.options;
            let (product, report) = lego::merged(&stack, parts, order.rank, options, &seed);
            lego = Some(report);
            product
        }
        Method::Family => family(&stack, parts, &path)?,
        method => {
            let (rule, form) = method.entrywise().expect("all other methods are entrywise");
            match form {
                Form::Factors => entries_of_factors(order, parts, rule)?,
                Form::Products => entries_of_products(order, parts, rule)?,
            }
        }
    };
    let factors = product.rounded();
    if factors.a.iter().chain(&factors.b).any(|v| !v.is_finite()) {
        return Err(Error::unprocessable(
            "non_finite_values",
            format!("the merged factors of `{path}` are not finite: the sources' are too large"),
        ));
    }
    let product = Product::of(&factors);
    let measured = report::measure(&stack, parts, &product)?;
    let report = SiteReport::new(order.site, &product, survey, &measured, lego);
    Ok(MergedSite { factors, report })
}

/// All ranks side by side, coefficients in B.
fn weighted(stack: &Stack, parts: &[Part<'_>]) -> Product {
    let worth = stack.worth(&parts.iter().map(Part::coefficient).collect::<Vec<_>>());
    let mut b = stack.b.clone();
    for (n, w) in worth.iter().enumerate() {
        b.col_mut(n).iter_mut().for_each(|v| *v *= w);
    }
    Product { a: stack.a.clone(), b }
}

/// Coefficients of spherical interpolation: with θ the angle between the two products and t the
/// second weight, sin((1−t)θ)/sin θ and sin(tθ)/sin θ, each times the source's scale. Products that
/// are nearly parallel, or one alone, are interpolated straight.
fn spherical(stack: &Stack, parts: &[Part<'_>]) -> Vec<f64> {
    let straight: Vec<f64> = parts.iter().map(Part::coefficient).collect();
    if parts.len() < 2 {
        return straight;
    }
    let scales: Vec<f64> = parts.iter().map(|p| f64::from(p.factors.scale)).collect();
    let inner = |i: usize, j: usize| scales[i] * scales[j] * stack.inner(i, j);
    let norms = (inner(0, 0) * inner(1, 1)).sqrt();
    let cosine = inner(0, 1) / norms;
    if norms == 0.0 || cosine.abs() > 0.9995 {
        return straight;
    }
    let angle = cosine.acos();
    let arc = |i: usize| scales[i] * (parts[i].weight * angle).sin() / angle.sin();
    vec![arc(0), arc(1)]
}

/// The sum at the sources' own rank, where they share A or share B.
fn family(stack: &Stack, parts: &[Part<'_>], path: &str) -> Result<Product> {
    let rank = parts[0].factors.dims.rank;
    let same = |of: fn(&ModuleFactors) -> &[f32]| {
        parts.iter().all(|p| of(p.factors) == of(parts[0].factors))
    };
    let shared_a = same(|f| &f.a);
    if !shared_a && !same(|f| &f.b) {
        return Err(Error::unprocessable(
            "not_a_family",
            format!(
                "the sources share neither A nor B at `{path}`: only a family that was trained \
                 with one of them frozen merges exactly at its own rank; use cat or svd"
            ),
        ));
    }
    let sum = |m: &Mat<f64>| {
        let mut out = Mat::<f64>::zeros(m.nrows(), rank);
        for (part, columns) in parts.iter().zip(&stack.columns) {
            out += m.subcols(columns.start, rank) * faer::Scale(part.coefficient());
        }
        out
    };
    Ok(match shared_a {
        true => Product { a: stack.a.subcols(0, rank).to_owned(), b: sum(&stack.b) },
        false => Product { a: sum(&stack.a), b: stack.b.subcols(0, rank).to_owned() },
    })
}

/// PEFT's form: A and B each for itself, with √|w·s| on both and the sign on A.
fn entries_of_factors(order: &Order<'_>, parts: &[Part<'_>], rule: Rule) -> Result<Product> {
    let dims = parts[0].factors.dims;
    if let Some(other) = parts.iter().find(|p| p.factors.dims.rank != dims.rank) {
        let name = |p: &Part<'_>| &order.spec.sources[p.source].name;
        return Err(Error::unprocessable(
            "ranks_differ",
            format!(
                "{} mixes factors, which needs equal ranks: at `{}` {} has {} and {} has {}; the \
                 _svd form, svd and lego take any",
                order.spec.method.name(),
                order.site.path(),
                name(&parts[0]),
                dims.rank,
                name(other),
                other.factors.dims.rank
            ),
        ));
    }
    let tasks = |of: fn(&ModuleFactors) -> &Vec<f32>, signed: bool, which: u64| Tasks {
        tensors: parts.iter().map(|p| of(p.factors).clone()).collect(),
        weights: parts
            .iter()
            .map(|p| {
                let c = p.coefficient();
                c.abs().sqrt() * if signed && c < 0.0 { -1.0 } else { 1.0 }
            })
            .collect(),
        streams: streams(order, parts, which),
    };
    let options = &order.spec.options;
    let a = tasks(|f| &f.a, true, 0).merged(rule, options);
    let b = tasks(|f| &f.b, false, 1).merged(rule, options);
    Ok(Product::of(&ModuleFactors { dims, a, b, scale: 1.0 }))
}

/// The true changes, made in full, merged entry by entry and truncated.
fn entries_of_products(order: &Order<'_>, parts: &[Part<'_>], rule: Rule) -> Result<Product> {
    let FactorDims { inputs, outputs, .. } = parts[0].factors.dims;
    if inputs.checked_mul(outputs).is_none_or(|n| n > ENTRIES_MAX) {
        return Err(refuse(format!(
            "{} needs the whole {outputs} × {inputs} product of `{}`, which is too large",
            order.spec.method.name(),
            order.site.path()
        )));
    }
    let full = |p: &Part<'_>| -> Vec<f32> {
        let product = Product::of(p.factors);
        let mut entries = Vec::with_capacity(outputs * inputs);
        for first in (0..outputs).step_by(ROWS) {
            let rows = product.b.subrows(first, ROWS.min(outputs - first));
            // Columns of A·Bᵀ are rows of B·Aᵀ, so the entries lie output by output.
            let transposed = &product.a * rows.transpose();
            for row in 0..transposed.ncols() {
                entries.extend(transposed.col_as_slice(row).iter().map(|v| *v as f32));
            }
        }
        entries
    };
    let tasks = Tasks {
        tensors: parts.iter().map(full).collect(),
        weights: parts.iter().map(|p| p.weight).collect(),
        streams: streams(order, parts, 2),
    };
    let merged: Vec<f64> =
        tasks.merged(rule, &order.spec.options).into_iter().map(f64::from).collect();
    Product::nearest(MatRef::from_row_major_slice(&merged, outputs, inputs), order.rank)
}

/// Most entries of a product that is made in full: 2 GiB in f32 for each source.
const ENTRIES_MAX: usize = 1 << 29;
/// Outputs of a product that are in f64 at a time.
const ROWS: usize = 256;

/// DARE's choices depend on seed, site, source and tensor, not on the order of sources.
fn streams(order: &Order<'_>, parts: &[Part<'_>], which: u64) -> Vec<Stream> {
    let site = word(&order.site.path());
    let source = |p: &Part<'_>| word(&order.spec.sources[p.source].name);
    parts.iter().map(|p| Stream::new(&[order.spec.seed, site, source(p), which])).collect()
}
