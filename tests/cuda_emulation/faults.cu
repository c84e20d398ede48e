// Kernels with one planted mistake each, to show that the emulation catches it, and the same kernels without it.
//   faults NAME right|planted SEED      exit status: 0 right numbers, 3 wrong numbers, 4 stopped by the emulation

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx_sm90.h"
#include "cuda/shared.h"

namespace {

using namespace pygpt::cuda;

constexpr int kThreads = 96;

template <bool kPlanted>
__global__ void missing_syncthreads(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads);
  values[threadIdx.x] = in[threadIdx.x];
  if (!kPlanted) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kPlanted>
__global__ void missing_syncwarp(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads);
  values[threadIdx.x] = in[threadIdx.x];
  if (!kPlanted) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x / 32 * 32 + 31 - threadIdx.x % 32];
}

// Two turns through one buffer, -in and then in twice: the second turn's writes must wait for the first turn's reads.
template <bool kPlanted>
__global__ void buffer_reused_early(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads);
  float total = 0;
  for (int turn = 0; turn < 2; ++turn) {
    values[threadIdx.x] = in[threadIdx.x] * static_cast<float>(turn * 2 - 1);
    __syncthreads();
    total += 2 * values[kThreads - 1 - threadIdx.x] * static_cast<float>(turn + 1) / 2;
    if (!kPlanted) __syncthreads();
  }
  out[threadIdx.x] = total;
}

template <bool kPlanted>
__global__ void missing_copy_wait(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads);
  if (threadIdx.x < kThreads / 4) ptx::cp_async_16(values + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  ptx::cp_async_commit();
  if (!kPlanted) ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  if (kPlanted) ptx::cp_async_wait<0>();
}

// Waits for one group too few.
template <bool kPlanted>
__global__ void wrong_copy_group(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads);
  for (int half = 0; half < 2; ++half) {
    const int at = half * kThreads / 2 + 4 * threadIdx.x;
    if (threadIdx.x < kThreads / 8) ptx::cp_async_16(values + at, in + at, true);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<kPlanted ? 1 : 0>();
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  ptx::cp_async_wait<0>();
}

template <bool kPlanted>
__global__ void shared_out_of_bounds(const float* in, float* out) {
  SharedMemory shared;
  float* values = shared.take<float>(kThreads);
  float* others = shared.take<float>(kThreads);  // the array that a real device would silently run into
  values[threadIdx.x] = in[threadIdx.x];
  others[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x] + 0.0f * values[threadIdx.x + (kPlanted ? 1 : 0)];
}

template <bool kPlanted>
__global__ void global_out_of_bounds(const float* in, float* out) {
  out[threadIdx.x] = in[kThreads - (kPlanted ? 0 : 1) - threadIdx.x];
}

template <bool kPlanted>
__global__ void misaligned_load(const float* in, float* out) {
  const auto* vectors = reinterpret_cast<const float4*>(in + (kPlanted ? 1 : 0));
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x] + 0.0f * vectors[threadIdx.x / 8].x;
}

// An index of 32 bits where a tensor can have more elements.
template <bool kPlanted>
__global__ void index_overflow(const float* in, float* out) {
  const int rows = static_cast<int>(in[0]) << 16;  // in[0] is 1
  const int64_t elements = kPlanted ? rows * rows : int64_t(rows) * rows;
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x] + 0.0f * static_cast<float>(elements);
}

template <bool kPlanted>
__global__ void misaligned_copy(const float* in, float* out) {
  float* values = SharedMemory().take<float>(2 * kThreads) + (kPlanted ? 1 : 4);
  if (threadIdx.x < kThreads / 4) ptx::cp_async_16(values + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kPlanted>
__global__ void copy_never_awaited(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads);
  if (threadIdx.x < kThreads / 4) ptx::cp_async_16(values + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
  ptx::cp_async_commit();
  if (!kPlanted) ptx::cp_async_wait<0>();
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
}

template <bool kPlanted>
__global__ void shared_not_written(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads);
  if (!kPlanted || threadIdx.x > 0) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kPlanted>
__global__ void more_shared_than_launched(const float* in, float* out) {
  float* values = SharedMemory().take<float>(kThreads + (kPlanted ? 1 : 0));
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kPlanted>
__global__ void divergent_barrier(const float* in, float* out) {
  if (kPlanted && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
}

template <bool kPlanted>
__global__ void barrier_after_return(const float* in, float* out) {
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  if (kPlanted && threadIdx.x == 5) return;
  __syncthreads();
}

template <bool kPlanted>
__global__ void divergent_shuffle(const float* in, float* out) {
  float value = in[kThreads - 1 - threadIdx.x];
  if (!kPlanted || threadIdx.x % 2 == 0) value += 0.0f * __shfl_xor_sync(0xffffffffu, value, 2);
  out[threadIdx.x] = value;
}

// A (16, 16) times B (16, 8), both row-major in shared memory: B needs the transposing ldmatrix.
template <bool kPlanted>
__global__ void wrong_fragment_layout(const float* in, float* out) {
  SharedMemory shared;
  __nv_bfloat16* A = shared.take<__nv_bfloat16>(16 * 16);
  __nv_bfloat16* B = shared.take<__nv_bfloat16>(32 * 8);  // twice, for ldmatrix.x4
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    A[i] = __float2bfloat16_rn(in[i % 91]);
    B[i] = __float2bfloat16_rn(in[i % 128 % 83]);
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x;
  uint32_t a[4], b[4];
  float c[4] = {};
  ptx::ldmatrix_x4(a, A + (lane % 16) * 16 + lane / 16 * 8);
  if (kPlanted) {
    ptx::ldmatrix_x4(b, B + lane * 8);
  } else {
    ptx::ldmatrix_x4_transposed(b, B + lane * 8);
  }
  ptx::mma_m16n8k16(__nv_bfloat16{}, c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

// --- Hopper: the input is a tensor of 3 rows of 64 16-bit elements, and arrives by tensor copy --------------------------

TensorMap input_map;

struct Arrival {
  float* values;
  uint64_t* full;

  Arrival(SharedMemory& shared, int bytes = kThreads * 4, uint32_t rows = 3)
      : values(shared.take<float>(rows * 32, 1024)), full(shared.take<uint64_t>(1)) {
    if (threadIdx.x == 0) ptx::mbarrier_init(full, 1);
    __syncthreads();
    if (threadIdx.x == 0) load(bytes);
  }
  void load(int bytes) const {
    ptx::mbarrier_arrive_expect(full, bytes);
    ptx::tma_load(values, &input_map, full, 0, 0, 0, 0);
  }
  float reversed() const {
    const int i = kThreads - 1 - threadIdx.x, row = i / 32;
    return values[row * 32 + (i % 32 / 4 ^ row) * 4 + i % 4];
  }
};

template <bool kPlanted>
__global__ void missing_barrier_wait(const float*, float* out) {
  SharedMemory shared;
  const Arrival arrival(shared);
  if (!kPlanted) ptx::mbarrier_wait(arrival.full, 0);
  out[threadIdx.x] = arrival.reversed();
  if (kPlanted) ptx::mbarrier_wait(arrival.full, 0);
}

template <bool kPlanted>
__global__ void wrong_barrier_parity(const float*, float* out) {
  SharedMemory shared;
  const Arrival arrival(shared);
  ptx::mbarrier_wait(arrival.full, kPlanted ? 1 : 0);  // parity 1 counts as ended already
  out[threadIdx.x] = arrival.reversed();
  ptx::mbarrier_wait(arrival.full, 0);
}

template <bool kPlanted>
__global__ void wrong_byte_count(const float*, float* out) {
  SharedMemory shared;
  const Arrival arrival(shared, kThreads * 4 + (kPlanted ? 16 : 0));
  ptx::mbarrier_wait(arrival.full, 0);
  out[threadIdx.x] = arrival.reversed();
}

// One stage, loaded twice: the second copy must wait until everybody has read the first.
template <bool kPlanted>
__global__ void stage_released_early(const float*, float* out) {
  SharedMemory shared;
  uint64_t* empty = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) ptx::mbarrier_init(empty, kThreads);
  const Arrival arrival(shared);
  ptx::mbarrier_wait(arrival.full, 0);
  if (kPlanted) ptx::mbarrier_arrive(empty);
  if (threadIdx.x == 0 && kPlanted) {
    ptx::mbarrier_wait(empty, 0);
    arrival.load(kThreads * 4);
  }
  float total = arrival.reversed();
  if (!kPlanted) ptx::mbarrier_arrive(empty);
  if (threadIdx.x == 0 && !kPlanted) {
    ptx::mbarrier_wait(empty, 0);
    arrival.load(kThreads * 4);
  }
  ptx::mbarrier_wait(arrival.full, 1);
  total += arrival.reversed();
  out[threadIdx.x] = total / 2;
}

// Rows of ones times the input as bfloat16: its odd elements are the floats, the even ones, their low halves, are 0.
constexpr int kProductThreads = 128;
enum Product { kRight, kNoFence, kNoWait, kChangedRegister, kChangedTile, kWrongOperand };

template <Product kPlanted>
__global__ void product(const float*, float* out) {
  SharedMemory shared;
  const Arrival arrival(shared, 16 * 128, 16);
  ptx::mbarrier_wait(arrival.full, 0);
  uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  float d[8][4] = {};
  if (kPlanted != kNoFence) ptx::wgmma_fence();
  ptx::wgmma_by_columns(__nv_bfloat16{}, d, ones, ptx::wgmma_operand(arrival.values + (kPlanted == kWrongOperand ? 4 : 0)));
  ptx::wgmma_commit();
  if (kPlanted == kChangedRegister) ones[1] = 0;
  if (kPlanted == kChangedTile && threadIdx.x == 0) arrival.values[5] = 7;
  if (kPlanted != kNoWait) ptx::wgmma_wait<0>(d);
  if (threadIdx.x < 4)
    for (int i = 0; i < 16; ++i) out[i / 2 * 8 + threadIdx.x * 2 + i % 2] = d[i / 2][i % 2];
  ptx::wgmma_wait<0>(d);
}

struct Fault {
  const char* name;
  void (*right)(const float*, float*);
  void (*planted)(const float*, float*);
  int outputs;
  size_t shared;
  int threads = kThreads;
};

#define FAULT(name, shared) \
  { #name, name<false>, name<true>, kThreads, shared }

#define PRODUCT(name, planted) \
  { #name, product<kRight>, product<planted>, 64, 16 * 128 + 8, kProductThreads }

const Fault kFaults[] = {
    FAULT(missing_syncthreads, kThreads * 4),
    FAULT(missing_syncwarp, kThreads * 4),
    FAULT(buffer_reused_early, kThreads * 4),
    FAULT(missing_copy_wait, kThreads * 4),
    FAULT(wrong_copy_group, kThreads * 4),
    FAULT(shared_out_of_bounds, kThreads * 8),
    FAULT(global_out_of_bounds, 0),
    FAULT(misaligned_load, 0),
    FAULT(index_overflow, 0),
    FAULT(misaligned_copy, kThreads * 8),
    FAULT(copy_never_awaited, kThreads * 4),
    FAULT(shared_not_written, kThreads * 4),
    FAULT(more_shared_than_launched, kThreads * 4),
    FAULT(divergent_barrier, 0),
    FAULT(barrier_after_return, 0),
    FAULT(divergent_shuffle, 0),
    FAULT(missing_barrier_wait, kThreads * 4 + 8),
    FAULT(wrong_barrier_parity, kThreads * 4 + 8),
    FAULT(wrong_byte_count, kThreads * 4 + 8),
    FAULT(stage_released_early, 1024 + kThreads * 4 + 8),
    PRODUCT(missing_product_fence, kNoFence),
    PRODUCT(missing_product_wait, kNoWait),
    PRODUCT(product_register_changed, kChangedRegister),
    PRODUCT(product_tile_changed, kChangedTile),
    PRODUCT(wrong_product_operand, kWrongOperand),
    {"wrong_fragment_layout", wrong_fragment_layout<false>, wrong_fragment_layout<true>, 128, 1024},
};

float bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

float expected(const Fault& fault, const std::vector<float>& in, int i) {
  if (strcmp(fault.name, "missing_syncwarp") == 0) return in[i / 32 * 32 + 31 - i % 32];
  if (fault.outputs == kThreads) return in[kThreads - 1 - i];
  if (fault.threads == kProductThreads) return i % 2 ? in[i / 2] + in[32 + i / 2] + in[64 + i / 2] : 0;
  float total = 0;
  for (int k = 0; k < 16; ++k) total += bf16(in[(i / 8 * 16 + k) % 91]) * bf16(in[(k * 8 + i % 8) % 83]);
  return total;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const Fault& fault : kFaults) puts(fault.name);
    return 0;
  }
  emulation::set_seed(strtoull(argv[3], nullptr, 10));
  for (const Fault& fault : kFaults) {
    if (strcmp(fault.name, argv[1]) != 0) continue;
    std::vector<float> in(kThreads), out(fault.outputs);
    in.shrink_to_fit();
    for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i * 37 % 101) / 8 + 1;
    const bool product = fault.threads == kProductThreads;
    input_map = {reinterpret_cast<unsigned char*>(in.data()), {64, 3, 1, 1}, {128, 384, 384}, {64, product ? 16u : 3u, 1, 1}};
    try {
      launch({nullptr, 1, fault.name}, strcmp(argv[2], "planted") == 0 ? fault.planted : fault.right, 1, fault.threads,
             fault.shared, in.data(), out.data());
    } catch (const std::runtime_error& error) {
      fprintf(stderr, "%s\n", error.what());
      return 4;
    }
    for (int i = 0; i < fault.outputs; ++i)
      if (!(std::fabs(out[i] - expected(fault, in, i)) < 0.01f)) {
        fprintf(stderr, "wrong number: out[%d] is %g, not %g\n", i, out[i], expected(fault, in, i));
        return 3;
      }
    return 0;
  }
  fprintf(stderr, "no such kernel: %s\n", argv[1]);
  return 2;
}
