//! The greatest logit, and where it is first. Reads only.

use crate::simd::{Isa, Kernel, LANES, Simd};

/// Logits looked at before the greatest so far is updated.
const BLOCK: usize = 16 * LANES;

/// Index and value of the greatest of `logits`, the first of equals; `None` if one of them is NaN
/// or +inf, or none is above -inf.
pub fn argmax(logits: &[f32]) -> Option<(usize, f32)> {
    let isa = *Isa::available().last().expect("portable is always there");
    // SAFETY: the instruction set is available; the kernel stays within the slice.
    let (block, greatest) = unsafe { isa.run(Greatest(logits)) }?;
    let first = block + logits[block..].iter().position(|&x| x == greatest)?;
    Some((first, greatest))
}

struct Greatest<'a>(&'a [f32]);

impl Kernel for Greatest<'_> {
    /// Start of the first block that has the greatest value, and the value.
    type Output = Option<(usize, f32)>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Option<(usize, f32)> {
        let infinity = S::splat(f32::INFINITY);
        // Zero in lanes that have seen nothing but numbers and -inf.
        let mut odd = S::zero();
        let (mut at, mut greatest) = (0, f32::NEG_INFINITY);
        for (index, block) in self.0.chunks(BLOCK).enumerate() {
            let mut best = [S::splat(f32::NEG_INFINITY); 2];
            let pairs = block.chunks_exact(2 * LANES);
            let tail = pairs.remainder();
            for pair in pairs {
                for (i, best) in best.iter_mut().enumerate() {
                    let x = S::load(pair.as_ptr().add(i * LANES));
                    *best = S::max(x, *best);
                    odd = S::select_lt(x, infinity, odd, infinity);
                }
            }
            let mut most = S::max_lane(S::max(best[0], best[1]));
            for &x in tail {
                most = if x > most { x } else { most };
                if x.is_nan() || x == f32::INFINITY {
                    return None;
                }
            }
            if most > greatest {
                (at, greatest) = (index * BLOCK, most);
            }
        }
        (greatest > f32::NEG_INFINITY && !S::any_lt(S::zero(), odd)).then_some((at, greatest))
    }
}
