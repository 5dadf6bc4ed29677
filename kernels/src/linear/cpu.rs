//! [`super::linear`] on the CPU: what it plans, and the memory that takes.
//!
//! One fork, whatever the number of adapters, ranks and sites: u = x·Aᵀ of every (site, segment),
//! and, output block by output block, x·Wᵀ and on top of it u·Bᵀ of every segment
//! ([`super::call`] says in which order). Tasks are ranges of outputs (and rows, if many), never of
//! a reduction, so any popularity of adapters spreads evenly.

use std::ops::Range;
use std::sync::atomic::AtomicUsize;

use crate::act::cpu::Act;
use crate::device::{Cpu, part};
use crate::linear::base::{Cut, Site, Sites};
use crate::linear::call::Call;
use crate::linear::change::{Change, Piece};
use crate::linear::delta::Delta;
use crate::linear::operands::{Linear, SITES_MAX, check_delta, check_ranks};
use crate::linear::scratch::{PIECE_RANKS, PIECE_ROWS, Scratch};
use crate::linear::stream::LINE;
use crate::segments::Segments;
use crate::simd::{Kernel, Simd};

/// See [`super::linear`]; shapes are checked but for the deltas'.
pub(super) fn linear(
    cpu: &Cpu,
    x: &Act,
    rows: usize,
    outs: &mut [Linear<'_>],
    segments: Segments<'_>,
    scratch: &mut Scratch,
) {
    cpu.count_op();
    if rows == 0 {
        return;
    }
    scratch.plan(cpu, x, outs, segments);
    let rounds = outs.iter().any(|out| out.weight.dtype().group().is_some());
    let outliers = rounds.then(|| x.outliers(rows));
    let outliers = outliers.as_deref().map_or(&[][..], Vec::as_slice);
    let sites: Sites<'_> = std::array::from_fn(|i| {
        let changed = scratch.firsts[i] < scratch.firsts[i + 1];
        outs.get_mut(i).map(|out| Site::new(cpu.isa(), x, out, changed))
    });
    let cut = Cut::new(cpu, rows, &sites);
    Call::new(cpu, x, outliers, sites, &cut, scratch).run(cpu);
}

impl Scratch {
    /// Lists the changes of every site and the pieces of u.
    fn plan(&mut self, cpu: &Cpu, x: &Act, outs: &[Linear<'_>], segments: Segments<'_>) {
        // SAFETY: only addresses of living deltas.
        unsafe { cpu.isa().run(Ask { outs, segments }) };
        let x_has_pairs = x.halves().is_some() && cpu.isa().multiplies_pairs();
        self.changes.clear();
        self.pieces.clear();
        let tasks = Cut::tasks_max(cpu);
        if self.left_by.len() < tasks {
            self.left_by.resize_with(tasks, AtomicUsize::default);
        }
        for i in 0..SITES_MAX {
            let Some(out) = outs.get(i) else {
                self.firsts[i + 1] = self.changes.len();
                continue;
            };
            for g in 0..segments.count() {
                let (first, mut column) = (self.changes.len(), 0);
                let rows = segments.rows(g);
                for (delta, weight) in segments.deltas(g, out.site) {
                    check_delta(delta, out.weight, i, g);
                    let (delta, change) = (delta.on().cpu(), self.changes.len());
                    self.pieces.extend(pieces(i, change, rows.clone(), delta.rank()));
                    self.changes.push(Change {
                        delta,
                        weight,
                        rows: [rows.start as u32, rows.end as u32],
                        column,
                        last: false,
                        pairs: x_has_pairs && delta.has_pairs(),
                        words: delta.plain_words(),
                        rank: delta.rank() as u32,
                    });
                    column += delta.rank() as u32;
                }
                check_ranks(column as usize, self.rank_max);
                self.end_segment(first);
            }
            self.firsts[i + 1] = self.changes.len();
        }
    }

    /// The changes from `first` on are all that their rows have at a site.
    fn end_segment(&mut self, first: usize) {
        let of_rows = &mut self.changes[first..];
        let alone = of_rows.len() == 1 && of_rows[0].weight == 1.0;
        // SAFETY: within the call that listed them.
        let gained = of_rows.iter().any(|change| unsafe { change.delta() }.has_gain());
        assert!(alone || !gained, "a gain is of a delta alone");
        if let Some(last) = of_rows.last_mut() {
            last.last = true;
        }
    }
}

/// Asks for the deltas' own pages, all at once: they have left the caches since the last step, and
/// the plan looks at one after the other.
struct Ask<'c, 'o> {
    outs: &'c [Linear<'o>],
    segments: Segments<'c>,
}

impl Kernel for Ask<'_, '_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for out in self.outs {
            for g in 0..self.segments.count() {
                for (delta, _) in self.segments.deltas(g, out.site) {
                    let page = (&raw const *delta).cast::<u8>();
                    for at in (0..size_of::<Delta>()).step_by(LINE) {
                        S::prefetch(page.wrapping_add(at));
                    }
                }
            }
        }
    }
}

/// Cuts the rows of one change into pieces of at most `PIECE_ROWS` rows by `PIECE_RANKS` ranks.
fn pieces(
    site: usize,
    change: usize,
    rows: Range<usize>,
    rank: usize,
) -> impl Iterator<Item = Piece> {
    let row_parts = rows.len().div_ceil(PIECE_ROWS);
    let parts = rank.div_ceil(PIECE_RANKS);
    (0..row_parts * parts).map(move |index| {
        let r = part(rows.len(), row_parts, index / parts);
        let start = index % parts * PIECE_RANKS;
        Piece {
            site: site as u32,
            change: change as u32,
            rows: [(rows.start + r.start) as u32, (rows.start + r.end) as u32],
            ranks: [start as u32, (start + PIECE_RANKS).min(rank) as u32],
        }
    })
}
