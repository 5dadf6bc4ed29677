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
    /// Ranks that are read and trained, from the first on.
    rank: usize,
    /// The norms of the rows of W + s·B·A, in the layout of the magnitudes; see [`super::Norms`].
    pub(super) norms: Vec<f32>,
}

impl Adapter {
    /// Zeros of `rank` at these sites, with magnitudes where it is DoRA.
    ///
    /// # Panics
    /// On a site that is named twice, and on the head, which is not trained.
    pub fn new(shape: &ModelShape, sites: &[Site], rank: usize, scale: f32, dora: bool) -> Self {
        Self::planned(shape, sites, rank, scale, dora).laid(|_| false)
    }

    /// The tensors, without memory.
    fn planned(shape: &ModelShape, sites: &[Site], rank: usize, scale: f32, dora: bool) -> Self {
        let mut places = vec![None; shape.sites()];
        let mut tensors = Vec::with_capacity(3 * sites.len());
        let mut add = |site, part, dims| tensors.push(Tensor { site, part, dims, range: 0..0 });
        for (i, &site) in sites.iter().enumerate() {
            assert_ne!(site, Site::Head, "the head is not trained");
            let place = &mut places[shape.site_index(site)];
            assert_eq!(*place, None, "{site:?} is named once");
            *place = Some(i);
            let (inputs, outputs) = shape.site_dims(site);
            add(site, Part::A, [rank, inputs]);
            add(site, Part::B, [rank, outputs]);
        }
        for &site in sites.iter().filter(|_| dora) {
            add(site, Part::Magnitude, [1, shape.site_dims(site).1]);
        }
        let (values, gradients, norms) = (Vec::new(), Vec::new(), Vec::new());
        let (sites, frozen, vectors) = (sites.len(), 0, 0);
        Self { scale, values, gradients, frozen, tensors, places, sites, vectors, rank, norms }
    }

    /// The same with A frozen, as LoRA-FA has it (arXiv 2308.03303): neither a gradient nor a
    /// moment is kept of it.
    ///
    /// # Panics
    /// As [`Adapter::new`].
    pub fn with_frozen_a(
        shape: &ModelShape,
        sites: &[Site],
        rank: usize,
        scale: f32,
        dora: bool,
    ) -> Self {
        Self::planned(shape, sites, rank, scale, dora).laid(|part| part == Part::A)
    }

    /// Random A and zeros as B, of which only A has gradients: what calibration reads and writes.
    pub(super) fn sketch(shape: &ModelShape, sites: &[Site], rank: usize) -> Self {
        Self::planned(shape, sites, rank, 1.0, false).laid(|part| part == Part::B)
    }

    /// Zeros in the layout where these parts are frozen.
    fn laid(mut self, is_frozen: impl Fn(Part) -> bool) -> Self {
        let mut end = 0;
        for frozen in [true, false] {
            for tensor in self.tensors.iter_mut().filter(|t| is_frozen(t.part) == frozen) {
                tensor.range = end..end + tensor.dims[0] * tensor.dims[1];
                end = tensor.range.end;
            }
            if frozen {
                self.frozen = end;
            }
        }
        let mut all = self.tensors.iter();
        let first = all.find(|t| t.part == Part::Magnitude);
        self.vectors = first.map_or(end, |tensor| tensor.range.start);
        self.values = vec![0.0; end];
        self.gradients = vec![0.0; end - self.frozen];
        self.norms = vec![0.0; end - self.vectors];
        self
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

    /// Whether a site, by its index, has a part that is trained.
    pub(super) fn trains(&self, site: usize, part: Part) -> bool {
        self.tensor(site, part).is_some_and(|tensor| self.trained(tensor).is_some())
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

    /// From now on only so many ranks of every site, the first ones, are read and trained.
    pub(super) fn narrow(&mut self, rank: usize) {
        self.rank = rank;
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
        let (rank, scale) = (self.rank, self.scale);
        let (a, b) = (&self.values[read(a, rank)], &self.values[read(b, rank)]);
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
                let rank = self.rank;
                Factor { rows, rank, values: &self.values[read(tensor, rank)], scale }
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
        let of = tensor.and_then(|tensor| {
            let (rank, start) = (self.rank, self.trained(tensor)?.start);
            Some((rank, start..start + rank * tensor.dims[1]))
        });
        match of {
            Some((rank, range)) => {
                FactorGradient { rows, rank, values: &mut self.gradients[range], scale }
            }
            None => FactorGradient { rows, rank: 0, values: &mut [], scale },
        }
    }
}

/// Where the first ranks of a factor lie.
fn read(factor: &Tensor, rank: usize) -> Range<usize> {
    factor.range.start..factor.range.start + rank * factor.dims[1]
}
