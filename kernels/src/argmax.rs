//! The index of the greatest logit; the first of equals wins. Reads only.

use crate::simd::{Isa, Kernel, LANES, Simd};

/// Index of the greatest value of `logits` (NaN never wins), the first of equals; 0 if there is
/// none.
pub fn argmax(logits: &[f32]) -> usize {
    let isa = *Isa::available().last().expect("portable is always there");
    // SAFETY: the instruction set is available; the kernel stays within the slice.
    let greatest = unsafe { isa.run(Greatest(logits)) };
    logits.iter().position(|&x| x == greatest).unwrap_or(0)
}

struct Greatest<'a>(&'a [f32]);

impl Kernel for Greatest<'_> {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let mut best = [S::splat(f32::NEG_INFINITY); 4];
        let chunks = self.0.chunks_exact(4 * LANES);
        let tail = chunks.remainder();
        for chunk in chunks {
            for (i, best) in best.iter_mut().enumerate() {
                *best = S::max(S::load(chunk.as_ptr().add(i * LANES)), *best);
            }
        }
        let best = S::max(S::max(best[0], best[1]), S::max(best[2], best[3]));
        tail.iter().copied().fold(S::max_lane(best), f32::max)
    }
}
