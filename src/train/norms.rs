//! DoRA's norms: of the rows of W once a base, of W + s·B·A once an optimizer step.
//!
//! Owns the squares of the base's rows. Never keeps an adapter. The thing to know: no gradient goes
//! through the norms (PEFT detaches them), so whoever changes factors makes them again, site by
//! site, before the next pass.

use super::adapter::Adapter;
use crate::error::Result;
use crate::model::weights::Weights;
use crate::shape::Site;
use polylora_kernels::{Device, DoraScratch, dora_norms, weight_squares};

/// See the file's head.
pub struct Norms {
    /// Of the adapter, in its order.
    sites: Vec<Site>,
    /// ‖W_o‖², in the layout of the adapter's norms.
    squares: Vec<f32>,
    /// Where each site's end.
    ends: Vec<usize>,
    scratch: DoraScratch,
}

impl Norms {
    /// For the sites of an adapter; none, unless it has magnitudes. Errors: a device that lacks the
    /// operation.
    pub fn new(dev: &Device, weights: &Weights, adapter: &Adapter) -> Result<Self> {
        let sites: Vec<Site> = adapter.sites().filter(|_| adapter.is_dora()).collect();
        let mut end = 0;
        let ends = sites.iter().map(|site| {
            end += weights.shape.site_dims(*site).1;
            end
        });
        Ok(Self {
            ends: ends.collect(),
            squares: vec![0.0; adapter.norms.len()],
            scratch: DoraScratch::new(dev.memory(), dev.threads(), adapter.rank_max())?,
            sites,
        })
    }

    /// Sites with magnitudes.
    pub fn len(&self) -> usize {
        self.sites.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sites.is_empty()
    }

    /// Measures the base at one site; its magnitudes start as the norms of W's rows where
    /// `is_new`. One op.
    pub fn measure(
        &mut self,
        dev: &Device,
        weights: &Weights,
        adapter: &mut Adapter,
        index: usize,
        is_new: bool,
    ) {
        let site = self.sites[index];
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let squares = &mut self.squares[start..self.ends[index]];
        weight_squares(dev, weights.site(site), squares);
        if is_new {
            let magnitudes = adapter.magnitudes_mut(weights.shape.site_index(site));
            for (magnitude, square) in magnitudes.iter_mut().zip(squares) {
                *magnitude = square.sqrt();
            }
        }
    }

    /// The norms of one site, of the factors as they are. One op.
    pub fn update(&mut self, dev: &Device, weights: &Weights, adapter: &mut Adapter, index: usize) {
        let site = self.sites[index];
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let squares = &self.squares[start..self.ends[index]];
        let Some((factors, norms)) = adapter.norms_of(weights.shape.site_index(site)) else {
            return;
        };
        dora_norms(dev, weights.site(site), squares, factors, norms, &mut self.scratch);
    }
}
