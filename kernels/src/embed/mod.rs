//! h[t] = scale · W[token[t]]  (+ Σ w·At[token[t]]·Bᵀ over the deltas of the row's segment).
//!
//! W `[V, H]` packed   tokens `[T]`   h `[T, H]`   At `[V, R]`   B `[H, R]` (scale folded in, kept
//! as `[R, H]`). Numerics: the delta is added to the scaled row rank by rank, in f32.

mod delta;

use crate::buffer::{Shared, Zeroed};
use crate::device::{Cpu, Device, Kind, part};
use crate::matrix::{Matrix, cpu};
use crate::segments::Segments;
use crate::simd::{GROUP, Isa, Kernel, LANES, Simd, Stored};
use crate::{Error, Plane};
pub use delta::EmbedDelta;
use delta::{Factors, Pair};

/// See the module page. A segment's changes of the table are added in the order of its mix.
///
/// # Panics
/// On shapes that do not fit, or a token outside the table.
pub fn embed(
    dev: &Device,
    table: &Matrix,
    tokens: &[u32],
    scale: f32,
    segments: Segments<'_>,
    h: &mut Plane,
) {
    let (rows, hidden) = (tokens.len(), table.inputs());
    segments.check(rows);
    assert!(h.holds(rows, hidden), "h holds {rows} rows of {hidden}");
    match &dev.kind {
        Kind::Cpu(cpu) => {
            let h = Shared::of(h.on_mut().cpu_mut());
            on_cpu(cpu, table.on().cpu(), tokens, scale, segments, h);
        }
        Kind::Cuda(_) => dev.remember(Error::OnCpuOnly("embed")),
    }
}

fn on_cpu(
    cpu: &Cpu,
    table: &cpu::Matrix,
    tokens: &[u32],
    scale: f32,
    segments: Segments<'_>,
    h: Shared<f32>,
) {
    cpu.count_op();
    let (rows, hidden, isa) = (tokens.len(), table.inputs(), cpu.isa());
    let pieces = cpu.pieces(rows, 4 * hidden);
    cpu.fork(pieces, &|piece| {
        for t in part(rows, pieces, piece) {
            // SAFETY: in bounds as asserted; a row belongs to one piece.
            let row = unsafe { std::slice::from_raw_parts_mut(h.get().add(t * hidden), hidden) };
            table.read_row(tokens[t] as usize, row);
            for x in row.iter_mut() {
                *x *= scale;
            }
            let Some(segment) = segments.of_row(t) else { continue };
            for (delta, weight) in segments.embeddings(segment) {
                let token = tokens[t] as usize;
                assert_eq!(delta.hidden, hidden, "an embedding delta of the same width");
                assert!(token < delta.vocab, "token {token} of {}", delta.vocab);
                // SAFETY: factor rows lie within the pair by the two asserts.
                unsafe { delta.add(isa, token, weight, row) };
            }
        }
    });
}

impl EmbedDelta {
    unsafe fn add(&self, isa: Isa, token: usize, weight: f32, h: &mut [f32]) {
        match &self.factors {
            Factors::F32(pair) => isa.run(self.row(pair, token, weight, h)),
            Factors::Bf16(pair) => isa.run(self.row(pair, token, weight, h)),
        }
    }

    fn row<'a, E: Stored + Zeroed>(
        &self,
        pair: &'a Pair<E>,
        token: usize,
        weight: f32,
        h: &'a mut [f32],
    ) -> AddRow<'a, E> {
        AddRow { a: &pair.a[token * self.rank..][..self.rank], b: &pair.b, weight, h }
    }
}

struct AddRow<'a, E> {
    a: &'a [E],
    b: &'a [E],
    weight: f32,
    h: &'a mut [f32],
}

impl<E: Stored> Kernel for AddRow<'_, E> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let hidden = self.h.len();
        for column in (0..hidden).step_by(GROUP) {
            let lanes = [0, 1].map(|half| hidden.saturating_sub(column + half * LANES).min(LANES));
            let h = [0, LANES].map(|at| self.h.as_mut_ptr().wrapping_add(column + at));
            let mut sums = [S::load_n(h[0], lanes[0]), S::load_n(h[1], lanes[1])];
            for (r, a) in self.a.iter().enumerate() {
                let b = self.b.as_ptr().add(r * hidden.next_multiple_of(GROUP) + column);
                let b = E::load_pair::<S>(b);
                let a = S::splat(self.weight * a.to_f32());
                sums = [0, 1].map(|half| S::fma(a, b[half], sums[half]));
            }
            S::store_row_n(h[0], lanes[0], sums[0]);
            S::store_row_n(h[1], lanes[1], sums[1]);
        }
    }
}
