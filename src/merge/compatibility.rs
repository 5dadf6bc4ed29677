//! What can be said before anything is merged: how much the sources are in each other's way.
//!
//! Owns the form of a survey of all sites. Never measures: the sites' own surveys do. The thing to
//! know: low alignment merges well whatever the method; high alignment with a high cosine means
//! that the sources agree, with a low or negative one that they fight for the same directions.

use super::report::Survey;
use super::spec::Spec;
use crate::adapters::format::factors::{FactorDims, FactorSite};
use serde::Serialize;

/// The survey of a whole merge.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompatibilityReport {
    pub spec: Spec,
    pub overall: Compatibility,
    pub sites: Vec<SiteCompatibility>,
}

/// Several sites as if they were one matrix: means are weighted by ‖exact‖².
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compatibility {
    pub sites: usize,
    /// Of the result, as planned.
    pub parameters: usize,
    pub norm_exact: f64,
    pub effective_rank_exact: f64,
    pub alignment: Option<f64>,
    pub cosine: Option<f64>,
}

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteCompatibility {
    /// Module path, e.g. `model.layers.3.self_attn.q_proj`.
    pub site: String,
    pub projection: &'static str,
    pub layer: Option<usize>,
    pub inputs: usize,
    pub outputs: usize,
    /// Rank that the result would have.
    pub rank: usize,
    #[serde(flatten)]
    pub survey: Survey,
}

impl SiteCompatibility {
    pub fn new(site: FactorSite, dims: FactorDims, rank: usize, survey: Survey) -> Self {
        Self {
            site: site.path(),
            projection: site.name(),
            layer: site.layer(),
            inputs: dims.inputs,
            outputs: dims.outputs,
            rank,
            survey,
        }
    }
}

impl Compatibility {
    pub fn of<'a>(sites: impl Iterator<Item = &'a SiteCompatibility> + Clone) -> Self {
        let mean = |of: &dyn Fn(&Survey) -> Option<f64>| {
            let known =
                sites.clone().filter_map(|s| Some((s.survey.norm_exact.powi(2), of(&s.survey)?)));
            let (weight, sum) =
                known.fold((0.0, 0.0), |(all, sum), (weight, v)| (all + weight, sum + weight * v));
            (weight > 0.0).then(|| sum / weight)
        };
        Self {
            sites: sites.clone().count(),
            parameters: sites.clone().map(|s| s.rank * (s.inputs + s.outputs)).sum(),
            norm_exact: sites.clone().map(|s| s.survey.norm_exact.powi(2)).sum::<f64>().sqrt(),
            effective_rank_exact: mean(&|s| Some(s.effective_rank_exact)).unwrap_or(0.0),
            alignment: mean(&|s| s.alignment),
            cosine: mean(&|s| s.cosine),
        }
    }
}
