//! Activations of one step, `[rows_max, width]`: what products read.
//!
//! Owns the choice of the form: on the CPU f32 with rounded copies ([`cpu`]), on a GPU bf16. Never
//! multiplies. The thing to know: whoever writes a row writes all its copies, so a product finds
//! them ready.

mod bytes;
pub(crate) mod cpu;

use crate::cuda;
use crate::device::{Memory, On};
use crate::{Dtype, Error};
pub(crate) use bytes::{Outlier, Rounded};

/// See the module page.
pub struct Act {
    on: On<cpu::Act, cuda::Act>,
}

impl Act {
    /// Zeros for `rows_max` rows; `dtype` is that of the floats among the weights that will read
    /// them.
    ///
    /// # Errors
    /// A GPU without room, or asked for f32.
    pub fn new(memory: &Memory, dtype: Dtype, rows_max: usize, width: usize) -> Result<Act, Error> {
        let on = match (memory, dtype) {
            (Memory::Cpu, _) => On::Cpu(cpu::Act::new(dtype, rows_max, width)),
            (Memory::Cuda(memory), Dtype::Bf16) => {
                On::Cuda(Box::new(cuda::Act::new(memory, rows_max, width)?))
            }
            (Memory::Cuda(_), Dtype::F32) => return Err(Error::OnCpuOnly("an activation in f32")),
        };
        Ok(Act { on })
    }

    /// The same, to be read by integer weights too.
    ///
    /// # Errors
    /// On a GPU, which has no integer weights.
    pub fn with_bytes(
        memory: &Memory,
        dtype: Dtype,
        rows_max: usize,
        width: usize,
    ) -> Result<Act, Error> {
        memory.only_cpu("an activation in 8 bits")?;
        Ok(Act { on: On::Cpu(cpu::Act::new(dtype, rows_max, width).with_bytes()) })
    }

    /// Bytes that each row takes at most, whatever reads it.
    pub fn row_bytes(width: usize) -> usize {
        cpu::Act::row_bytes(width)
    }

    /// Values a row.
    pub fn width(&self) -> usize {
        match &self.on {
            On::Cpu(act) => act.width(),
            On::Cuda(act) => act.width(),
        }
    }

    /// Rows there is room for.
    pub fn rows_max(&self) -> usize {
        match &self.on {
            On::Cpu(act) => act.rows_max(),
            On::Cuda(act) => act.rows_max(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.on {
            On::Cpu(act) => act.bytes(),
            On::Cuda(act) => act.bytes(),
        }
    }

    /// Row `t` in f32, of an activation on the CPU.
    ///
    /// # Panics
    /// On a GPU's, which has no f32.
    pub fn row(&self, t: usize) -> &[f32] {
        self.on.cpu().row(t)
    }

    /// Writes whole rows from row `first` on, with all their copies.
    ///
    /// # Errors
    /// What a GPU says of the copy.
    ///
    /// # Panics
    /// If they are not whole rows, or do not fit.
    pub fn write(&mut self, first: usize, rows: &[f32]) -> Result<(), Error> {
        let width = self.width();
        assert_eq!(rows.len() % width, 0, "a row of Act has width {width}");
        match &mut self.on {
            On::Cpu(act) => {
                for (t, row) in rows.chunks(width).enumerate() {
                    act.set_row(first + t, row);
                }
                Ok(())
            }
            On::Cuda(act) => act.write(first, rows),
        }
    }

    pub(crate) fn on(&self) -> &On<cpu::Act, cuda::Act> {
        &self.on
    }

    pub(crate) fn on_mut(&mut self) -> &mut On<cpu::Act, cuda::Act> {
        &mut self.on
    }
}
