//! Where a job's factors start: random, or where another adapter ended.
//!
//! Owns what such an adapter must have in common with the job. Never rounds a value. The thing to
//! know: an adapter that differs in anything is refused by name, never taken in part.

use crate::adapters::format::factors::{self, FactorDims, FactorSite, OpenAdapter};
use crate::error::{Error, Result};
use crate::random::Stream;
use crate::shape::{ModelShape, Site};
use crate::train::adapter::{Adapter, Part};
use std::path::Path;

/// A uniform in ±1/√I (PEFT's kaiming with a = √5), B zero; every number is of (seed, site) alone.
pub(super) fn random(adapter: &mut Adapter, shape: &ModelShape, seed: u64) {
    let sites: Vec<Site> = adapter.sites().collect();
    for (i, site) in sites.into_iter().enumerate() {
        let mut stream = Stream::new(&[seed, shape.site_index(site) as u64]);
        let bound = 1.0 / (shape.site_dims(site).0 as f64).sqrt();
        let a = adapter.tensors()[2 * i].range.clone();
        for value in &mut adapter.values[a] {
            *value = ((2.0 * stream.unit() - 1.0) * bound) as f32;
        }
    }
}

/// The factors and magnitudes of the adapter in `dir`, which has every rank, scale and target of
/// the job, and nothing else. Errors: `incompatible_start`, and every refusal of adapter files.
pub(super) fn read(adapter: &mut Adapter, dir: &Path, shape: &ModelShape) -> Result<()> {
    let open = factors::open(dir, shape)?;
    if let Some(more) = open.beyond_magnitudes() {
        return Err(incompatible(format!("it has {more}, which is not trained here")));
    }
    let sites: Vec<Site> = adapter.sites().collect();
    let known = |site: &FactorSite| matches!(site, FactorSite::Site(s) if sites.contains(s));
    if let Some((site, _)) = open.modules().iter().find(|(site, _)| !known(site)) {
        let path = site.path();
        return Err(incompatible(format!("it adapts `{path}`, which the job does not train")));
    }
    for tensor in adapter.tensors().to_vec() {
        let values = read_tensor(&open, (tensor.site, tensor.part), adapter)?;
        if values.len() != tensor.range.len() {
            return Err(Error::fault(format!("a start of {} values", values.len())));
        }
        adapter.values[tensor.range].copy_from_slice(&values);
    }
    Ok(())
}

/// The values of one tensor in the order of a job's.
fn read_tensor(open: &OpenAdapter, of: (Site, Part), job: &Adapter) -> Result<Vec<f32>> {
    let (site, part) = of;
    let path = FactorSite::Site(site).path();
    let Some(module) = open.read(FactorSite::Site(site))? else {
        return Err(incompatible(format!("it has no factors on `{path}`, which the job trains")));
    };
    let FactorDims { rank, outputs, .. } = module.dims;
    if rank != job.rank_max() {
        let job = job.rank_max();
        return Err(incompatible(format!("its rank on `{path}` is {rank}, the job's is {job}")));
    }
    if module.scale != job.scale {
        let (own, job) = (module.scale, job.scale);
        return Err(incompatible(format!(
            "its factors on `{path}` are scaled by {own} (alpha and rank make the scale), the \
             job's by {job}"
        )));
    }
    match (part, open.magnitude(site)?) {
        (Part::Magnitude, Some(values)) => Ok(values),
        (Part::Magnitude, None) => {
            Err(incompatible(format!("it has no magnitudes on `{path}`, and the job is DoRA")))
        }
        (_, Some(_)) if !job.is_dora() => {
            Err(incompatible(format!("it has DoRA's magnitudes on `{path}`, the job has none")))
        }
        (Part::A, _) => Ok(module.a),
        // `[O, R]` as `[R, O]`.
        (Part::B, _) => {
            let at = |i: usize| module.b[i % outputs * rank + i / outputs];
            Ok((0..module.b.len()).map(at).collect())
        }
    }
}

fn incompatible(what: String) -> Error {
    Error::unprocessable("incompatible_start", format!("the job cannot go on from it: {what}"))
}
