//! y += Σ w·((x·Aᵀ)·Bᵀ), the deltas of each row's own segment, in two launches for any number
//! of adapters: u = w·(x·Aᵀ), then y += u·Bᵀ.
//!
//! x `[T, I]` bf16, A `[R, I]` bf16, B `[R, O]` bf16 (transposed, scale folded in), u f32, its rows
//! the ranks of a row's deltas side by side, y `[T, O]` f32; I and rows of B are padded, R is not.
//! Work is cut into chunks of at most 16 rows of one segment; rows in no chunk are untouched. Sums
//! are f32: u in the order of common.cuh; the delta of an element is one chain of fused
//! multiply-adds over parts and ranks in order, added to y once. So a row's bits depend neither on
//! the rows beside it nor on how they were cut. Never pads a rank: a tile reads what there is.
#include "common.cuh"

/// One delta of a segment: the words of a row of the table that the launcher writes.
struct Part {
  const bf16* a;
  const bf16* b;
  u32 rank;
  /// Where its ranks start in the rows of u.
  u32 column;
  float weight;
  u32 unused;
};

/// Some rows of one segment.
struct Chunk {
  u32 segment;
  u32 row;
  u32 rows;
};

/// Grid: chunks, ranks in sixteens of the segment with most. Parts of segment g are
/// `parts[firsts[g]..firsts[g + 1]]`.
extern "C" __global__ void __launch_bounds__(THREADS)
lora_shrink(const Part* parts, const u32* firsts, const Chunk* chunks, const bf16* x, float* u,
            u32 inputs, u32 u_stride) {
  __shared__ float sums[CHAINS * FEW_SIZE];
  Chunk chunk = chunks[blockIdx.x];
  u32 at = blockIdx.y, end = firsts[chunk.segment + 1];
  for (u32 p = firsts[chunk.segment]; p < end; p++) {
    Part part = parts[p];
    u32 tiles = (part.rank + FEW_OUTPUTS - 1) / FEW_OUTPUTS;
    if (at >= tiles) {
      at -= tiles;
      continue;
    }
    u32 rank = at * FEW_OUTPUTS;
    int ranks = min(part.rank - rank, static_cast<u32>(FEW_OUTPUTS));
    few(sums, part.a + static_cast<size_t>(rank) * inputs, ranks,
        x + static_cast<size_t>(chunk.row) * inputs, chunk.rows, inputs);
    for (int n = threadIdx.x; n < FEW_SIZE; n += THREADS) {
      u32 row = n / FEW_OUTPUTS;
      int r = n % FEW_OUTPUTS;
      if (row < chunk.rows && r < ranks) {
        float* to = u + static_cast<size_t>(chunk.row + row) * u_stride + part.column + rank + r;
        *to = part.weight * join(sums + n, FEW_SIZE);
      }
    }
    return;
  }
}

/// Outputs of a block, two a thread; ranks of u at a time.
constexpr int EXPAND_OUTPUTS = 2 * THREADS;
constexpr int EXPAND_RANKS = 32;

/// y += u·Bᵀ of up to `count` rows of a chunk, from its row `first` on. By the whole block.
template <int count>
__device__ __forceinline__ void expand(float (*u_here)[EXPAND_RANKS], const Part* parts, u32 from,
                                       u32 to, Chunk chunk, const float* u, float* y, u32 outputs,
                                       u32 b_stride, u32 u_stride) {
  u32 o = blockIdx.y * EXPAND_OUTPUTS + 2 * threadIdx.x;
  float low[count] = {}, high[count] = {};
  for (u32 p = from; p < to; p++) {
    Part part = parts[p];
    for (u32 r0 = 0; r0 < part.rank; r0 += EXPAND_RANKS) {
      int ranks = min(part.rank - r0, static_cast<u32>(EXPAND_RANKS));
      __syncthreads();
      for (int n = threadIdx.x; n < count * EXPAND_RANKS; n += THREADS) {
        u32 row = n / EXPAND_RANKS;
        int r = n % EXPAND_RANKS;
        bool there = row < chunk.rows && r < ranks;
        size_t at = static_cast<size_t>(chunk.row + row) * u_stride + part.column + r0 + r;
        u_here[row][r] = there ? u[at] : 0.0f;
      }
      __syncthreads();
      if (o >= outputs) continue;
      const bf16* b = part.b + static_cast<size_t>(r0) * b_stride + o;
#pragma unroll 8
      for (int r = 0; r < ranks; r++) {
        u32 pair = *reinterpret_cast<const u32*>(b + static_cast<size_t>(r) * b_stride);
        float b_low = wide(static_cast<bf16>(pair & 0xffff));
        float b_high = wide(static_cast<bf16>(pair >> 16));
#pragma unroll
        for (int row = 0; row < count; row++) {
          low[row] = __fmaf_rn(u_here[row][r], b_low, low[row]);
          high[row] = __fmaf_rn(u_here[row][r], b_high, high[row]);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < count; row++) {
    if (static_cast<u32>(row) < chunk.rows && o < outputs) {
      float* to = y + static_cast<size_t>(chunk.row + row) * outputs + o;
      to[0] += low[row];
      if (o + 1 < outputs) to[1] += high[row];
    }
  }
}

/// Grid: chunks, outputs in 256s. Rows of B are `b_stride` (even) values apart.
extern "C" __global__ void __launch_bounds__(THREADS)
lora_expand(const Part* parts, const u32* firsts, const Chunk* chunks, const float* u, float* y,
            u32 outputs, u32 b_stride, u32 u_stride) {
  __shared__ float u_here[FEW_ROWS][EXPAND_RANKS];
  Chunk chunk = chunks[blockIdx.x];
  u32 from = firsts[chunk.segment], to = firsts[chunk.segment + 1];
  if (chunk.rows == 1) {
    expand<1>(u_here, parts, from, to, chunk, u, y, outputs, b_stride, u_stride);
  } else if (chunk.rows <= 4) {
    expand<4>(u_here, parts, from, to, chunk, u, y, outputs, b_stride, u_stride);
  } else {
    expand<FEW_ROWS>(u_here, parts, from, to, chunk, u, y, outputs, b_stride, u_stride);
  }
}
