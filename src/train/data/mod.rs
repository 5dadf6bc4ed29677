//! Examples as a trainer reads them: ids and weights, flat.
//!
//! Owns the two lists. Never reads a file. The thing to know: an example is a range of both.

use super::batch::Example;

/// See the file's head.
#[derive(Debug, Default)]
pub struct Examples {
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Where each example ends.
    ends: Vec<usize>,
}

impl Examples {
    /// Adds an example. `[n]` each
    ///
    /// # Panics
    /// On a weight too many or too few.
    pub fn add(&mut self, ids: &[u32], weights: &[f32]) {
        assert_eq!(ids.len(), weights.len(), "a weight an id");
        self.ids.extend(ids);
        self.weights.extend(weights);
        self.ends.push(self.ids.len());
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn get(&self, index: usize) -> Example<'_> {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let range = start..self.ends[index];
        Example { ids: &self.ids[range.clone()], weights: &self.weights[range] }
    }

    /// All ids.
    pub fn tokens(&self) -> u64 {
        self.ids.len() as u64
    }

    /// Ids of the longest example.
    pub fn longest(&self) -> usize {
        (0..self.len()).map(|i| self.get(i).ids.len()).max().unwrap_or(0)
    }
}
