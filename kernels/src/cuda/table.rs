//! What the LoRA kernels read of a step's segments: parts, where each segment's start, and chunks
//! of rows, in one run of words that goes to the GPU in one copy.
//!
//! Owns the layout, which is that of the structures in `kernels/cuda/lora.cu`. Never reads a
//! factor.

use crate::PARTS_MAX;
use crate::cuda::FEW_ROWS;
use crate::segments::Segments;

/// Words of a part, of which the last is unused, and of a chunk.
const PART_WORDS: usize = 8;
const CHUNK_WORDS: usize = 3;

/// One delta of a segment, as the kernels see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) rank: u32,
    pub(super) weight: f32,
}

/// Takes a part.
type AddPart<'c> = &'c mut dyn FnMut(Part);

/// See the module page.
pub(super) struct Table {
    words: Vec<u32>,
    firsts: Vec<u32>,
    chunks: Vec<u32>,
    /// Ranks of the segment with most: in sum, and in tiles of `tile`.
    pub(super) rank_max: usize,
    pub(super) tiles_max: usize,
    tile: usize,
}

impl Table {
    /// Words that steps of `rows_max` rows need at most.
    pub(super) fn words_max(rows_max: usize) -> usize {
        // A segment has a row at least, and so has a chunk.
        rows_max * (PARTS_MAX * PART_WORDS + 1 + CHUNK_WORDS) + 1
    }

    /// For steps of at most `rows_max` rows; ranks are computed `tile` at a time.
    pub(super) fn new(rows_max: usize, tile: usize) -> Table {
        Table {
            words: Vec::with_capacity(Table::words_max(rows_max)),
            firsts: Vec::with_capacity(rows_max + 1),
            chunks: Vec::with_capacity(rows_max * CHUNK_WORDS),
            rank_max: 0,
            tiles_max: 0,
            tile,
        }
    }

    /// Lists the parts of every segment and cuts the rows of those that have any into chunks.
    /// `parts(g, add)` adds those of segment `g`, at most [`PARTS_MAX`].
    pub(super) fn fill(
        &mut self,
        segments: Segments<'_>,
        parts: &mut dyn FnMut(usize, AddPart<'_>),
    ) {
        self.words.clear();
        self.firsts.clear();
        self.chunks.clear();
        (self.rank_max, self.tiles_max) = (0, 0);
        let Table { words, firsts, chunks, tile, .. } = self;
        firsts.push(0);
        for g in 0..segments.count() {
            let (mut count, mut column, mut tiles) = (0, 0, 0);
            parts(g, &mut |part| {
                let halves = |address: u64| [address as u32, (address >> 32) as u32];
                words.extend(halves(part.a));
                words.extend(halves(part.b));
                words.extend([part.rank, column, part.weight.to_bits(), 0]);
                count += 1;
                column += part.rank;
                tiles += (part.rank as usize).div_ceil(*tile);
            });
            firsts.push((words.len() / PART_WORDS) as u32);
            self.rank_max = self.rank_max.max(column as usize);
            self.tiles_max = self.tiles_max.max(tiles);
            if count > 0 {
                let rows = segments.rows(g);
                for start in rows.clone().step_by(FEW_ROWS) {
                    let some = FEW_ROWS.min(rows.end - start);
                    chunks.extend([g as u32, start as u32, some as u32]);
                }
            }
        }
        words.extend_from_slice(firsts);
        words.extend_from_slice(chunks);
    }

    /// Chunks of rows that have deltas.
    pub(super) fn chunks(&self) -> usize {
        self.chunks.len() / CHUNK_WORDS
    }

    /// All of it.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// Bytes from its start to the segments' firsts and to the chunks.
    pub(super) fn offsets(&self) -> [u64; 2] {
        let chunks = self.words.len() - self.chunks.len();
        [chunks - self.firsts.len(), chunks].map(|words| (words * size_of::<u32>()) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_firsts_and_chunks_lie_as_the_kernels_read_them() {
        let mut table = Table::new(64, 16);
        let segments = Segments { indptr: &[0, 20, 21, 24], ..Segments::none() };
        // Segment 1 has no part here, segment 2 has two.
        table.fill(segments, &mut |g, add| {
            let part = |rank| Part { a: 0x1_0000_0002, b: 3, rank, weight: 0.5 };
            match g {
                0 => add(part(33)),
                2 => {
                    add(part(7));
                    add(part(17));
                }
                _ => {}
            }
        });
        let half = 0.5f32.to_bits();
        let parts = [[2, 1, 3, 0, 33, 0, half, 0], [2, 1, 3, 0, 7, 0, half, 0]];
        assert_eq!(table.words()[..16], parts.concat());
        assert_eq!(table.words()[16..24], [2, 1, 3, 0, 17, 7, half, 0]);
        let [firsts, chunks] = table.offsets().map(|bytes| bytes as usize / 4);
        assert_eq!(table.words()[firsts..chunks], [0, 1, 1, 3]);
        assert_eq!(table.words()[chunks..], [0, 0, 16, 0, 16, 4, 2, 21, 3]);
        assert_eq!((table.chunks(), table.rank_max, table.tiles_max), (3, 33, 3));
        assert!(table.words().len() <= Table::words_max(24));
    }

    #[test]
    fn every_row_a_segment_of_its_own_fits() {
        let indptr: Vec<u32> = (0..=32).collect();
        let mut table = Table::new(32, 16);
        table.fill(Segments { indptr: &indptr, ..Segments::none() }, &mut |_, add| {
            (0..PARTS_MAX).for_each(|_| add(Part { a: 0, b: 0, rank: 1, weight: 1.0 }));
        });
        assert_eq!(table.words().len(), Table::words_max(32));
        assert_eq!((table.chunks(), table.rank_max, table.tiles_max), (32, PARTS_MAX, PARTS_MAX));
    }
}
