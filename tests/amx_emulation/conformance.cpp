// What the instructions of csrc/cpu/amx.h do, checked against plain C++: on a processor with AMX, or, compiled with
// -DPYGPT_AMX_EMULATED, on the emulation. Exit status 0: as described; 1: not; 77: this processor has no AMX. With the
// name of a mistake as argument: makes it (emulation only).

#include "cpu/amx.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#ifndef PYGPT_AMX_EMULATED
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace pygpt;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what);
}

uint32_t random_bits() {
  static uint32_t state = 2463534242u;
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state;
}

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

uint16_t as_bf16(float x) { return static_cast<uint16_t>(as_bits(x) >> 16); }

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
float element(uint16_t bits) { return flushed(as_float(static_cast<uint32_t>(bits) << 16)); }

// One element of TDPBF16PS as the manual describes it.
float dot(const uint16_t* a, const uint16_t* b, int b_stride, int pairs, float c) {
  float even = 0, odd = 0;
  for (int p = 0; p < pairs; ++p) {
    even = flushed(std::fma(element(a[2 * p]), element(b[p * b_stride]), even));
    odd = flushed(std::fma(element(a[2 * p + 1]), element(b[p * b_stride + 1]), odd));
  }
  return flushed(flushed(c) + flushed(even + odd));
}

constexpr int kStride = 192;  // bytes: rows lie further apart than they are long
struct alignas(64) Area {
  unsigned char bytes[17 * kStride];
};

Area a, b, c, before;

template <class T>
T* row(Area& area, int r) {
  return reinterpret_cast<T*>(area.bytes + r * kStride);
}

TileConfig shapes(int rows, int pairs, int columns) {
  TileConfig config;
  config.palette = 1;
  config.rows[4] = config.rows[0] = static_cast<uint8_t>(rows);
  config.rows[1] = static_cast<uint8_t>(pairs);
  config.row_bytes[0] = static_cast<uint16_t>(4 * pairs);
  config.row_bytes[1] = config.row_bytes[4] = static_cast<uint16_t>(4 * columns);
  return config;
}

template <class Fill>
void fill(Fill value) {
  for (Area* area : {&a, &b})
    for (int i = 0; i < 17 * kStride / 2; ++i) reinterpret_cast<uint16_t*>(area->bytes)[i] = value();
  for (int i = 0; i < 17 * kStride / 4; ++i) {
    const float x = as_float(static_cast<uint32_t>(value()) << 16 | (random_bits() & 0xffff));
    std::memcpy(c.bytes + 4 * i, &x, sizeof x);
  }
  before = c;
}

void multiply(int rows, int pairs, int columns, const char* what) {
  const TileConfig config = shapes(rows, pairs, columns);
  tile_configure(config);
  tile_load<4>(c.bytes, kStride);
  tile_load<0>(a.bytes, kStride);
  tile_load<1>(b.bytes, kStride);
  tile_dot_bf16<4, 0, 1>();
  tile_store<4>(c.bytes, kStride);
  tile_release();
  bool right = true, untouched = true;
  for (int r = 0; r < 17; ++r)
    for (int n = 0; n < kStride / 4; ++n) {
      const float is = row<float>(c, r)[n], was = row<float>(before, r)[n];
      if (r >= rows || n >= columns) {
        untouched &= as_bits(is) == as_bits(was);
        continue;
      }
      const float should = dot(row<uint16_t>(a, r), row<uint16_t>(b, 0) + 2 * n, kStride / 2, pairs, was);
      right &= std::isnan(should) ? std::isnan(is) : as_bits(is) == as_bits(should);
    }
  expect(right, what);
  expect(untouched, "a store leaves alone what is not in the tile");
}

uint16_t ordinary() { return as_bf16(static_cast<int32_t>(random_bits()) * 0x1p-31f); }
uint16_t whole_number() { return as_bf16(static_cast<float>(static_cast<int32_t>(random_bits() % 17) - 8)); }
// Every exponent from the denormals' to that of numbers whose products stay finite.
uint16_t small() { return static_cast<uint16_t>((random_bits() & 0x80ff) | (random_bits() % 64 << 8 & 0x3f00)); }
uint16_t anything() { return static_cast<uint16_t>(random_bits()); }

void products() {
  for (int i = 0; i < 20; ++i) {
    fill(ordinary), multiply(16, 16, 16, "a product of whole tiles");
    fill(whole_number), multiply(16, 16, 16, "a product of whole numbers");
    fill(small), multiply(16, 16, 16, "denormals are taken and given as zero");
    fill(anything), multiply(16, 16, 16, "infinities and NaN");
    const int rows = static_cast<int>(1 + random_bits() % 16), pairs = static_cast<int>(1 + random_bits() % 16);
    fill(ordinary), multiply(rows, pairs, static_cast<int>(1 + random_bits() % 16), "a product of smaller tiles");
  }
}

// What lies in memory at that moment: stores of a loop before a load, loads after a store, a second load of changed memory.
void memory() {
  constexpr TileConfig config = whole_tiles();
  tile_configure(config);
  float sum = 0;
  for (int round = 1; round <= 3; ++round) {
    alignas(64) float from[256], to[256];
    for (int i = 0; i < 256; ++i) from[i] = static_cast<float>(i * round);
    tile_load<7>(from, 64);
    tile_store<7>(to, 64);
    for (int i = 0; i < 256; ++i) sum += to[i] - static_cast<float>(i * round);
    expect(to[255] == 255.0f * static_cast<float>(round), "a load reads what was stored last");
  }
  expect(sum == 0, "a tile holds what was loaded");
  alignas(64) float to[256];
  for (float& x : to) x = 5;
  tile_zero<7>();
  tile_store<7>(to, 64);
  for (const float x : to) expect(x == 0, "a zeroed tile is zero");
  tile_load<2>(to, 64);
  tile_release();
  for (float& x : to) x = 5;
  tile_configure(config);
  tile_store<2>(to, 64);
  for (const float x : to) expect(x == 0, "configured tiles are zero");
  tile_release();
}

#ifdef PYGPT_AMX_EMULATED

TileConfig changed(int rows, int row_bytes, int tile) {
  TileConfig config = whole_tiles();
  config.rows[tile] = static_cast<uint8_t>(rows), config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
  return config;
}

void make_mistake(const std::string& name) {
  const TileConfig whole = whole_tiles();
  TileConfig other = whole;
  if (name == "load_not_configured") tile_load<0>(a.bytes, 64);
  if (name == "zero_not_configured") tile_zero<0>();
  if (name == "dot_not_configured") tile_dot_bf16<4, 0, 1>();
  if (name == "store_after_release") tile_configure(whole), tile_release(), tile_store<0>(a.bytes, 64);
  if (name == "release_forgotten") tile_configure(whole), tile_configure(whole);
  if (name == "palette_forgotten") other.palette = 0, tile_configure(other);
  if (name == "reserved_byte") other.reserved[3] = 1, tile_configure(other);
  if (name == "rows_too_long") tile_configure(changed(16, 128, 2));
  if (name == "too_many_rows") tile_configure(changed(32, 64, 2));
  if (name == "rows_without_bytes") tile_configure(changed(16, 0, 2));
  if (name == "ninth_tile") tile_configure(changed(16, 64, 8));
  if (name == "tile_not_configured") tile_configure(changed(0, 0, 3)), tile_load<3>(a.bytes, 64);
  if (name == "dot_of_unconfigured") tile_configure(changed(0, 0, 1)), tile_dot_bf16<4, 0, 1>();
  if (name == "rows_differ") tile_configure(changed(8, 64, 0)), tile_dot_bf16<4, 0, 1>();
  if (name == "columns_differ") tile_configure(changed(16, 32, 1)), tile_dot_bf16<4, 0, 1>();
  if (name == "sums_differ") tile_configure(changed(16, 32, 0)), tile_dot_bf16<4, 0, 1>();
  if (name == "load_not_aligned") tile_configure(whole), tile_load<0>(a.bytes + 32, 64);
  if (name == "stride_not_aligned") tile_configure(whole), tile_store<0>(a.bytes, 96);
  if (name == "stored_rows_overlap") tile_configure(whole), tile_store<0>(a.bytes, 0);
}

#else

bool has_amx() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx & 1u << 24 && edx & 1u << 22 &&
         syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

#endif

}  // namespace

int main([[maybe_unused]] int count, [[maybe_unused]] char** arguments) {
#ifdef PYGPT_AMX_EMULATED
  if (count > 1) {
    make_mistake(arguments[1]);
    std::puts("the mistake went through");
    return 0;
  }
#else
  if (!has_amx()) return 77;
#endif
  products();
  memory();
  return failures != 0;
}
