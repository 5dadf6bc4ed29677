//! Where buffers come from: memory in huge pages. Owns regions and who has which part of them;
//! knows no types.
//!
//! Serving reads hundreds of megabytes a step, once each. In 4 KiB pages the translation of
//! addresses and the prefetcher's stop at every page end cost half of the memory's bandwidth (17
//! against 33 GB/s a core on Zen 4), so weights, adapters and KV pages lie in 2 MiB pages.
//! Adapters' factors are smaller than that and come and go: buffers share regions, first fit, and a
//! region that falls empty goes back to the system. Nothing here is on the path of a step.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};

/// Size and alignment of a huge page.
const HUGE: usize = 2 << 20;
/// Bytes of a shared region; only what buffers touched is resident.
const REGION: usize = 64 << 20;
/// Buffers above have a region of their own.
const SHARED_MAX: usize = REGION / 4;
/// Buffers below would not fill a small page: the ordinary heap.
const SHARED_MIN: usize = 4 << 10;
/// A cache line: the grain of everything here.
const LINE: usize = 64;

/// Shared regions, oldest first.
static REGIONS: Mutex<Vec<Region>> = Mutex::new(Vec::new());

struct Region {
    start: usize,
    /// Free (offset, length), by offset, no two adjacent.
    free: Vec<(usize, usize)>,
}

fn layout(bytes: usize, align: usize) -> Layout {
    Layout::from_size_align(bytes, align).expect("buffer fits the address space")
}

fn regions() -> MutexGuard<'static, Vec<Region>> {
    REGIONS.lock().expect("no code panics under this lock")
}

/// `bytes > 0` of zeros, aligned to 64.
pub(crate) fn take(bytes: usize) -> NonNull<u8> {
    let start = match bytes {
        ..SHARED_MIN => system(layout(bytes, LINE)),
        SHARED_MIN..=SHARED_MAX => shared(bytes.next_multiple_of(LINE)),
        _ => huge(bytes),
    };
    // SAFETY: `bytes` from `start` on were just taken for this call.
    unsafe { start.write_bytes(0, bytes) };
    start
}

/// Gives back what [`take`] gave for the same `bytes`.
///
/// # Safety
/// Once per take, and nobody uses the memory any more.
pub(crate) unsafe fn give_back(start: NonNull<u8>, bytes: usize) {
    match bytes {
        ..SHARED_MIN => dealloc(start.as_ptr(), layout(bytes, LINE)),
        SHARED_MIN..=SHARED_MAX => unshare(start, bytes.next_multiple_of(LINE)),
        _ => dealloc(start.as_ptr(), layout(bytes, HUGE)),
    }
}

fn system(layout: Layout) -> NonNull<u8> {
    // SAFETY: the size is above zero.
    NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}

/// Memory of its own, in huge pages where the system has them.
fn huge(bytes: usize) -> NonNull<u8> {
    let start = system(layout(bytes, HUGE));
    #[cfg(target_os = "linux")]
    {
        unsafe extern "C" {
            fn madvise(start: *mut u8, bytes: usize, advice: i32) -> i32;
        }
        const MADV_HUGEPAGE: i32 = 14;
        // SAFETY: advice on memory we own, not touched yet. A refusal leaves small pages, which are
        // only slower.
        unsafe { madvise(start.as_ptr(), bytes, MADV_HUGEPAGE) };
    }
    start
}

fn shared(bytes: usize) -> NonNull<u8> {
    let mut regions = regions();
    let found = regions.iter_mut().find_map(|region| region.take(bytes));
    found.unwrap_or_else(|| {
        let start = huge(REGION).as_ptr().expose_provenance();
        let mut region = Region { start, free: vec![(0, REGION)] };
        let taken = region.take(bytes).expect("an empty region has room");
        regions.push(region);
        taken
    })
}

fn unshare(start: NonNull<u8>, bytes: usize) {
    let mut regions = regions();
    let address = start.addr().get();
    let holds = |region: &Region| (region.start..region.start + REGION).contains(&address);
    let index = regions.iter().position(holds).expect("shared memory lies in a region");
    let region = &mut regions[index];
    region.give_back(address - region.start, bytes);
    if region.free == [(0, REGION)] {
        let region = regions.remove(index);
        let start = std::ptr::with_exposed_provenance_mut::<u8>(region.start);
        // SAFETY: allocated in `shared` with this layout; no buffer lies in it.
        unsafe { dealloc(start, layout(REGION, HUGE)) };
    }
}

impl Region {
    /// The first free stretch that is long enough, from its front.
    fn take(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let index = self.free.iter().position(|&(_, length)| length >= bytes)?;
        let (offset, length) = self.free[index];
        if length == bytes {
            self.free.remove(index);
        } else {
            self.free[index] = (offset + bytes, length - bytes);
        }
        NonNull::new(std::ptr::with_exposed_provenance_mut(self.start + offset))
    }

    fn give_back(&mut self, offset: usize, bytes: usize) {
        let index = self.free.partition_point(|&(start, _)| start < offset);
        self.free.insert(index, (offset, bytes));
        for left in [index, index.wrapping_sub(1)] {
            if let (Some(&(start, length)), Some(&(next, more))) =
                (self.free.get(left), self.free.get(left.wrapping_add(1)))
                && start + length == next
            {
                self.free[left].1 = length + more;
                self.free.remove(left + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_never_overlap_and_an_empty_region_is_whole_again() {
        let mut region = Region { start: HUGE, free: vec![(0, REGION)] };
        let mut held: Vec<(usize, usize)> = Vec::new();
        let mut state = 1u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let draw = (state >> 33) as usize;
            if draw % 5 < 3 {
                let bytes = (1 + draw % 9000) * LINE;
                let Some(start) = region.take(bytes) else {
                    continue;
                };
                let offset = start.addr().get() - HUGE;
                assert!(offset + bytes <= REGION);
                let clash = |&(o, b): &(usize, usize)| o < offset + bytes && offset < o + b;
                assert!(!held.iter().any(clash), "{bytes} at {offset}");
                held.push((offset, bytes));
            } else if !held.is_empty() {
                let (offset, bytes) = held.swap_remove(draw % held.len());
                region.give_back(offset, bytes);
            }
        }
        assert!(region.take(REGION).is_none());
        held.into_iter().for_each(|(offset, bytes)| region.give_back(offset, bytes));
        assert_eq!(region.free, [(0, REGION)]);
    }

    #[test]
    fn reused_memory_is_zero_again() {
        for bytes in [100, 5000, 3 << 20, 40 << 20] {
            for _ in 0..3 {
                let start = take(bytes);
                // SAFETY: just taken, given back once.
                unsafe {
                    let values = std::slice::from_raw_parts_mut(start.as_ptr(), bytes);
                    assert!(values.iter().all(|&b| b == 0), "{bytes}");
                    values.fill(7);
                    give_back(start, bytes);
                }
            }
        }
    }
}
