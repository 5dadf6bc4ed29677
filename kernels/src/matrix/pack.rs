//! Filling a matrix, block by block, from several threads.
//!
//! Owns who may write where: a block is 64 outputs, and nobody else has its words. Never reads a
//! file. The thing to know: a panel is written whole and once, padding included, by the thread that
//! packs it, so that thread also takes the memory's pages, and nothing is cleared before.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use super::BLOCK;
use super::cpu::Matrix;
use super::ints::{Group, SCALE_WORDS};
use crate::WeightDtype;
use crate::device::Cpu;
use crate::simd::LANES;

/// Steps of floats that are turned at a time: a cache line of every output.
const TILE: usize = 16;

/// Up to 64 outputs of a matrix that is being packed.
pub struct Block<'a> {
    words: &'a mut [u32],
    dtype: WeightDtype,
    first: usize,
    outputs: usize,
    inputs: usize,
}

/// Up to 16 outputs of a block. One of its ways to pack is to be called, once.
pub struct Panel<'a> {
    words: &'a mut [u32],
    dtype: WeightDtype,
    first: usize,
    outputs: usize,
    inputs: usize,
    /// Its place in the block, and how many there are.
    index: usize,
    panels: usize,
}

impl Matrix {
    /// A matrix whose blocks are packed by `pack` (which is told the thread's number), on all
    /// threads. Every panel of every block is to be packed. After an error no
    /// further block is begun.
    ///
    /// # Errors
    /// The first of `pack`.
    pub(super) fn packed<E: Send>(
        cpu: &Cpu,
        dtype: WeightDtype,
        outputs: usize,
        inputs: usize,
        pack: impl Fn(usize, Block<'_>) -> Result<(), E> + Sync,
    ) -> Result<Matrix, E> {
        let mut matrix = Self::empty(dtype, outputs, inputs);
        let blocks: Vec<_> = matrix.blocks_mut().map(|block| Mutex::new(Some(block))).collect();
        let failure: Mutex<Option<E>> = Mutex::new(None);
        cpu.fork_tasks(blocks.len(), &|task, worker| {
            let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
            let block = blocks[task].lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(block) = block.filter(|_| failed().is_none())
                && let Err(e) = pack(worker, block)
            {
                failed().get_or_insert(e);
            }
        });
        drop(blocks);
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(e) => Err(e),
            None => Ok(matrix),
        }
    }

    /// The same on the calling thread, panel by panel.
    pub(super) fn packed_here(
        dtype: WeightDtype,
        outputs: usize,
        inputs: usize,
        pack: impl Fn(Panel<'_>),
    ) -> Matrix {
        let mut matrix = Self::empty(dtype, outputs, inputs);
        for mut block in matrix.blocks_mut() {
            (0..block.panels()).for_each(|panel| pack(block.panel(panel)));
        }
        matrix
    }

    fn blocks_mut(&mut self) -> impl Iterator<Item = Block<'_>> {
        let (dtype, outputs, inputs) = (self.dtype, self.outputs, self.inputs);
        let words = BLOCK / LANES * dtype.steps(inputs) * dtype.step_words();
        self.words.chunks_mut(words).enumerate().map(move |(index, words)| {
            let first = index * BLOCK;
            Block { words, dtype, first, outputs: (outputs - first).min(BLOCK), inputs }
        })
    }
}

impl Block<'_> {
    /// Which outputs of the matrix these are.
    pub fn outputs(&self) -> Range<usize> {
        self.first..self.first + self.outputs
    }

    /// How many panels there are.
    pub fn panels(&self) -> usize {
        self.outputs.div_ceil(LANES)
    }

    /// A panel of them, by its place.
    pub fn panel(&mut self, index: usize) -> Panel<'_> {
        let panels = self.panels();
        assert!(index < panels, "panel {index} of {panels}");
        let before = index * LANES;
        Panel {
            words: self.words,
            dtype: self.dtype,
            first: self.first + before,
            outputs: (self.outputs - before).min(LANES),
            inputs: self.inputs,
            index,
            panels,
        }
    }
}

impl Panel<'_> {
    /// Which outputs of the matrix these are.
    pub fn outputs(&self) -> Range<usize> {
        self.first..self.first + self.outputs
    }

    /// Packs rows of f32, rounding to the matrix's type. `row(n)` is the n-th of these outputs,
    /// `[I]`.
    pub fn pack_f32<'r>(self, row: impl Fn(usize) -> &'r [f32]) {
        let (dtype, inputs) = (self.dtype, self.inputs);
        let rows = self.rows(row, inputs);
        match dtype {
            WeightDtype::F32 => self.put_words(|lane, step| rows[lane][step].to_bits()),
            WeightDtype::Bf16 => self.put_words(|lane, step| {
                let half = |i| {
                    let x = if i < inputs { rows[lane][i] } else { 0.0 };
                    u32::from(bf16::from_f32(x).to_bits())
                };
                half(2 * step) | half(2 * step + 1) << 16
            }),
            _ => {
                let size = dtype.group().expect("integers have groups");
                self.pack_groups(|lane, step| {
                    let mut values = [0.0; 32];
                    let start = inputs.min(step * size);
                    let there = &rows[lane][start..inputs.min(start + size)];
                    values[..there.len()].copy_from_slice(there);
                    Group::of(dtype, &values[..size])
                });
            }
        }
    }

    /// Packs rows of bf16 as a file has them, two bytes each, the low one first, into a matrix of
    /// bf16. `row(n)` is the n-th of these outputs, `[2 · I]`.
    ///
    /// # Panics
    /// On a matrix of another type.
    pub fn pack_bf16<'r>(self, row: impl Fn(usize) -> &'r [u8]) {
        assert_eq!(self.dtype, WeightDtype::Bf16, "bf16 is packed as it is");
        let inputs = self.inputs;
        let rows = self.rows(row, 2 * inputs);
        let even = inputs / 2;
        self.put_words(|lane, step| {
            let bytes = &rows[lane][4 * step..];
            match step < even {
                true => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
                false => u32::from(u16::from_le_bytes([bytes[0], bytes[1]])),
            }
        });
    }

    /// Packs integers as they are. `group(n, g)` is group g of the n-th of these outputs; the
    /// last ones may lie beyond I, where groups of 16 are padded to pairs ([`Group::none`]).
    ///
    /// # Panics
    /// On a matrix of floats.
    pub fn pack_groups(self, group: impl Fn(usize, usize) -> Group) {
        match self.dtype.word_inputs() {
            4 => self.put_groups::<4>(group),
            8 => self.put_groups::<8>(group),
            _ => panic!("{:?} has no groups", self.dtype),
        }
    }

    fn rows<'r, T>(&self, row: impl Fn(usize) -> &'r [T], len: usize) -> [&'r [T]; LANES] {
        let checked = |lane| {
            let row = if lane < self.outputs { row(lane) } else { &[] };
            assert!(lane >= self.outputs || row.len() == len, "a row has {len} values");
            row
        };
        std::array::from_fn(checked)
    }

    /// Writes every step of floats. A tile at a time, so that each output's values are read line by
    /// line, whatever the distance of the rows.
    #[inline]
    fn put_words(self, word: impl Fn(usize, usize) -> u32) {
        let steps = self.dtype.steps(self.inputs);
        let stride = self.panels * LANES;
        for first in (0..steps).step_by(TILE) {
            let many = TILE.min(steps - first);
            let mut tile = [[0u32; LANES]; TILE];
            for lane in 0..self.outputs {
                for (step, words) in tile[..many].iter_mut().enumerate() {
                    words[lane] = word(lane, first + step);
                }
            }
            let to = &mut self.words[first * stride + self.index * LANES..];
            for (to, words) in to.chunks_mut(stride).zip(&tile[..many]) {
                to[..LANES].copy_from_slice(words);
            }
        }
    }

    /// Writes every step of integers, with N of them in a word.
    #[inline]
    fn put_groups<const N: usize>(self, group: impl Fn(usize, usize) -> Group) {
        let (dtype, panels, index) = (self.dtype, self.panels, self.index);
        let (head, words) = (dtype.head_words(), dtype.group_words());
        let min_at = dtype.has_min().then_some(panels * SCALE_WORDS);
        for (step, to) in self.words.chunks_mut(panels * dtype.step_words()).enumerate() {
            let (mut scales, mut min) = ([f16::ZERO; LANES], [f16::ZERO; LANES]);
            let mut values = [[0u32; LANES]; 8];
            for lane in 0..self.outputs {
                let group = group(lane, step);
                (scales[lane], min[lane]) = (group.scale, group.min);
                for (q, values) in group.q.as_chunks::<N>().0.iter().zip(&mut values) {
                    values[lane] = word(q);
                }
            }
            put_halves(&mut to[index * SCALE_WORDS..], &scales);
            if let Some(at) = min_at {
                put_halves(&mut to[at + index * SCALE_WORDS..], &min);
            }
            let to = &mut to[panels * head + index * LANES..];
            for (to, values) in to.chunks_mut(panels * LANES).zip(&values[..words]) {
                to[..LANES].copy_from_slice(values);
            }
        }
    }
}

fn put_halves(to: &mut [u32], values: &[f16; LANES]) {
    for (to, [low, high]) in to.iter_mut().zip(values.as_chunks::<2>().0) {
        *to = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
    }
}

/// Four bytes, or eight nibbles.
#[inline(always)]
fn word<const N: usize>(q: &[u8; N]) -> u32 {
    let bytes = |at: usize| u32::from_le_bytes([q[at], q[at + 1], q[at + 2], q[at + 3]]);
    if N == 4 { bytes(0) } else { bytes(0) | bytes(4) << 4 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    /// Dtype, inputs of a step, integers in a word, whether it has minimums, as the module
    /// pages say.
    const INTS: [(WeightDtype, usize, usize, bool); 5] = [
        (WeightDtype::Int8, 32, 4, false),
        (WeightDtype::Int8By16, 16, 4, false),
        (WeightDtype::Int8Min, 32, 4, true),
        (WeightDtype::Int4, 32, 8, false),
        (WeightDtype::Int4Min, 32, 8, true),
    ];
    const SHAPES: [(usize, usize); 10] = [
        (1, 1),
        (3, 5),
        (16, 32),
        (17, 48),
        (48, 33),
        (64, 64),
        (65, 80),
        (130, 224),
        (200, 31),
        (256, 576),
    ];

    struct Rng(u64);

    impl Rng {
        fn next(&mut self) -> u32 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 33) as u32
        }

        fn value(&mut self) -> f32 {
            match self.next() % 17 {
                0 => 0.0,
                1 => -0.0,
                n => (self.next() as f32 / 2f32.powi(30) - 1.0) * n as f32,
            }
        }
    }

    /// Where the first word of a block's step is, and how many panels the block has.
    fn place(outputs: usize, output: usize, steps: usize, words: usize) -> (usize, usize) {
        let block = output / 64;
        let panels = (outputs - 64 * block).min(64).div_ceil(16);
        (block * 4 * steps * words, panels)
    }

    /// Packs floats word by word.
    fn slow_floats(dtype: WeightDtype, outputs: usize, inputs: usize, rows: &[f32]) -> Vec<u32> {
        let each = if dtype == WeightDtype::F32 { 1 } else { 2 };
        let steps = inputs.div_ceil(each);
        let mut words = vec![0; outputs.div_ceil(16) * steps * 16];
        for (o, row) in rows.chunks(inputs).enumerate() {
            let (start, panels) = place(outputs, o, steps, 16);
            for (step, x) in row.chunks(each).enumerate() {
                let half = |i: usize| x.get(i).map_or(0, |x| bf16::from_f32(*x).to_bits());
                words[start + step * panels * 16 + o % 64] = match each {
                    1 => x[0].to_bits(),
                    _ => u32::from(half(0)) | u32::from(half(1)) << 16,
                };
            }
        }
        words
    }

    /// Packs groups value by value.
    fn slow_groups(
        (dtype, size, each, has_min): (WeightDtype, usize, usize, bool),
        outputs: usize,
        inputs: usize,
        group: impl Fn(usize, usize) -> Group,
    ) -> Vec<u32> {
        let steps = inputs.div_ceil(32) * (32 / size);
        let head = if has_min { 16 } else { 8 };
        let of_panel = head + size / each * 16;
        let mut words = vec![0; outputs.div_ceil(16) * steps * of_panel];
        assert_eq!(of_panel, dtype.step_words());
        for output in 0..outputs {
            let (start, panels) = place(outputs, output, steps, of_panel);
            let lane = output % 64;
            for step in 0..steps {
                let group = group(output, step);
                let at = start + step * panels * of_panel;
                words[at + lane / 2] |= u32::from(group.scale.to_bits()) << (lane % 2 * 16);
                if has_min {
                    let word = &mut words[at + panels * 8 + lane / 2];
                    *word |= u32::from(group.min.to_bits()) << (lane % 2 * 16);
                }
                for (i, &q) in group.q[..size].iter().enumerate() {
                    let shift = match each {
                        4 => i % 4 * 8,
                        _ => i % 4 * 8 + i % 8 / 4 * 4,
                    };
                    let word = at + panels * head + i / each * panels * 16 + lane;
                    words[word] |= u32::from(q) << shift;
                }
            }
        }
        words
    }

    /// Packs on a team of threads what `pack` packs panel by panel; every other time into memory
    /// that somebody had.
    fn on(
        threads: usize,
        (dtype, outputs, inputs): (WeightDtype, usize, usize),
        pack: impl Fn(Panel<'_>) + Sync,
    ) -> Vec<u32> {
        let cpu = Cpu::new(threads, Isa::Portable);
        let mut before = Matrix::empty(dtype, outputs, inputs);
        before.words.fill(u32::MAX);
        drop(before);
        let matrix = Matrix::packed(&cpu, dtype, outputs, inputs, |worker, mut block| {
            assert!(worker < threads && !block.outputs().is_empty());
            (0..block.panels()).for_each(|panel| pack(block.panel(panel)));
            Ok::<(), ()>(())
        });
        matrix.expect("nothing fails").words.to_vec()
    }

    #[test]
    fn floats_lie_where_the_slow_packer_puts_them() {
        let mut rng = Rng(1);
        for (outputs, inputs) in SHAPES {
            let rows: Vec<f32> = (0..outputs * inputs).map(|_| rng.value()).collect();
            let halves: Vec<bf16> = rows.iter().map(|x| bf16::from_f32(*x)).collect();
            let bytes: Vec<u8> = halves.iter().flat_map(|x| x.to_le_bytes()).collect();
            for threads in [1, 2, 7] {
                for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
                    let want = slow_floats(dtype, outputs, inputs, &rows);
                    let got = on(threads, (dtype, outputs, inputs), |panel| {
                        let first = panel.outputs().start;
                        panel.pack_f32(|n| &rows[(first + n) * inputs..][..inputs]);
                    });
                    assert!(got == want, "{dtype:?} [{outputs}, {inputs}], {threads} threads");
                    let matrix = Matrix::from_f32(dtype, outputs, inputs, &rows);
                    assert!(matrix.words[..] == want, "{dtype:?} [{outputs}, {inputs}]");
                }
                let dtype = WeightDtype::Bf16;
                let got = on(threads, (dtype, outputs, inputs), |panel| {
                    let first = panel.outputs().start;
                    panel.pack_bf16(|n| &bytes[(first + n) * inputs * 2..][..inputs * 2]);
                });
                let want = slow_floats(dtype, outputs, inputs, &rows);
                assert!(got == want, "bytes [{outputs}, {inputs}], {threads} threads");
                let wide: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
                assert!(Matrix::from_f32(dtype, outputs, inputs, &wide).words[..] == want);
            }
        }
    }

    #[test]
    fn integers_lie_where_the_slow_packer_puts_them() {
        let mut rng = Rng(2);
        for (outputs, inputs) in SHAPES {
            let rows: Vec<f32> = (0..outputs * inputs).map(|_| rng.value()).collect();
            for ints in INTS {
                let (dtype, size, each, _) = ints;
                let steps = inputs.div_ceil(32) * (32 / size);
                let mut group = |_| Group {
                    q: std::array::from_fn(|_| rng.next() as u8 >> (8 - 32 / each)),
                    scale: f16::from_bits(rng.next() as u16),
                    min: f16::from_bits(rng.next() as u16),
                };
                let groups: Vec<Group> = (0..outputs * steps).map(&mut group).collect();
                let of_file = |o: usize, step: usize| groups[o * steps + step];
                let rounded = |o: usize, step: usize| {
                    let row = &rows[o * inputs..][..inputs];
                    let at = |i| row.get(step * size + i).copied().unwrap_or(0.0);
                    Group::of(dtype, &(0..size).map(at).collect::<Vec<f32>>())
                };
                let shape = (dtype, outputs, inputs);
                for threads in [1, 2, 7] {
                    let case = format!("{dtype:?} [{outputs}, {inputs}], {threads} threads");
                    let got = on(threads, shape, |panel| {
                        let first = panel.outputs().start;
                        panel.pack_groups(|n, step| of_file(first + n, step));
                    });
                    assert!(got == slow_groups(ints, outputs, inputs, of_file), "{case}");
                    let got = on(threads, shape, |panel| {
                        let first = panel.outputs().start;
                        panel.pack_f32(|n| &rows[(first + n) * inputs..][..inputs]);
                    });
                    assert!(got == slow_groups(ints, outputs, inputs, rounded), "{case}");
                }
            }
        }
    }

    #[test]
    fn the_first_error_ends_the_packing() {
        let cpu = Cpu::new(2, Isa::Portable);
        let begun = Mutex::new(0);
        let made = Matrix::packed(&cpu, WeightDtype::F32, 64 * 1000, 1, |_, block| {
            *begun.lock().expect("no panic") += 1;
            if block.outputs().start >= 64 * 10 { Err("planted") } else { Ok(()) }
        });
        assert_eq!(made.err(), Some("planted"));
        let begun = begun.into_inner().expect("no panic");
        assert!((11..1000).contains(&begun), "{begun} blocks were begun");
    }
}
