//! A stretch of memory that is read once, and what is asked for ahead of it.
//!
//! Owns the addresses. Never reads one.

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// A stretch of factors read once from front to back, and what is read next. The stretches are too
/// short for the CPU's own prefetch to get going.
#[derive(Clone, Copy)]
pub(super) struct Stream {
    pub(super) end: *const u8,
    /// Null: not known.
    pub(super) after: *const u8,
    /// Bytes on the way at a time.
    pub(super) distance: usize,
}

impl Stream {
    /// Twice what a core has on the way at full bandwidth.
    pub(super) const DISTANCE: usize = 8192;

    /// What will be read some time after `p`; `p` itself where that is not known: asking for what
    /// is near costs nothing, while a place that no page holds is looked for in the page tables
    /// each time.
    #[inline(always)]
    pub(super) fn ahead(self, p: *const u8) -> *const u8 {
        let ahead = p.wrapping_add(self.distance);
        if ahead < self.end {
            ahead
        } else if self.after.is_null() {
            p
        } else {
            self.after.wrapping_add(ahead.addr() - self.end.addr())
        }
    }
}
