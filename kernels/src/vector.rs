//! Values of one row that do not change: the weights of a norm, a bias. f32.
//!
//! Never on a GPU in this version: no operation there reads one.

use crate::Error;
use crate::device::Memory;

/// See the module page. The default has no values.
#[derive(Default)]
pub struct Vector {
    values: Box<[f32]>,
}

impl Vector {
    /// These values.
    ///
    /// # Errors
    /// On a GPU.
    pub fn new(memory: &Memory, values: impl Into<Box<[f32]>>) -> Result<Vector, Error> {
        memory.only_cpu("a norm or a bias")?;
        Ok(Vector { values: values.into() })
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Values held.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        size_of_val::<[f32]>(&self.values)
    }
}
