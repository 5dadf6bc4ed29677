//! Which cache lines of the deltas a product brings near: a list of addresses, one for each step of
//! its inner loop.
//!
//! Owns the order, which is that of reading. Never reads a factor. The thing to know: every adapter
//! has its own B, so what follows a product lies in many short runs, and a loop that multiplies can
//! only spare one instruction to ask for the next line.

use std::mem::MaybeUninit;

use crate::linear::Change;

/// Lines of B to bring near beside the products of a block, in the order in which they are read.
pub(super) struct Lines {
    places: [MaybeUninit<*const u8>; LINES_MAX],
    count: usize,
}

/// Lines of a block's deltas at most that are fetched beside its products; the rest is later.
const LINES_MAX: usize = 1024;
/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

impl Lines {
    #[inline(always)]
    pub(super) fn none() -> Lines {
        Lines { places: [MaybeUninit::uninit(); LINES_MAX], count: 0 }
    }

    /// Lists the deltas' lines of a block, and repeats the last one up to a multiple of `span`.
    #[inline(always)]
    pub(super) unsafe fn list(&mut self, changes: &[Change], block: usize, span: usize) {
        self.count = 0;
        let mut last = std::ptr::null();
        for change in changes {
            let b = change.delta().place_b(block);
            let lines = change.delta().b_bytes(block..block + 1) / LINE;
            let lines = lines.min(LINES_MAX - self.count);
            let places = &mut self.places[self.count..self.count + lines];
            for (line, place) in places.iter_mut().enumerate() {
                last = b.wrapping_add(line * LINE);
                place.write(last);
            }
            self.count += lines;
        }
        let end = self.count.next_multiple_of(span).min(LINES_MAX);
        for place in &mut self.places[self.count..end] {
            place.write(last);
        }
        self.count = end;
    }

    /// `span` of them from `start` on; null where they are fewer.
    #[inline(always)]
    pub(super) fn from(&self, start: usize, span: usize) -> *const *const u8 {
        if start + span <= self.count {
            self.places[start..].as_ptr().cast()
        } else {
            std::ptr::null()
        }
    }
}
