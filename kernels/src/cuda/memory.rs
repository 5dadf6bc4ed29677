//! Memory on a GPU: zeroed, of fixed length, taken once. The counterpart of the CPU's `Buffer`.
//!
//! Owns copies there and back. Never grows, never moves: addresses in a table stay true while the
//! buffer lives.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, ValidAsZeroBits};

use crate::cuda::{Error, Gpu};

/// What kernels read and write: `f32`, `bf16` and `u32`.
pub trait Stored: DeviceRepr + ValidAsZeroBits + Copy {}
impl Stored for f32 {}
impl Stored for u32 {}
impl Stored for half::bf16 {}

/// Some values on a GPU.
pub struct Buffer<T: Stored> {
    values: CudaSlice<T>,
    len: usize,
}

impl<T: Stored> Buffer<T> {
    /// `len` zeros.
    pub fn zeroed(gpu: &Gpu, len: usize) -> Result<Buffer<T>, Error> {
        // The driver has no memory of no bytes.
        let values = gpu.stream().alloc_zeros(len.max(1));
        let values = values.map_err(Error::doing("taking memory on the GPU"))?;
        Ok(Buffer { values, len })
    }

    /// Values from here.
    pub fn from(gpu: &Gpu, values: &[T]) -> Result<Buffer<T>, Error> {
        let mut buffer = Buffer::zeroed(gpu, values.len())?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Values held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Copies `values` to the places from `at` on, after everything launched so far.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&mut self, at: usize, values: &[T]) -> Result<(), Error> {
        let end = at.checked_add(values.len()).filter(|&end| end <= self.len);
        let end = end.unwrap_or_else(|| panic!("{} values at {at} of {}", values.len(), self.len));
        if values.is_empty() {
            return Ok(());
        }
        let stream = self.values.stream().clone();
        let done = stream.memcpy_htod(values, &mut self.values.slice_mut(at..end));
        done.map_err(Error::doing("copying to the GPU"))
    }

    /// Copies the first values to `out`, when everything launched so far is done.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read(&self, out: &mut [T]) -> Result<(), Error> {
        assert!(out.len() <= self.len, "{} values of {}", out.len(), self.len);
        if out.is_empty() {
            return Ok(());
        }
        let stream = self.values.stream();
        let copied = stream.memcpy_dtoh(&self.values.slice(..out.len()), out);
        copied.and_then(|()| stream.synchronize()).map_err(Error::doing("copying from the GPU"))
    }

    /// Where it starts.
    ///
    /// # Panics
    /// If it lies on another GPU.
    pub(super) fn address(&self, gpu: &Gpu) -> u64 {
        assert!(Arc::ptr_eq(self.values.stream(), gpu.stream()), "memory of another GPU");
        self.values.device_ptr(gpu.stream()).0
    }
}
