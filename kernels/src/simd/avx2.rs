//! Sixteen lanes in two AVX2 registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::lanes::{Kernel, LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Lanes i and i+4, then i+2, i+1.
#[inline(always)]
pub(super) unsafe fn sum8(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
}

/// The first `n <= 16` lanes. (By copies of so many bytes, loads and stores would be calls, across
/// which no register holds its sum.)
#[inline(always)]
unsafe fn mask(n: usize) -> [__m256i; 2] {
    const BITS: [i32; 2 * LANES] = {
        let mut bits = [0; 2 * LANES];
        let mut i = 0;
        while i < LANES {
            bits[i] = -1;
            i += 1;
        }
        bits
    };
    let start = BITS.as_ptr().add(LANES - n);
    [_mm256_loadu_si256(start.cast()), _mm256_loadu_si256(start.add(8).cast())]
}

/// The bf16 in the low and the high half of every word, as f32.
#[inline(always)]
unsafe fn halves(words: __m256i) -> [__m256; 2] {
    let low = _mm256_slli_epi32::<16>(words);
    let high = _mm256_and_si256(words, _mm256_set1_epi32(-65536));
    [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
}

#[inline(always)]
unsafe fn round_bf16(v: __m256) -> __m256i {
    let bits = _mm256_castps_si256(v);
    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
    _mm256_srli_epi32::<16>(_mm256_blendv_epi8(up, quiet, nan))
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::F) {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p.add(8), v[1]);
    }
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> Self::F {
        if n == LANES {
            return Self::load(p);
        }
        let [low, high] = mask(n);
        [_mm256_maskload_ps(p, low), _mm256_maskload_ps(p.wrapping_add(8), high)]
    }
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, n: usize, v: Self::F) {
        if n == LANES {
            return Self::store(p, v);
        }
        let [low, high] = mask(n);
        _mm256_maskstore_ps(p, low, v[0]);
        _mm256_maskstore_ps(p.wrapping_add(8), high, v[1]);
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const bf16) -> [Self::F; 2] {
        let [low0, high0] = halves(_mm256_loadu_si256(p.cast()));
        let [low1, high1] = halves(_mm256_loadu_si256(p.add(LANES).cast()));
        [[low0, low1], [high0, high1]]
    }
    #[inline(always)]
    unsafe fn load_i8_pair(p: *const i8) -> [Self::F; 2] {
        let wide =
            |p: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
        [[wide(p), wide(p.add(8))], [wide(p.add(LANES)), wide(p.add(LANES + 8))]]
    }
    #[inline(always)]
    unsafe fn store_bf16_n(p: *mut bf16, n: usize, v: Self::F) {
        // The pack works within 128-bit halves; the permutation puts the four quarters in order.
        let packed = _mm256_packus_epi32(round_bf16(v[0]), round_bf16(v[1]));
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
        if n == LANES {
            _mm256_storeu_si256(p.cast(), ordered);
        } else {
            let mut lanes = [bf16::ZERO; LANES];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), ordered);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F {
        let one =
            |i: usize| _mm256_blendv_ps(no[i], yes[i], _mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i]));
        [one(0), one(1)]
    }
    #[inline(always)]
    unsafe fn round(v: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        [_mm256_round_ps::<NEAREST>(v[0]), _mm256_round_ps::<NEAREST>(v[1])]
    }
    #[inline(always)]
    unsafe fn pow2(n: Self::F) -> Self::F {
        let one = |n: __m256| {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        };
        [one(n[0]), one(n[1])]
    }
    #[inline(always)]
    unsafe fn sum(v: Self::F) -> f32 {
        sum8(_mm256_add_ps(v[0], v[1]))
    }
    #[inline(always)]
    unsafe fn max_lane(v: Self::F) -> f32 {
        let eight = _mm256_max_ps(v[0], v[1]);
        let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
    #[inline(always)]
    unsafe fn low_halves(w: *const u32) -> Self::F {
        let [low, high] = Self::load_int(w);
        [halves(low)[0], halves(high)[0]]
    }
    #[inline(always)]
    unsafe fn high_halves(mut w: *const u32) -> Self::F {
        // Read again rather than kept from `low_halves`, where the registers are for sums.
        std::arch::asm!(
            "/* {0} */",
            inout(reg) w,
            options(pure, readonly, nostack, preserves_flags)
        );
        let [low, high] = Self::load_int(w);
        [halves(low)[1], halves(high)[1]]
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T1>(p.cast())
    }
    #[inline(always)]
    unsafe fn prefetch_near(p: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(p.cast())
    }
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> Self::I {
        [_mm256_set1_epi32(x); 2]
    }
    #[inline(always)]
    unsafe fn load_int(p: *const u32) -> Self::I {
        [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())]
    }
    #[inline(always)]
    unsafe fn store_int(p: *mut u32, v: Self::I) {
        _mm256_storeu_si256(p.cast(), v[0]);
        _mm256_storeu_si256(p.add(8).cast(), v[1]);
    }
    #[inline(always)]
    unsafe fn any_lt(a: Self::F, b: Self::F) -> bool {
        let low = _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]);
        let high = _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]);
        _mm256_movemask_ps(_mm256_or_ps(low, high)) != 0
    }
    #[inline(always)]
    unsafe fn all_lt(a: Self::F, b: Self::F) -> bool {
        let low = _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]);
        let high = _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]);
        _mm256_movemask_ps(_mm256_and_ps(low, high)) == 0xff
    }
    #[inline(always)]
    unsafe fn float_bits(v: Self::F) -> Self::I {
        [_mm256_castps_si256(v[0]), _mm256_castps_si256(v[1])]
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn to_float(v: Self::I) -> Self::F {
        [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])]
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self::F {
        let half = |p: *const f16| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        [half(p), half(p.add(8))]
    }
    #[inline(always)]
    unsafe fn low_nibbles(w: Self::I) -> Self::I {
        let nibbles = _mm256_set1_epi8(15);
        [_mm256_and_si256(w[0], nibbles), _mm256_and_si256(w[1], nibbles)]
    }
    #[inline(always)]
    unsafe fn high_nibbles(w: Self::I) -> Self::I {
        Self::low_nibbles([_mm256_srli_epi32::<4>(w[0]), _mm256_srli_epi32::<4>(w[1])])
    }
    #[inline(always)]
    unsafe fn bits<const COUNT: usize>(w: Self::I, from: usize) -> Self::I {
        let (from, mask) = (_mm_cvtsi64_si128(from as i64), _mm256_set1_epi32((1 << COUNT) - 1));
        let half = |w| _mm256_and_si256(_mm256_srl_epi32(w, from), mask);
        [half(w[0]), half(w[1])]
    }
    const ORIGIN: i32 = 128;
    #[inline(always)]
    unsafe fn dot(acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        // |w − 128| · ±x, whose pairs sum to 2 · 128 · 127 < 2^15 at most.
        let half = |acc, w, x| {
            let w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        [half(acc[0], w[0], x[0]), half(acc[1], w[1], x[1])]
    }
    const NIBBLES: bool = true;
    #[inline(always)]
    unsafe fn dot_nibbles(acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        // 8 times twice 15 · 127 is below 2^15.
        let half = |acc, w, x| _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
        [half(acc[0], w[0], x[0]), half(acc[1], w[1], x[1])]
    }
    #[inline(always)]
    unsafe fn nibble_sums(sums: Self::I, start: i32) -> Self::I {
        let (start, one) = (_mm256_set1_epi32(start), _mm256_set1_epi16(1));
        let half = |sums| _mm256_add_epi32(start, _mm256_madd_epi16(sums, one));
        [half(sums[0]), half(sums[1])]
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Self::F) {
        let words = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
        // The pack works within 128-bit halves; the permutation puts the quarters in order.
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
        let (low, high) = (_mm256_castsi256_si128(ordered), _mm256_extracti128_si256::<1>(ordered));
        _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high))
    }
}
