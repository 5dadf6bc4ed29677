//! Where ops run: a team of threads and the instruction set they use, or a GPU. Owns no memory and
//! no weights.

use std::cell::Cell;
use std::str::FromStr;

use crate::cuda::{self, Gpu};
use crate::simd::Isa;
use crate::team::Team;
use std::sync::atomic::AtomicBool;

/// Where an operator wants ops to run: `auto`, `cpu` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The best that this version serves on: the CPU.
    Auto,
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for Place {
    type Err = &'static str;

    /// The error says what was expected.
    fn from_str(text: &str) -> Result<Place, &'static str> {
        match text {
            "auto" => Ok(Place::Auto),
            "cpu" => Ok(Place::Cpu),
            _ => {
                let index =
                    text.strip_prefix("cuda:").filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
                let index = index.and_then(|n| n.parse().ok()).map(Place::Cuda);
                index.ok_or("auto, cpu or cuda:N, where N is a GPU's number from 0")
            }
        }
    }
}

/// A CPU or a GPU. Belongs to one engine thread.
pub enum Device {
    Cpu(Cpu),
    Cuda(Box<Gpu>),
}

/// A thread team on this CPU; the thread it belongs to is worker 0 of the team.
pub struct Cpu {
    team: Team,
    isa: Isa,
    op_calls: Cell<u64>,
}

impl Device {
    /// The device of `place`, with `threads` on a CPU.
    ///
    /// # Errors
    /// Why there is no such GPU.
    ///
    /// # Panics
    /// As [`Device::cpu`].
    pub fn open(place: Place, threads: usize) -> Result<Device, cuda::Error> {
        match place {
            Place::Auto | Place::Cpu => Ok(Device::cpu(threads)),
            Place::Cuda(index) => Ok(Device::Cuda(Box::new(Gpu::open(index)?))),
        }
    }

    /// A device of `threads` (the calling thread and `threads - 1` spawned ones) with the best
    /// instruction set there is.
    ///
    /// # Panics
    /// If `threads` is 0 or the system refuses a thread.
    pub fn cpu(threads: usize) -> Device {
        let isa = *Isa::available().last().expect("portable is always there");
        Device::Cpu(Cpu { team: Team::new(threads), isa, op_calls: Cell::new(0) })
    }

    /// The same restricted to `isa`, or `None` where this CPU lacks it. For tests and comparisons.
    pub fn cpu_with(threads: usize, isa: Isa) -> Option<Device> {
        Isa::available()
            .contains(&isa)
            .then(|| Device::Cpu(Cpu { team: Team::new(threads), isa, op_calls: Cell::new(0) }))
    }

    /// The team that the ops outside [`crate::cuda`] run on.
    ///
    /// # Panics
    /// On a GPU. Nobody gets one from [`Device::open`] into a model before they run there.
    #[inline]
    fn team(&self) -> &Cpu {
        match self {
            Device::Cpu(cpu) => cpu,
            Device::Cuda(gpu) => panic!("an op of the CPU was asked of {}", gpu.name()),
        }
    }

    /// Threads of the team, the calling one included.
    pub fn threads(&self) -> usize {
        self.team().team.threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.team().isa
    }

    /// For people: `cpu: 2 threads, avx512bf16` or `cuda:0: NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> String {
        match self {
            Device::Cpu(cpu) => {
                let threads = cpu.team.threads();
                let plural = if threads == 1 { "" } else { "s" };
                format!("cpu: {threads} thread{plural}, {}", cpu.isa.name())
            }
            Device::Cuda(gpu) => gpu.name(),
        }
    }

    /// Public ops called since start, on a GPU kernels launched: a step's count must not depend on
    /// its adapters.
    pub fn op_calls(&self) -> u64 {
        match self {
            Device::Cpu(cpu) => cpu.op_calls.get(),
            Device::Cuda(gpu) => gpu.launches(),
        }
    }

    pub(crate) fn count_op(&self) {
        let calls = &self.team().op_calls;
        calls.set(calls.get() + 1);
    }

    /// Runs `body` once per task; tasks start in order.
    pub(crate) fn fork(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        self.team().team.run(tasks, &|task, _| body(task));
    }

    /// The same with the number of the worker that runs it.
    pub(crate) fn fork_tasks(&self, tasks: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        self.team().team.run(tasks, &body);
    }

    /// Calls `body` with a worker's number `calls` times in all, for work that is not cut up in
    /// order: the body chooses what to do. The result must not depend on who does what.
    pub(crate) fn fork_calls(&self, calls: usize, body: &(dyn Fn(usize) + Sync)) {
        self.team().team.run(calls, &|_, worker| body(worker));
    }

    /// Whether a task of the current fork panicked.
    pub(crate) fn failed(&self) -> &AtomicBool {
        self.team().team.failed()
    }

    /// How many equal pieces to cut `items` of `cost` (lane operations, roughly 1 ns each) into:
    /// one where a fork costs more than it brings, else a few per thread, so that a late thread
    /// hurts little.
    pub(crate) fn pieces(&self, items: usize, cost: usize) -> usize {
        const COST_MIN: usize = 1500;
        let worth = (items.saturating_mul(cost) / COST_MIN).max(1);
        if self.threads() == 1 { 1 } else { worth.min(4 * self.threads()).min(items).max(1) }
    }
}

/// The part `index` of `parts` nearly equal parts of `0..items`.
pub(crate) fn part(items: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    items * index / parts..items * (index + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_auto_cpu_or_a_numbered_gpu() {
        for (text, place) in [
            ("auto", Place::Auto),
            ("cpu", Place::Cpu),
            ("cuda:0", Place::Cuda(0)),
            ("cuda:17", Place::Cuda(17)),
        ] {
            assert_eq!(text.parse(), Ok(place));
        }
        for text in ["", "cuda", "cuda:", "cuda:-1", "cuda:+1", "cuda:1 ", "CPU", "gpu", "cuda:one"]
        {
            assert!(text.parse::<Place>().is_err_and(|e| e.contains("cuda:N")), "{text}");
        }
    }

    #[test]
    fn auto_and_cpu_are_this_cpu() {
        for place in [Place::Auto, Place::Cpu] {
            let device = Device::open(place, 1).expect("a CPU");
            assert!(device.name().starts_with("cpu: 1 thread, "), "{}", device.name());
        }
    }
}
