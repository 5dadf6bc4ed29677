//! Examples by the million, flat.
//!
//! Owns ids, weights and where each example ends. Never knows where they come from.

use super::encode::Encoded;
use crate::train::Example;

/// See the file's head.
#[derive(Debug, Default)]
pub struct Examples {
    ids: Vec<u32>,
    weights: Vec<f32>,
    ends: Vec<usize>,
    /// The line that each is of, from 1.
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

    pub(super) fn push(&mut self, line: u64, encoded: &Encoded) {
        self.ids.extend_from_slice(&encoded.ids);
        self.weights.extend_from_slice(&encoded.weights);
        self.ends.push(self.ids.len());
        self.lines.push(line);
        self.longest = self.longest.max(encoded.ids.len());
        self.supervised += encoded.supervised() as u64;
    }
}
