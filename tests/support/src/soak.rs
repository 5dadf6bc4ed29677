//! How long a test runs: briefly in `make test`, long in `make soak`, which sets `POLYLORA_SOAK`.
//!
//! Owns the two variables that say so. The thing to know: what is judged by time or by the memory of
//! a process is judged in a soak only, on a machine with nothing else to do.

use std::ops::Range;

/// Whether this is the long run.
pub fn soak() -> bool {
    std::env::var_os("POLYLORA_SOAK").is_some()
}

/// `short` in `make test`, `long` in a soak.
pub fn rounds(short: usize, long: usize) -> usize {
    if soak() { long } else { short }
}

/// Numbers of that many cases. Each case follows from its number alone, so `POLYLORA_ONLY` repeats
/// one that failed.
pub fn cases(short: usize, long: usize) -> Range<usize> {
    match std::env::var("POLYLORA_ONLY") {
        Ok(number) => {
            let only = number.parse().expect("POLYLORA_ONLY is the number of a case");
            only..only + 1
        }
        Err(_) => 0..rounds(short, long),
    }
}
