//! Digests of lines: which lines are equal, and which files had a line.
//!
//! Owns the digest's form. Never keeps a line.

use sha2::{Digest as _, Sha256};
use std::cmp::Ordering;

/// The first 16 bytes of SHA-256 over a line without its end.
pub type Digest = [u8; 16];

pub fn digest(line: &str) -> Digest {
    let whole: [u8; 32] = Sha256::digest(line.as_bytes()).into();
    whole.first_chunk().copied().unwrap_or_default()
}

/// Sorts, keeps one of each, and says how many were left out.
pub fn distinct(digests: &mut Vec<Digest>) -> u64 {
    let all = digests.len();
    digests.sort_unstable();
    digests.dedup();
    (all - digests.len()) as u64
}

/// How many different lines two files share, of their sorted digests.
pub fn shared(a: &[Digest], b: &[Digest]) -> u64 {
    let (mut i, mut k, mut both) = (0, 0, 0);
    while let (Some(x), Some(y)) = (a.get(i), b.get(k)) {
        match x.cmp(y) {
            Ordering::Less => i += 1,
            Ordering::Greater => k += 1,
            Ordering::Equal => (i, k, both) = (i + 1, k + 1, both + 1),
        }
    }
    both
}
