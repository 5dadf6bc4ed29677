//! What the kernels share: the shape of a product on tensor cores, and the order of its sum.
//!
//! Owns the primitives that are not C++ (`mma`, asynchronous copies) and the tile of 16 outputs by
//! 8 rows that every product is made of. Never knows a model. The thing to know: an element
//! y[t, o] is four chains over the inputs, joined as (c0 + c1) + (c2 + c3). Chain c takes
//! the steps c, c + 4, c + 8, … of 32 inputs in order, two `mma` each. That order is the same in
//! every kernel, whatever the tile and the number of rows, so a row's bits do not depend on its
//! neighbours.
//!
//! Matrices are bf16, row by row, rows padded with zeros to whole steps and aligned to 16 bytes.
#pragma once

typedef unsigned short bf16;  // its bits
typedef unsigned int u32;

/// Inputs of a step: 8 each (16 bytes) for the four lanes that share a row.
constexpr int STEP = 32;
/// Chains of a sum, each a warp's.
constexpr int CHAINS = 4;
constexpr int THREADS = CHAINS * 32;
/// Outputs and rows of the tile of one `mma`.
constexpr int TILE_OUTPUTS = 16;
constexpr int TILE_ROWS = 8;

// The emulated driver of the tests brings its own.
#ifndef POLYLORA_PRIMITIVES

/// c += a·b of a 16 × 16 and a 16 × 8 tile, by the whole warp. With g = lane / 4, q = lane % 4 a
/// lane holds of a: (g; 2q, 2q+1), (g+8; 2q, 2q+1), (g; 2q+8, 2q+9), (g+8; 2q+8, 2q+9); of b:
/// (2q, 2q+1; g), (2q+8, 2q+9; g); of c: (g; 2q), (g; 2q+1), (g+8; 2q), (g+8; 2q+1).
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// Starts a copy of 16 bytes to shared memory; of zeros, where there is nothing to copy.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool there) {
  u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

/// Ends the group of copies started so far.
__device__ __forceinline__ void copies_end() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most `later` of the groups are on their way.
template <int later>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory");
}

#endif

__device__ __forceinline__ float wide(bf16 x) {
  return __uint_as_float(static_cast<u32>(x) << 16);
}

/// 16 bytes, or zeros where there is nothing to read.
__device__ __forceinline__ uint4 load16(const bf16* p, bool there) {
  return there ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
}

/// One step of a tile. Lane (g, q) brings inputs 8q..8q+8 of outputs g (`low`) and g + 8 (`high`),
/// and of row g. A tile of `mma` wants inputs 2q, 2q+1, 2q+8, 2q+9 from it; since w and x come in
/// the same order, giving it 8q..8q+4, then 8q+4..8q+8, only changes which 16 are added first.
__device__ __forceinline__ void step(float (&c)[4], uint4 low, uint4 high, uint4 x) {
  mma(c, low.x, high.x, low.y, high.y, x.x, x.y);
  mma(c, low.z, high.z, low.w, high.w, x.z, x.w);
}

/// Writes a warp's tile to its place in a chain's sums `[rows][stride]`.
__device__ __forceinline__ void put(float* sums, int stride, const float (&c)[4]) {
  int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  sums[(2 * q) * stride + g] = c[0];
  sums[(2 * q + 1) * stride + g] = c[1];
  sums[(2 * q) * stride + g + 8] = c[2];
  sums[(2 * q + 1) * stride + g + 8] = c[3];
}

/// An element of the four chains' sums, which lie `size` apart.
__device__ __forceinline__ float join(const float* sums, int size) {
  return (sums[0] + sums[size]) + (sums[2 * size] + sums[3 * size]);
}

/// What one block computes of few rows: 16 outputs by 16 rows, straight from memory.
constexpr int FEW_OUTPUTS = TILE_OUTPUTS;
constexpr int FEW_ROWS = 2 * TILE_ROWS;
constexpr int FEW_SIZE = FEW_OUTPUTS * FEW_ROWS;

/// The four chains of w·x for `outputs` rows of `w` and `rows` rows of `x` (at most 16 each; what
/// is missing is not read, and its sums mean nothing), to `sums` `[4][16 rows][16 outputs]` in
/// shared memory. By the whole block; synchronised at the end.
__device__ __forceinline__ void few(float* sums, const bf16* w, int outputs, const bf16* x,
                                    int rows, u32 inputs) {
  int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const bf16* w_low = w + static_cast<size_t>(g) * inputs;
  const bf16* w_high = w_low + static_cast<size_t>(8) * inputs;
  const bf16* x_low = x + static_cast<size_t>(g) * inputs;
  const bf16* x_high = x_low + static_cast<size_t>(8) * inputs;
  float c[2][4] = {};
#pragma unroll 4
  for (u32 i = warp * STEP; i < inputs; i += CHAINS * STEP) {
    u32 at = i + 8 * q;
    uint4 low = load16(w_low + at, g < outputs);
    uint4 high = load16(w_high + at, g + 8 < outputs);
    step(c[0], low, high, load16(x_low + at, g < rows));
    step(c[1], low, high, load16(x_high + at, g + 8 < rows));
  }
  float* mine = sums + warp * FEW_SIZE;
  put(mine, FEW_OUTPUTS, c[0]);
  put(mine + TILE_ROWS * FEW_OUTPUTS, FEW_OUTPUTS, c[1]);
  __syncthreads();
}
