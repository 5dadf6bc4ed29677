//! Random sources, merges of them, and products made in full: what the other files compare with.

use faer::Mat;
use polylora::adapters::format::factors::{FactorDims, FactorSite, ModuleFactors};
use polylora::error::Result;
use polylora::merge::spec::{Method, Options, Source, Spec};
use polylora::merge::{Merge, Merged};
use polylora::shape::{Projection, Site};
use std::collections::BTreeMap;
use support::adapters::Noise;

pub type Adapter = BTreeMap<FactorSite, ModuleFactors>;

/// Layer 0 and 1: q is 40 → 40, v 40 → 24, down 72 → 40.
pub fn sizes(p: Projection) -> (usize, usize) {
    match p {
        Projection::V => (40, 24),
        Projection::Down => (72, 40),
        _ => (40, 40),
    }
}

pub fn place(layer: usize, p: Projection) -> FactorSite {
    FactorSite::Site(Site::Layer(layer, p))
}

pub fn factors(rank: usize, inputs: usize, outputs: usize, noise: &mut Noise) -> ModuleFactors {
    // Scales as rsLoRA and plain LoRA make them.
    let scale = [1.0, 2.0, 16.0 / (rank as f32).sqrt()][noise.below(3)];
    ModuleFactors {
        dims: FactorDims { rank, inputs, outputs },
        a: noise.floats(rank * inputs, 0.4),
        b: noise.floats(outputs * rank, 0.4),
        scale,
    }
}

/// An adapter with this rank everywhere, or (0) with a rank of its own from 1 to 64 at each site
/// and some sites missing.
pub fn adapter(rank: usize, noise: &mut Noise) -> Adapter {
    let mut out = Adapter::new();
    for layer in 0..2 {
        for p in [Projection::Q, Projection::V, Projection::Down] {
            let (inputs, outputs) = sizes(p);
            let own = if rank == 0 { 1 + noise.below(64) } else { rank };
            let missing = rank == 0 && noise.below(4) == 0 && (layer, p) != (0, Projection::Q);
            if !missing {
                out.insert(place(layer, p), factors(own, inputs, outputs, noise));
            }
        }
    }
    out
}

pub fn spec(method: Method, weights: &[f64]) -> Spec {
    let source = |(i, w): (usize, &f64)| Source { name: format!("s{i}"), weight: *w };
    let sources = weights.iter().enumerate().map(source).collect();
    Spec { method, sources, options: Options::default(), seed: 0 }
}

/// Runs the merge `sites` sites a step.
pub fn merged_in_steps(spec: &Spec, adapters: &[Adapter], sites: usize) -> Result<Merged> {
    let modules: Vec<Vec<(FactorSite, FactorDims)>> =
        adapters.iter().map(|a| a.iter().map(|(p, f)| (*p, f.dims)).collect()).collect();
    let modules: Vec<&[(FactorSite, FactorDims)]> = modules.iter().map(Vec::as_slice).collect();
    let mut merge = Merge::new(spec.clone(), &modules)?;
    loop {
        let read = &mut |source: usize, place| Ok(adapters[source].get(&place).cloned());
        let progress = merge.step(sites, read)?;
        if progress.done == progress.total {
            return merge.finish();
        }
    }
}

pub fn merged(spec: &Spec, adapters: &[Adapter]) -> Merged {
    merged_in_steps(spec, adapters, 1).unwrap_or_else(|e| panic!("{:?}: {e}", spec.method))
}

/// scale · B · A, `[O, I]`.
pub fn product(f: &ModuleFactors) -> Mat<f64> {
    let FactorDims { rank, inputs, outputs } = f.dims;
    Mat::from_fn(outputs, inputs, |o, i| {
        let terms =
            (0..rank).map(|r| f64::from(f.b[o * rank + r]) * f64::from(f.a[r * inputs + i]));
        f64::from(f.scale) * terms.sum::<f64>()
    })
}

/// Σ w · s · B · A at a place.
pub fn exact(place: FactorSite, adapters: &[Adapter], weights: &[f64]) -> Mat<f64> {
    let mut sum: Option<Mat<f64>> = None;
    for (adapter, weight) in adapters.iter().zip(weights) {
        let Some(factors) = adapter.get(&place) else { continue };
        let term = product(factors) * faer::Scale(*weight);
        sum = Some(match sum {
            Some(sum) => sum + term,
            None => term,
        });
    }
    sum.expect("some source has factors there")
}

/// ‖x − y‖ / ‖y‖
pub fn apart(x: &Mat<f64>, y: &Mat<f64>) -> f64 {
    (x - y).norm_l2() / y.norm_l2()
}

/// Fails unless the merge equals the exact sum at every place.
pub fn assert_exact(merged: &Merged, adapters: &[Adapter], weights: &[f64], within: f64) {
    for (place, factors) in &merged.modules {
        let error = apart(&product(factors), &exact(*place, adapters, weights));
        assert!(error <= within, "{:?} at {place:?}: {error}", merged.report.spec.method);
    }
}

/// Fails unless both merges are the same change at every place.
pub fn assert_same(x: &Merged, y: &Merged, within: f64) {
    assert!(x.modules.keys().eq(y.modules.keys()));
    for (place, factors) in &x.modules {
        let error = apart(&product(factors), &product(&y.modules[place]));
        assert!(error <= within, "{:?} at {place:?}: {error}", x.report.spec.method);
    }
}
