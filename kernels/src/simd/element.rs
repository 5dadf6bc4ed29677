//! The types that factors, keys and values are stored as, and how lanes read and store them.
//!
//! Never decides which type is used: an adapter's bank and a KV cache do.

use half::bf16;

use super::lanes::{GROUP, LANES, Simd};

/// What a factor, a key or a value may be stored as, widened to f32 lanes when read.
///
/// Storage is in groups of 32. In bf16 a group is 16 words of 32 bits, value `i` in the low half of
/// word `i` and value `16 + i` in its high half: a shift and a mask widen a whole cache line, where
/// consecutive values would take two shuffles. In int8 they are consecutive.
pub(crate) trait Element: Copy + Send + Sync {
    /// A group of 32: its first 16 values and the others.
    unsafe fn load_pair<S: Simd>(p: *const Self) -> [S::F; 2];
    /// Where value `index` of a row is stored.
    fn place(index: usize) -> usize;
    /// Ranks of B that lie side by side: as many as fill a word that the CPU may multiply whole.
    const DEPTH: usize = 1;
    /// Whether a word of them, two values, is multiplied whole ([`Simd::dot_bf16`]).
    #[inline(always)]
    fn multiplied_in_pairs<S: Simd>() -> bool {
        S::PAIRS && Self::DEPTH == 2
    }
    fn from_f32(x: f32) -> Self;
}

/// What is read value by value too, and stored by a step.
pub(crate) trait Stored: Element {
    /// Whether values are multiples of a scale that is kept elsewhere.
    const SCALED: bool = false;
    fn to_f32(self) -> f32;
    /// Stores the first `n` lanes, rounded.
    unsafe fn store_n<S: Simd>(p: *mut Self, n: usize, v: S::F);
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const f32) -> [S::F; 2] {
        [S::load(p), S::load(p.add(LANES))]
    }
    #[inline(always)]
    fn place(index: usize) -> usize {
        index
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn store_n<S: Simd>(p: *mut f32, n: usize, v: S::F) {
        S::store_row_n(p, n, v)
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const bf16) -> [S::F; 2] {
        S::load_bf16_pair(p)
    }
    #[inline(always)]
    fn place(index: usize) -> usize {
        index / GROUP * GROUP + index % LANES * 2 + index / LANES % 2
    }
    const DEPTH: usize = 2;
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn store_n<S: Simd>(p: *mut bf16, n: usize, v: S::F) {
        S::store_bf16_n(p, n, v)
    }
}

/// A multiple of its row's scale.
impl Element for i8 {
    #[inline(always)]
    unsafe fn load_pair<S: Simd>(p: *const i8) -> [S::F; 2] {
        S::load_i8_pair(p)
    }
    #[inline(always)]
    fn place(index: usize) -> usize {
        index
    }
    #[inline(always)]
    fn from_f32(x: f32) -> i8 {
        x.round_ties_even() as i8
    }
}

impl Stored for i8 {
    const SCALED: bool = true;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    unsafe fn store_n<S: Simd>(p: *mut i8, n: usize, v: S::F) {
        let mut lanes = [0; LANES];
        S::store_i8(lanes.as_mut_ptr(), S::round(v));
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
    }
}
