//! A weight `[O, I]`, made once at load. Never changes afterwards.
//!
//! Owns the choice of the form: packed on the CPU ([`cpu`]), rows of bf16 on a GPU. The thing to
//! know: a file's weights are packed block by block, by the threads that read them ([`pack`]).

pub(crate) mod columns;
pub(crate) mod cpu;
pub(crate) mod ints;
mod pack;

use half::bf16;

use crate::cuda;
use crate::device::{Device, Kind, Memory, On};
use crate::{Error, WeightDtype};
pub(crate) use cpu::{BLOCK, BLOCK_PANELS};
pub use ints::{Group, Grouped};
pub use pack::{Block, Panel};

/// See the module page.
pub struct Matrix {
    on: On<cpu::Matrix, cuda::Matrix>,
}

/// The same bits of the same type and shape, both on the CPU.
impl PartialEq for Matrix {
    fn eq(&self, other: &Matrix) -> bool {
        matches!((&self.on, &other.on), (On::Cpu(one), On::Cpu(two)) if one == two)
    }
}

impl Matrix {
    /// Packs row-major `rows` `[O, I]`, rounding to `dtype`.
    ///
    /// # Errors
    /// A GPU without room, or asked for anything but bf16.
    ///
    /// # Panics
    /// If there are not so many values.
    pub fn from_f32(
        memory: &Memory,
        dtype: impl Into<WeightDtype>,
        outputs: usize,
        inputs: usize,
        rows: &[f32],
    ) -> Result<Matrix, Error> {
        let on = match (memory, dtype.into()) {
            (Memory::Cpu, dtype) => On::Cpu(cpu::Matrix::from_f32(dtype, outputs, inputs, rows)),
            (Memory::Cuda(memory), WeightDtype::Bf16) => {
                On::Cuda(Box::new(cuda::Matrix::from_f32(memory, outputs, inputs, rows)?))
            }
            (Memory::Cuda(_), WeightDtype::F32) => {
                return Err(Error::OnCpuOnly("a matrix in f32"));
            }
            (Memory::Cuda(_), _) => return Err(Error::OnCpuOnly("a matrix of integers")),
        };
        Ok(Matrix { on })
    }

    /// Packs row-major `rows` `[O, I]`; exact in both floats.
    ///
    /// # Errors
    /// As [`Matrix::from_f32`].
    pub fn from_bf16(
        memory: &Memory,
        dtype: impl Into<WeightDtype>,
        outputs: usize,
        inputs: usize,
        rows: &[bf16],
    ) -> Result<Matrix, Error> {
        let wide: Vec<f32> = rows.iter().map(|x| x.to_f32()).collect();
        Self::from_f32(memory, dtype, outputs, inputs, &wide)
    }

    /// Packs integers as they are.
    ///
    /// # Errors
    /// On a GPU, which has no integer weights.
    ///
    /// # Panics
    /// On a dtype of floats, and on lengths that do not fit.
    pub fn from_groups(
        memory: &Memory,
        dtype: WeightDtype,
        outputs: usize,
        inputs: usize,
        from: &Grouped<'_>,
    ) -> Result<Matrix, Error> {
        memory.only_cpu("a matrix of integers")?;
        Ok(Matrix { on: On::Cpu(cpu::Matrix::from_groups(dtype, outputs, inputs, from)) })
    }

    /// A matrix whose blocks are packed by `pack` (which is told the thread's number), on all
    /// threads of the device. Every panel of every block is to be packed. After an error no
    /// further block is begun.
    ///
    /// # Errors
    /// The first of `pack`; that of a GPU, for which no weights are read from a file yet.
    pub fn packed<E: Send + From<Error>>(
        dev: &Device,
        dtype: impl Into<WeightDtype>,
        outputs: usize,
        inputs: usize,
        pack: impl Fn(usize, Block<'_>) -> Result<(), E> + Sync,
    ) -> Result<Matrix, E> {
        match &dev.kind {
            Kind::Cpu(cpu) => {
                let matrix = cpu::Matrix::packed(cpu, dtype.into(), outputs, inputs, pack)?;
                Ok(Matrix { on: On::Cpu(matrix) })
            }
            Kind::Cuda(_) => Err(Error::OnCpuOnly("a matrix read from a file").into()),
        }
    }

    /// O.
    pub fn outputs(&self) -> usize {
        match &self.on {
            On::Cpu(matrix) => matrix.outputs(),
            On::Cuda(matrix) => matrix.outputs(),
        }
    }

    /// I.
    pub fn inputs(&self) -> usize {
        match &self.on {
            On::Cpu(matrix) => matrix.inputs(),
            On::Cuda(matrix) => matrix.inputs(),
        }
    }

    /// What the values are stored as.
    pub fn dtype(&self) -> WeightDtype {
        match &self.on {
            On::Cpu(matrix) => matrix.dtype(),
            On::Cuda(_) => WeightDtype::Bf16,
        }
    }

    /// Bytes held, padding included.
    pub fn bytes(&self) -> usize {
        match &self.on {
            On::Cpu(matrix) => matrix.bytes(),
            On::Cuda(matrix) => matrix.bytes(),
        }
    }

    /// The weights of one output, unpacked: `out` `[I]`. For DoRA norms and verification.
    ///
    /// # Panics
    /// On an output beyond the last, an `out` of another length, and a matrix on a GPU.
    pub fn read_row(&self, output: usize, out: &mut [f32]) {
        self.on.cpu().read_row(output, out);
    }

    pub(crate) fn on(&self) -> &On<cpu::Matrix, cuda::Matrix> {
        &self.on
    }
}
