//! A CUDA driver without a GPU: the kernels' own sources, compiled for this CPU.
//!
//! Owns as much of the driver's interface as `polylora_kernels::cuda` calls, with host memory for
//! the GPU's and fibres for its threads, so that everything but the PTX is tried where there is no
//! GPU: launches, tables, index arithmetic, tails, barriers. Never fast. The thing to know: `mma`
//! follows the fragment tables of the PTX ISA, written down here once more and independently of the
//! kernels; each allocation ends at a page that must not be touched, and begins as NaN.
//!
//! EMULATED_CUDA=12080, EMULATED_GPUS=1 and EMULATED_CAPABILITY=80 say what it pretends to be.

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// ---- What a kernel sees -------------------------------------------------------------------------

#define POLYLORA_PRIMITIVES
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

struct Index {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

static Index threadIdx, blockIdx;

static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
using std::min;

// ---- Fibres: the threads of one block -----------------------------------------------------------

constexpr int FIBRES_MAX = 1024;
constexpr size_t STACK = 64 << 10;

static ucontext_t scheduler, fibres[FIBRES_MAX];
static bool running[FIBRES_MAX];
static int fibre_count, moves;

[[noreturn]] static void fail(const char *what) {
  fprintf(stderr, "emulated driver: %s\n", what);
  abort();
}

static void rest() { swapcontext(&fibres[threadIdx.x], &scheduler); }

/// Everybody of a group arrives before anybody goes on.
struct Barrier {
  int arrived = 0;
  unsigned round = 0;
  template <class Last>
  void wait(int members, Last last) {
    moves++;
    if (++arrived == members) {
      last();
      arrived = 0;
      round++;
      return;
    }
    for (unsigned mine = round; mine == round;) rest();
  }
};

static Barrier block_barrier;
static void __syncthreads() { block_barrier.wait(fibre_count, [] {}); }

// ---- Primitives ---------------------------------------------------------------------------------

struct Warp {
  Barrier barrier;
  unsigned a[32][4], b[32][2];
  float c[32][4];
};
static Warp warps[FIBRES_MAX / 32];

static float half_of(unsigned word, int i) { return __uint_as_float(word >> (16 * i) << 16); }

/// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", element by element.
static void multiply(Warp &warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    int group = lane >> 2, thread = lane % 4;
    for (int i = 0; i < 8; i++) {
      int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      int col = thread * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][col] = half_of(warp.a[lane][i / 2], i & 1);
    }
    for (int i = 0; i < 4; i++) {
      b[thread * 2 + (i & 1) + (i < 2 ? 0 : 8)][group] = half_of(warp.b[lane][i / 2], i & 1);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    int group = lane >> 2, thread = lane % 4;
    for (int i = 0; i < 4; i++) {
      int row = i < 2 ? group : group + 8, col = thread * 2 + (i & 1);
      double sum = warp.c[lane][i];
      for (int k = 0; k < 16; k++) sum += static_cast<double>(a[row][k]) * b[k][col];
      warp.c[lane][i] = static_cast<float>(sum);
    }
  }
}

static void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1) {
  Warp &warp = warps[threadIdx.x / 32];
  int lane = threadIdx.x % 32;
  unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  memcpy(warp.a[lane], a, sizeof a);
  memcpy(warp.b[lane], b, sizeof b);
  memcpy(warp.c[lane], c, sizeof c);
  warp.barrier.wait(32, [&] { multiply(warp); });
  memcpy(c, warp.c[lane], sizeof c);
}

/// Copies under way: they arrive as late as they may.
struct Copy {
  void *to;
  const void *from;
  bool there;
};
static std::vector<std::vector<Copy>> copies[FIBRES_MAX];

static void copy16(void *to, const void *from, bool there) {
  auto &mine = copies[threadIdx.x];
  if (mine.empty()) mine.emplace_back();
  mine.back().push_back({to, from, there});
}
static void copies_end() {
  auto &mine = copies[threadIdx.x];
  if (mine.empty()) mine.emplace_back();
  mine.emplace_back();
}
template <int later>
static void copies_wait() {
  auto &mine = copies[threadIdx.x];
  // The last is the group that has not ended.
  while (mine.size() > later + 1) {
    for (Copy copy : mine.front()) {
      if (copy.there) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
    mine.erase(mine.begin());
  }
}

#include "gemm.cu"
#include "lora.cu"

// ---- Launching ----------------------------------------------------------------------------------

template <class... Args, size_t... I>
static void call(void (*kernel)(Args...), void **params, std::index_sequence<I...>) {
  kernel(*static_cast<Args *>(params[I])...);
}
template <auto kernel>
struct Runner;
template <class... Args, void (*kernel)(Args...)>
struct Runner<kernel> {
  static void run(void **params) { call(kernel, params, std::index_sequence_for<Args...>()); }
};

struct Entry {
  const char *name;
  void (*run)(void **);
};
static const Entry ENTRIES[] = {
    {"gemm_few", Runner<gemm_few>::run},
    {"gemm_many", Runner<gemm_many>::run},
    {"lora_shrink", Runner<lora_shrink>::run},
    {"lora_expand", Runner<lora_expand>::run},
};

static const Entry *launched;
static void **arguments;

static void fibre() {
  launched->run(arguments);
  running[threadIdx.x] = false;
  moves++;
  rest();
}

static void run_block() {
  static std::vector<char> stacks(FIBRES_MAX * STACK);
  block_barrier = {};
  for (Warp &warp : warps) warp.barrier = {};
  for (int i = 0; i < fibre_count; i++) {
    copies[i].clear();
    running[i] = true;
    getcontext(&fibres[i]);
    fibres[i].uc_stack = {&stacks[i * STACK], 0, STACK};
    fibres[i].uc_link = nullptr;
    makecontext(&fibres[i], fibre, 0);
  }
  for (int left = fibre_count; left > 0;) {
    int before = moves;
    left = 0;
    for (int i = 0; i < fibre_count; i++) {
      if (!running[i]) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibres[i]);
      left += running[i];
    }
    if (left > 0 && moves == before) fail("threads wait for others that do not come");
  }
}

// ---- The driver's interface ---------------------------------------------------------------------

using Result = int;
constexpr Result OK = 0, INVALID = 1, NO_DEVICE = 100, INVALID_DEVICE = 101, NOT_FOUND = 500;

static int said(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static std::mutex lock;
/// Where each allocation's pages start, and how many bytes they are.
static std::map<uint64_t, std::pair<char *, size_t>> allocations;
static int context, stream;

extern "C" {

Result cuDriverGetVersion(int *version) {
  *version = said("EMULATED_CUDA", 12080);
  return OK;
}
Result cuInit(unsigned) { return said("EMULATED_GPUS", 1) > 0 ? OK : NO_DEVICE; }
Result cuDeviceGetCount(int *count) {
  *count = said("EMULATED_GPUS", 1);
  return OK;
}
Result cuDeviceGet(int *device, int index) {
  *device = index;
  return index < said("EMULATED_GPUS", 1) ? OK : INVALID_DEVICE;
}
Result cuDeviceGetName(char *name, int size, int) {
  snprintf(name, size, "emulated GPU");
  return OK;
}
Result cuDeviceGetAttribute(int *value, int attribute, int) {
  int capability = said("EMULATED_CAPABILITY", 80);
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 0;
  return OK;
}
Result cuDevicePrimaryCtxRetain(void **made, int) {
  *made = &context;
  return OK;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return OK; }
Result cuCtxGetCurrent(void **current) {
  *current = &context;
  return OK;
}
Result cuCtxSetCurrent(void *) { return OK; }
Result cuStreamCreate(void **made, unsigned) {
  *made = &stream;
  return OK;
}
Result cuStreamDestroy_v2(void *) { return OK; }
Result cuStreamSynchronize(void *) { return OK; }

Result cuMemAlloc_v2(uint64_t *made, size_t bytes) {
  if (bytes == 0) return INVALID;
  size_t page = sysconf(_SC_PAGESIZE);
  size_t aligned = (bytes + 15) / 16 * 16, pages = (aligned + page - 1) / page * page;
  void *start = mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
  if (start == MAP_FAILED) return 2;
  char *base = static_cast<char *>(start);
  mprotect(base + pages, page, PROT_NONE);
  memset(base, 0xff, pages);
  std::lock_guard<std::mutex> held(lock);
  *made = reinterpret_cast<uint64_t>(base + pages - aligned);
  allocations[*made] = {base, pages + page};
  return OK;
}
Result cuMemFree_v2(uint64_t address) {
  std::lock_guard<std::mutex> held(lock);
  auto found = allocations.find(address);
  if (found == allocations.end()) return INVALID;
  munmap(found->second.first, found->second.second);
  allocations.erase(found);
  return OK;
}
Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *) {
  memset(reinterpret_cast<void *>(to), value, bytes);
  return OK;
}
Result cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) {
  memcpy(reinterpret_cast<void *>(to), from, bytes);
  return OK;
}
Result cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) {
  memcpy(to, reinterpret_cast<const void *>(from), bytes);
  return OK;
}

/// A module is its text.
Result cuModuleLoadData(void **made, const void *image) {
  *made = new std::string(static_cast<const char *>(image));
  return OK;
}
Result cuModuleUnload(void *module) {
  delete static_cast<std::string *>(module);
  return OK;
}
Result cuModuleGetFunction(const Entry **made, void *module, const char *name) {
  const std::string &text = *static_cast<std::string *>(module);
  if (text.find(std::string(".entry ") + name + "(") == std::string::npos) return NOT_FOUND;
  for (const Entry &entry : ENTRIES) {
    if (strcmp(entry.name, name) == 0) {
      *made = &entry;
      return OK;
    }
  }
  return NOT_FOUND;
}
Result cuLaunchKernel(const Entry *entry, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                      unsigned by, unsigned bz, unsigned, void *, void **params, void **) {
  if (gx * gy * gz == 0 || gy > 65535 || gz != 1 || by * bz != 1 || bx > FIBRES_MAX) return INVALID;
  std::lock_guard<std::mutex> held(lock);
  launched = entry;
  arguments = params;
  fibre_count = bx;
  // Blocks come in no order; kernels must not count on one.
  for (unsigned n = gx * gy; n-- > 0;) {
    blockIdx = {n % gx, n / gx, 0};
    run_block();
  }
  return OK;
}

Result cuGetErrorName(Result, const char **name) {
  *name = "CUDA_ERROR_EMULATED";
  return OK;
}
Result cuGetErrorString(Result, const char **text) {
  *text = "the emulated driver says no";
  return OK;
}
}
