//! How large a job is: rows and sequences of a micro-batch, and the bytes of all that it takes.
//!
//! Owns the sums. Never takes memory. The thing to know: a test holds them against what
//! `Trainer::new` really takes.

use crate::error::Result;
use crate::model::weights::Weights;
use crate::shape::{ModelShape, Projection, Site};
use crate::train::pass::{Pass, PassOptions, Sizes};
use crate::train::spec::TrainSpec;
use polylora_kernels::DoraScratch;

/// Examples of a micro-batch: each may need a page of its own for its last rows.
const SEQUENCES_MAX: usize = 64;

/// The sites that a job trains, layer by layer.
pub(super) fn sites(shape: &ModelShape, spec: &TrainSpec) -> Vec<Site> {
    let of_layer = |l| spec.targets.iter().map(move |p| Site::Layer(l, *p));
    (0..shape.layers).flat_map(of_layer).collect()
}

/// The micro-batch that entries are cut to, and the pass that holds it: an entry with more rows is
/// alone in one.
pub(super) fn options(spec: &TrainSpec, longest: usize, rows_max: usize) -> [PassOptions; 2] {
    let group = spec.objective.group();
    let sequences_max = (spec.batch * group).clamp(8, SEQUENCES_MAX);
    let adapters_max = 1 + usize::from(spec.has_reference());
    let of = |rows_max| PassOptions { rows_max, sequences_max, adapters_max };
    [of(rows_max), of(rows_max.max(group * longest.saturating_sub(1)))]
}

/// See [`super::Trainer::bytes`].
pub(super) fn bytes(
    weights: &Weights,
    spec: &TrainSpec,
    options: PassOptions,
    threads: usize,
) -> Result<usize> {
    let shape = &weights.shape;
    let sites = sites(shape, spec);
    let dims = sites.iter().map(|site| shape.site_dims(*site));
    let state = |(i, o): (usize, usize)| {
        let of = |is_trained: bool, dims| {
            if is_trained { spec.optimiser.state_len(dims) } else { 0 }
        };
        of(!spec.freeze_a, [spec.rank, i]) + of(true, [spec.rank, o]) + of(spec.dora, [1, o])
    };
    let state: usize = dims.clone().map(state).sum();
    let (inputs, outputs) =
        dims.fold((0, 0), |(i, o), (inputs, outputs)| (i + inputs, o + outputs));
    let (a, b) = (spec.rank * inputs, spec.rank * outputs);
    let vectors = if spec.dora { outputs } else { 0 };
    let sizes = Sizes {
        options,
        threads,
        layers: shape.layers,
        rank: spec.rank,
        z: Projection::ALL.map(|p| spec.dora && spec.targets.contains(&p)),
    };
    // Values, gradients, moments; of magnitudes norms and squares too.
    let (values, frozen) = (a + b + vectors, if spec.freeze_a { a } else { 0 });
    let adapter = 4 * (values + (values - frozen) + state + 2 * vectors);
    // Both factors, and the gradient of A.
    let sketch = if spec.calibrates() { 4 * (2 * a + b) } else { 0 };
    let reference = if spec.has_reference() { 4 * (values + vectors) } else { 0 };
    Ok(adapter
        + sketch
        + reference
        + DoraScratch::bytes(threads, spec.rank)
        + Pass::bytes(weights, sizes)?)
}
