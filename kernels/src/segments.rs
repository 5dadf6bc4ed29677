//! Which rows are computed with which residents. Only reads the table the scheduler made.

use std::ops::Range;

use crate::{AdapterMix, Delta, EmbedDelta, Residents, Vector};

/// Rows of one mix are neighbours; base rows come last.
///
/// `indptr` `[G + 1]` starts with 0 and strictly increases; segment `g` is the rows
/// `indptr[g]..indptr[g + 1]`, computed with `mixes[g]`. Rows from `indptr[G]` on belong to no
/// adapter. No segments at all is `[0]`.
#[derive(Clone, Copy)]
pub struct Segments<'a> {
    pub indptr: &'a [u32],
    /// `[G]`
    pub mixes: &'a [AdapterMix],
    pub residents: &'a Residents,
}

impl<'a> Segments<'a> {
    /// Base rows only.
    pub fn none() -> Segments<'static> {
        static NOBODY: Residents = Residents::empty();
        Segments { indptr: &[0], mixes: &[], residents: &NOBODY }
    }

    /// G.
    pub fn count(&self) -> usize {
        self.indptr.len() - 1
    }

    /// Rows of segment `g`.
    pub fn rows(&self, g: usize) -> Range<usize> {
        self.indptr[g] as usize..self.indptr[g + 1] as usize
    }

    /// The segment of row `t`, or `None` for a base row.
    pub fn of_row(&self, t: usize) -> Option<usize> {
        let after = self.indptr.partition_point(|&start| start as usize <= t);
        (after < self.indptr.len()).then(|| after - 1)
    }

    /// The deltas that segment `g` has at a site and their weights, in the order in which they are
    /// summed.
    pub(crate) fn deltas(&self, g: usize, site: usize) -> impl Iterator<Item = (&'a Delta, f32)> {
        let Segments { mixes, residents, .. } = *self;
        let delta = move |(slot, weight)| Some((residents.delta(slot, site)?, weight));
        mixes[g].parts().filter_map(delta)
    }

    /// The same of the table.
    pub(crate) fn embeddings(&self, g: usize) -> impl Iterator<Item = (&'a EmbedDelta, f32)> {
        let Segments { mixes, residents, .. } = *self;
        let delta = move |(slot, weight)| Some((residents.embedding(slot)?, weight));
        mixes[g].parts().filter_map(delta)
    }

    /// The weights that segment `g` has in place of a norm's. Only an adapter alone may replace
    /// them.
    pub(crate) fn norm(&self, g: usize, norm: usize) -> Option<&'a Vector> {
        self.residents.norm(self.mixes[g].alone()?, norm)
    }

    /// # Panics
    /// Unless the table is as described, for `rows` rows.
    pub(crate) fn check(&self, rows: usize) {
        assert_eq!(self.indptr.first(), Some(&0), "indptr starts with 0");
        assert!(self.indptr.is_sorted_by(|a, b| a < b), "indptr strictly increases");
        assert_eq!(self.mixes.len(), self.count(), "a mix a segment");
        let end = self.indptr[self.count()] as usize;
        assert!(end <= rows, "segments reach row {end} of {rows}");
    }
}
