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
    /// From here on nobody had any of it: these bytes are zero.
    fresh: usize,
    /// Free (offset, length), by offset, no two adjacent.
    free: Vec<(usize, usize)>,
}

fn layout(bytes: usize, align: usize) -> Layout {
    Layout::from_size_align(bytes, align).expect("buffer fits the address space")
}

fn regions() -> MutexGuard<'static, Vec<Region>> {
    REGIONS.lock().expect("no code panics under this lock")
}

/// `bytes > 0` of zeros, aligned to 64, in pages that are there.
pub(crate) fn take(bytes: usize) -> NonNull<u8> {
    let (start, _) = find(bytes);
    // SAFETY: `bytes` from `start` on were just taken for this call.
    unsafe { start.write_bytes(0, bytes) };
    start
}

/// The same, but pages that nobody had are left to whoever writes to them first.
pub(crate) fn take_untouched(bytes: usize) -> NonNull<u8> {
    let (start, used) = find(bytes);
    // SAFETY: `used <= bytes`, and `bytes` from `start` on were just taken for this call.
    unsafe { start.write_bytes(0, used) };
    start
}

/// Memory, and how many bytes at its front somebody may have written: the others are zero.
fn find(bytes: usize) -> (NonNull<u8>, usize) {
    match bytes {
        ..SHARED_MIN => (system(layout(bytes, LINE)), bytes),
        SHARED_MIN..=SHARED_MAX => shared(bytes.next_multiple_of(LINE)),
        _ => (huge(bytes), 0),
    }
}

/// Gives back what [`take`] gave for the same `bytes`.
///
/// # Safety
/// Once per take, and nobody uses the memory any more.
pub(crate) unsafe fn give_back(start: NonNull<u8>, bytes: usize) {
    match bytes {
        ..SHARED_MIN => dealloc(start.as_ptr(), layout(bytes, LINE)),
        SHARED_MIN..=SHARED_MAX => unshare(start, bytes.next_multiple_of(LINE)),
        _ => unmap(start.as_ptr(), bytes),
    }
}

fn system(layout: Layout) -> NonNull<u8> {
    // SAFETY: the size is above zero.
    NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
}

/// Zeros in memory of its own, aligned to [`HUGE`], in huge pages where the system has them.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn huge(bytes: usize) -> NonNull<u8> {
    const READ_WRITE: i32 = 1 | 2;
    const PRIVATE_ANONYMOUS: i32 = 2 | 0x20;
    const MADV_HUGEPAGE: i32 = 14;
    let length = mapped(bytes);
    let all = length.checked_add(HUGE).expect("buffer fits the address space");
    // SAFETY: a new mapping, of no file. Its ends, cut off below, and the rest are ours alone; all
    // borders are multiples of a page. Advice that is refused leaves small pages, which are only
    // slower.
    unsafe {
        let start = mmap(std::ptr::null_mut(), all, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
        if start.addr() == usize::MAX {
            handle_alloc_error(layout(bytes, HUGE));
        }
        let before = start.align_offset(HUGE);
        let kept = start.add(before);
        for (end, bytes) in [(start, before), (kept.add(length), HUGE - before)] {
            if bytes > 0 {
                munmap(end, bytes);
            }
        }
        madvise(kept, length, MADV_HUGEPAGE);
        NonNull::new_unchecked(kept)
    }
}

/// # Safety
/// `start` is of [`huge`] for the same `bytes`; once, and nobody uses the memory any more.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn unmap(start: *mut u8, bytes: usize) {
    munmap(start, mapped(bytes));
}

/// Bytes of a mapping: whole pages, of whichever size.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn mapped(bytes: usize) -> usize {
    const PAGE_MAX: usize = 64 << 10;
    bytes.checked_next_multiple_of(PAGE_MAX).expect("buffer fits the address space")
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe extern "C" {
    fn mmap(
        start: *mut u8,
        bytes: usize,
        protection: i32,
        flags: i32,
        file: i32,
        offset: i64,
    ) -> *mut u8;
    fn munmap(start: *mut u8, bytes: usize) -> i32;
    fn madvise(start: *mut u8, bytes: usize, advice: i32) -> i32;
}

/// Zeros in memory of its own, aligned to [`HUGE`].
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
fn huge(bytes: usize) -> NonNull<u8> {
    let start = system(layout(bytes, HUGE));
    // SAFETY: just taken.
    unsafe { start.write_bytes(0, bytes) };
    start
}

/// # Safety
/// `start` is of [`huge`] for the same `bytes`; once, and nobody uses the memory any more.
#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
unsafe fn unmap(start: *mut u8, bytes: usize) {
    dealloc(start, layout(bytes, HUGE));
}

fn shared(bytes: usize) -> (NonNull<u8>, usize) {
    let mut regions = regions();
    let found = regions.iter_mut().find_map(|region| region.take(bytes));
    found.unwrap_or_else(|| {
        let start = huge(REGION).as_ptr().expose_provenance();
        let mut region = Region { start, fresh: 0, free: vec![(0, REGION)] };
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
        // SAFETY: taken in `shared` with this length; no buffer lies in it.
        unsafe { unmap(start, REGION) };
    }
}

impl Region {
    /// The first free stretch that is long enough, from its front; see [`find`].
    fn take(&mut self, bytes: usize) -> Option<(NonNull<u8>, usize)> {
        let index = self.free.iter().position(|&(_, length)| length >= bytes)?;
        let (offset, length) = self.free[index];
        if length == bytes {
            self.free.remove(index);
        } else {
            self.free[index] = (offset + bytes, length - bytes);
        }
        let used = self.fresh.saturating_sub(offset).min(bytes);
        self.fresh = self.fresh.max(offset + bytes);
        let start = NonNull::new(std::ptr::with_exposed_provenance_mut(self.start + offset))?;
        Some((start, used))
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
        let mut region = Region { start: HUGE, fresh: 0, free: vec![(0, REGION)] };
        let mut held: Vec<(usize, usize)> = Vec::new();
        let (mut state, mut most) = (1u64, 0usize);
        for _ in 0..20_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let draw = (state >> 33) as usize;
            if draw % 5 < 3 {
                let bytes = (1 + draw % 9000) * LINE;
                let Some((start, used)) = region.take(bytes) else {
                    continue;
                };
                let offset = start.addr().get() - HUGE;
                assert!(offset + bytes <= REGION);
                assert_eq!(used, bytes.min(most.saturating_sub(offset)), "{bytes} at {offset}");
                most = most.max(offset + bytes);
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
        // Its region stays, whatever else is given back.
        let stays = take(SHARED_MIN);
        for take in [take, take_untouched] {
            for bytes in [100, 5000, 3 << 20, 40 << 20] {
                for _ in 0..3 {
                    let (start, after) = (take(bytes), take(bytes));
                    for start in [start, after] {
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
        // SAFETY: taken above, given back once.
        unsafe { give_back(stays, SHARED_MIN) };
    }
}
