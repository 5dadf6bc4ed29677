//! Values between two ops, f32 `[T, W]`: the residual stream, what products make, logits.
//!
//! Owns its rows, wherever they lie. Never has a copy in another type: what a product reads is an
//! [`crate::Act`].

use crate::Error;
use crate::buffer::Buffer;
use crate::cuda;
use crate::device::{Device, Memory, On};

/// See the module page.
pub struct Plane {
    on: On<Buffer<f32>, cuda::Plane>,
    rows_max: usize,
    width: usize,
}

impl Plane {
    /// Zeros for `rows_max` rows.
    ///
    /// # Errors
    /// A GPU without room.
    pub fn new(memory: &Memory, rows_max: usize, width: usize) -> Result<Plane, Error> {
        let on = match memory {
            Memory::Cpu => On::Cpu(Buffer::zeroed(rows_max * width)),
            Memory::Cuda(memory) => On::Cuda(Box::new(cuda::Plane::new(memory, rows_max * width)?)),
        };
        Ok(Plane { on, rows_max, width })
    }

    /// Values a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows there is room for.
    pub fn rows_max(&self) -> usize {
        self.rows_max
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.rows_max * self.width * size_of::<f32>()
    }

    /// Writes whole rows from row `first` on.
    ///
    /// # Errors
    /// What a GPU says of the copy.
    ///
    /// # Panics
    /// If they are not whole rows, or do not fit.
    pub fn write(&mut self, first: usize, rows: &[f32]) -> Result<(), Error> {
        assert!(rows.len().is_multiple_of(self.width), "a row has width {}", self.width);
        let start = first * self.width;
        match &mut self.on {
            On::Cpu(values) => {
                values[start..][..rows.len()].copy_from_slice(rows);
                Ok(())
            }
            On::Cuda(plane) => plane.write(start, rows),
        }
    }

    /// The first `rows` rows: where they lie on the CPU, or a copy of what lies on a GPU, made when
    /// everything launched so far is done.
    ///
    /// # Errors
    /// What the first operation of the device that failed met ([`Device::take_error`]), or what it
    /// says of the copy.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read(&mut self, dev: &Device, rows: usize) -> Result<&mut [f32], Error> {
        assert!(rows <= self.rows_max, "{rows} rows of {}", self.rows_max);
        if let Some(error) = dev.take_error() {
            return Err(error);
        }
        match &mut self.on {
            On::Cpu(values) => Ok(&mut values[..rows * self.width]),
            On::Cuda(plane) => plane.read(rows * self.width),
        }
    }

    pub(crate) fn on(&self) -> &On<Buffer<f32>, cuda::Plane> {
        &self.on
    }

    pub(crate) fn on_mut(&mut self) -> &mut On<Buffer<f32>, cuda::Plane> {
        &mut self.on
    }

    /// Whether it holds `rows` rows of `width`.
    pub(crate) fn holds(&self, rows: usize, width: usize) -> bool {
        self.width == width && self.rows_max >= rows
    }
}
