//! The order of one [`super::linear`] on the CPU: who makes u, who multiplies, who adds the deltas.
//!
//! Owns the sharing out of one call's work. Never decides a value: every order gives the same bits.
//! The thing to know: shrinks wait for memory and products (of several rows) for arithmetic, so
//! half of the threads begin with one and half with the other. A product whose u is not made yet is
//! left as it is and gets its deltas later, from the thread that made it: its y and the B fetched
//! beside it are in that thread's caches.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use half::bf16;

use crate::act::Outlier;
use crate::act::cpu::Act;
use crate::buffer::Shared;
use crate::device::Cpu;
use crate::linear::base::{Cut, Site, Sites};
use crate::linear::change::{Change, Piece, STRETCH, TURNS_PER_THREAD};
use crate::linear::expand::Expand;
use crate::linear::operands::SITES_MAX;
use crate::linear::scratch::Scratch;
use crate::linear::shrink::Shrink;
use crate::simd::Isa;
use crate::team::Apart;

/// No thread has left the deltas of a task for later.
const NOBODY: usize = usize::MAX;

/// One call, as its tasks see it.
pub(super) struct Call<'c> {
    isa: Isa,
    threads: usize,
    /// Some task of this call panicked.
    failed: &'c AtomicBool,
    x: &'c Act,
    /// Those of x that integer weights multiply, by row.
    outliers: &'c [Outlier],
    sites: Sites<'c>,
    cut: &'c Cut,
    changes: &'c [Change],
    /// Where the changes of each site start.
    firsts: [usize; SITES_MAX + 1],
    pieces: &'c [Piece],
    /// Pieces made in one turn.
    share: usize,
    u: Shared<f32>,
    rows_max: usize,
    u_stride: usize,
    /// The next piece and product.
    next_piece: Apart<AtomicUsize>,
    next_product: Apart<AtomicUsize>,
    /// Pieces of u that are made.
    shrunk: Apart<AtomicUsize>,
    /// By task: who has made x·Wᵀ but not yet added the deltas. Only that thread asks.
    left_by: &'c [AtomicUsize],
}

impl<'c> Call<'c> {
    /// `scratch` holds the plan of these sites and segments; shapes are checked.
    pub(super) fn new(
        cpu: &'c Cpu,
        x: &'c Act,
        outliers: &'c [Outlier],
        sites: Sites<'c>,
        cut: &'c Cut,
        scratch: &'c mut Scratch,
    ) -> Call<'c> {
        let left_by = &scratch.left_by[..cut.tasks()];
        left_by.iter().for_each(|task| task.store(NOBODY, Ordering::Relaxed));
        Call {
            isa: cpu.isa(),
            threads: cpu.threads(),
            failed: cpu.failed(),
            x,
            outliers,
            sites,
            cut,
            changes: &scratch.changes,
            firsts: scratch.firsts,
            pieces: &scratch.pieces,
            share: scratch.pieces.len().div_ceil(TURNS_PER_THREAD * cpu.threads()).max(1),
            u: Shared::of(&mut scratch.u),
            rows_max: scratch.rows_max,
            u_stride: scratch.u_stride,
            next_piece: Apart::default(),
            next_product: Apart::default(),
            shrunk: Apart::default(),
            left_by,
        }
    }

    pub(super) fn run(&self, cpu: &Cpu) {
        if self.changes.is_empty() {
            // SAFETY: shapes are checked; tasks are disjoint in y.
            return cpu.fork(self.cut.tasks(), &|task| unsafe { self.multiply(task) });
        }
        // SAFETY: the plan bounds rows and ranks; pieces are disjoint in u, products in y.
        cpu.fork_calls(self.threads, &|worker| unsafe { self.work(worker) });
    }

    /// Makes pieces of u and products while there are any, and adds the deltas to its products.
    unsafe fn work(&self, worker: usize) {
        let mut left = 0..0;
        let shrinks_first = worker.is_multiple_of(2);
        while shrinks_first && self.take_pieces()
            || self.take_product(worker, &mut left)
            || self.take_pieces()
        {}
        if wait(self.failed, || self.has_u()) {
            self.finish_left(worker, &mut left);
        }
    }

    unsafe fn take_pieces(&self) -> bool {
        // Looked at before it is written: it is asked for once a product.
        if self.next_piece.0.load(Ordering::Relaxed) >= self.pieces.len() {
            return false;
        }
        let start = self.next_piece.0.fetch_add(self.share, Ordering::Relaxed);
        let end = self.pieces.len().min(start + self.share);
        if start >= end {
            return false;
        }
        for index in start..end {
            let next = self.pieces.get(index + 1);
            self.shrink(
                &self.pieces[index],
                next.map_or(std::ptr::null(), |next| self.place_a(next)),
            );
        }
        self.shrunk.0.fetch_add(end - start, Ordering::Release);
        true
    }

    /// `left`: among these tasks are those whose deltas the worker has left for later.
    unsafe fn take_product(&self, worker: usize, left: &mut Range<usize>) -> bool {
        let task = self.next_product.0.fetch_add(1, Ordering::Relaxed);
        if task >= self.cut.tasks() {
            return false;
        }
        self.multiply(task);
        self.left_by[task].store(worker, Ordering::Relaxed);
        let first = if left.start < left.end { left.start } else { task };
        *left = first..task + 1;
        if self.has_u() {
            self.finish_left(worker, left);
        }
        true
    }

    /// Whether all of u is made.
    fn has_u(&self) -> bool {
        self.shrunk.0.load(Ordering::Acquire) == self.pieces.len()
    }

    /// Adds the deltas to the worker's products that lack them.
    unsafe fn finish_left(&self, worker: usize, left: &mut Range<usize>) {
        for task in std::mem::take(left) {
            if self.left_by[task].load(Ordering::Relaxed) == worker {
                self.finish(task);
            }
        }
    }

    /// y = x·Wᵀ of a task.
    unsafe fn multiply(&self, task: usize) {
        let (i, rows, blocks) = self.cut.task(task);
        // Threads take tasks in turn, so this one can guess its next and have those weights on
        // their way.
        let next = task + self.threads;
        let after = if next < self.cut.tasks() {
            let (i, _, blocks) = self.cut.task(next);
            self.site(i).weight.place(blocks.start, 0)
        } else {
            std::ptr::null()
        };
        let changes = self.changes_among(i, &rows);
        self.site(i).run(self.isa, rows, blocks, after, changes, self.outliers);
    }

    /// Adds the deltas to the y of a task, stretch by stretch, while that is near.
    unsafe fn finish(&self, task: usize) {
        let (i, rows, blocks) = self.cut.task(task);
        if self.site(i).changed {
            let most = (STRETCH / rows.len()).max(1);
            for start in blocks.clone().step_by(most) {
                let end = blocks.end.min(start + most);
                self.add(i, rows.clone(), start..end);
            }
        }
    }

    fn site(&self, i: usize) -> &Site<'_> {
        self.sites[i].as_ref().expect("tasks name existing sites")
    }

    /// A site's changes that some of `rows` have.
    fn changes_among(&self, i: usize, rows: &Range<usize>) -> &[Change] {
        let all = &self.changes[self.firsts[i]..self.firsts[i + 1]];
        let start = all.partition_point(|change| change.rows().end <= rows.start);
        let end = all.partition_point(|change| change.rows().start < rows.end);
        &all[start..end]
    }

    /// Row 0 of a site's u.
    fn u(&self, i: usize) -> *mut f32 {
        self.u.get().wrapping_add(i * self.rows_max * self.u_stride)
    }

    unsafe fn place_a(&self, piece: &Piece) -> *const u8 {
        self.changes[piece.change as usize].delta().place_a(piece.ranks[0] as usize)
    }

    unsafe fn shrink(&self, piece: &Piece, after: *const u8) {
        let (x, x_stride) = self.x.wide();
        let change = &self.changes[piece.change as usize];
        let halves = self.x.halves().filter(|_| change.pairs);
        let at = Shrink {
            x: x.as_ptr(),
            halves: halves.map_or(std::ptr::null(), <[bf16]>::as_ptr),
            x_stride,
            rows: piece.rows[0] as usize..piece.rows[1] as usize,
            ranks: piece.ranks[0] as usize..piece.ranks[1] as usize,
            u: self.u(piece.site as usize).wrapping_add(change.column as usize),
            u_stride: self.u_stride,
            weight: change.weight,
            after,
        };
        change.delta().shrink(self.isa, at);
    }

    /// Adds the deltas of `rows`, and the bias, to x·Wᵀ.
    unsafe fn add(&self, i: usize, rows: Range<usize>, blocks: Range<usize>) {
        let site = self.site(i);
        self.isa.run(Expand {
            u: self.u(i),
            u_stride: self.u_stride,
            changes: self.changes_among(i, &rows),
            rows,
            blocks,
            y: site.y.get(),
            outputs: site.weight.outputs(),
            bias: site.bias,
        });
    }
}

/// Waits for what another thread is at. False when some task panicked: then it never comes.
fn wait(failed: &AtomicBool, ready: impl Fn() -> bool) -> bool {
    const POLLS_MAX: usize = 10_000;
    let mut polls = 0;
    while !ready() {
        if failed.load(Ordering::Acquire) {
            return false;
        }
        if polls < POLLS_MAX {
            polls += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn nobody_waits_for_a_task_that_panicked() {
        let failed = AtomicBool::new(false);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&failed, || false));
            thread::sleep(Duration::from_millis(20));
            failed.store(true, Ordering::Release);
            assert!(!waiting.join().expect("the wait ends"));
        });
        assert!(wait(&failed, || true), "what is ready needs no wait");
    }
}
