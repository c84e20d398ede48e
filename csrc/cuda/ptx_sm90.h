// PTX instructions of Hopper (sm_90a), one wrapper each: barriers in shared memory that count bytes, copies of tiles by the
// copy engine (TMA), and products of a warpgroup, 4 warps of which the first has a number divisible by 4 (wgmma).
//
// tests/cuda_emulation has the same functions for the host. Layouts are those of the PTX manual. Of a product's 64 rows, warp
// w of the warpgroup has rows 16 w .. 16 w + 15; a and d hold them as a and c of mma.m16n8k16 do (ptx.h), d[n] columns 8 n ...
//
// Tiles in shared memory have rows of 128 bytes, their 16-byte pieces permuted by the row's number modulo 8 (the 128-byte
// swizzle), and begin at a multiple of 1,024 bytes. A wider row is continued in a second tile of the same number of rows.
#pragma once

#include "cuda/ptx.h"
#include "cuda/tensor_map.h"

#ifdef PYGPT_CUDA_EMULATION
#include <emulated_ptx_sm90.h>
#else

namespace pygpt::cuda::ptx {

// --- barriers in shared memory ---------------------------------------------------------------------------------------
// A phase ends when all arrivals have come and all bytes expected in it have been written; then the next one begins.

__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes the initialised barriers known to the copy engine; __syncthreads() makes them known to the other threads.
__device__ inline void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and adds to the bytes that this phase waits for.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first phase, 1 for the second, and so on. A barrier in its first
// phase counts as one whose phase of parity 1 has ended.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- copies ----------------------------------------------------------------------------------------------------------

// One thread: copies the map's box at these coordinates to shared memory, and tells the barrier of its bytes, all of them
// even where the box reaches out of the tensor and zeros are written.
__device__ inline void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// --- products of a warpgroup -----------------------------------------------------------------------------------------
// All 128 threads call these. A product's d (and a, where it is in registers) must not be touched, and its tiles must stay
// as they are, from the call until the wait.

// Before the first product, and again after other instructions have written d or a.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the newest kGroupsLeft groups; `d` is what the group waited for has written.
template <int kGroupsLeft, int N>
__device__ void wgmma_wait(float (&d)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
#pragma unroll
  for (int n = 0; n < N; ++n)  // so that the compiler reads d after the wait
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

#define PYGPT_D4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PYGPT_D16(d, n) PYGPT_D4(d, n), PYGPT_D4(d, n + 1), PYGPT_D4(d, n + 2), PYGPT_D4(d, n + 3)
#define PYGPT_D32(d) PYGPT_D16(d, 0), PYGPT_D16(d, 4)
#define PYGPT_D64(d) PYGPT_D32(d), PYGPT_D16(d, 8), PYGPT_D16(d, 12)
#define PYGPT_32_REGISTERS                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYGPT_64_REGISTERS                                                                             \
  PYGPT_32_REGISTERS                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64, 8 N) = a (64, 16) b^T (8 N, 16), plus d if `accumulate`; both are 16 columns of tiles.
#define PYGPT_WGMMA_ROWS(T, TYPE, N, REGISTERS, D, A, B, ADD)                                                          \
  __device__ inline void wgmma_by_rows(T, float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {            \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                                  \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B         \
                 ", add, 1, 1, 0, 0;\n}"                                                                              \
                 : D(d)                                                                                                \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                 \
  }
PYGPT_WGMMA_ROWS(__nv_bfloat16, "bf16", 64, PYGPT_32_REGISTERS, PYGPT_D32, "%32", "%33", "%34")
PYGPT_WGMMA_ROWS(__half, "f16", 64, PYGPT_32_REGISTERS, PYGPT_D32, "%32", "%33", "%34")
PYGPT_WGMMA_ROWS(__nv_bfloat16, "bf16", 128, PYGPT_64_REGISTERS, PYGPT_D64, "%64", "%65", "%66")
PYGPT_WGMMA_ROWS(__half, "f16", 128, PYGPT_64_REGISTERS, PYGPT_D64, "%64", "%65", "%66")

// d (64, 8 N) += a (64, 16), in registers, times b (16, 8 N), 16 rows of tiles.
#define PYGPT_WGMMA_COLUMNS(T, TYPE, N, REGISTERS, D, A, B)                                                          \
  __device__ inline void wgmma_by_columns(T, float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A "}, " B    \
                 ", 1, 1, 1, 1;"                                                                                    \
                 : D(d)                                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
  }
PYGPT_WGMMA_COLUMNS(__nv_bfloat16, "bf16", 64, PYGPT_32_REGISTERS, PYGPT_D32, "%32, %33, %34, %35", "%36")
PYGPT_WGMMA_COLUMNS(__half, "f16", 64, PYGPT_32_REGISTERS, PYGPT_D32, "%32, %33, %34, %35", "%36")
PYGPT_WGMMA_COLUMNS(__nv_bfloat16, "bf16", 128, PYGPT_64_REGISTERS, PYGPT_D64, "%64, %65, %66, %67", "%68")
PYGPT_WGMMA_COLUMNS(__half, "f16", 128, PYGPT_64_REGISTERS, PYGPT_D64, "%64, %65, %66, %67", "%68")

#undef PYGPT_D4
#undef PYGPT_D16
#undef PYGPT_D32
#undef PYGPT_D64
#undef PYGPT_32_REGISTERS
#undef PYGPT_64_REGISTERS
#undef PYGPT_WGMMA_ROWS
#undef PYGPT_WGMMA_COLUMNS

// How many registers each thread of this warpgroup has from here on: given back to the block's pool, or taken from it.
template <int kRegisters>
__device__ void registers_give_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace pygpt::cuda::ptx

#endif

namespace pygpt::cuda::ptx {

// What wgmma is told of an operand in shared memory: where it begins, the way from 8 of its rows of 128 bytes to the next 8
// (they follow each other), and from 64 of its columns to the next 64, needed only where rows are what is summed over. An
// operand that begins 16 bytes further is one more.
__device__ inline uint64_t wgmma_operand(const void* begin, int next_64_columns = 16) {
  constexpr uint64_t kNext8Rows = 8 * 128, kSwizzle128 = 1;
  return (shared_address(begin) & 0x3ffff) >> 4 | uint64_t(next_64_columns >> 4) << 16 | kNext8Rows >> 4 << 32 |
         kSwizzle128 << 62;
}

}  // namespace pygpt::cuda::ptx
