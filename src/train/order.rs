//! Which examples an optimizer step reads.
//!
//! Owns the permutation of every epoch. Never reads an example. The thing to know: a batch is a
//! function of (seed, step), so a job that is resumed needs no other state.

use crate::random::Stream;

/// See the file's head.
pub struct Order {
    seed: u64,
    batch: usize,
    /// The epoch that `examples` is ordered for.
    epoch: Option<u64>,
    examples: Vec<u32>,
}

impl Order {
    /// Of batches of `batch` of `examples`.
    ///
    /// # Panics
    /// Where either is none.
    pub fn new(seed: u64, examples: u32, batch: usize) -> Self {
        assert!(examples > 0 && batch > 0, "some examples in batches");
        Self { seed, batch, epoch: None, examples: (0..examples).collect() }
    }

    /// Steps of an epoch; its last batch may be shorter.
    pub fn steps_per_epoch(&self) -> u64 {
        self.examples.len().div_ceil(self.batch) as u64
    }

    /// The examples of a step, from 0.
    pub fn batch(&mut self, step: u64) -> &[u32] {
        let (epoch, index) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        if self.epoch != Some(epoch) {
            self.shuffle(epoch);
        }
        let start = index as usize * self.batch;
        &self.examples[start..self.examples.len().min(start + self.batch)]
    }

    fn shuffle(&mut self, epoch: u64) {
        let mut stream = Stream::new(&[self.seed, epoch]);
        for (i, example) in self.examples.iter_mut().enumerate() {
            *example = i as u32;
        }
        // Fisher and Yates; 64 bits for a few million places leave no bias that could be seen.
        for end in (1..self.examples.len()).rev() {
            let at = (u128::from(stream.next()) * (end as u128 + 1)) >> 64;
            self.examples.swap(end, at as usize);
        }
        self.epoch = Some(epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(order: &mut Order, epoch: u64) -> Vec<u32> {
        let steps = order.steps_per_epoch();
        (epoch * steps..(epoch + 1) * steps).flat_map(|s| order.batch(s).to_vec()).collect()
    }

    #[test]
    fn an_epoch_reads_every_example_once_in_an_order_of_its_own() {
        let mut order = Order::new(7, 10, 4);
        assert_eq!(order.steps_per_epoch(), 3);
        let epochs: Vec<Vec<u32>> = (0..3).map(|e| epoch(&mut order, e)).collect();
        for read in &epochs {
            let mut sorted = read.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().copied().eq(0..10), "{read:?}");
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        assert_ne!(epochs[0], epoch(&mut Order::new(8, 10, 4), 0));
        assert_eq!(order.batch(2).len(), 2, "the last batch of an epoch is short");
    }

    #[test]
    fn a_step_reads_the_same_wherever_a_job_is_resumed() {
        let mut order = Order::new(7, 10, 4);
        let all: Vec<Vec<u32>> = (0..9).map(|step| order.batch(step).to_vec()).collect();
        for (step, expected) in all.iter().enumerate().rev() {
            assert_eq!(Order::new(7, 10, 4).batch(step as u64), expected);
            assert_eq!(order.batch(step as u64), expected);
        }
    }

    #[test]
    fn every_place_is_as_likely_as_any() {
        let mut order = Order::new(1, 4, 1);
        let mut seen = [[0; 4]; 4];
        for e in 0..4000 {
            for (place, example) in epoch(&mut order, e).into_iter().enumerate() {
                seen[place][example as usize] += 1;
            }
        }
        assert!(seen.as_flattened().iter().all(|n| (900..1100).contains(n)), "{seen:?}");
    }
}
