//! A tensor as it lies in a file, and how it becomes a matrix of the kernels.
//!
//! Owns the reading of rows in whatever form they are stored, and their order. Never knows a name
//! table or a header. The thing to know: each thread reads 16 rows at a time into memory that it
//! keeps and packs them where they stay; no tensor exists in any other form.

use super::gguf_blocks::{kept_as, pack_blocks};
use super::weight_file::WeightFile;
use crate::error::{Error, Result};
use candle_core::Device as CandleDevice;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use half::{bf16, f16};
use polylora_kernels::{Block, Device, Matrix, Panel, WeightDtype};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// candle dequantises about so many values at a time: few enough that the allocator keeps their
/// memory.
const CANDLE_VALUES: usize = 8 << 10;

/// How values lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    F32,
    F16,
    Bf16,
    /// GGUF's blocks.
    Blocks(GgmlDType),
}

impl Form {
    /// Of one of GGUF's types.
    pub fn of(dtype: GgmlDType) -> Self {
        match dtype {
            GgmlDType::F32 => Self::F32,
            GgmlDType::F16 => Self::F16,
            GgmlDType::BF16 => Self::Bf16,
            blocks => Self::Blocks(blocks),
        }
    }

    /// Values and bytes of the smallest piece.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Blocks(dtype) => (dtype.block_size(), dtype.type_size()),
        }
    }
}

/// See the module page. `[rows, width]`, row-major.
pub struct Stored<'a> {
    file: &'a WeightFile,
    name: &'a str,
    /// Where it begins in the file.
    offset: u64,
    form: Form,
    rows: usize,
    width: usize,
    /// What the rotary rows of a head lie interleaved by: its width.
    pub head_dim: Option<usize>,
    /// Values are rounded to bf16 before anything else.
    pub rounded: bool,
}

/// Memory that a thread keeps from piece to piece.
#[derive(Default)]
pub struct Scratch {
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl<'a> Stored<'a> {
    /// Errors (`invalid_model`) name the file and the tensor: rows that are not whole blocks, a
    /// file that ends too early.
    pub fn new(
        file: &'a WeightFile,
        name: &'a str,
        offset: u64,
        form: Form,
        [rows, width]: [usize; 2],
    ) -> Result<Self> {
        let (block, _) = form.block();
        if !width.is_multiple_of(block) {
            let why = format!("tensor {name}: rows of {width} are not whole blocks of {block}");
            return Err(file.wrong(&why));
        }
        let rounded = form == Form::Bf16;
        let stored = Self { file, name, offset, form, rows, width, head_dim: None, rounded };
        match offset.checked_add(stored.bytes()).is_some_and(|end| end <= file.bytes()) {
            true => Ok(stored),
            false => Err(file.wrong(&format!("the file ends within tensor {name}"))),
        }
    }

    fn row_bytes(&self) -> usize {
        let (block, bytes) = self.form.block();
        self.width / block * bytes
    }

    fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes() as u64
    }

    /// What the integers it is stored as are kept as; `None` for floats and for blocks that are
    /// dequantised.
    pub fn kept_as(&self) -> Option<WeightDtype> {
        match self.form {
            Form::Blocks(dtype) => kept_as(dtype),
            _ => None,
        }
    }

    /// Where a row is stored.
    fn place(&self, row: usize) -> usize {
        self.head_dim.map_or(row, |width| interleaved(row, width))
    }

    /// Stored rows that hold all of some rows.
    fn span(&self, rows: Range<usize>) -> Range<usize> {
        let places = || rows.clone().map(|row| self.place(row));
        let (first, last) = (places().min(), places().max());
        first.unwrap_or(0)..last.map_or(0, |last| last + 1)
    }

    /// The matrix in `dtype`, made on all threads of the device; with `as_stored` its integers are
    /// taken as they are, and `dtype` is what they are kept as. `told` hears of bytes that are
    /// done.
    pub fn packed(
        &self,
        device: &Device,
        (dtype, as_stored): (WeightDtype, bool),
        scratch: &[Mutex<Scratch>],
        told: &(dyn Fn(u64) + Sync),
    ) -> Result<Matrix> {
        Matrix::packed(device, dtype, self.rows, self.width, |worker, mut block: Block<'_>| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            for index in 0..block.panels() {
                self.pack(block.panel(index), dtype, as_stored, &mut scratch)?;
            }
            told((block.outputs().len() * self.row_bytes()) as u64);
            Ok(())
        })
    }

    fn pack(
        &self,
        panel: Panel<'_>,
        dtype: WeightDtype,
        as_stored: bool,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (rows, row_bytes) = (panel.outputs(), self.row_bytes());
        let span = self.span(rows.clone());
        let Scratch { bytes, values } = scratch;
        let bytes = prefix(bytes, span.len() * row_bytes);
        let offset = self.offset + (span.start * row_bytes) as u64;
        self.file.read(bytes, offset, &format_args!("tensor {}", self.name))?;
        let row = |n: usize| {
            let at = self.place(rows.start + n) - span.start;
            &bytes[at * row_bytes..][..row_bytes]
        };
        match self.form {
            Form::Bf16 if dtype == WeightDtype::Bf16 => panel.pack_bf16(row),
            Form::Blocks(blocks) if as_stored => {
                let all: Vec<&[u8]> = (0..rows.len()).map(row).collect();
                pack_blocks(panel, blocks, &all);
            }
            _ => {
                let values = prefix(values, rows.len() * self.width);
                for (n, values) in values.chunks_mut(self.width).enumerate() {
                    self.decode(row(n), values)?;
                }
                panel.pack_f32(|n| &values[n * self.width..][..self.width]);
            }
        }
        Ok(())
    }

    /// All values, row by row.
    pub fn values(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.rows * self.width];
        let mut bytes = vec![0; self.row_bytes()];
        for (row, values) in values.chunks_mut(self.width).enumerate() {
            let offset = self.offset + (self.place(row) * self.row_bytes()) as u64;
            self.file.read(&mut bytes, offset, &format_args!("tensor {}", self.name))?;
            self.decode(&bytes, values)?;
        }
        Ok(values)
    }

    fn decode(&self, bytes: &[u8], values: &mut [f32]) -> Result<()> {
        let pairs = bytes.as_chunks::<2>().0.iter().zip(&mut *values);
        match self.form {
            Form::Bf16 => pairs.for_each(|(b, v)| *v = bf16::from_le_bytes(*b).to_f32()),
            Form::F16 => pairs.for_each(|(b, v)| *v = f16::from_le_bytes(*b).to_f32()),
            Form::F32 => {
                let fours = bytes.as_chunks::<4>().0.iter().zip(&mut *values);
                fours.for_each(|(b, v)| *v = f32::from_le_bytes(*b));
            }
            Form::Blocks(dtype) => dequantise(dtype, bytes, values).map_err(|e| self.failed(&e))?,
        }
        if self.rounded && self.form != Form::Bf16 {
            values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
        }
        Ok(())
    }

    fn failed(&self, why: &candle_core::Error) -> Error {
        self.file.wrong(&format!("tensor {}: {why}", self.name))
    }
}

/// Where a row of heads is stored: `[head, pair, half of pair]` where `[head, half, pair]` is
/// wanted.
pub fn interleaved(row: usize, head_dim: usize) -> usize {
    let (head, d, half) = (row / head_dim, row % head_dim, head_dim / 2);
    head * head_dim + d % half * 2 + d / half
}

/// The first `len` of `values`, which grow if they must.
fn prefix<T: Clone + Default>(values: &mut Vec<T>, len: usize) -> &mut [T] {
    if values.len() < len {
        values.resize(len, T::default());
    }
    &mut values[..len]
}

fn dequantise(
    dtype: GgmlDType,
    bytes: &[u8],
    values: &mut [f32],
) -> Result<(), candle_core::Error> {
    let blocks = (CANDLE_VALUES / dtype.block_size()).max(1);
    let pieces = bytes.chunks(blocks * dtype.type_size());
    for (bytes, values) in pieces.zip(values.chunks_mut(blocks * dtype.block_size())) {
        let blocks = qtensor_from_ggml(dtype, bytes, vec![values.len()], &CandleDevice::Cpu)?;
        let floats: Vec<f32> = blocks.dequantize(&CandleDevice::Cpu)?.to_vec1()?;
        values.copy_from_slice(&floats);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;
    use candle_core::quantized::QTensor;
    use polylora_kernels::Memory;
    use polylora_kernels::WeightDtype::*;
    use std::io::Write;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    /// Values as `form` stores them, and what they are then.
    fn stored_as(form: Form, values: &[f32], width: usize) -> (Vec<u8>, Vec<f32>) {
        let each = |bytes: fn(f32) -> Vec<u8>, back: fn(f32) -> f32| {
            let bytes = values.iter().flat_map(|v| bytes(*v)).collect();
            (bytes, values.iter().map(|v| back(*v)).collect())
        };
        match form {
            Form::F32 => each(|v| v.to_le_bytes().to_vec(), |v| v),
            Form::F16 => {
                each(|v| f16::from_f32(v).to_le_bytes().to_vec(), |v| f16::from_f32(v).to_f32())
            }
            Form::Bf16 => {
                each(|v| bf16::from_f32(v).to_le_bytes().to_vec(), |v| bf16::from_f32(v).to_f32())
            }
            Form::Blocks(dtype) => {
                let shape = (values.len() / width, width);
                let tensor = Tensor::from_slice(values, shape, &CandleDevice::Cpu).unwrap();
                let blocks = QTensor::quantize(&tensor, dtype).unwrap();
                let flat = blocks.dequantize(&CandleDevice::Cpu).unwrap().flatten_all().unwrap();
                (blocks.data().unwrap().into_owned(), flat.to_vec1().unwrap())
            }
        }
    }

    /// Rows in the order in which they are wanted, row by row.
    fn in_order<T: Copy>(values: &[T], width: usize, head_dim: Option<usize>) -> Vec<T> {
        let place = |row: usize| match head_dim {
            None => row,
            // Stored: both of the first pair, both of the second, …
            Some(d) if row % d < d / 2 => row / d * d + row % d * 2,
            Some(d) => row / d * d + (row % d - d / 2) * 2 + 1,
        };
        let rows = 0..values.len() / width;
        rows.flat_map(|row| values[place(row) * width..][..width].iter().copied()).collect()
    }

    /// Packs what lies 7 bytes into a file, on some threads.
    fn packed(
        file: &WeightFile,
        (form, rows, width, head_dim): (Form, usize, usize, Option<usize>),
        rounded: bool,
        to: (WeightDtype, bool),
        threads: usize,
    ) -> Matrix {
        let mut stored = Stored::new(file, "t", 7, form, [rows, width]).unwrap();
        (stored.head_dim, stored.rounded) = (head_dim, rounded);
        let scratch: Vec<Mutex<Scratch>> = (0..threads).map(|_| Mutex::default()).collect();
        let told = AtomicU64::new(0);
        let count = |bytes| {
            told.fetch_add(bytes, Relaxed);
        };
        let matrix = stored.packed(&Device::cpu(threads), to, &scratch, &count).unwrap();
        assert_eq!(told.into_inner(), stored.bytes());
        matrix
    }

    #[test]
    fn a_tensor_in_a_file_is_the_matrix_of_its_values_whatever_the_threads() {
        let shapes = [(3, 32, None), (96, 64, Some(32)), (80, 256, Some(80)), (130, 512, None)];
        let blocks = [GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K, GgmlDType::Q2K];
        let forms = [Form::F32, Form::F16, Form::Bf16].into_iter();
        for form in forms.chain(blocks.map(Form::Blocks)) {
            for (rows, width, head_dim) in shapes.into_iter().filter(|s| s.1 % form.block().0 == 0)
            {
                let noise = |i: usize| (i * 2_654_435_761 % 10_007) as f32 / 10_007.0 - 0.4;
                let values: Vec<f32> = (0..rows * width).map(noise).collect();
                let (bytes, values) = stored_as(form, &values, width);
                let mut file = tempfile::NamedTempFile::new().unwrap();
                file.write_all(&[&[0; 7], &bytes[..], &[0; 3]].concat()).unwrap();
                let file = WeightFile::open(file.path()).unwrap();
                let shape = (form, rows, width, head_dim);
                for (to, rounded) in [(F32, false), (F32, true), (Bf16, false), (Int4Min, true)] {
                    let mut want = in_order(&values, width, head_dim);
                    if rounded {
                        want.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
                    }
                    let want = Matrix::from_f32(&Memory::Cpu, to, rows, width, &want).unwrap();
                    for threads in [1, 2, 5] {
                        let got = packed(&file, shape, rounded, (to, false), threads);
                        assert!(got == want, "{shape:?} as {to:?} on {threads} threads");
                    }
                }
                let Form::Blocks(dtype) = form else { continue };
                let Some(kept) = kept_as(dtype) else { continue };
                let row_bytes = bytes.len() / rows;
                let ordered = in_order(&bytes, row_bytes, head_dim);
                let want = Matrix::packed(&Device::cpu(1), kept, rows, width, |_, mut block| {
                    for index in 0..block.panels() {
                        let panel = block.panel(index);
                        let part = &ordered[panel.outputs().start * row_bytes..];
                        let all: Vec<&[u8]> = part.chunks(row_bytes).take(16).collect();
                        pack_blocks(panel, dtype, &all);
                    }
                    Ok::<(), Error>(())
                });
                let want = want.unwrap();
                for threads in [1, 2, 5] {
                    let got = packed(&file, shape, true, (kept, true), threads);
                    assert!(got == want, "{shape:?} kept, on {threads} threads");
                }
            }
        }
    }
}
