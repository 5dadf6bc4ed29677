//! An adapter that is being trained: its factors, magnitudes and their gradients, plain f32.
//!
//! Owns two arrays of one layout, gradients without what is frozen. Never computes. The thing to
//! know: A and B both lie rank by rank (A `[R, I]`, B `[R, O]`), as the kernels of training read
//! them; what is frozen lies before all else, magnitudes behind all factors.

use crate::shape::{ModelShape, Site};
use polylora_kernels::{DoraFactors, Factor, FactorGradient, Magnitude, MagnitudeGradient};
use std::ops::Range;

/// What a tensor is to its site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    A,
    B,
    /// DoRA's m, one value an output.
    Magnitude,
}

/// Where a tensor lies in [`Adapter::values`]; see [`Adapter::trained`] for its gradient.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub site: Site,
    pub part: Part,
    /// R, or 1 of a magnitude; and I (of A) or O.
    pub dims: [usize; 2],
    pub range: Range<usize>,
}

/// See the file's head.
pub struct Adapter {
    /// α/R, or α/√R: y = x·Wᵀ + scale·(x·Aᵀ)·B.
    pub scale: f32,
    /// All tensors, in the order of [`Adapter::tensors`].
    pub values: Vec<f32>,
    /// Of the loss, by each of `values` that is trained; passes add to it.
    pub gradients: Vec<f32>,
    /// How many of `values`, from the first on, are frozen.
    frozen: usize,
    tensors: Vec<Tensor>,
    /// By site index: which of the sites given it is.
    places: Vec<Option<usize>>,
    /// How many sites were given.
    sites: usize,
    /// Where magnitudes begin in `values`.
    vectors: usize,
    /// The norms of the rows of W + s·B·A, in the layout of the magnitudes; see [`super::Norms`].
    pub(super) norms: Vec<f32>,
}

impl Adapter {
    /// Zeros of `rank` at these sites, with magnitudes where it is DoRA.
    ///
    /// # Panics
    /// On a site that is named twice, and on the head, which is not trained.
    pub fn new(shape: &ModelShape, sites: &[Site], rank: usize, scale: f32, dora: bool) -> Self {
        let mut places = vec![None; shape.sites()];
        let (mut tensors, mut end) = (Vec::with_capacity(3 * sites.len()), 0);
        let mut add = |site, part, dims: [usize; 2]| {
            let range = end..end + dims[0] * dims[1];
            end = range.end;
            tensors.push(Tensor { site, part, dims, range });
            end
        };
        let mut vectors = 0;
        for (i, &site) in sites.iter().enumerate() {
            assert_ne!(site, Site::Head, "the head is not trained");
            let place = &mut places[shape.site_index(site)];
            assert_eq!(*place, None, "{site:?} is named once");
            *place = Some(i);
            let (inputs, outputs) = shape.site_dims(site);
            add(site, Part::A, [rank, inputs]);
            vectors = add(site, Part::B, [rank, outputs]);
        }
        for &site in sites.iter().filter(|_| dora) {
            add(site, Part::Magnitude, [1, shape.site_dims(site).1]);
        }
        let (values, gradients) = (vec![0.0; end], vec![0.0; end]);
        let norms = vec![0.0; end - vectors];
        let (sites, frozen) = (sites.len(), 0);
        Self { scale, values, gradients, frozen, tensors, places, sites, vectors, norms }
    }

    /// The same factors and magnitudes, all of them frozen.
    pub(super) fn as_frozen(&self) -> Self {
        Self {
            values: self.values.clone(),
            gradients: Vec::new(),
            frozen: self.values.len(),
            tensors: self.tensors.clone(),
            places: self.places.clone(),
            norms: self.norms.clone(),
            ..*self
        }
    }

    /// Where a tensor's gradient lies in [`Adapter::gradients`]; none where it is frozen.
    pub fn trained(&self, tensor: &Tensor) -> Option<Range<usize>> {
        let Range { start, end } = tensor.range;
        Some(start.checked_sub(self.frozen)?..end - self.frozen)
    }

    /// A and B of each site in the order given, then the magnitudes in that order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The largest rank of a site.
    pub fn rank_max(&self) -> usize {
        self.tensors.first().map_or(0, |tensor| tensor.dims[0])
    }

    /// Whether a site, by its index, has factors.
    pub fn has(&self, site: usize) -> bool {
        self.places[site].is_some()
    }

    /// Whether it has magnitudes.
    pub fn is_dora(&self) -> bool {
        self.vectors < self.values.len()
    }

    /// The sites given.
    pub(super) fn sites(&self) -> impl Iterator<Item = Site> {
        self.tensors[..2 * self.sites].iter().step_by(2).map(|tensor| tensor.site)
    }

    fn tensor(&self, site: usize, part: Part) -> Option<&Tensor> {
        let place = self.places[site]?;
        self.tensors.get(match part {
            Part::A => 2 * place,
            Part::B => 2 * place + 1,
            Part::Magnitude => 2 * self.sites + place,
        })
    }

    /// The range of a site's magnitudes in `values`, and of their norms in `norms`.
    fn magnitude_at(&self, site: usize) -> Option<[Range<usize>; 2]> {
        let range = self.tensor(site, Part::Magnitude)?.range.clone();
        let norms = range.start - self.vectors..range.end - self.vectors;
        Some([range, norms])
    }

    /// A site's magnitudes for some rows; none where the site has none.
    pub(super) fn magnitude(&self, site: usize, rows: Range<usize>) -> Option<Magnitude<'_>> {
        let [values, norms] = self.magnitude_at(site)?;
        Some(Magnitude { rows, values: &self.values[values], norms: &self.norms[norms] })
    }

    /// The same, with their gradient.
    pub(super) fn magnitude_gradient(
        &mut self,
        site: usize,
        rows: Range<usize>,
    ) -> Option<MagnitudeGradient<'_>> {
        let [at, norms] = self.magnitude_at(site)?;
        let trained = self.trained(self.tensor(site, Part::Magnitude)?)?;
        let of = Magnitude { rows, values: &self.values[at], norms: &self.norms[norms] };
        Some(MagnitudeGradient { of, gradient: &mut self.gradients[trained] })
    }

    /// A site's magnitudes; none where it has none.
    pub(super) fn magnitudes_mut(&mut self, site: usize) -> &mut [f32] {
        match self.magnitude_at(site) {
            Some([at, _]) => &mut self.values[at],
            None => &mut [],
        }
    }

    /// A site's factors, and where its norms are written.
    pub(super) fn norms_of(&mut self, site: usize) -> Option<(DoraFactors<'_>, &mut [f32])> {
        let [_, norms] = self.magnitude_at(site)?;
        let (a, b) = (self.tensor(site, Part::A)?, self.tensor(site, Part::B)?);
        let (rank, scale) = (a.dims[0], self.scale);
        let (a, b) = (&self.values[a.range.clone()], &self.values[b.range.clone()]);
        Some((DoraFactors { rank, a, b, scale }, &mut self.norms[norms]))
    }

    /// B carries the scale, so that s·x·Aᵀ·B is made of both.
    fn scale_of(&self, part: Part) -> f32 {
        if part == Part::B { self.scale } else { 1.0 }
    }

    /// A factor for some rows; of no rank where the site has none.
    pub(super) fn factor(&self, site: usize, part: Part, rows: Range<usize>) -> Factor<'_> {
        let scale = self.scale_of(part);
        match self.tensor(site, part) {
            Some(tensor) => {
                let values = &self.values[tensor.range.clone()];
                Factor { rows, rank: tensor.dims[0], values, scale }
            }
            None => Factor { rows, rank: 0, values: &[], scale },
        }
    }

    /// The same for the factor's gradient; of no rank where it is frozen.
    pub(super) fn gradient(
        &mut self,
        site: usize,
        part: Part,
        rows: Range<usize>,
    ) -> FactorGradient<'_> {
        let scale = self.scale_of(part);
        let tensor = self.tensor(site, part);
        let of = tensor.and_then(|tensor| Some((tensor.dims[0], self.trained(tensor)?)));
        match of {
            Some((rank, range)) => {
                FactorGradient { rows, rank, values: &mut self.gradients[range], scale }
            }
            None => FactorGradient { rows, rank: 0, values: &mut [], scale },
        }
    }
}
