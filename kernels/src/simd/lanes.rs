//! The vocabulary: sixteen f32 lanes, sixteen words, and the loops that are written in them.
//!
//! Owns [`Simd`] and what every instruction set computes by the same operations. The thing to know:
//! an operation's order of sums is part of its meaning.

use half::{bf16, f16};

/// Lanes of one vector, outputs of one weight panel, tokens of one page.
pub(crate) const LANES: usize = 16;

/// Values of one group of stored factors, keys or values: two vectors.
pub(crate) const GROUP: usize = 2 * LANES;

/// An inner loop, generic over the lanes it runs on.
pub(crate) trait Kernel {
    type Output;
    /// # Safety
    /// The instruction set of `S` is there; pointers held by `self` are valid for what the kernel's
    /// page says.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Sixteen f32 lanes. All methods are unsafe because they need the instruction set; pointers need
/// no alignment.
pub(crate) trait Simd: Copy {
    /// One vector.
    type F: Copy;
    /// Sixteen 32-bit integers.
    type I: Copy;
    /// Whether there are registers for a tile of 24 vectors; else for one of 6.
    const WIDE: bool;
    /// Whether the CPU multiplies pairs of bf16 itself: [`Simd::dot_bf16`] and what it reads.
    const PAIRS: bool = false;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    /// The first `n <= 16` lanes, the others zero.
    unsafe fn load_n(p: *const f32, n: usize) -> Self::F;
    unsafe fn store_n(p: *mut f32, n: usize, v: Self::F);
    /// The same for long rows, of which nearly all vectors are whole: a masked store takes several
    /// times as long on some CPUs (Zen 4).
    #[inline(always)]
    unsafe fn store_row_n(p: *mut f32, n: usize, v: Self::F) {
        if n == LANES { Self::store(p, v) } else { Self::store_n(p, n, v) }
    }
    /// 32 values stored as [`super::Element::place`] says: the first 16 and the others.
    unsafe fn load_bf16_pair(p: *const bf16) -> [Self::F; 2];
    /// 32 values, the first 16 and the others.
    unsafe fn load_i8_pair(p: *const i8) -> [Self::F; 2];
    /// Rounded to nearest even, as `bf16::from_f32` does.
    unsafe fn store_bf16_n(p: *mut bf16, n: usize, v: Self::F);

    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`, so `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`, so `b` where either is NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, fused where the CPU can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a < b ? yes : no`.
    unsafe fn select_lt(a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// To the nearest integer, ties to even; |v| < 2^22.
    unsafe fn round(v: Self::F) -> Self::F;
    /// 2^n of integral lanes in -126..=127.
    unsafe fn pow2(n: Self::F) -> Self::F;
    /// `v · 2^n` for such n.
    #[inline(always)]
    unsafe fn scale_pow2(v: Self::F, n: Self::F) -> Self::F {
        Self::mul(v, Self::pow2(n))
    }
    /// Whether `a < b` in any lane.
    unsafe fn any_lt(a: Self::F, b: Self::F) -> bool;
    /// Whether `a < b` in all lanes.
    unsafe fn all_lt(a: Self::F, b: Self::F) -> bool;
    /// Lanes i and i+8, then i+4, i+2, i+1: one order everywhere.
    unsafe fn sum(v: Self::F) -> f32;
    /// Stores the [`Simd::sum`] of each vector times its weight.
    #[inline(always)]
    unsafe fn store_sums<const N: usize>(p: *mut f32, v: [Self::F; N], weights: [f32; N]) {
        for (i, (v, weight)) in v.into_iter().zip(weights).enumerate() {
            *p.add(i) = weight * Self::sum(v);
        }
    }
    unsafe fn max_lane(v: Self::F) -> f32;

    /// The bf16 in the low, or the high, halves of 16 words, as f32.
    unsafe fn low_halves(w: *const u32) -> Self::F;
    unsafe fn high_halves(w: *const u32) -> Self::F;
    /// 32 consecutive bf16 as words that pair the first 16 with the others; where [`Simd::PAIRS`].
    #[inline(always)]
    unsafe fn load_pairs(_p: *const bf16) -> Self::I {
        unreachable!("asked where the CPU does not multiply pairs")
    }
    /// `acc + x0 · w0 + x1 · w1` of every lane's pairs; where [`Simd::PAIRS`].
    #[inline(always)]
    unsafe fn dot_bf16(_acc: Self::F, _x: Self::I, _w: Self::I) -> Self::F {
        unreachable!("asked where the CPU does not multiply pairs")
    }
    /// Stores the first `n <= 16` lanes as pairs of neighbours, rounded to nearest even (subnormals
    /// to zero), the last completed with zero; where [`Simd::PAIRS`].
    #[inline(always)]
    unsafe fn store_pairs_n(_p: *mut u32, _n: usize, _v: Self::F) {
        unreachable!("asked where the CPU does not multiply pairs")
    }
    unsafe fn splat_int(x: i32) -> Self::I;
    /// `a`, then `b`, as words that pair neighbours, rounded as [`Simd::store_pairs_n`] does; where
    /// [`Simd::PAIRS`].
    #[inline(always)]
    unsafe fn pairs(_a: Self::F, _b: Self::F) -> Self::I {
        unreachable!("asked where the CPU does not multiply pairs")
    }
    unsafe fn load_int(p: *const u32) -> Self::I;
    unsafe fn store_int(p: *mut u32, v: Self::I);
    /// The lanes' bits.
    unsafe fn float_bits(v: Self::F) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn to_float(v: Self::I) -> Self::F;
    /// 16 values.
    unsafe fn load_f16(p: *const f16) -> Self::F;
    /// The low, or the high, half of every byte.
    unsafe fn low_nibbles(w: Self::I) -> Self::I;
    unsafe fn high_nibbles(w: Self::I) -> Self::I;
    /// `COUNT < 32` bits of every lane from bit `from` on.
    unsafe fn bits<const COUNT: usize>(w: Self::I, from: usize) -> Self::I;
    /// What [`Simd::dot`] takes from every w.
    const ORIGIN: i32 = 0;
    /// `acc + Σ (w − ORIGIN)·x` over the four bytes of every lane, w unsigned, |x| < 128, x the
    /// same in all lanes.
    unsafe fn dot(acc: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// Whether nibbles are multiplied by bytes in fewer instructions than bytes:
    /// [`Simd::dot_nibbles`].
    const NIBBLES: bool = false;
    /// `acc + Σ w·x` over the bytes of every lane in two 16-bit sums, w < 16, |x| < 128; at most
    /// eight times on top of zeros. Where [`Simd::NIBBLES`].
    #[inline(always)]
    unsafe fn dot_nibbles(_acc: Self::I, _w: Self::I, _x: Self::I) -> Self::I {
        unreachable!("asked where bytes are multiplied as they are")
    }
    /// `start` and each lane's two sums. Where [`Simd::NIBBLES`].
    #[inline(always)]
    unsafe fn nibble_sums(_sums: Self::I, _start: i32) -> Self::I {
        unreachable!("asked where bytes are multiplied as they are")
    }
    /// Stores the columns of 16 rows, the last eight from `to[1]` on, then the others from `to[0]`
    /// on, each `stride` words apart.
    #[inline(always)]
    unsafe fn store_turned(rows: &[Self::I; LANES], to: [*mut u32; 2], stride: usize) {
        let rows = rows.as_ptr().cast::<u32>();
        for column in (0..LANES).rev() {
            let to = to[column / 8].add(column % 8 * stride);
            (0..LANES).for_each(|row| *to.add(row) = *rows.add(row * LANES + column));
        }
    }
    /// To integers; lanes within an i8.
    unsafe fn store_i8(p: *mut i8, v: Self::F);
    /// Asks for the line in the second-level cache: the first level's few places for misses would
    /// limit a core to half the memory's bandwidth.
    unsafe fn prefetch(p: *const u8);
    /// Asks for the line in the first-level cache: for what another cache has.
    unsafe fn prefetch_near(p: *const u8);

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        Self::splat(0.0)
    }

    /// eˣ within 2 ulp; 0 below -87.33 (no subnormals), e^88.37 above.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        const LOW: f32 = -87.33;
        let clamped = Self::max(Self::splat(LOW), Self::min(Self::splat(88.37), x));
        let n = Self::round(Self::mul(clamped, Self::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts; the first has so few bits that n · LN2_HIGH is exact.
        let r = Self::fma(n, Self::splat(-0.693_359_4), clamped);
        let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
        // Taylor to the 7th power: the rest is below 6e-9 for |r| <= ln 2 / 2.
        let mut p = Self::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = Self::fma(p, r, Self::splat(c));
        }
        let y = Self::mul(p, Self::pow2(n));
        Self::select_lt(x, Self::splat(LOW), Self::zero(), y)
    }

    /// 2ˣ of x <= 0 within 2 ulp, 1 of 0; 0 below -126 (no subnormals).
    #[inline(always)]
    unsafe fn exp2(x: Self::F) -> Self::F {
        const LOW: f32 = -126.0;
        // (2^r - 1) / r for |r| <= 1/2, by Lawson's iteration: within 2e-9 of 2^r.
        const Q: [f32; 6] = [
            1.535_336_2e-4,
            1.339_887_5e-3,
            9.618_437e-3,
            5.550_332_4e-2,
            2.402_264_8e-1,
            std::f32::consts::LN_2,
        ];
        let clamped = Self::max(Self::splat(LOW), x);
        let n = Self::round(clamped);
        let r = Self::sub(clamped, n);
        let mut p = Self::splat(Q[0]);
        for c in &Q[1..] {
            p = Self::fma(p, r, Self::splat(*c));
        }
        let p = Self::fma(p, r, Self::splat(1.0));
        let y = Self::scale_pow2(p, n);
        Self::select_lt(x, Self::splat(LOW), Self::zero(), y)
    }
}
