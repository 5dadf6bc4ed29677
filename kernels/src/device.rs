//! Where ops run and where operands lie: this CPU with a team of threads, or a GPU.
//!
//! Owns no operand and no weights. The thing to know: an operand belongs to the memory it was made
//! in, and an operation that has no code for a GPU refuses its operands when they are made.

use std::cell::{Cell, RefCell};
use std::str::FromStr;

use crate::Error;
use crate::cuda::{self, Gpu};
use crate::simd::Isa;
use crate::team::Team;
use std::sync::atomic::AtomicBool;

/// Where an operator wants ops to run: `auto`, `cpu` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best that this version serves on: the CPU.
    Auto,
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = &'static str;

    /// The error says what was expected.
    fn from_str(text: &str) -> Result<DeviceChoice, &'static str> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            _ => {
                let index =
                    text.strip_prefix("cuda:").filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
                let index = index.and_then(|n| n.parse().ok()).map(DeviceChoice::Cuda);
                index.ok_or("auto, cpu or cuda:N, where N is a GPU's number from 0")
            }
        }
    }
}

/// A CPU or a GPU. Belongs to one engine thread.
pub struct Device {
    pub(crate) kind: Kind,
    memory: Memory,
    /// What the first operation that failed met.
    failure: RefCell<Option<Error>>,
}

/// What every operation matches on.
pub(crate) enum Kind {
    Cpu(Cpu),
    Cuda(Box<Gpu>),
}

/// Where operands lie: the memory of a device. A copy of it names the same memory, on any thread.
#[derive(Clone)]
pub enum Memory {
    Cpu,
    Cuda(cuda::Memory),
}

/// An operand, in the form of the memory it lies in. A GPU's is boxed, so that the CPU's is no
/// larger than alone: a step looks at hundreds of deltas that have left the caches.
pub(crate) enum On<C, G> {
    Cpu(C),
    Cuda(Box<G>),
}

/// A thread team on this CPU; the thread it belongs to is worker 0 of the team.
pub(crate) struct Cpu {
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
    pub fn open(place: DeviceChoice, threads: usize) -> Result<Device, Error> {
        match place {
            DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::cpu(threads)),
            DeviceChoice::Cuda(index) => {
                let gpu = Gpu::open(index)?;
                let memory = Memory::Cuda(gpu.memory().clone());
                Ok(Device::of(Kind::Cuda(Box::new(gpu)), memory))
            }
        }
    }

    /// A device of `threads` (the calling thread and `threads - 1` spawned ones) with the best
    /// instruction set there is.
    ///
    /// # Panics
    /// If `threads` is 0 or the system refuses a thread.
    pub fn cpu(threads: usize) -> Device {
        let isa = *Isa::available().last().expect("portable is always there");
        Device::team(threads, isa)
    }

    /// The same restricted to `isa`, or `None` where this CPU lacks it. For tests and comparisons.
    pub fn cpu_with(threads: usize, isa: Isa) -> Option<Device> {
        Isa::available().contains(&isa).then(|| Device::team(threads, isa))
    }

    fn team(threads: usize, isa: Isa) -> Device {
        Device::of(Kind::Cpu(Cpu::new(threads, isa)), Memory::Cpu)
    }

    fn of(kind: Kind, memory: Memory) -> Device {
        Device { kind, memory, failure: RefCell::new(None) }
    }

    /// The memory that its operands lie in.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether it is this CPU.
    pub fn is_cpu(&self) -> bool {
        matches!(self.kind, Kind::Cpu(_))
    }

    /// Threads that work for it, the calling one included: the team's; for a GPU the calling one.
    pub fn threads(&self) -> usize {
        match &self.kind {
            Kind::Cpu(cpu) => cpu.threads(),
            Kind::Cuda(_) => 1,
        }
    }

    /// The instruction set in use; `None` on a GPU.
    pub fn isa(&self) -> Option<Isa> {
        match &self.kind {
            Kind::Cpu(cpu) => Some(cpu.isa),
            Kind::Cuda(_) => None,
        }
    }

    /// For people: `cpu: 2 threads, avx512bf16` or `cuda:0: NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> String {
        match &self.kind {
            Kind::Cpu(cpu) => {
                let threads = cpu.threads();
                let plural = if threads == 1 { "" } else { "s" };
                format!("cpu: {threads} thread{plural}, {}", cpu.isa.name())
            }
            Kind::Cuda(gpu) => gpu.name(),
        }
    }

    /// Public ops called since start, on a GPU kernels launched: a step's count must not depend on
    /// its adapters.
    pub fn op_calls(&self) -> u64 {
        match &self.kind {
            Kind::Cpu(cpu) => cpu.op_calls.get(),
            Kind::Cuda(gpu) => gpu.launches(),
        }
    }

    /// Remembers an error until [`Device::take_error`], unless one is remembered already.
    pub fn remember(&self, error: Error) {
        self.failure.borrow_mut().get_or_insert(error);
    }

    /// What the first operation that failed met since this was last asked. Operations are
    /// infallible to their callers, who ask once when the results are read.
    pub fn take_error(&self) -> Option<Error> {
        self.failure.take()
    }
}

impl Memory {
    /// Of an operand that no operation of a GPU reads.
    ///
    /// # Errors
    /// [`Error::OnCpuOnly`] where this is a GPU's memory.
    pub(crate) fn only_cpu(&self, operand: &'static str) -> Result<(), Error> {
        match self {
            Memory::Cpu => Ok(()),
            Memory::Cuda(_) => Err(Error::OnCpuOnly(operand)),
        }
    }
}

/// The accessors of one arm. Their panic is a caller's bug, as a shape that does not fit is: an
/// operation was given an operand from the memory of another device.
impl<C, G> On<C, G> {
    pub(crate) fn cpu(&self) -> &C {
        match self {
            On::Cpu(operand) => operand,
            On::Cuda(_) => panic!("an operand on a GPU, for an operation on the CPU"),
        }
    }

    pub(crate) fn cpu_mut(&mut self) -> &mut C {
        match self {
            On::Cpu(operand) => operand,
            On::Cuda(_) => panic!("an operand on a GPU, for an operation on the CPU"),
        }
    }

    pub(crate) fn cuda(&self) -> &G {
        match self {
            On::Cpu(_) => panic!("an operand of the CPU, for an operation on a GPU"),
            On::Cuda(operand) => operand,
        }
    }

    pub(crate) fn cuda_mut(&mut self) -> &mut G {
        match self {
            On::Cpu(_) => panic!("an operand of the CPU, for an operation on a GPU"),
            On::Cuda(operand) => operand,
        }
    }
}

impl Cpu {
    /// `threads`, the calling one among them.
    pub(crate) fn new(threads: usize, isa: Isa) -> Cpu {
        Cpu { team: Team::new(threads), isa, op_calls: Cell::new(0) }
    }

    pub(crate) fn threads(&self) -> usize {
        self.team.threads()
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    pub(crate) fn count_op(&self) {
        self.op_calls.set(self.op_calls.get() + 1);
    }

    /// Runs `body` once per task; tasks start in order.
    pub(crate) fn fork(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        self.team.run(tasks, &|task, _| body(task));
    }

    /// The same with the number of the worker that runs it.
    pub(crate) fn fork_tasks(&self, tasks: usize, body: &(dyn Fn(usize, usize) + Sync)) {
        self.team.run(tasks, &body);
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
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("cuda:0", DeviceChoice::Cuda(0)),
            ("cuda:17", DeviceChoice::Cuda(17)),
        ] {
            assert_eq!(text.parse(), Ok(place));
        }
        for text in ["", "cuda", "cuda:", "cuda:-1", "cuda:+1", "cuda:1 ", "CPU", "gpu", "cuda:one"]
        {
            assert!(text.parse::<DeviceChoice>().is_err_and(|e| e.contains("cuda:N")), "{text}");
        }
    }

    #[test]
    fn auto_and_cpu_are_this_cpu() {
        for place in [DeviceChoice::Auto, DeviceChoice::Cpu] {
            let device = Device::open(place, 1).expect("a CPU");
            assert!(device.name().starts_with("cpu: 1 thread, "), "{}", device.name());
        }
    }
}
