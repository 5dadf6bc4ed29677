//! What every op of a pass reads: the base, the rows, and where a layer's things lie.
//!
//! Owns the views of the adapters' factors. Never holds memory. The thing to know: an adapter's
//! rows are one segment, and a site without factors is a segment of no rank.

use crate::model::Decoder;
use crate::shape::{ModelShape, Projection, Site};
use crate::train::adapter::{Adapter, Part};
use crate::train::batch::MicroBatch;
use polylora_kernels::{
    Accumulate, Act, Device, Factor, FactorGradient, Linear, LinearBackward, LoraScratch,
    Magnitude, MagnitudeGradient, Plane, Segments, dora, dora_backward, expand, linear,
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

/// A site and what it makes, by way of z where it has magnitudes.
pub(super) struct Made<'a> {
    pub site: Site,
    pub y: &'a mut Plane,
    pub z: Option<&'a mut Plane>,
}

/// A site, the gradient of what it made, and z as it was.
pub(super) struct Trained<'a> {
    pub site: Site,
    pub dy: &'a mut Act,
    pub z: Option<&'a Plane>,
}

/// Whether dx is made, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Below {
    /// Nothing reads it.
    Unread,
    Read(Accumulate),
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

    /// y of sites that read the same x, adapters applied: z = x·Wᵀ + s·(x·Aᵀ)·B, and
    /// y = (m/c)∘z + bias. u `[T, R]` is scratch.
    pub fn sites_forward<const N: usize>(
        &self,
        adapters: &[Adapter],
        mut outs: [Made<'_>; N],
        x: &Act,
        u: &mut Plane,
        scratch: &mut LoraScratch,
    ) {
        let rows = self.rows();
        let mut linears = outs.each_mut().map(|Made { site, y, z }| match z {
            Some(z) => Linear { bias: None, ..self.decoder.linear(*site, z) },
            None => self.decoder.linear(*site, y),
        });
        linear(self.dev, x, rows, &mut linears, Segments::none(), scratch);
        for Made { site, y, z } in outs {
            match z {
                _ if !self.is_adapted(adapters, site) => {}
                None => self.adapt(adapters, site, x, u, y),
                Some(z) => {
                    self.adapt(adapters, site, x, u, z);
                    self.magnitudes(adapters, site, z, y);
                }
            }
        }
    }

    /// y += s·(x·Aᵀ)·B of every adapter's rows.
    fn adapt(&self, adapters: &[Adapter], site: Site, x: &Act, u: &mut Plane, y: &mut Plane) {
        let count = adapters.len();
        shrink(self.dev, x, &self.factors(adapters, site, Part::A)[..count], u);
        expand(self.dev, u, &self.factors(adapters, site, Part::B)[..count], y);
    }

    /// Σ (x·Aᵀ)ᵀ·x of every adapter's rows, added to the gradient of A.
    pub fn sketch(&self, adapters: &mut [Adapter], site: Site, x: &Act, u: &mut Plane) {
        if self.is_adapted(adapters, site) {
            let count = adapters.len();
            shrink(self.dev, x, &self.factors(adapters, site, Part::A)[..count], u);
            self.outer(adapters, site, Part::A, u, x);
        }
    }

    pub fn is_adapted(&self, adapters: &[Adapter], site: Site) -> bool {
        adapters.iter().any(|adapter| adapter.has(self.index(site)))
    }

    /// dA, dB and dm of sites that read the same x, and dx, where it is wanted; every dy becomes
    /// dz. x `[T, I]`, dx `[T, I]`; u and v `[T, R]` are scratch.
    pub fn sites_backward<const N: usize>(
        &self,
        adapters: &mut [Adapter],
        mut sites: [Trained<'_>; N],
        x: &Act,
        (dx, below): (&mut Plane, Below),
        [u, v]: [&mut Plane; 2],
    ) {
        for Trained { site, dy, z } in &mut sites {
            if let Some(z) = z {
                self.magnitudes_backward(adapters, *site, z, dy);
            }
        }
        if let Below::Read(accumulate) = below {
            let weights = self.decoder.weights;
            let of = sites
                .each_ref()
                .map(|Trained { site, dy, .. }| LinearBackward { weight: weights.site(*site), dy });
            linear_backward(self.dev, &of, self.rows(), dx, accumulate);
        }
        for Trained { site, dy, .. } in sites {
            if !self.is_adapted(adapters, site) {
                continue;
            }
            let count = adapters.len();
            shrink(self.dev, x, &self.factors(adapters, site, Part::A)[..count], u);
            let trains_a = adapters.iter().any(|a| a.trains(self.index(site), Part::A));
            if trains_a || below != Below::Unread {
                shrink(self.dev, dy, &self.factors(adapters, site, Part::B)[..count], v);
            }
            self.outer(adapters, site, Part::B, u, dy);
            if trains_a {
                self.outer(adapters, site, Part::A, v, x);
            }
            if below != Below::Unread {
                expand(self.dev, v, &self.factors(adapters, site, Part::A)[..count], dx);
            }
        }
    }

    /// y = (m/c)∘z + bias, where an adapter has magnitudes.
    fn magnitudes(&self, adapters: &[Adapter], site: Site, z: &Plane, y: &mut Plane) {
        let nobody = Magnitude { rows: 0..0, values: &[], norms: &[] };
        let mut segments: [Magnitude<'_>; ADAPTERS_MAX] = std::array::from_fn(|_| nobody.clone());
        let mut count = 0;
        for (g, adapter) in adapters.iter().enumerate() {
            if let Some(of) = adapter.magnitude(self.index(site), self.batch.segment(g)) {
                segments[count] = of;
                count += 1;
            }
        }
        let bias = self.decoder.weights.bias(site);
        dora(self.dev, z, self.rows(), &segments[..count], bias, y);
    }

    /// dm, and dz in the place of dy.
    fn magnitudes_backward(&self, to: &mut [Adapter], site: Site, z: &Plane, dy: &mut Act) {
        let index = self.index(site);
        let mut segments: [MagnitudeGradient<'_>; ADAPTERS_MAX] = std::array::from_fn(|_| {
            let of = Magnitude { rows: 0..0, values: &[], norms: &[] };
            MagnitudeGradient { of, gradient: &mut [] }
        });
        let mut count = 0;
        for (g, adapter) in to.iter_mut().enumerate() {
            if let Some(of) = adapter.magnitude_gradient(index, self.batch.segment(g)) {
                segments[count] = of;
                count += 1;
            }
        }
        dora_backward(self.dev, z, &mut segments[..count], dy);
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
