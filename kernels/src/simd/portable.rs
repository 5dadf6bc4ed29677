//! Sixteen lanes as a plain array: loops of fixed length that the compiler vectorises for the
//! target (NEON, SSE2).

use half::{bf16, f16};

use super::lanes::{LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Array = [f32; LANES];

/// A call into the C library where the CPU has no fused instruction: a plain product and sum is
/// better then.
const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

#[inline(always)]
fn zip(a: Array, b: Array, f: impl Fn(f32, f32) -> f32) -> Array {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// The bf16 in the low and the high half of every word, as f32.
#[inline(always)]
fn halves(words: [u32; LANES]) -> [Array; 2] {
    [words.map(|w| f32::from_bits(w << 16)), words.map(|w| f32::from_bits(w & 0xffff_0000))]
}

impl Simd for Portable {
    type F = Array;
    type I = [i32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Array {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Array {
        p.cast::<Array>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Array) {
        p.cast::<Array>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn load_n(p: *const f32, n: usize) -> Array {
        std::array::from_fn(|i| if i < n { *p.add(i) } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_n(p: *mut f32, n: usize, v: Array) {
        std::ptr::copy_nonoverlapping(v.as_ptr(), p, n);
    }
    #[inline(always)]
    unsafe fn load_bf16_pair(p: *const bf16) -> [Array; 2] {
        halves(p.cast::<[u32; LANES]>().read_unaligned())
    }
    #[inline(always)]
    unsafe fn load_i8_pair(p: *const i8) -> [Array; 2] {
        p.cast::<[[i8; LANES]; 2]>().read().map(|values| values.map(f32::from))
    }
    #[inline(always)]
    unsafe fn store_bf16_n(p: *mut bf16, n: usize, v: Array) {
        let rounded = v.map(bf16::from_f32);
        std::ptr::copy_nonoverlapping(rounded.as_ptr(), p, n);
    }
    #[inline(always)]
    unsafe fn add(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: Array, b: Array) -> Array {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn fma(a: Array, b: Array, c: Array) -> Array {
        std::array::from_fn(|i| if FUSED { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] })
    }
    #[inline(always)]
    unsafe fn select_lt(a: Array, b: Array, yes: Array, no: Array) -> Array {
        std::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }
    #[inline(always)]
    unsafe fn round(v: Array) -> Array {
        // Adding 1.5 · 2^23 leaves no room for a fraction.
        const SHIFT: f32 = 12_582_912.0;
        v.map(|x| (x + SHIFT) - SHIFT)
    }
    #[inline(always)]
    unsafe fn pow2(n: Array) -> Array {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(mut v: Array) -> f32 {
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                v[i] += v[i + width];
            }
        }
        v[0]
    }
    #[inline(always)]
    unsafe fn max_lane(v: Array) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn low_halves(w: *const u32) -> Array {
        halves(w.cast::<[u32; LANES]>().read_unaligned())[0]
    }
    #[inline(always)]
    unsafe fn high_halves(w: *const u32) -> Array {
        halves(w.cast::<[u32; LANES]>().read_unaligned())[1]
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn prefetch_near(_: *const u8) {}
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_int(p: *const u32) -> Self::I {
        p.cast::<Self::I>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store_int(p: *mut u32, v: Self::I) {
        p.cast::<Self::I>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn any_lt(a: Array, b: Array) -> bool {
        (0..LANES).any(|i| a[i] < b[i])
    }
    #[inline(always)]
    unsafe fn all_lt(a: Array, b: Array) -> bool {
        (0..LANES).all(|i| a[i] < b[i])
    }
    #[inline(always)]
    unsafe fn float_bits(v: Array) -> Self::I {
        v.map(|x| x.to_bits() as i32)
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    unsafe fn to_float(v: Self::I) -> Array {
        v.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Array {
        p.cast::<[f16; LANES]>().read_unaligned().map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn low_nibbles(w: Self::I) -> Self::I {
        w.map(|w| w & 0x0f0f_0f0f)
    }
    #[inline(always)]
    unsafe fn high_nibbles(w: Self::I) -> Self::I {
        w.map(|w| w >> 4 & 0x0f0f_0f0f)
    }
    #[inline(always)]
    unsafe fn bits<const COUNT: usize>(w: Self::I, from: usize) -> Self::I {
        w.map(|w| w >> from & ((1 << COUNT) - 1))
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, w: Self::I, x: Self::I) -> Self::I {
        let x = x[0].to_le_bytes().map(|byte| byte as i8);
        let byte = |w: i32, b: usize| (w >> (8 * b) & 255) * i32::from(x[b]);
        std::array::from_fn(|i| {
            acc[i] + byte(w[i], 0) + byte(w[i], 1) + byte(w[i], 2) + byte(w[i], 3)
        })
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: Array) {
        p.cast::<[i8; LANES]>().write(v.map(|x| x as i8));
    }
}
