//! What every op of a pass reads: the base, the rows, and where a layer's things lie.
//!
//! Owns the views of the adapters' factors. Never holds memory. The thing to know: an adapter's
//! rows are one segment, and a site without factors is a segment of no rank.

use crate::model::Decoder;
use crate::shape::{ModelShape, Projection, Site};
use crate::train::adapter::{Adapter, Part};
use crate::train::batch::MicroBatch;
use polylora_kernels::{
    Accumulate, Act, Device, Factor, FactorGradient, LinearBackward, Plane, expand,
    linear_backward, outer, shrink,
};

/// Most adapters of a pass.
pub(super) const ADAPTERS_MAX: usize = 8;

/// See the file's head.
#[derive(Clone, Copy)]
pub(super) struct Ops<'a> {
    pub dev: &'a Device,
    pub decoder: Decoder<'a>,
    pub batch: &'a MicroBatch,
    /// The lowest layer that is kept.
    pub lowest: usize,
}

/// A site, what it read, and the gradient of what it made.
#[derive(Clone, Copy)]
pub(super) struct Trained<'a> {
    pub site: Site,
    pub dy: &'a Act,
}

impl<'a> Ops<'a> {
    pub fn shape(&self) -> &'a ModelShape {
        self.decoder.shape()
    }

    pub fn rows(&self) -> usize {
        self.batch.rows()
    }

    /// Where a layer's things lie.
    pub fn place(&self, layer: usize) -> usize {
        layer.saturating_sub(self.lowest)
    }

    fn index(&self, site: Site) -> usize {
        self.shape().site_index(site)
    }

    /// Each adapter's factor at a site; those beyond the last have no rows.
    fn factors<'f>(
        &self,
        adapters: &'f [Adapter],
        site: Site,
        part: Part,
    ) -> [Factor<'f>; ADAPTERS_MAX] {
        std::array::from_fn(|g| {
            let rows = self.batch.segment(g);
            match adapters.get(g) {
                Some(adapter) => adapter.factor(self.index(site), part, rows),
                None => Factor { rows: rows.end..rows.end, rank: 0, values: &[], scale: 1.0 },
            }
        })
    }

    /// y += s·(x·Aᵀ)·B of every adapter's rows.
    pub fn adapt(&self, adapters: &[Adapter], site: Site, x: &Act, y: &mut Plane, u: &mut Plane) {
        if !self.is_adapted(adapters, site) {
            return;
        }
        let count = adapters.len();
        shrink(self.dev, x, &self.factors(adapters, site, Part::A)[..count], u);
        expand(self.dev, u, &self.factors(adapters, site, Part::B)[..count], y);
    }

    pub fn is_adapted(&self, adapters: &[Adapter], site: Site) -> bool {
        adapters.iter().any(|adapter| adapter.has(self.index(site)))
    }

    /// dA and dB of sites that read the same x, and dx, where it is wanted.
    /// x `[T, I]`, dx `[T, I]`; u and v `[T, R]` are scratch.
    pub fn sites_backward(
        &self,
        adapters: &mut [Adapter],
        sites: &[Trained<'_>],
        x: &Act,
        mut dx: Option<&mut Plane>,
        [u, v]: [&mut Plane; 2],
    ) {
        if let Some(dx) = &mut dx {
            let weights = self.decoder.weights;
            let of = |i: usize| {
                let Trained { site, dy } = sites[i.min(sites.len() - 1)];
                LinearBackward { weight: weights.site(site), dy }
            };
            let of: [LinearBackward<'_>; 3] = std::array::from_fn(of);
            linear_backward(self.dev, &of[..sites.len()], self.rows(), dx, Accumulate::Overwrite);
        }
        for &Trained { site, dy } in sites {
            if !self.is_adapted(adapters, site) {
                continue;
            }
            let count = adapters.len();
            shrink(self.dev, x, &self.factors(adapters, site, Part::A)[..count], u);
            shrink(self.dev, dy, &self.factors(adapters, site, Part::B)[..count], v);
            self.outer(adapters, site, Part::B, u, dy);
            self.outer(adapters, site, Part::A, v, x);
            if let Some(dx) = &mut dx {
                expand(self.dev, v, &self.factors(adapters, site, Part::A)[..count], dx);
            }
        }
    }

    /// The gradient of every adapter's factor at a site.
    fn outer(&self, adapters: &mut [Adapter], site: Site, part: Part, u: &Plane, x: &Act) {
        let (index, count) = (self.index(site), adapters.len());
        let mut adapters = adapters.iter_mut();
        let mut gradients: [FactorGradient<'_>; ADAPTERS_MAX] = std::array::from_fn(|g| {
            let rows = self.batch.segment(g);
            match adapters.next() {
                Some(adapter) => adapter.gradient(index, part, rows),
                None => FactorGradient { rows, rank: 0, values: &mut [], scale: 1.0 },
            }
        });
        outer(self.dev, u, x, &mut gradients[..count]);
    }
}

/// A projection of a layer.
pub(super) fn site(layer: usize, projection: Projection) -> Site {
    Site::Layer(layer, projection)
}
