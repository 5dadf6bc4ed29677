//! Sixteen lanes in one AVX-512 register, with or without `vpdpbusd` and `vdpbf16ps`.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::lanes::{Kernel, LANES, Simd};

/// `VNNI`: the CPU multiplies bytes itself. `BF16`: and bf16 pairs.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool, const BF16: bool>;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<false, false>>()
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
pub(super) unsafe fn run_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true, false>>()
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma")]
pub(super) unsafe fn run_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true, true>>()
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// The bf16 in the low and the high half of every word, as f32.
#[inline(always)]
unsafe fn halves(words: __m512i) -> [__m512; 2] {
    let low = _mm512_slli_epi32::<16>(words);
    let high = _mm512_and_si512(words, _mm512_set1_epi32(-65536));
    [_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)]
}

#[inline(always)]
unsafe fn bf16_pairs(words: __m512i) -> __m512bh {
    // SAFETY: the same 64 bytes.
    std::mem::transmute::<__m512i, __m512bh>(words)
}

impl<const VNNI: bool, const BF16: bool> Simd for Avx512<VNNI, BF16> {
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;
    const PAIRS: bool = BF16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> __m512 {
        _mm512_maskz_loadu_ps(mask(n), p)
    }
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, n: usize, v: __m512) {
        _mm512_mask_storeu_ps(p, mask(n), v)
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const bf16) -> [__m512; 2] {
        halves(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_i8_pair(p: *const i8) -> [__m512; 2] {
        let wide =
            |p: *const i8| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())));
        [wide(p), wide(p.add(LANES))]
    }
    #[inline(always)]
    unsafe fn store_bf16_n(p: *mut bf16, n: usize, v: __m512) {
        // By integers rather than `vcvtneps2bf16`, which flushes subnormals: all paths round alike.
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let rounded = _mm512_mask_blend_epi32(nan, up, quiet);
        let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
        if n == LANES {
            _mm256_storeu_si256(p.cast(), halves)
        } else {
            _mm256_mask_storeu_epi16(p.cast(), mask(n), halves)
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn select_lt(a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes)
    }
    #[inline(always)]
    unsafe fn round(v: __m512) -> __m512 {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v)
    }
    #[inline(always)]
    unsafe fn pow2(n: __m512) -> __m512 {
        let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
    }
    #[inline(always)]
    unsafe fn scale_pow2(v: __m512, n: __m512) -> __m512 {
        _mm512_scalef_ps(v, n)
    }
    #[inline(always)]
    unsafe fn any_lt(a: __m512, b: __m512) -> bool {
        _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) != 0
    }
    #[inline(always)]
    unsafe fn all_lt(a: __m512, b: __m512) -> bool {
        _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) == u16::MAX
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        let high = _mm512_extractf32x8_ps::<1>(v);
        super::avx2::sum8(_mm256_add_ps(_mm512_castps512_ps256(v), high))
    }
    #[inline(always)]
    unsafe fn store_sums<const N: usize>(p: *mut f32, v: [__m512; N], weights: [f32; N]) {
        if N != 4 {
            for (i, (v, weight)) in v.into_iter().zip(weights).enumerate() {
                *p.add(i) = weight * Self::sum(v);
            }
            return;
        }
        // Four at once, the lanes of each in the order of `sum`.
        let eights = |a, b| {
            let low = _mm512_shuffle_f32x4::<0x44>(a, b);
            _mm512_add_ps(low, _mm512_shuffle_f32x4::<0xee>(a, b))
        };
        let (ab, cd) = (eights(v[0], v[1]), eights(v[2], v[3]));
        let low = _mm512_shuffle_f32x4::<0x88>(ab, cd);
        let fours = _mm512_add_ps(low, _mm512_shuffle_f32x4::<0xdd>(ab, cd));
        let twos = _mm512_add_ps(fours, _mm512_permute_ps::<0x4e>(fours));
        let sums = _mm512_add_ps(twos, _mm512_permute_ps::<0xb1>(twos));
        let each = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sums));
        _mm_storeu_ps(p, _mm_mul_ps(_mm_loadu_ps(weights.as_ptr()), each));
    }
    #[inline(always)]
    unsafe fn max_lane(v: __m512) -> f32 {
        _mm512_reduce_max_ps(v)
    }
    #[inline(always)]
    unsafe fn low_halves(w: *const u32) -> __m512 {
        halves(_mm512_loadu_si512(w.cast()))[0]
    }
    #[inline(always)]
    unsafe fn high_halves(w: *const u32) -> __m512 {
        halves(_mm512_loadu_si512(w.cast()))[1]
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const bf16) -> __m512i {
        // Value i to the low half of word i, value 16 + i to its high half.
        const ORDER: [u32; 16] = {
            let mut order = [0; 16];
            let mut i = 0;
            while i < 16 {
                order[i] = (i | (16 + i) << 16) as u32;
                i += 1;
            }
            order
        };
        let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
        _mm512_permutexvar_epi16(order, _mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: __m512, x: __m512i, w: __m512i) -> __m512 {
        _mm512_dpbf16_ps(acc, bf16_pairs(x), bf16_pairs(w))
    }
    #[inline(always)]
    unsafe fn store_pairs_n(p: *mut u32, n: usize, v: __m512) {
        let halves = _mm512_cvtneps_pbh(_mm512_maskz_mov_ps(mask(n), v));
        // SAFETY: the same 32 bytes.
        let words = std::mem::transmute::<__m256bh, __m256i>(halves);
        if n == LANES {
            _mm256_storeu_si256(p.cast(), words)
        } else {
            _mm256_mask_storeu_epi32(p.cast(), mask(n.div_ceil(2)) as __mmask8, words)
        }
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
    unsafe fn splat_int(x: i32) -> __m512i {
        _mm512_set1_epi32(x)
    }
    #[inline(always)]
    unsafe fn load_int(p: *const u32) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn store_int(p: *mut u32, v: __m512i) {
        _mm512_storeu_si512(p.cast(), v)
    }
    #[inline(always)]
    unsafe fn pairs(a: __m512, b: __m512) -> __m512i {
        // SAFETY: the same 64 bytes.
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a))
    }
    #[inline(always)]
    unsafe fn float_bits(v: __m512) -> __m512i {
        _mm512_castps_si512(v)
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }
    #[inline(always)]
    unsafe fn to_float(v: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(v)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m512 {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn low_nibbles(w: __m512i) -> __m512i {
        _mm512_and_si512(w, _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn high_nibbles(w: __m512i) -> __m512i {
        _mm512_and_si512(_mm512_srli_epi32::<4>(w), _mm512_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn bits<const COUNT: usize>(w: __m512i, from: usize) -> __m512i {
        let w = _mm512_srl_epi32(w, _mm_cvtsi64_si128(from as i64));
        _mm512_and_si512(w, _mm512_set1_epi32((1 << COUNT) - 1))
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, w: __m512i, x: __m512i) -> __m512i {
        if VNNI {
            return _mm512_dpbusd_epi32(acc, w, x);
        }
        // Even and odd bytes as 16 bits: what `vpmaddubsw` sums could overflow.
        let even = _mm512_and_si512(w, _mm512_set1_epi16(255));
        let even_x = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x));
        let acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, even_x));
        let (odd, odd_x) = (_mm512_srli_epi16::<8>(w), _mm512_srai_epi16::<8>(x));
        _mm512_add_epi32(acc, _mm512_madd_epi16(odd, odd_x))
    }
    #[inline(always)]
    unsafe fn store_turned(rows: &[__m512i; LANES], to: [*mut u32; 2], stride: usize) {
        let mut rows = *rows;
        // Within quarters of registers: words of two rows, then of four.
        for rows in rows.chunks_exact_mut(4) {
            let (a, b) = (rows[0], rows[1]);
            let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (a, b) = (rows[2], rows[3]);
            let (low2, high2) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            rows[0] = _mm512_unpacklo_epi64(low, low2);
            rows[1] = _mm512_unpackhi_epi64(low, low2);
            rows[2] = _mm512_unpacklo_epi64(high, high2);
            rows[3] = _mm512_unpackhi_epi64(high, high2);
        }
        // Then the quarters: those of column i lie in rows i % 4, 4 + i % 4, ….
        let mut columns = [_mm512_setzero_si512(); LANES];
        for m in 0..4 {
            let [a, b, c, d] = [rows[m], rows[4 + m], rows[8 + m], rows[12 + m]];
            let even = _mm512_shuffle_i32x4::<0x88>(a, b);
            let even2 = _mm512_shuffle_i32x4::<0x88>(c, d);
            let odd = _mm512_shuffle_i32x4::<0xdd>(a, b);
            let odd2 = _mm512_shuffle_i32x4::<0xdd>(c, d);
            columns[m] = _mm512_shuffle_i32x4::<0x88>(even, even2);
            columns[4 + m] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
            columns[8 + m] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
            columns[12 + m] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
        }
        for (i, &column) in columns.iter().enumerate().rev() {
            Self::store_int(to[i / 8].add(i % 8 * stride), column);
        }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: __m512) {
        _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)))
    }
}
