//! Which cache lines of the deltas a product brings near: a list of addresses, dealt out evenly to
//! the steps of its inner loops.
//!
//! Owns the order, which is that of reading. Never reads a factor. The thing to know: every adapter
//! has its own B, so what follows a product lies in many short runs, and a loop that multiplies can
//! only spare a few instructions to ask for the next line.

use std::mem::MaybeUninit;

use crate::linear::change::Change;
use crate::linear::stream::LINE;

/// Lines of B to bring near beside the products of a block, in the order in which they are read.
pub(super) struct Lines<const MOST: usize = LINES_MAX> {
    places: [MaybeUninit<*const u8>; MOST],
    count: usize,
}

/// Lines of a block's deltas at most that are fetched beside its products; the rest is later.
const LINES_MAX: usize = 1024;
/// One line a step.
pub(super) const RATE_ONE: usize = 1 << 16;

impl<const MOST: usize> Lines<MOST> {
    #[inline(always)]
    pub(super) fn none() -> Lines<MOST> {
        Lines { places: [const { MaybeUninit::uninit() }; MOST], count: 0 }
    }

    /// Lists those of some stretches (start and bytes), as many as there is room for.
    #[inline(always)]
    pub(super) fn list_stretches(&mut self, all: impl Iterator<Item = (*const u8, usize)>) {
        self.count = 0;
        for (start, bytes) in all {
            let lines = (bytes / LINE).min(MOST - self.count);
            let places = &mut self.places[self.count..self.count + lines];
            for (line, place) in places.iter_mut().enumerate() {
                place.write(start.wrapping_add(line * LINE));
            }
            self.count += lines;
        }
    }

    /// Lists the deltas' lines of a block, no more than `most`.
    #[inline(always)]
    pub(super) unsafe fn list(&mut self, changes: &[Change], block: usize, most: usize) {
        self.count = 0;
        let most = most.min(MOST);
        for change in changes {
            let b = change.delta().place_b(block);
            let lines = change.delta().b_bytes(block..block + 1) / LINE;
            let lines = lines.min(most - self.count);
            let places = &mut self.places[self.count..self.count + lines];
            for (line, place) in places.iter_mut().enumerate() {
                place.write(b.wrapping_add(line * LINE));
            }
            self.count += lines;
        }
    }

    /// What the `index`th of `count` loops of `steps` steps each fetches: from where on, and how
    /// many lines a step in `RATE_ONE`ths, at most one. Null: nothing.
    #[inline(always)]
    pub(super) fn share(
        &self,
        index: usize,
        count: usize,
        steps: usize,
    ) -> (*const *const u8, usize) {
        let lines = self.count * index / count..self.count * (index + 1) / count;
        if lines.is_empty() {
            return (std::ptr::null(), 0);
        }
        let rate = lines.len().min(steps) * RATE_ONE / steps;
        (self.places[lines.start..].as_ptr().cast(), rate)
    }
}
