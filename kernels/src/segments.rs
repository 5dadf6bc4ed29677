//! Which rows share an adapter. Only reads the table the scheduler made.

use std::ops::Range;

/// Rows of one adapter are neighbours; base rows come last.
///
/// `indptr` `[G + 1]` starts with 0 and strictly increases; segment `g` is the rows
/// `indptr[g]..indptr[g + 1]`. Rows from `indptr[G]` on belong to no adapter. No segments at all is
/// `[0]`.
#[derive(Debug, Clone, Copy)]
pub struct Segments<'a> {
    pub indptr: &'a [u32],
}

impl Segments<'_> {
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

    /// # Panics
    /// Unless the table is as described, for `rows` rows.
    pub(crate) fn check(&self, rows: usize) {
        assert_eq!(self.indptr.first(), Some(&0), "indptr starts with 0");
        assert!(self.indptr.is_sorted_by(|a, b| a < b), "indptr strictly increases");
        let end = self.indptr[self.count()] as usize;
        assert!(end <= rows, "segments reach row {end} of {rows}");
    }
}
