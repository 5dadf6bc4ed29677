//! An adapter that is being trained: its factors and their gradients, plain f32.
//!
//! Owns two arrays of one layout. Never computes. The thing to know: A and B both lie rank by rank
//! (A `[R, I]`, B `[R, O]`), as the kernels of training read them.

use crate::shape::{ModelShape, Site};
use polylora_kernels::{Factor, FactorGradient};
use std::ops::Range;

/// What a tensor is to its site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    A,
    B,
}

/// Where a tensor lies in [`Adapter::values`] and [`Adapter::gradients`].
#[derive(Debug, Clone)]
pub struct Tensor {
    pub site: Site,
    pub part: Part,
    /// R, and I (of A) or O (of B).
    pub dims: [usize; 2],
    pub range: Range<usize>,
}

/// See the file's head.
pub struct Adapter {
    /// α/R, or α/√R: y = x·Wᵀ + scale·(x·Aᵀ)·B.
    pub scale: f32,
    /// All tensors, in the order of [`Adapter::tensors`].
    pub values: Vec<f32>,
    /// Of the loss, by each of `values`; passes add to it.
    pub gradients: Vec<f32>,
    tensors: Vec<Tensor>,
    /// By site index: the place of A in `tensors`; B is next.
    places: Vec<Option<usize>>,
}

impl Adapter {
    /// Zeros of `rank` at these sites.
    ///
    /// # Panics
    /// On a site that is named twice, and on the head, which is not trained.
    pub fn new(shape: &ModelShape, sites: &[Site], rank: usize, scale: f32) -> Self {
        let mut places = vec![None; shape.sites()];
        let (mut tensors, mut end) = (Vec::with_capacity(2 * sites.len()), 0);
        for &site in sites {
            assert_ne!(site, Site::Head, "the head is not trained");
            let place = &mut places[shape.site_index(site)];
            assert_eq!(*place, None, "{site:?} is named once");
            *place = Some(tensors.len());
            let (inputs, outputs) = shape.site_dims(site);
            for (part, width) in [(Part::A, inputs), (Part::B, outputs)] {
                let range = end..end + rank * width;
                end = range.end;
                tensors.push(Tensor { site, part, dims: [rank, width], range });
            }
        }
        Self { scale, values: vec![0.0; end], gradients: vec![0.0; end], tensors, places }
    }

    /// In the order of the sites given; A before B.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The largest rank of a site.
    pub fn rank_max(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.dims[0]).max().unwrap_or(0)
    }

    /// Whether a site, by its index, has factors.
    pub fn has(&self, site: usize) -> bool {
        self.places[site].is_some()
    }

    fn tensor(&self, site: usize, part: Part) -> Option<&Tensor> {
        self.places[site].map(|place| &self.tensors[place + usize::from(part == Part::B)])
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

    /// The same for the factor's gradient.
    pub(super) fn gradient(
        &mut self,
        site: usize,
        part: Part,
        rows: Range<usize>,
    ) -> FactorGradient<'_> {
        let scale = self.scale_of(part);
        match self.tensor(site, part).cloned() {
            Some(Tensor { range, dims: [rank, _], .. }) => {
                FactorGradient { rows, rank, values: &mut self.gradients[range], scale }
            }
            None => FactorGradient { rows, rank: 0, values: &mut [], scale },
        }
    }
}
