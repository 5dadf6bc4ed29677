//! A weight `[O, I]` on a GPU: bf16, row by row, rows padded with zeros to whole steps. Never
//! changes afterwards.

use half::bf16;

use crate::cuda::act::padded;
use crate::cuda::{Buffer, Error, Memory, STEP};

/// See the module page.
pub(crate) struct Matrix {
    pub(super) values: Buffer<bf16>,
    outputs: usize,
    inputs: usize,
}

impl Matrix {
    /// Rounds row-major `rows` `[O, I]` to bf16.
    ///
    /// # Panics
    /// If there are not so many values.
    pub(crate) fn from_f32(
        memory: &Memory,
        outputs: usize,
        inputs: usize,
        rows: &[f32],
    ) -> Result<Matrix, Error> {
        assert!(outputs > 0 && inputs > 0, "a matrix has outputs and inputs");
        assert_eq!(rows.len(), outputs * inputs, "rows of a [{outputs}, {inputs}] matrix");
        let values = Buffer::from(memory, &padded(rows, inputs, inputs.next_multiple_of(STEP)))?;
        Ok(Matrix { values, outputs, inputs })
    }

    /// O.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// I.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes held, padding included.
    pub(crate) fn bytes(&self) -> usize {
        self.values.bytes()
    }
}
