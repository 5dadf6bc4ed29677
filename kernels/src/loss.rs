//! Cross-entropy of some rows of logits: log-probabilities of the targets, and the gradient.
//!
//! logits `[T, V]`   for each row a target y and a coefficient k:   p = softmax(logits),
//! log p(y) = logits(y) − lse,   dlogits = k·(p − onehot(y)), the gradient of −k·log p(y).
//!
//! The coefficient is the caller's: w/Σw for a mean loss over supervised tokens, anything for
//! another loss of log-probabilities (DPO). Rows come in chunks of some tens: the caller makes the
//! logits of a chunk with [`crate::linear`], and dh = dlogits·W with [`crate::linear_backward`];
//! there is never a `[T, V]` of all rows. Numerics: exp in f32 below the row's largest logit; its
//! sum in f32 over 1,024 columns at a time, in f64 over those.

use crate::act::Act;
use crate::act::cpu::ActWriter;
use crate::argmax::argmax;
use crate::buffer::Shared;
use crate::device::{Device, Kind};
use crate::simd::{Kernel, LANES, Simd};
use crate::{Error, Plane};

/// Columns whose sum is kept in lanes.
const SPAN: usize = 64 * LANES;

/// What the logits say of one row's target.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scored {
    /// NaN where a logit is NaN or +inf, or none is above -inf.
    pub log_prob: f32,
    /// Whether the target has the greatest logit, the first of equals.
    pub is_greatest: bool,
}

/// Scores `targets` `[T]` in the first rows of `logits`.
///
/// # Panics
/// On shapes that do not fit, and a target beyond V.
pub fn score(dev: &Device, logits: &Plane, targets: &[u32], scored: &mut [Scored]) {
    check(logits, targets, scored);
    each_row(dev, "score", logits, targets, None, scored);
}

/// The same, and the gradient of −Σ k·log p: `coefficients` `[T]`, `dlogits` `[T, V]`. Where a
/// log-probability is NaN, the row's gradient is too.
///
/// # Panics
/// As [`score`].
pub fn cross_entropy_backward(
    dev: &Device,
    logits: &Plane,
    targets: &[u32],
    coefficients: &[f32],
    dlogits: &mut Act,
    scored: &mut [Scored],
) {
    check(logits, targets, scored);
    let (rows, width) = (targets.len(), logits.width());
    assert_eq!(coefficients.len(), rows, "a coefficient a row");
    assert!(dlogits.width() == width && dlogits.rows_max() >= rows, "dlogits is [{rows}, {width}]");
    let gradient = Some((coefficients, dlogits));
    each_row(dev, "cross_entropy_backward", logits, targets, gradient, scored);
}

fn check(logits: &Plane, targets: &[u32], scored: &[Scored]) {
    let (rows, width) = (targets.len(), logits.width());
    assert!(logits.holds(rows, width), "logits have {rows} rows");
    assert_eq!(scored.len(), rows, "a place for what is scored a row");
    for (t, &target) in targets.iter().enumerate() {
        assert!((target as usize) < width, "row {t}: target {target} of {width}");
    }
}

fn each_row(
    dev: &Device,
    name: &'static str,
    logits: &Plane,
    targets: &[u32],
    gradient: Option<(&[f32], &mut Act)>,
    scored: &mut [Scored],
) {
    let Kind::Cpu(cpu) = &dev.kind else { return dev.remember(Error::OnCpuOnly(name)) };
    cpu.count_op();
    let isa = cpu.isa();
    let (width, logits, scored) = (logits.width(), logits.on().cpu(), Shared::of(scored));
    let gradient = gradient.map(|(k, act)| (k, act.on_mut().cpu_mut().writer()));
    cpu.fork(targets.len(), &|t| {
        let logits = &logits[t * width..][..width];
        let target = targets[t] as usize;
        let out = gradient.map(|(coefficients, out)| (coefficients[t], out, t));
        let greatest = argmax(logits);
        let row = Row { logits, target, most: greatest.map_or(f32::NAN, |(_, most)| most), out };
        // SAFETY: shapes are checked; row `t` of everything belongs to this task.
        unsafe {
            let log_prob = isa.run(row);
            let is_greatest = greatest.is_some_and(|(at, _)| at == target);
            scored.get().add(t).write(Scored { log_prob, is_greatest });
        }
    });
}

struct Row<'a> {
    logits: &'a [f32],
    target: usize,
    /// The largest; NaN makes everything NaN.
    most: f32,
    /// The coefficient, and where the gradient goes.
    out: Option<(f32, ActWriter, usize)>,
}

impl Kernel for Row<'_> {
    /// log p of the target.
    type Output = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let (width, most) = (self.logits.len(), S::splat(self.most));
        let hidden = S::splat(f32::NEG_INFINITY);
        let mut total = 0.0;
        for start in (0..width).step_by(SPAN) {
            let mut sums = S::zero();
            for c in (start..width.min(start + SPAN)).step_by(LANES) {
                let n = (width - c).min(LANES);
                let mut x = S::sub(S::load_n(self.logits.as_ptr().add(c), n), most);
                if n < LANES {
                    x = S::select_lt(S::load(INDEX.as_ptr()), S::splat(n as f32), x, hidden);
                }
                let weight = S::exp(x);
                sums = S::add(sums, weight);
                if let Some((_, out, row)) = self.out {
                    out.store::<S>(row, c, n, weight);
                }
            }
            total += f64::from(S::sum(sums));
        }
        if let Some((coefficient, out, row)) = self.out {
            let factor = S::splat((f64::from(coefficient) / total) as f32);
            for c in (0..width).step_by(LANES) {
                let n = (width - c).min(LANES);
                let weight = S::load_n(out.row(row).add(c), n);
                out.store::<S>(row, c, n, S::mul(weight, factor));
            }
            let p = *out.row(row).add(self.target);
            out.store::<S>(row, self.target, 1, S::splat(p - coefficient));
        }
        (f64::from(self.logits[self.target]) - f64::from(self.most) - total.ln()) as f32
    }
}

const INDEX: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
