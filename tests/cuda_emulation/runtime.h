// The emulated device: what the headers in include/ are built on. runtime.cpp is the implementation.
//
// A block's threads are fibers of one operating-system thread. A seeded generator picks who runs next whenever a thread
// has to wait, and in which order blocks run: a kernel that depends on an order gives wrong numbers under some seed.
// Nothing here is inline: kernels may be compiled with a sanitizer, and the runtime never is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

// Where in the source a barrier or warp operation is: threads that meet must be at the same place.
struct Site {
  const char* file;
  int line;
};

void set_seed(uint64_t seed);  // 0: a fixed order, and blocks one after the other

// Runs body(argument) once per thread. Throws std::runtime_error for a mistake found (a divergent barrier, ...).
void run_grid(Index grid, Index block, size_t shared_bytes, void (*body)(void*), void* argument);

// Shared memory: filled with 0xff (NaN in every float type) at block start; only what was taken may be touched.
void* take_shared(size_t* used, size_t bytes, size_t alignment);

void block_barrier(Site at);
void warp_barrier(Site at);

// Operations of a whole warp: each returns once all 32 threads have called it.
uint32_t shuffle(uint32_t value, int source_lane, Site at);
uint32_t ballot(bool predicate, Site at);
void load_matrix(uint32_t* to, const void* row, int count, bool transposed, Site at);  // ldmatrix .x1, .x2, .x4
enum class Element { bf16, f16 };
void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, Element element, Site at);

// cp.async: `to` holds garbage from now until the wait that covers the copy.
void copy_async(void* to, const void* from, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// Hopper. A tensor copy's map, a barrier in shared memory, products of a warpgroup (hopper.h).
struct alignas(64) TensorMap {
  unsigned char* data;
  uint64_t sizes[4], strides[3];
  uint32_t box[4];
};
void barrier_init(uint64_t* barrier, int arrivals);
void barrier_arrive(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity, Site at);
void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w);
uint32_t shared_offset(const void* address);
void wgmma_fence(Site at);
void wgmma_commit(Site at);
void wgmma_wait(int groups_left, Site at);
// a: four registers, or null for the operand in shared memory.
void wgmma(float* d, int columns, const uint32_t* a, uint64_t a_operand, uint64_t b_operand, bool b_by_rows, bool accumulate,
           Element element, Site at);
uint64_t wgmma_count();  // since the program began: have Hopper's kernels run?

[[noreturn]] void fail(const char* format, ...);

}  // namespace emulation

extern emulation::Index threadIdx, blockIdx, blockDim, gridDim;  // of the running thread
