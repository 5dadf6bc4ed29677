//! The rows of one pass: examples one after the other, ragged, without padding.
//!
//! Owns the side tables that kernels read. Never allocates once it has grown. The thing to know: a
//! row is an input token and what it predicts is the next one, so an example of n tokens has n − 1
//! rows.

use polylora_kernels::{KvCache, Rows};
use std::ops::Range;

/// Tokens, and how much the prediction of each counts. `[n]` each; the first is never predicted.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    pub ids: &'a [u32],
    /// 0: not supervised.
    pub weights: &'a [f32],
}

/// See the file's head.
#[derive(Debug, Default)]
pub struct MicroBatch {
    /// `[T]`
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<u32>,
    /// Page ids of all sequences, and where each begins in them.
    pages: Vec<u32>,
    page_indptr: Vec<u32>,
    /// Rows of each adapter.
    segments: Vec<Range<usize>>,
    /// Rows with a target, ascending; their targets, and what −log p of each is multiplied by.
    supervised: Vec<u32>,
    targets: Vec<u32>,
    coefficients: Vec<f32>,
    /// By example: where its supervised rows end.
    ends: Vec<u32>,
}

impl MicroBatch {
    /// With room for so many rows, sequences and adapters.
    pub(super) fn with_capacity(rows: usize, sequences: usize, adapters: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(rows),
            positions: Vec::with_capacity(rows),
            sequences: Vec::with_capacity(rows),
            pages: Vec::with_capacity(pages_max(rows, sequences)),
            page_indptr: Vec::with_capacity(sequences + 1),
            segments: Vec::with_capacity(adapters),
            supervised: Vec::with_capacity(rows),
            targets: Vec::with_capacity(rows),
            coefficients: Vec::with_capacity(rows),
            ends: Vec::with_capacity(sequences),
        }
    }

    /// Bytes that `with_capacity` takes.
    pub(super) fn bytes(rows: usize, sequences: usize, adapters: usize) -> usize {
        4 * (6 * rows + pages_max(rows, sequences) + 2 * sequences + 1)
            + adapters * size_of::<Range<usize>>()
    }

    /// Removes all rows; the next example is of adapter 0.
    pub(super) fn clear(&mut self) {
        for list in [
            &mut self.tokens,
            &mut self.positions,
            &mut self.sequences,
            &mut self.pages,
            &mut self.page_indptr,
            &mut self.supervised,
            &mut self.targets,
            &mut self.ends,
        ] {
            list.clear();
        }
        self.page_indptr.push(0);
        self.coefficients.clear();
        self.segments.clear();
        self.segments.push(0..0);
    }

    /// Adds an example to the rows of the adapter at hand. Weights are divided by `total`: Σ w of
    /// the whole optimizer batch makes the loss a mean, 1 a sum.
    ///
    /// # Panics
    /// On fewer than two tokens.
    pub fn push(&mut self, example: Example<'_>, total: f64) {
        let rows = example.ids.len().checked_sub(1).filter(|rows| *rows > 0);
        let rows = rows.expect("an example has two tokens at least");
        let (first, sequence) = (self.tokens.len(), self.page_indptr.len() - 1);
        self.tokens.extend(&example.ids[..rows]);
        self.positions.extend(0..rows as u32);
        self.sequences.resize(first + rows, sequence as u32);
        let pages = self.pages.len()..self.pages.len() + rows.div_ceil(KvCache::PAGE);
        self.pages.extend(pages.start as u32..pages.end as u32);
        self.page_indptr.push(pages.end as u32);
        for row in 0..rows {
            let weight = example.weights[row + 1];
            if weight != 0.0 {
                self.supervised.push((first + row) as u32);
                self.targets.push(example.ids[row + 1]);
                self.coefficients.push((f64::from(weight) / total) as f32);
            }
        }
        self.segments.last_mut().expect("cleared before").end = self.tokens.len();
        self.ends.push(self.supervised.len() as u32);
    }

    /// Examples from here on are of the next adapter; beyond the last one, of the base.
    pub fn next_adapter(&mut self) {
        let end = self.rows();
        self.segments.push(end..end);
    }

    /// T.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Examples.
    pub fn sequences(&self) -> usize {
        self.page_indptr.len() - 1
    }

    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub(super) fn page_rows(&self) -> Rows<'_> {
        Rows {
            positions: &self.positions,
            sequences: &self.sequences,
            pages: &self.pages,
            page_indptr: &self.page_indptr,
        }
    }

    /// Rows of an adapter.
    pub(super) fn segment(&self, adapter: usize) -> Range<usize> {
        self.segments.get(adapter).cloned().unwrap_or(self.rows()..self.rows())
    }

    /// Rows with a target, ascending.
    pub(super) fn supervised(&self) -> &[u32] {
        &self.supervised
    }

    /// The supervised rows of an example, as a range of `supervised`.
    pub(super) fn supervised_of(&self, example: usize) -> Range<usize> {
        let start = example.checked_sub(1).map_or(0, |before| self.ends[before]);
        start as usize..self.ends[example] as usize
    }

    /// Multiplies the weights of an example.
    pub(super) fn weigh(&mut self, example: usize, factor: f64) {
        let rows = self.supervised_of(example);
        for coefficient in &mut self.coefficients[rows] {
            *coefficient = (f64::from(*coefficient) * factor) as f32;
        }
    }

    /// Of `supervised`.
    pub(super) fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// Of `supervised`.
    pub(super) fn coefficients(&self) -> &[f32] {
        &self.coefficients
    }
}

/// Pages that so many rows of so many sequences need at most.
pub(super) fn pages_max(rows: usize, sequences: usize) -> usize {
    rows.div_ceil(KvCache::PAGE) + sequences
}
