//! One GPU: its context, the one stream that all work goes through, and the loaded kernels.
//!
//! Owns finding, opening and launching. Never holds memory. The thing to know: the driver's library
//! is asked for before anything else, because calling into it where there is none panics.

use std::cell::Cell;
use std::ffi::{CString, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use crate::cuda::error::{CAPABILITY_MIN, CUDA_MIN, Error};
use crate::cuda::{Memory, THREADS};

/// The kernels, by file. `build.py` makes the text; a test holds the names equal.
const MODULES: [&str; 2] =
    [include_str!("../../cuda/gemm.ptx"), include_str!("../../cuda/lora.ptx")];

/// The kernels' entry points.
#[derive(Debug, Clone, Copy)]
pub(super) enum Entry {
    GemmFew,
    GemmMany,
    LoraShrink,
    LoraExpand,
}

impl Entry {
    const ALL: [Entry; 4] = [Entry::GemmFew, Entry::GemmMany, Entry::LoraShrink, Entry::LoraExpand];

    /// Its name, and which of the modules has it.
    fn place(self) -> (&'static str, usize) {
        match self {
            Entry::GemmFew => ("gemm_few", 0),
            Entry::GemmMany => ("gemm_many", 0),
            Entry::LoraShrink => ("lora_shrink", 1),
            Entry::LoraExpand => ("lora_expand", 1),
        }
    }
}

/// Arguments of a kernel at most.
const ARGS_MAX: usize = 8;

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Address(u64),
    Count(u32),
}

impl Arg {
    /// A size that kernels count in 32 bits.
    pub(super) fn count(n: usize) -> Arg {
        Arg::Count(u32::try_from(n).expect("sizes of an op fit in 32 bits"))
    }
}

/// See the module page. Belongs to one engine thread.
pub(crate) struct Gpu {
    index: usize,
    name: String,
    memory: Memory,
    modules: Vec<sys::CUmodule>,
    /// In the order of [`Entry`].
    entries: Vec<sys::CUfunction>,
    launches: Cell<u64>,
}

// SAFETY: the driver's handles may be used from any thread; the context is made current on the
// calling one before each use.
unsafe impl Send for Gpu {}

/// The names of the GPUs that the driver finds, in the order of their numbers. Opens none.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::OldDriver`], or what the driver says of its own start.
pub fn gpus() -> Result<Vec<String>, Error> {
    // SAFETY: loading a library runs its initialisers; this one is the system's own driver.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    let mut version = 0;
    // SAFETY: writes one integer; may be called before anything else.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    asked.result().map_err(Error::doing("asking for the driver's version"))?;
    let known = (version / 1000, version % 1000 / 10);
    if known < CUDA_MIN {
        return Err(Error::OldDriver(known.0, known.1));
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(Vec::new()),
        Err(error) => return Err(Error::doing("starting the NVIDIA driver")(error)),
    }
    let count = result::device::get_count().map_err(Error::doing("counting GPUs"))?;
    let name = |index| result::device::get(index).and_then(result::device::get_name);
    (0..count).map(name).collect::<Result<_, _>>().map_err(Error::doing("naming GPUs"))
}

impl Gpu {
    /// Opens GPU `index` and loads the kernels, which the driver compiles for it the first time (a
    /// few seconds; it keeps the result).
    ///
    /// # Errors
    /// Every [`Error`].
    pub(crate) fn open(index: usize) -> Result<Gpu, Error> {
        let names = gpus()?;
        let found = names.len();
        let name = names.into_iter().nth(index).ok_or(Error::NoSuchGpu { index, found })?;
        let context = CudaContext::new(index).map_err(Error::doing("opening the GPU"))?;
        let attribute = |a| context.attribute(a).map_err(Error::doing("asking the GPU"));
        let capability = (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < CAPABILITY_MIN {
            return Err(Error::OldGpu { name, capability });
        }
        // SAFETY: all work goes through one stream, which keeps its order without events.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(Error::doing("making a stream"))?;
        let mut gpu = Gpu {
            index,
            name,
            memory: Memory::of(stream),
            modules: Vec::new(),
            entries: Vec::new(),
            launches: Cell::new(0),
        };
        gpu.load().map_err(Error::doing("loading the kernels"))?;
        Ok(gpu)
    }

    fn load(&mut self) -> Result<(), DriverError> {
        for text in MODULES {
            let text = CString::new(text).expect("PTX is text");
            // SAFETY: PTX that ends with a zero, which the call only reads.
            self.modules.push(unsafe { result::module::load_data(text.as_ptr().cast()) }?);
        }
        for entry in Entry::ALL {
            let (name, module) = entry.place();
            let name = CString::new(name).expect("a name");
            // SAFETY: the module was loaded above and lives as long as this GPU.
            let function = unsafe { result::module::get_function(self.modules[module], name) }?;
            self.entries.push(function);
        }
        Ok(())
    }

    /// For people: `cuda:0: NVIDIA H100 80GB HBM3`.
    pub(crate) fn name(&self) -> String {
        format!("cuda:{}: {}", self.index, self.name)
    }

    /// Kernels launched since it was opened: a step's count must not depend on its adapters.
    pub(crate) fn launches(&self) -> u64 {
        self.launches.get()
    }

    /// Where its operands lie.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        self.memory.stream()
    }

    /// Lines up one kernel.
    ///
    /// # Safety
    /// The arguments are the entry's, in order; every element that a block of the grid touches
    /// lies in the buffers they name, and what it writes no other block touches.
    pub(super) unsafe fn launch(
        &self,
        entry: Entry,
        grid: [usize; 2],
        args: &[Arg],
    ) -> Result<(), Error> {
        let blocks = grid.map(|n| u32::try_from(n).expect("a grid fits in 32 bits"));
        assert!(blocks[1] <= 65_535, "a grid of {blocks:?} blocks");
        let mut places = [null_mut::<c_void>(); ARGS_MAX];
        for (place, arg) in places.iter_mut().zip(args) {
            *place = match arg {
                Arg::Address(address) => (&raw const *address).cast_mut().cast(),
                Arg::Count(count) => (&raw const *count).cast_mut().cast(),
            };
        }
        self.launches.set(self.launches.get() + 1);
        self.stream().context().bind_to_thread().map_err(Error::doing("taking up the GPU"))?;
        result::launch_kernel(
            self.entries[entry as usize],
            (blocks[0], blocks[1], 1),
            (THREADS, 1, 1),
            0,
            self.stream().cu_stream(),
            &mut places[..args.len()],
        )
        .map_err(Error::doing("launching a kernel"))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // A GPU that cannot be reached any more has nothing left to unload.
        if self.stream().context().bind_to_thread().is_ok() {
            for module in self.modules.drain(..) {
                // SAFETY: loaded in `load`; nothing is launched any more.
                let _ = unsafe { result::module::unload(module) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PTX directive's value.
    fn directive<'t>(text: &'t str, name: &str) -> &'t str {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap_or_else(|| panic!("{name} in the PTX")).trim()
    }

    #[test]
    fn the_ptx_is_for_the_oldest_driver_and_gpu_that_are_let_in() {
        for text in MODULES {
            // PTX 8.n is CUDA 12.n's.
            assert_eq!(directive(text, ".version"), format!("8.{}", CUDA_MIN.1));
            assert_eq!(CUDA_MIN.0, 12);
            let (major, minor) = CAPABILITY_MIN;
            assert_eq!(directive(text, ".target"), format!("sm_{major}{minor}"));
            assert_eq!(directive(text, ".address_size"), "64");
        }
    }

    #[test]
    fn every_kernel_is_there_with_its_block_and_no_other_is() {
        let entries: Vec<&str> = MODULES
            .iter()
            .flat_map(|text| text.lines())
            .filter_map(|line| line.strip_prefix(".visible .entry "))
            .map(|name| name.trim_end_matches('('))
            .collect();
        for entry in Entry::ALL {
            let (name, module) = entry.place();
            assert!(MODULES[module].contains(&format!(".visible .entry {name}(")), "{name}");
        }
        assert_eq!(entries.len(), Entry::ALL.len(), "{entries:?}");
        for text in MODULES {
            let bounds = text.matches(&format!(".maxntid {THREADS}, 1, 1")).count();
            assert_eq!(bounds, 2, "each entry says how many threads it wants");
        }
    }
}
