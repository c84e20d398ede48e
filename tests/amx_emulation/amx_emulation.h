// The instructions of csrc/cpu/amx.h in C++, for tests on a processor without AMX. As the processor does, it refuses tiles that are not configured and shapes that do not fit, and works on what memory holds at that
// moment; what it refuses ends the process, with a line that says why. Beyond that it refuses what the kernels mean
// never to do: rows that straddle cache lines, stores whose rows overlap, and tiles left configured by whoever had them
// before.
//
// Arithmetic as in the Software Developer's Manual's description of TDPBF16PS: per element two sums from zero, of the
// even and the odd products, fused and rounded to nearest, denormals taken and given as zero; then their sum is added.
#pragma once

#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef PYGPT_AVX512_EMULATED
#include "avx512_emulation.h"
#define PYGPT_EMULATION_TARGET "avx2,fma,f16c,bmi,bmi2,popcnt"
#else
#define PYGPT_EMULATION_TARGET "avx512f"
#endif

namespace pygpt {
namespace amx_emulation {

struct Tile {
  alignas(64) unsigned char row[16][64];
};

struct State {
  bool configured = false;
  TileConfig config;
  Tile tiles[8];
};

inline State& state() {
  static thread_local State of_thread;
  return of_thread;
}

[[noreturn]] inline void refuse(const char* instruction, const char* why) {
  std::fprintf(stderr, "AMX emulation: %s: %s\n", instruction, why);
  std::abort();
}

inline State& configured(const char* instruction) {
  State& s = state();
  if (!s.configured) refuse(instruction, "tiles are not configured");
  return s;
}

inline void check_rows(const char* instruction, const void* rows, int64_t stride) {
  if (reinterpret_cast<uintptr_t>(rows) % 64 || stride % 64) refuse(instruction, "rows straddle cache lines");
}

typedef uint32_t Units __attribute__((vector_size(64)));

inline __attribute__((target(PYGPT_EMULATION_TARGET), always_inline)) __m512 evens(Units u) { return (__m512)(u << 16); }
inline __attribute__((target(PYGPT_EMULATION_TARGET), always_inline)) __m512 odds(Units u) { return (__m512)(u >> 16 << 16); }

// Not inline: no arithmetic may move to where denormals count.
__attribute__((target(PYGPT_EMULATION_TARGET), noinline)) inline void add_dot_bf16(
    Tile& c, const Tile& a, const Tile& b, int rows, int pairs, int row_bytes) {
  const __mmask16 columns = static_cast<__mmask16>((1u << row_bytes / 4) - 1);
  for (int r = 0; r < rows; ++r) {
    __m512 even = {}, odd = {};
    for (int p = 0; p < pairs; ++p) {
      uint32_t pair;
      std::memcpy(&pair, a.row[r] + 4 * p, sizeof pair);
      const Units left = pair - Units{};
      Units right;
      std::memcpy(&right, b.row[p], sizeof right);
      even = _mm512_fmadd_ps(evens(left), evens(right), even);
      odd = _mm512_fmadd_ps(odds(left), odds(right), odd);
    }
    const __m512 sum = _mm512_load_ps(c.row[r]) + (even + odd);
    _mm512_store_ps(c.row[r], _mm512_maskz_mov_ps(columns, sum));
  }
}

inline void dot_bf16(Tile& c, const Tile& a, const Tile& b, int rows, int pairs, int row_bytes) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // to nearest, no exceptions, denormals are zero
  add_dot_bf16(c, a, b, rows, pairs, row_bytes);
  _mm_setcsr(before);
}

}  // namespace amx_emulation

inline void tile_configure(const TileConfig& config) {
  amx_emulation::State& s = amx_emulation::state();
  if (s.configured) amx_emulation::refuse("ldtilecfg", "tiles are still configured: a release is missing");
  if (config.palette != 1 || config.start_row) amx_emulation::refuse("ldtilecfg", "palette must be 1, the start row 0");
  for (int i = 0; i < 14; ++i)
    if (config.reserved[i]) amx_emulation::refuse("ldtilecfg", "reserved bytes must be zero");
  for (int i = 0; i < 16; ++i) {
    if (config.rows[i] > 16 || config.row_bytes[i] > 64)
      amx_emulation::refuse("ldtilecfg", "a tile is 16 rows of 64 bytes");
    if (!config.rows[i] != !config.row_bytes[i]) amx_emulation::refuse("ldtilecfg", "a tile has rows without bytes");
    if (i >= 8 && config.rows[i]) amx_emulation::refuse("ldtilecfg", "there are eight tiles");
  }
  s.configured = true;
  s.config = config;
  std::memset(s.tiles, 0, sizeof s.tiles);
}

inline void tile_release() { amx_emulation::state().configured = false; }

template <int TILE>
void tile_zero() {
  std::memset(amx_emulation::configured("tilezero").tiles + TILE, 0, sizeof(amx_emulation::Tile));
}

template <int TILE>
void tile_load(const void* from, int64_t stride) {
  amx_emulation::State& s = amx_emulation::configured("tileloadd");
  if (!s.config.rows[TILE]) amx_emulation::refuse("tileloadd", "this tile is not configured");
  amx_emulation::check_rows("tileloadd", from, stride);
  std::memset(s.tiles + TILE, 0, sizeof(amx_emulation::Tile));
  for (int r = 0; r < s.config.rows[TILE]; ++r)
    std::memcpy(s.tiles[TILE].row[r], static_cast<const char*>(from) + r * stride, s.config.row_bytes[TILE]);
}

template <int TILE>
void tile_load_once(const void* from, int64_t stride) {
  tile_load<TILE>(from, stride);
}

template <int TILE>
void tile_store(void* to, int64_t stride) {
  amx_emulation::State& s = amx_emulation::configured("tilestored");
  if (!s.config.rows[TILE]) amx_emulation::refuse("tilestored", "this tile is not configured");
  amx_emulation::check_rows("tilestored", to, stride);
  if (s.config.rows[TILE] > 1 && stride < s.config.row_bytes[TILE]) amx_emulation::refuse("tilestored", "rows overlap");
  for (int r = 0; r < s.config.rows[TILE]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, s.tiles[TILE].row[r], s.config.row_bytes[TILE]);
}

template <int C, int A, int B>
void tile_dot_bf16() {
  static_assert(C != A && C != B && A != B, "the processor refuses tiles that are the same");
  amx_emulation::State& s = amx_emulation::configured("tdpbf16ps");
  const TileConfig& t = s.config;
  if (!t.rows[C] || !t.rows[A] || !t.rows[B]) amx_emulation::refuse("tdpbf16ps", "this tile is not configured");
  if (t.rows[C] != t.rows[A] || t.row_bytes[C] != t.row_bytes[B] || t.row_bytes[A] != 4 * t.rows[B] ||
      t.row_bytes[C] % 4)
    amx_emulation::refuse("tdpbf16ps", "shapes do not fit");
  amx_emulation::dot_bf16(s.tiles[C], s.tiles[A], s.tiles[B], t.rows[C], t.row_bytes[A] / 4, t.row_bytes[C]);
}

}  // namespace pygpt
