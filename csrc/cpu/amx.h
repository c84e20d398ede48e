// The instructions of Intel AMX (Advanced Matrix Extensions) that the kernels use: eight tile registers of 16 rows of
// 64 bytes. The tests replace them by an emulation, so that kernels can be tested on a processor without AMX.
//
// Assembly, not the compiler's intrinsics: those of GCC 12 do not say that they read memory, and it drops the stores
// that fill what they load. Tile numbers are constants, so that no tile is ever moved behind the kernel's back.
#pragma once

#include <cstdint>

namespace pygpt {

// What ldtilecfg reads: the shape of each tile.
struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// All eight tiles whole.
constexpr TileConfig whole_tiles() {
  TileConfig config;
  config.palette = 1;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  return config;
}

}  // namespace pygpt

#ifdef PYGPT_AMX_EMULATED
#include "amx_emulation.h"
#elif defined(__x86_64__) && defined(__GNUC__)

namespace pygpt {

#define PYGPT_TILE static inline __attribute__((always_inline, unused))

// Sets the shapes of this thread's tiles; their contents become zero.
PYGPT_TILE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }

// After it the thread's state is small again: the operating system has less to save, and the core may clock higher.
PYGPT_TILE void tile_release() { asm volatile("tilerelease" : : : "memory"); }

template <int TILE>
PYGPT_TILE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

// Row r lies at `from` + r * stride bytes.
template <int TILE>
PYGPT_TILE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}

// The same of what is read once: it does not push out what the first-level cache holds.
template <int TILE>
PYGPT_TILE void tile_load_once(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
PYGPT_TILE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}

// C += A B: float32 sums of products of bfloat16. A: rows x pairs, B: pairs x columns, C: rows x columns.
template <int C, int A, int B>
PYGPT_TILE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#undef PYGPT_TILE

}  // namespace pygpt

#endif

namespace pygpt {

// The thread's tiles from here to the end of the scope. Nothing of what is in them outlives a product.
struct TileScope {
  TileScope() {
    static constexpr TileConfig config = whole_tiles();
    tile_configure(config);
  }
  ~TileScope() { tile_release(); }
  TileScope(const TileScope&) = delete;
};

}  // namespace pygpt
