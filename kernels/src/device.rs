//! Where ops run: a team of threads, and the instruction set they use. Owns no memory and no
//! weights.

use std::cell::Cell;

use crate::simd::Isa;
use crate::team::Team;
use std::sync::atomic::AtomicBool;

/// A thread team on this CPU. Belongs to one engine thread, which is worker 0 of the team.
pub struct Device {
    team: Team,
    isa: Isa,
    op_calls: Cell<u64>,
}

impl Device {
    /// A device of `threads` (the calling thread and `threads - 1` spawned ones) with the best
    /// instruction set there is.
    ///
    /// # Panics
    /// If `threads` is 0 or the system refuses a thread.
    pub fn cpu(threads: usize) -> Device {
        let isa = *Isa::available().last().expect("portable is always there");
        Device { team: Team::new(threads), isa, op_calls: Cell::new(0) }
    }

    /// The same restricted to `isa`, or `None` where this CPU lacks it. For tests and comparisons.
    pub fn cpu_with(threads: usize, isa: Isa) -> Option<Device> {
        Isa::available().contains(&isa).then(|| Device {
            team: Team::new(threads),
            isa,
            op_calls: Cell::new(0),
        })
    }

    /// Threads of the team, the calling one included.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// For people: `cpu: 2 threads, avx512bf16`.
    pub fn name(&self) -> String {
        let threads = self.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu: {threads} thread{plural}, {}", self.isa.name())
    }

    /// Public ops called since start: a step's count must not depend on its adapters.
    pub fn op_calls(&self) -> u64 {
        self.op_calls.get()
    }

    pub(crate) fn count_op(&self) {
        self.op_calls.set(self.op_calls.get() + 1);
    }

    /// Runs `body` once per task; tasks start in order.
    pub(crate) fn fork(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        self.team.run(tasks, &|task, _| body(task));
    }

    /// Calls `body` with a worker's number `calls` times in all, for work that is not cut up in
    /// order: the body chooses what to do. The result must not depend on who does what.
    pub(crate) fn fork_calls(&self, calls: usize, body: &(dyn Fn(usize) + Sync)) {
        self.team.run(calls, &|_, worker| body(worker));
    }

    /// Whether a task of the current fork panicked.
    pub(crate) fn failed(&self) -> &AtomicBool {
        self.team.failed()
    }

    /// How many equal pieces to cut `items` of `cost` (lane operations, roughly 1 ns each) into:
    /// one where a fork costs more than it brings, else a few per thread, so that a late thread
    /// hurts little.
    pub(crate) fn pieces(&self, items: usize, cost: usize) -> usize {
        const COST_MIN: usize = 4000;
        let worth = (items.saturating_mul(cost) / COST_MIN).max(1);
        if self.threads() == 1 { 1 } else { worth.min(4 * self.threads()).min(items).max(1) }
    }
}

/// The part `index` of `parts` nearly equal parts of `0..items`.
pub(crate) fn part(items: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    items * index / parts..items * (index + 1) / parts
}
