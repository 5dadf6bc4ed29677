//! Examples by the million, flat.
//!
//! Owns ids, weights and where each example ends. Never knows where they come from.

use super::encode::Encoded;
use crate::train::batch::Example;

/// See the file's head.
#[derive(Debug, Default)]
pub struct Examples {
    ids: Vec<u32>,
    weights: Vec<f32>,
    ends: Vec<usize>,
    /// The line that each is of, from 1; 0 is none.
    lines: Vec<u64>,
    longest: usize,
    supervised: u64,
}

impl Examples {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// # Panics
    /// Beyond the last.
    pub fn get(&self, index: usize) -> Example<'_> {
        let from = if index == 0 { 0 } else { self.ends[index - 1] };
        let range = from..self.ends[index];
        Example { ids: &self.ids[range.clone()], weights: &self.weights[range] }
    }

    /// The line that an example is of, from 1.
    ///
    /// # Panics
    /// Beyond the last.
    pub fn line(&self, index: usize) -> u64 {
        self.lines[index]
    }

    /// Ids of all examples.
    pub fn tokens(&self) -> u64 {
        self.ids.len() as u64
    }

    /// Ids that are learnt.
    pub fn supervised(&self) -> u64 {
        self.supervised
    }

    /// Ids of the longest example.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Adds an example that is of no line. `[n]` each
    ///
    /// # Panics
    /// On a weight too many or too few.
    pub fn add(&mut self, ids: &[u32], weights: &[f32]) {
        assert_eq!(ids.len(), weights.len(), "a weight an id");
        self.ids.extend_from_slice(ids);
        self.weights.extend_from_slice(weights);
        self.ends.push(self.ids.len());
        self.lines.push(0);
        self.longest = self.longest.max(ids.len());
        self.supervised += weights.iter().skip(1).filter(|w| **w != 0.0).count() as u64;
    }

    /// Those whose line `keeps`.
    pub(super) fn part(&self, keeps: impl Fn(u64) -> bool) -> Self {
        let mut part = Self::default();
        for index in (0..self.len()).filter(|index| keeps(self.line(*index))) {
            let Example { ids, weights } = self.get(index);
            part.add_of(self.line(index), ids, weights);
        }
        part
    }

    pub(super) fn push(&mut self, line: u64, encoded: &Encoded) {
        self.add_of(line, &encoded.ids, &encoded.weights);
    }

    pub(super) fn add_of(&mut self, line: u64, ids: &[u32], weights: &[f32]) {
        self.add(ids, weights);
        if let Some(last) = self.lines.last_mut() {
            *last = line;
        }
    }
}
