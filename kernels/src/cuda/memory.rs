//! Memory on a GPU: zeroed, of fixed length, taken once. The counterpart of the CPU's `Buffer`.
//!
//! Owns copies there and back, and the rows of a [`crate::Plane`]. Never grows, never moves:
//! addresses in a table stay true while the buffer lives.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, ValidAsZeroBits};

use crate::cuda::Error;

/// The memory of one GPU, by the stream that orders all work with it.
#[derive(Clone)]
pub struct Memory {
    stream: Arc<CudaStream>,
}

impl Memory {
    pub(super) fn of(stream: Arc<CudaStream>) -> Memory {
        Memory { stream }
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

/// What kernels read and write: `f32`, `bf16` and `u32`.
pub(crate) trait Stored: DeviceRepr + ValidAsZeroBits + Copy {}
impl Stored for f32 {}
impl Stored for u32 {}
impl Stored for half::bf16 {}

/// Some values on a GPU.
pub(crate) struct Buffer<T: Stored> {
    values: CudaSlice<T>,
    len: usize,
}

impl<T: Stored> Buffer<T> {
    /// `len` zeros.
    pub(super) fn zeroed(memory: &Memory, len: usize) -> Result<Buffer<T>, Error> {
        // The driver has no memory of no bytes.
        let values = memory.stream.alloc_zeros(len.max(1));
        let values = values.map_err(Error::doing("taking memory on the GPU"))?;
        Ok(Buffer { values, len })
    }

    /// Values from here.
    pub(super) fn from(memory: &Memory, values: &[T]) -> Result<Buffer<T>, Error> {
        let mut buffer = Buffer::zeroed(memory, values.len())?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Copies `values` to the places from `at` on, after everything launched so far.
    ///
    /// # Panics
    /// If they do not fit.
    pub(super) fn write(&mut self, at: usize, values: &[T]) -> Result<(), Error> {
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
    pub(super) fn read(&self, out: &mut [T]) -> Result<(), Error> {
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
    pub(super) fn address(&self, memory: &Memory) -> u64 {
        assert!(Arc::ptr_eq(self.values.stream(), memory.stream()), "memory of another GPU");
        self.values.device_ptr(memory.stream()).0
    }
}

/// Rows of f32 on a GPU, and those that were read.
pub(crate) struct Plane {
    pub(super) values: Buffer<f32>,
    /// As many as were ever read at once.
    here: Vec<f32>,
}

impl Plane {
    /// `len` zeros.
    pub(crate) fn new(memory: &Memory, len: usize) -> Result<Plane, Error> {
        Ok(Plane { values: Buffer::zeroed(memory, len)?, here: Vec::new() })
    }

    /// Copies `values` to the places from `at` on.
    pub(crate) fn write(&mut self, at: usize, values: &[f32]) -> Result<(), Error> {
        self.values.write(at, values)
    }

    /// Copies the first `len` values here, when everything launched so far is done.
    pub(crate) fn read(&mut self, len: usize) -> Result<&mut [f32], Error> {
        if self.here.len() < len {
            self.here.resize(len, 0.0);
        }
        self.values.read(&mut self.here[..len])?;
        Ok(&mut self.here[..len])
    }
}
