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

// One element of TDPBF16PS as the manual describes it; size: the sum of what is added, without signs.
float dot(const uint16_t* a, const uint16_t* b, int b_stride, int pairs, float c, double& size) {
  float even = 0, odd = 0;
  size = std::fabs(flushed(c));
  for (int p = 0; p < pairs; ++p) {
    const float a_even = element(a[2 * p]), a_odd = element(a[2 * p + 1]);
    const float b_even = element(b[p * b_stride]), b_odd = element(b[p * b_stride + 1]);
    even = flushed(std::fma(a_even, b_even, even));
    odd = flushed(std::fma(a_odd, b_odd, odd));
    size += std::fabs(double{a_even} * b_even) + std::fabs(double{a_odd} * b_odd);
  }
  return flushed(flushed(c) + flushed(even + odd));
}

// Of a processor the order of the sums is not tested, on which no kernel relies; the emulation is as the manual says.
bool agree(float is, float should, [[maybe_unused]] double size) {
  if (!std::isfinite(should)) return std::isnan(should) ? std::isnan(is) : is == should;
#ifdef PYGPT_AMX_EMULATED
  return as_bits(is) == as_bits(should);
#else
  return flushed(is) == is && std::fabs(double{is} - should) <= 0x1p-20 * size + 0x1p-120;
#endif
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

template <class T, class Value>
void fill(Area& area, Value value) {
  for (size_t i = 0; i < sizeof area.bytes / sizeof(T); ++i) {
    const T x = value();
    std::memcpy(area.bytes + i * sizeof x, &x, sizeof x);
  }
}

template <class A, class B, class C>
void fill(A of_a, B of_b, C of_c) {
  fill<uint16_t>(a, of_a), fill<uint16_t>(b, of_b), fill<float>(c, of_c);
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
      double size;
      const float should = dot(row<uint16_t>(a, r), row<uint16_t>(b, 0) + 2 * n, kStride / 2, pairs, was, size);
      right &= agree(is, should, size);
    }
  expect(right, what);
  expect(untouched, "a store leaves alone what is not in the tile");
}

// Of the elements' kinds: -1 .. 1; -8 .. 8; denormals; up to 2^60; about 2^-70, whose products are denormals.
float uniform() { return static_cast<int32_t>(random_bits()) * 0x1p-31f; }
uint16_t ordinary() { return as_bf16(uniform()); }
float whole_float() { return static_cast<float>(static_cast<int32_t>(random_bits() % 17) - 8); }
uint16_t whole_number() { return as_bf16(whole_float()); }
float denormal_float() { return as_float(random_bits() & 0x807fffff); }
uint16_t denormal() { return as_bf16(denormal_float()); }
uint16_t large() { return as_bf16(uniform() * 0x1p60f); }
uint16_t tiny() { return as_bf16(uniform() * 0x1p-70f); }
float zero() { return 0; }
// Infinities and NaN among numbers whose sums stay finite: then no order of the sums makes a difference.
uint16_t anything() {
  const uint32_t bits = random_bits();
  return static_cast<uint16_t>((bits & 0x807f) | ((bits >> 16) % 50 ? (bits >> 22) % 180 : 255u) << 7);
}
float any_float() { return as_float(static_cast<uint32_t>(anything()) << 16 | (random_bits() & 0xffff)); }

void products() {
  for (int i = 0; i < 20; ++i) {
    fill(ordinary, ordinary, uniform), multiply(16, 16, 16, "a product of whole tiles");
    fill(whole_number, whole_number, whole_float), multiply(16, 16, 16, "a product of whole numbers");
    fill(denormal, large, zero), multiply(16, 16, 16, "denormals in a are zero");
    fill(large, denormal, zero), multiply(16, 16, 16, "denormals in b are zero");
    fill(tiny, tiny, denormal_float), multiply(16, 16, 16, "denormals in c and as the result are zero");
    fill(anything, anything, any_float), multiply(16, 16, 16, "infinities and NaN");
    const int rows = static_cast<int>(1 + random_bits() % 16), pairs = static_cast<int>(1 + random_bits() % 16);
    fill(ordinary, ordinary, uniform);
    multiply(rows, pairs, static_cast<int>(1 + random_bits() % 16), "a product of smaller tiles");
  }
}

// What lies in memory at that moment: stores of a loop before a load, loads after a store, a load of changed memory.
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
