//! y = x·Wᵀ
//!
//! x `[T, I]` bf16, W `[O, I]` bf16, y `[T, O]` f32; products exact, sums in f32 in the order of
//! common.cuh. I is padded to whole steps; T and O are any. Owns two ways to the same bits: for few
//! rows straight from memory, which is what a step of decoding waits for, and for many through
//! shared memory, where each weight is used for 32 rows.
#include "common.cuh"

/// Grid: rows in sixteens, outputs in sixteens.
extern "C" __global__ void __launch_bounds__(THREADS)
gemm_few(const bf16* w, const bf16* x, float* y, u32 rows, u32 outputs, u32 inputs) {
  __shared__ float sums[CHAINS * FEW_SIZE];
  u32 t = blockIdx.x * FEW_ROWS, o = blockIdx.y * FEW_OUTPUTS;
  int rows_here = min(rows - t, static_cast<u32>(FEW_ROWS));
  int outputs_here = min(outputs - o, static_cast<u32>(FEW_OUTPUTS));
  few(sums, w + static_cast<size_t>(o) * inputs, outputs_here, x + static_cast<size_t>(t) * inputs,
      rows_here, inputs);
  for (int at = threadIdx.x; at < FEW_SIZE; at += THREADS) {
    int row = at / FEW_OUTPUTS, output = at % FEW_OUTPUTS;
    if (row < rows_here && output < outputs_here) {
      y[static_cast<size_t>(t + row) * outputs + o + output] = join(sums + at, FEW_SIZE);
    }
  }
}

constexpr int MANY_OUTPUTS = 64;
constexpr int MANY_ROWS = 32;
constexpr int MANY_SIZE = MANY_OUTPUTS * MANY_ROWS;
/// Values of one chain's step of a block's weights and rows. Rows of 64 bytes: the eight lanes that
/// read at once read two rows, which are all 32 banks.
constexpr int STEP_W = MANY_OUTPUTS * STEP;
constexpr int STEP_X = MANY_ROWS * STEP;
/// A stage is a step of each chain: weights `[chain][output][32]`, then rows `[chain][row][32]`.
constexpr int STAGE = CHAINS * (STEP_W + STEP_X);
/// What one is multiplied from while the next is on its way.
constexpr int STAGES = 2;

/// Starts the copies of some rows of a stage, from input `i` on.
template <int count>
__device__ __forceinline__ void fetch(bf16* stage, const bf16* from, u32 first, u32 end, u32 i,
                                      u32 inputs) {
  constexpr int PIECES = CHAINS * STEP / 8;  // 16 bytes each, of a row
#pragma unroll
  for (int n = threadIdx.x; n < count * PIECES; n += THREADS) {
    int row = n / PIECES, piece = n % PIECES;
    u32 at = i + piece * 8;
    bool there = first + row < end && at < inputs;
    const bf16* source = there ? from + static_cast<size_t>(first + row) * inputs + at : from;
    copy16(stage + (piece / 4 * count + row) * STEP + piece % 4 * 8, source, there);
  }
}

/// Grid: rows in thirty-twos, outputs in sixty-fours.
extern "C" __global__ void __launch_bounds__(THREADS)
gemm_many(const bf16* w, const bf16* x, float* y, u32 rows, u32 outputs, u32 inputs) {
  __shared__ uint4 memory[STAGES * STAGE / 8];
  bf16* stages = reinterpret_cast<bf16*>(memory);
  u32 t = blockIdx.x * MANY_ROWS, o = blockIdx.y * MANY_OUTPUTS;
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  auto fetch_stage = [&](bf16* stage, u32 i) {
    fetch<MANY_OUTPUTS>(stage, w, o, outputs, i, inputs);
    fetch<MANY_ROWS>(stage + CHAINS * STEP_W, x, t, rows, i, inputs);
    copies_end();
  };
  float c[MANY_OUTPUTS / TILE_OUTPUTS][MANY_ROWS / TILE_ROWS][4] = {};
  fetch_stage(stages, 0);
  for (u32 i = 0, n = 0; i < inputs; i += CHAINS * STEP, n ^= 1) {
    fetch_stage(stages + (n ^ 1) * STAGE, i + CHAINS * STEP);
    copies_wait<1>();
    __syncthreads();
    if (i + warp * STEP < inputs) {
      const bf16* mine_w = stages + n * STAGE + warp * STEP_W + g * STEP + q * 8;
      const bf16* mine_x = stages + n * STAGE + CHAINS * STEP_W + warp * STEP_X + g * STEP + q * 8;
      uint4 row[MANY_ROWS / TILE_ROWS];
#pragma unroll
      for (int r = 0; r < MANY_ROWS / TILE_ROWS; r++) {
        row[r] = load16(mine_x + r * TILE_ROWS * STEP, true);
      }
#pragma unroll
      for (int m = 0; m < MANY_OUTPUTS / TILE_OUTPUTS; m++) {
        uint4 low = load16(mine_w + m * TILE_OUTPUTS * STEP, true);
        uint4 high = load16(mine_w + (m * TILE_OUTPUTS + 8) * STEP, true);
#pragma unroll
        for (int r = 0; r < MANY_ROWS / TILE_ROWS; r++) step(c[m][r], low, high, row[r]);
      }
    }
    __syncthreads();
  }
  // The last stage on its way is of zeros, and sums take its place.
  copies_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int m = 0; m < MANY_OUTPUTS / TILE_OUTPUTS; m++) {
#pragma unroll
    for (int r = 0; r < MANY_ROWS / TILE_ROWS; r++) {
      float* tile = sums + warp * MANY_SIZE + r * TILE_ROWS * MANY_OUTPUTS + m * TILE_OUTPUTS;
      put(tile, MANY_OUTPUTS, c[m][r]);
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < MANY_SIZE; at += THREADS) {
    u32 row = t + at / MANY_OUTPUTS, output = o + at % MANY_OUTPUTS;
    if (row < rows && output < outputs) {
      y[static_cast<size_t>(row) * outputs + output] = join(sums + at, MANY_SIZE);
    }
  }
}
static_assert(CHAINS * MANY_SIZE * sizeof(float) <= STAGES * STAGE * sizeof(bf16), "sums fit");
