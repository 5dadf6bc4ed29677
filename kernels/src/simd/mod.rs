//! Sixteen f32 lanes on every CPU: the vocabulary in which each inner loop is written once.
//!
//! [`Simd`] is implemented by AVX-512 (one register), AVX2 (two) and plain arrays (NEON and the
//! rest, which the compiler vectorises). [`Isa::run`] picks at run time: a [`Kernel`] is inlined
//! whole into a function compiled for that instruction set. Everything under `Kernel::run` must be
//! `#[inline(always)]`, or it is compiled without the instructions.
//!
//! Lane operations are the same everywhere and every sum has one order, so AVX2 and AVX-512 give
//! the same bits; `vdpbf16ps` and CPUs without fused multiply-add round differently.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use half::{bf16, f16};

/// Lanes of one vector, outputs of one weight panel, tokens of one page.
pub(crate) const LANES: usize = 16;

/// Values of one group of stored factors, keys or values: two vectors.
pub(crate) const GROUP: usize = 2 * LANES;

/// An instruction set this crate has code for, the poorest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What the target always has: NEON on aarch64, SSE2 on x86-64.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, BW, VL and DQ; bf16 weights are widened by a shift, bytes to 16 bits.
    Avx512,
    /// AVX-512 with VNNI: `vpdpbusd` multiplies bytes.
    Avx512Vnni,
    /// AVX-512 with VNNI and BF16: `vdpbf16ps` multiplies bf16 pairs.
    Avx512Bf16,
}

impl Isa {
    /// Those this CPU can run, the best last.
    pub fn available() -> &'static [Isa] {
        const ALL: [Isa; 5] =
            [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Bf16];
        #[cfg(target_arch = "x86_64")]
        let count = {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
            let bf16 = vnni && is_x86_feature_detected!("avx512bf16");
            1 + [avx2, avx512, vnni, bf16].map(usize::from).iter().sum::<usize>()
        };
        #[cfg(not(target_arch = "x86_64"))]
        let count = 1;
        &ALL[..count]
    }

    /// Whether [`Simd::PAIRS`] of its lanes.
    pub(crate) fn multiplies_pairs(self) -> bool {
        self == Isa::Avx512Bf16
    }

    /// As shown to people.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable if cfg!(target_arch = "aarch64") => "neon",
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Runs `kernel` compiled for this instruction set.
    ///
    /// # Safety
    /// `self` is available, and the kernel's own requirements hold.
    #[inline]
    pub(crate) unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => avx512::run_bf16(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => avx512::run_vnni(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::run(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::run(kernel),
            _ => kernel.run::<portable::Portable>(),
        }
    }
}

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
    /// 32 values stored as [`Element::place`] says: the first 16 and the others.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The powers of e, or of 2.
    struct Exp([f32; LANES], f64);

    impl Kernel for Exp {
        type Output = [f32; LANES];
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> [f32; LANES] {
            let (mut out, x) = ([0.0; LANES], S::load(self.0.as_ptr()));
            let y = if self.1 == 2.0 { S::exp2(x) } else { S::exp(x) };
            S::store(out.as_mut_ptr(), y);
            out
        }
    }

    fn exp(isa: Isa, x: [f32; LANES]) -> [f32; LANES] {
        // SAFETY: `isa` is available.
        unsafe { isa.run(Exp(x, std::f64::consts::E)) }
    }

    fn exp2(isa: Isa, x: [f32; LANES]) -> [f32; LANES] {
        // SAFETY: `isa` is available.
        unsafe { isa.run(Exp(x, 2.0)) }
    }

    #[test]
    fn exp2_is_within_two_ulp_of_f64_and_the_same_bits_everywhere() {
        for step in 0..100_000 {
            let x = -126.0 * step as f32 / 100_000.0;
            let want = f64::from(x).exp2();
            let ulp = f64::from((want as f32).next_up()) - f64::from(want as f32);
            let mut bits = Vec::new();
            for &isa in Isa::available() {
                let got = exp2(isa, [x; LANES])[step % LANES];
                let apart = (f64::from(got) - want).abs() / ulp;
                assert!(apart <= 2.0, "{} {x}: {apart} ulp", isa.name());
                bits.push(got.to_bits());
            }
            let fused = &bits[usize::from(cfg!(target_arch = "x86_64"))..];
            assert!(fused.windows(2).all(|two| two[0] == two[1]), "{x}: {fused:x?}");
        }
    }

    #[test]
    fn exp2_at_its_ends_is_zero_one_and_keeps_nan() {
        for &isa in Isa::available() {
            let mut x = [0.0; LANES];
            x[..5].copy_from_slice(&[f32::NEG_INFINITY, -1e9, -126.1, f32::NAN, -126.0]);
            let y = exp2(isa, x);
            assert_eq!(y[..3], [0.0; 3], "{}", isa.name());
            assert!(y[3].is_nan(), "{}", isa.name());
            assert_eq!(y[4], f32::MIN_POSITIVE, "{}", isa.name());
            assert_eq!(y[5..], [1.0; LANES - 5], "{}", isa.name());
        }
    }

    #[test]
    fn exp_is_within_two_ulp_of_f64_over_its_range() {
        for &isa in Isa::available() {
            let mut worst: f64 = 0.0;
            for step in 0..200_000 {
                let x = -87.0 + 175.0 * step as f32 / 200_000.0;
                let want = f64::from(x).exp();
                let got = f64::from(exp(isa, [x; LANES])[step % LANES]);
                let ulp = f64::from((want as f32).next_up()) - f64::from(want as f32);
                worst = worst.max((got - want).abs() / ulp);
            }
            assert!(worst <= 2.0, "{}: {worst} ulp", isa.name());
        }
    }

    #[test]
    fn exp_at_its_ends_is_zero_finite_and_keeps_nan() {
        for &isa in Isa::available() {
            let mut x = [0.0; LANES];
            x[..4].copy_from_slice(&[f32::NEG_INFINITY, -1000.0, f32::INFINITY, f32::NAN]);
            let y = exp(isa, x);
            assert_eq!(y[..2], [0.0, 0.0], "{}", isa.name());
            assert!(y[2].is_finite() && y[2] > 1e38, "{}: {}", isa.name(), y[2]);
            assert!(y[3].is_nan(), "{}", isa.name());
            assert_eq!(y[4..], [1.0; LANES - 4], "{}", isa.name());
        }
    }
}
