//! What the C library's allocator keeps of what was freed.
//!
//! Owns three settings of the process, and the call that gives pages back. Never allocates. The
//! thing to know: where there is no glibc it does nothing, since the others have no such settings.

/// Blocks of so many bytes and more are mapped for themselves, and unmapped when they are freed.
const MAPPED_FROM: i32 = 64 << 10;
/// At most so many mapped blocks: a process may have 65,530 mappings, and threads and files want
/// some as well.
const MAPPED_MAX: i32 = 16 << 10;

/// Heaps that threads share. What computes allocates nothing, and small blocks pass through a cache
/// of each thread.
const ARENAS_MAX: i32 = 2;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
unsafe extern "C" {
    fn mallopt(parameter: i32, value: i32) -> i32;
    fn malloc_trim(pad: usize) -> i32;
}

/// Gives large blocks back to the system as soon as they are freed, and keeps small ones in few
/// heaps. Left to itself glibc learns from the first large block that is freed to keep such blocks,
/// in one of up to eight arenas a core; adapters, read on one thread and freed on another, then let
/// a process grow by a half. To be called before there are other threads; calling it again changes
/// nothing.
pub fn return_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in [(-3, MAPPED_FROM), (-4, MAPPED_MAX), (-8, ARENAS_MAX)] {
        // SAFETY: mallopt takes two integers and touches only the allocator's own settings; -3 is
        // M_MMAP_THRESHOLD, -4 is M_MMAP_MAX and -8 is M_ARENA_MAX in glibc's malloc.h. A value
        // that it does not like leaves things as they were.
        unsafe { mallopt(parameter, value) };
    }
}

/// Gives the system back what lies free between small blocks that are in use: glibc itself only
/// gives back what lies free at a heap's end. Takes a millisecond for some hundred megabytes.
pub fn return_free_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes a number, may be called from any thread at any time, and changes
    // nothing that a program can see but which pages are mapped.
    unsafe {
        malloc_trim(0)
    };
}
