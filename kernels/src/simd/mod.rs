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
mod element;
mod lanes;
mod portable;

pub(crate) use element::{Element, Stored};
pub(crate) use lanes::{GROUP, Kernel, LANES, Simd};

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
