// The AVX-512 instructions that the CPU kernels use, in C++ for AVX2, so that the levels avx512, avx512_bf16 and amx can be
// tested on a processor that has none of them. foreach_isa.h includes it where PYGPT_AVX512_EMULATED is defined; each name of
// an intrinsic is then one of a function here. Not for speed. Differs from the processor in denormals: bfloat16 ones count
// here.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")

namespace pygpt::avx512_emulation {

#define PYGPT_EMULATED static inline __attribute__((always_inline, unused))
#define PYGPT_EMULATED_BY_LOOP static inline __attribute__((noinline, unused))  // or kernels take minutes to compile

// 64 bytes as elements of a type.
template <class T>
using Of __attribute__((vector_size(64))) = T;
template <class T>
using Half __attribute__((vector_size(32))) = T;
template <class T>
constexpr int kCount = 64 / sizeof(T);

PYGPT_EMULATED __m512i set1_epi16(int16_t x) { return (__m512i)(x - Of<int16_t>{}); }
PYGPT_EMULATED __m512i set1_epi32(int32_t x) { return (__m512i)(x - Of<int32_t>{}); }
PYGPT_EMULATED __m512i set1_epi64(int64_t x) { return (__m512i)(x - Of<int64_t>{}); }
PYGPT_EMULATED __m512 set1_ps(float x) { return (__m512)(x - Of<float>{}); }
PYGPT_EMULATED __m512i setzero_si512() { return __m512i{}; }
PYGPT_EMULATED __m512i set4_epi32(int32_t d, int32_t c, int32_t b, int32_t a) {
  return (__m512i)Of<int32_t>{a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d};
}
PYGPT_EMULATED __m512i setr_epi64(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f, int64_t g, int64_t h) {
  return (__m512i)Of<int64_t>{a, b, c, d, e, f, g, h};
}

// --- memory; what a mask leaves out is not touched -----------------------------------------------------------------

template <class T, class V, class M>
PYGPT_EMULATED_BY_LOOP V masked_load(M mask, const void* from) {
  V v = {};
  for (int i = 0; i < static_cast<int>(sizeof v / sizeof(T)); ++i)
    if (mask >> i & 1) std::memcpy(reinterpret_cast<char*>(&v) + i * sizeof(T), static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  return v;
}
template <class T, class V, class M>
PYGPT_EMULATED_BY_LOOP void masked_store(void* to, M mask, V v) {
  for (int i = 0; i < static_cast<int>(sizeof v / sizeof(T)); ++i)
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + i * sizeof(T), reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
}
PYGPT_EMULATED __m512i loadu_si512(const void* from) { return masked_load<uint32_t, __m512i>(0xffffu, from); }
PYGPT_EMULATED void check_aligned(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 64) __builtin_trap();  // where the processor would fault
}
PYGPT_EMULATED __m512 load_ps(const void* from) { return check_aligned(from), (__m512)loadu_si512(from); }
PYGPT_EMULATED __m512 maskz_loadu_ps(__mmask16 k, const void* from) { return masked_load<float, __m512>(k, from); }
PYGPT_EMULATED __m512i maskz_loadu_epi16(__mmask32 k, const void* from) { return masked_load<uint16_t, __m512i>(k, from); }
PYGPT_EMULATED __m256i maskz_loadu_epi16_256(__mmask16 k, const void* from) { return masked_load<uint16_t, __m256i>(k, from); }
PYGPT_EMULATED __m128i maskz_loadu_epi8_128(__mmask16 k, const void* from) { return masked_load<uint8_t, __m128i>(k, from); }
PYGPT_EMULATED void storeu_si512(void* to, __m512i v) { std::memcpy(to, &v, sizeof v); }
PYGPT_EMULATED void store_si512(void* to, __m512i v) { check_aligned(to), storeu_si512(to, v); }
PYGPT_EMULATED void store_ps(void* to, __m512 v) { store_si512(to, (__m512i)v); }
PYGPT_EMULATED void mask_storeu_ps(void* to, __mmask16 k, __m512 v) { masked_store<float>(to, k, v); }
PYGPT_EMULATED void mask_store_ps(void* to, __mmask16 k, __m512 v) { check_aligned(to), mask_storeu_ps(to, k, v); }
PYGPT_EMULATED void mask_storeu_epi16(void* to, __mmask32 k, __m512i v) { masked_store<uint16_t>(to, k, v); }
PYGPT_EMULATED void mask_storeu_epi16_256(void* to, __mmask16 k, __m256i v) { masked_store<uint16_t>(to, k, v); }

// --- masks -----------------------------------------------------------------------------------------------------------

template <class T>
PYGPT_EMULATED_BY_LOOP uint64_t signs(Of<T> v) {  // a bit for each element that is not zero
  uint64_t k = 0;
  for (int i = 0; i < kCount<T>; ++i) k |= uint64_t{v[i] != 0} << i;
  return k;
}
template <class T, class M>
PYGPT_EMULATED_BY_LOOP Of<T> spread(M mask) {  // all ones where the mask has a bit
  Of<T> v = {};
  for (int i = 0; i < kCount<T>; ++i) v[i] = mask >> i & 1 ? static_cast<T>(-1) : 0;
  return v;
}
template <class T>
PYGPT_EMULATED uint64_t compare(Of<T> a, Of<T> b, int how) {
  if (how == _MM_CMPINT_LT) return signs<T>((Of<T>)(a < b));
  if (how == _MM_CMPINT_NLT) return signs<T>((Of<T>)(a >= b));
  __builtin_trap();
}
PYGPT_EMULATED __mmask16 cmp_epi32_mask(__m512i a, __m512i b, int how) { return compare<int32_t>((Of<int32_t>)a, (Of<int32_t>)b, how); }
PYGPT_EMULATED __mmask16 cmp_epu32_mask(__m512i a, __m512i b, int how) { return compare<uint32_t>((Of<uint32_t>)a, (Of<uint32_t>)b, how); }
PYGPT_EMULATED __mmask16 mask_cmp_epi32_mask(__mmask16 k, __m512i a, __m512i b, int how) { return k & cmp_epi32_mask(a, b, how); }
PYGPT_EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b, int how) {
  const Of<float> x = (Of<float>)a, y = (Of<float>)b;
  if (how == _CMP_GT_OQ) return signs<int32_t>((Of<int32_t>)(x > y));
  if (how == _CMP_NEQ_UQ) return signs<int32_t>((Of<int32_t>)(x != y));
  __builtin_trap();
}
PYGPT_EMULATED __mmask16 mask_cmp_ps_mask(__mmask16 k, __m512 a, __m512 b, int how) { return k & cmp_ps_mask(a, b, how); }
PYGPT_EMULATED __mmask16 test_epi32_mask(__m512i a, __m512i b) { return signs<int32_t>((Of<int32_t>)(a & b)); }
PYGPT_EMULATED __m512 maskz_mov_ps(__mmask16 k, __m512 v) { return (__m512)((Of<int32_t>)v & spread<int32_t>(k)); }
PYGPT_EMULATED __m512i maskz_mov_epi16(__mmask32 k, __m512i v) { return (__m512i)((Of<int16_t>)v & spread<int16_t>(k)); }
PYGPT_EMULATED __m512 maskz_mul_ps(__mmask16 k, __m512 a, __m512 b) { return maskz_mov_ps(k, a * b); }
PYGPT_EMULATED __m512 mask_add_ps(__m512 otherwise, __mmask16 k, __m512 a, __m512 b) {
  const Of<int32_t> on = spread<int32_t>(k);
  return (__m512)(((Of<int32_t>)(a + b) & on) | ((Of<int32_t>)otherwise & ~on));
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

PYGPT_EMULATED __m512 max_ps(__m512 a, __m512 b) { return (__m512)((Of<float>)a > (Of<float>)b ? (Of<float>)a : (Of<float>)b); }
PYGPT_EMULATED __m512 min_ps(__m512 a, __m512 b) { return (__m512)((Of<float>)a < (Of<float>)b ? (Of<float>)a : (Of<float>)b); }
PYGPT_EMULATED_BY_LOOP __m512 sqrt_ps(__m512 x) {
  for (int i = 0; i < 16; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
PYGPT_EMULATED_BY_LOOP __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
PYGPT_EMULATED_BY_LOOP __m512 reduce_ps(__m512 x, int how) {  // what rounding leaves; of an infinity 0
  for (int i = 0; i < 16; ++i) {
    const float whole = how == _MM_FROUND_TO_NEG_INF ? std::floor(x[i]) : std::nearbyint(x[i]);
    x[i] = std::isinf(x[i]) ? 0.0f : x[i] - whole;
  }
  return x;
}
PYGPT_EMULATED_BY_LOOP __m512 scalef_ps(__m512 x, __m512 power) {
  for (int i = 0; i < 16; ++i) {
    const float n = std::floor(power[i]);
    x[i] = n != n ? n : std::ldexp(x[i], static_cast<int>(n < -400 ? -400 : n > 400 ? 400 : n));
  }
  return x;
}
PYGPT_EMULATED_BY_LOOP __m512 getexp_ps(__m512 x) {
  for (int i = 0; i < 16; ++i) x[i] = std::logb(x[i]);
  return x;
}
// Of _MM_MANT_NORM_p75_1p5 and _MM_MANT_SIGN_nan.
PYGPT_EMULATED_BY_LOOP __m512 getmant_ps(__m512 x, int, int) {
  for (int i = 0; i < 16; ++i) {
    if (x[i] != x[i]) continue;
    int exponent;
    float m = x[i] == 0 || std::isinf(x[i]) ? 1.0f : 2 * std::frexp(std::fabs(x[i]), &exponent);  // [1, 2)
    if (m >= 1.5f) m /= 2;
    x[i] = x[i] < 0 ? std::numeric_limits<float>::quiet_NaN() : m;
  }
  return x;
}
PYGPT_EMULATED __m512i slli_epi32(__m512i v, int n) { return (__m512i)((Of<uint32_t>)v << n); }
PYGPT_EMULATED __m512i sub_epi16(__m512i a, __m512i b) { return (__m512i)((Of<uint16_t>)a - (Of<uint16_t>)b); }
PYGPT_EMULATED __m512i max_epu16(__m512i a, __m512i b) {
  return (__m512i)((Of<uint16_t>)a > (Of<uint16_t>)b ? (Of<uint16_t>)a : (Of<uint16_t>)b);
}
PYGPT_EMULATED __m512i and_si512(__m512i a, __m512i b) { return a & b; }
PYGPT_EMULATED __m512i or_si512(__m512i a, __m512i b) { return a | b; }
PYGPT_EMULATED_BY_LOOP __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i v = {};
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) v |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return v;
}
PYGPT_EMULATED __m512i maskz_mul_epu32(__mmask8 k, __m512i a, __m512i b) {
  const Of<uint64_t> low = 0xffffffffu - Of<uint64_t>{};
  return (__m512i)((((Of<uint64_t>)a & low) * ((Of<uint64_t>)b & low)) & spread<uint64_t>(k));
}
// The upper operand's bits follow those of the lower one.
PYGPT_EMULATED __m512i shrdi_epi16(__m512i lower, __m512i upper, int n) {
  return (__m512i)((Of<uint16_t>)lower >> n | (Of<uint16_t>)upper << (16 - n));
}

// --- conversions -----------------------------------------------------------------------------------------------------

PYGPT_EMULATED __m512i cvtepu16_epi32(__m256i v) { return (__m512i)__builtin_convertvector((Half<uint16_t>)v, Of<uint32_t>); }
PYGPT_EMULATED __m256i cvtepi32_epi16(__m512i v) { return (__m256i)__builtin_convertvector((Of<uint32_t>)v, Half<uint16_t>); }
PYGPT_EMULATED_BY_LOOP __m512i cvtepi8_epi32(__m128i v) {
  Of<int32_t> wide;
  for (int i = 0; i < 16; ++i) wide[i] = reinterpret_cast<const int8_t*>(&v)[i];
  return (__m512i)wide;
}
PYGPT_EMULATED __m512 cvtepi32_ps(__m512i v) { return (__m512)__builtin_convertvector((Of<int32_t>)v, Of<float>); }
PYGPT_EMULATED Half<uint16_t> to_bf16(__m512 v) {
  const Of<uint32_t> u = (Of<uint32_t>)v, rounded = u + 0x7fff + ((u >> 16) & 1);
  const Of<uint32_t> bits = (Of<float>)v != (Of<float>)v ? u | 0x400000 : rounded;
  return __builtin_convertvector(bits >> 16, Half<uint16_t>);
}
PYGPT_EMULATED __m256bh cvtneps_pbh(__m512 v) { return (__m256bh)to_bf16(v); }
PYGPT_EMULATED __m512bh cvtne2ps_pbh(__m512 upper, __m512 lower) {
  const Half<uint16_t> halves[] = {to_bf16(lower), to_bf16(upper)};
  __m512bh v;
  std::memcpy(&v, halves, sizeof v);
  return v;
}
PYGPT_EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Of<uint32_t> x = (Of<uint32_t>)a, y = (Of<uint32_t>)b, upper = 0xffff0000u - Of<uint32_t>{};
  return sum + (__m512)(x & upper) * (__m512)(y & upper) + (__m512)(x << 16) * (__m512)(y << 16);
}

// --- elements that change places ---------------------------------------------------------------------------------------

template <class T>
PYGPT_EMULATED_BY_LOOP __m512i permute(__m512i which, __m512i from) {
  const Of<T> w = (Of<T>)which, f = (Of<T>)from;
  Of<T> v;
  for (int i = 0; i < kCount<T>; ++i) v[i] = f[w[i] & (kCount<T> - 1)];
  return (__m512i)v;
}
PYGPT_EMULATED __m512i permutexvar_epi16(__m512i which, __m512i from) { return permute<uint16_t>(which, from); }
PYGPT_EMULATED __m512i permutexvar_epi64(__m512i which, __m512i from) { return permute<uint64_t>(which, from); }
PYGPT_EMULATED __m512i maskz_permutexvar_epi8(__mmask64 k, __m512i which, __m512i from) {
  return permute<uint8_t>(which, from) & (__m512i)spread<uint8_t>(k);
}
PYGPT_EMULATED_BY_LOOP __m512i interleave(__m512i a, __m512i b, int half) {  // of each 16 bytes the lower or the upper half
  const Of<uint16_t> x = (Of<uint16_t>)a, y = (Of<uint16_t>)b;
  Of<uint16_t> v;
  for (int i = 0; i < 32; ++i) v[i] = (i & 1 ? y : x)[i / 8 * 8 + half * 4 + i % 8 / 2];
  return (__m512i)v;
}
PYGPT_EMULATED __m512i unpacklo_epi16(__m512i a, __m512i b) { return interleave(a, b, 0); }
PYGPT_EMULATED __m512i unpackhi_epi16(__m512i a, __m512i b) { return interleave(a, b, 1); }
PYGPT_EMULATED_BY_LOOP __m512i mask_shuffle_epi8(__m512i otherwise, __mmask64 k, __m512i from, __m512i which) {
  const Of<uint8_t> f = (Of<uint8_t>)from, w = (Of<uint8_t>)which;
  Of<uint8_t> v = (Of<uint8_t>)otherwise;
  for (int i = 0; i < 64; ++i)
    if (k >> i & 1) v[i] = w[i] & 0x80 ? 0 : f[i / 16 * 16 + (w[i] & 15)];
  return (__m512i)v;
}
PYGPT_EMULATED_BY_LOOP __m512i multishift_epi64_epi8(__m512i at, __m512i from) {
  const Of<uint8_t> a = (Of<uint8_t>)at;
  const Of<uint64_t> f = (Of<uint64_t>)from;
  Of<uint8_t> v;
  for (int i = 0; i < 64; ++i) {
    const int n = a[i] & 63;
    v[i] = static_cast<uint8_t>(n ? f[i / 8] >> n | f[i / 8] << (64 - n) : f[i / 8]);
  }
  return (__m512i)v;
}

#undef PYGPT_EMULATED
#undef PYGPT_EMULATED_BY_LOOP

}  // namespace pygpt::avx512_emulation

#pragma GCC pop_options

#define _mm512_set1_epi16 pygpt::avx512_emulation::set1_epi16
#define _mm512_set1_epi32 pygpt::avx512_emulation::set1_epi32
#define _mm512_set1_epi64 pygpt::avx512_emulation::set1_epi64
#define _mm512_set1_ps pygpt::avx512_emulation::set1_ps
#define _mm512_setzero_si512 pygpt::avx512_emulation::setzero_si512
#undef _mm512_set4_epi32
#define _mm512_set4_epi32 pygpt::avx512_emulation::set4_epi32
#undef _mm512_setr_epi64
#define _mm512_setr_epi64 pygpt::avx512_emulation::setr_epi64
#define _mm512_loadu_si512 pygpt::avx512_emulation::loadu_si512
#define _mm512_load_ps pygpt::avx512_emulation::load_ps
#define _mm512_maskz_loadu_ps pygpt::avx512_emulation::maskz_loadu_ps
#define _mm512_maskz_loadu_epi16 pygpt::avx512_emulation::maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 pygpt::avx512_emulation::maskz_loadu_epi16_256
#define _mm_maskz_loadu_epi8 pygpt::avx512_emulation::maskz_loadu_epi8_128
#define _mm512_storeu_si512 pygpt::avx512_emulation::storeu_si512
#define _mm512_store_si512 pygpt::avx512_emulation::store_si512
#define _mm512_stream_si512 pygpt::avx512_emulation::store_si512
#define _mm512_store_ps pygpt::avx512_emulation::store_ps
#define _mm512_mask_storeu_ps pygpt::avx512_emulation::mask_storeu_ps
#define _mm512_mask_store_ps pygpt::avx512_emulation::mask_store_ps
#define _mm512_mask_storeu_epi16 pygpt::avx512_emulation::mask_storeu_epi16
#define _mm256_mask_storeu_epi16 pygpt::avx512_emulation::mask_storeu_epi16_256
#define _mm512_cmp_epi32_mask pygpt::avx512_emulation::cmp_epi32_mask
#define _mm512_cmp_epu32_mask pygpt::avx512_emulation::cmp_epu32_mask
#define _mm512_mask_cmp_epi32_mask pygpt::avx512_emulation::mask_cmp_epi32_mask
#define _mm512_cmp_ps_mask pygpt::avx512_emulation::cmp_ps_mask
#define _mm512_mask_cmp_ps_mask pygpt::avx512_emulation::mask_cmp_ps_mask
#define _mm512_test_epi32_mask pygpt::avx512_emulation::test_epi32_mask
#define _mm512_maskz_mov_ps pygpt::avx512_emulation::maskz_mov_ps
#define _mm512_maskz_mov_epi16 pygpt::avx512_emulation::maskz_mov_epi16
#define _mm512_maskz_mul_ps pygpt::avx512_emulation::maskz_mul_ps
#define _mm512_mask_add_ps pygpt::avx512_emulation::mask_add_ps
#define _mm512_max_ps pygpt::avx512_emulation::max_ps
#define _mm512_min_ps pygpt::avx512_emulation::min_ps
#define _mm512_sqrt_ps pygpt::avx512_emulation::sqrt_ps
#define _mm512_fmadd_ps pygpt::avx512_emulation::fmadd_ps
#define _mm512_reduce_ps pygpt::avx512_emulation::reduce_ps
#define _mm512_scalef_ps pygpt::avx512_emulation::scalef_ps
#define _mm512_getexp_ps pygpt::avx512_emulation::getexp_ps
#define _mm512_getmant_ps pygpt::avx512_emulation::getmant_ps
#define _mm512_slli_epi32 pygpt::avx512_emulation::slli_epi32
#define _mm512_sub_epi16 pygpt::avx512_emulation::sub_epi16
#define _mm512_max_epu16 pygpt::avx512_emulation::max_epu16
#define _mm512_and_si512 pygpt::avx512_emulation::and_si512
#define _mm512_or_si512 pygpt::avx512_emulation::or_si512
#define _mm512_ternarylogic_epi32 pygpt::avx512_emulation::ternarylogic_epi32
#define _mm512_maskz_mul_epu32 pygpt::avx512_emulation::maskz_mul_epu32
#define _mm512_shrdi_epi16 pygpt::avx512_emulation::shrdi_epi16
#define _mm512_cvtepu16_epi32 pygpt::avx512_emulation::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 pygpt::avx512_emulation::cvtepi32_epi16
#define _mm512_cvtepi8_epi32 pygpt::avx512_emulation::cvtepi8_epi32
#define _mm512_cvtepi32_ps pygpt::avx512_emulation::cvtepi32_ps
#define _mm512_cvtneps_pbh pygpt::avx512_emulation::cvtneps_pbh
#define _mm512_cvtne2ps_pbh pygpt::avx512_emulation::cvtne2ps_pbh
#define _mm512_dpbf16_ps pygpt::avx512_emulation::dpbf16_ps
#define _mm512_permutexvar_epi16 pygpt::avx512_emulation::permutexvar_epi16
#define _mm512_permutexvar_epi64 pygpt::avx512_emulation::permutexvar_epi64
#define _mm512_maskz_permutexvar_epi8 pygpt::avx512_emulation::maskz_permutexvar_epi8
#define _mm512_unpacklo_epi16 pygpt::avx512_emulation::unpacklo_epi16
#define _mm512_unpackhi_epi16 pygpt::avx512_emulation::unpackhi_epi16
#define _mm512_mask_shuffle_epi8 pygpt::avx512_emulation::mask_shuffle_epi8
#define _mm512_multishift_epi64_epi8 pygpt::avx512_emulation::multishift_epi64_epi8
