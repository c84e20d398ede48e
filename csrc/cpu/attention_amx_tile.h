// What attention by AMX tiles is made of (see foreach_isa.h): products between whose rows other work stands, the exponentials
// that do, and packing. Every operand is stored as tiles, 16 rows of 64 bytes one after another.

namespace pygpt::PYGPT_ISA {

constexpr int64_t kSide = 16, kTile = kSide * kSide;  // rows of a tile, its 32-bit units
constexpr int64_t kQueries = 2 * kSide;               // of a step
constexpr int64_t kGroups = kBlock / kQueries, kKeyTiles = kBlock / kSide, kKeySlices = kBlock / 32;  // of a block

// --- products ------------------------------------------------------------------------------------------------------

alignas(64) static const float kZeros[kSide] = {};

// c = a b, or with ADD c += a b, in tiles: c is (rows x 2), a (rows x slices) and b (slices x 2), with one or TWO slices.
// Columns of b and of c, the halves of the queries, lie apart, rows of c one after another. With SWAP c = b a instead: c is
// (2 x rows), a (slices x rows) and b (2 x slices).
struct TileProduct {
  const float* a;
  int64_t a_row, a_slice;  // from one row, or from one slice, to the next
  const float* b;
  int64_t b_half, b_slice;
  float* c;
  int64_t c_half, rows;
  const float* start = kZeros;  // without ADD, what a row of c's tiles is before the sum; from one row of tiles to the next
  int64_t start_row = 0;
};

// Other work of a product's time: take() does a part, twice a row. This is none.
struct Nothing {
  void take() {}
};

// A new value, not tilezero, which waits for the last product into this tile.
template <int TILE, bool ADD>
PYGPT_INLINE void start_sum(const float* c, const float* start) {
  ADD ? tile_load<TILE>(c, 64) : tile_load<TILE>(start, 0);
}

template <bool SWAP, int C, int A, int B>
PYGPT_INLINE void dot() {
  SWAP ? tile_dot_bf16<C, B, A>() : tile_dot_bf16<C, A, B>();
}

// A row of c to tiles X and Y; of the row before, which is in Y and Z, the tiles are stored meanwhile: stores that wait for
// their product would fill the window in which the processor looks for other work. Tiles 0 to 3 hold b.
template <int X, int Y, int Z, bool FIRST, bool ADD, bool TWO, bool SWAP, class Work>
PYGPT_INLINE void multiply_row(const TileProduct& p, int64_t row, Work& work) {
  const float *a = p.a + row * p.a_row, *start = p.start + row * p.start_row;
  float* c = p.c + row * kTile;
  tile_load_once<4>(a, 64);
  start_sum<X, ADD>(c, start);
  dot<SWAP, X, 4, 0>();
  if constexpr (!FIRST) tile_store<Y>(c - kTile, 64);
  start_sum<Y, ADD>(c + p.c_half, start);
  dot<SWAP, Y, 4, 2>();
  work.take();
  if constexpr (TWO) {
    tile_load_once<4>(a + p.a_slice, 64);
    dot<SWAP, X, 4, 1>();
  }
  if constexpr (!FIRST) tile_store<Z>(c - kTile + p.c_half, 64);
  if constexpr (TWO) dot<SWAP, Y, 4, 3>();
  work.take();
}

template <bool ADD, bool TWO, bool SWAP, class Work>
PYGPT_INLINE void multiply_tiles(const TileProduct& p, Work& work) {
  tile_load<0>(p.b, 64);
  tile_load<2>(p.b + p.b_half, 64);
  if constexpr (TWO) {
    tile_load<1>(p.b + p.b_slice, 64);
    tile_load<3>(p.b + p.b_slice + p.b_half, 64);
  }
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) {
    multiply_row<5, 6, 7, true, ADD, TWO, SWAP>(p, row, work);
    multiply_row<7, 5, 6, false, ADD, TWO, SWAP>(p, row + 1, work);
    multiply_row<6, 7, 5, false, ADD, TWO, SWAP>(p, row + 2, work);
    multiply_row<5, 6, 7, false, ADD, TWO, SWAP>(p, row + 3, work);
    tile_store<5>(p.c + (row + 3) * kTile, 64);
    tile_store<6>(p.c + (row + 3) * kTile + p.c_half, 64);
  }
  if (row + 2 <= p.rows) {
    multiply_row<5, 6, 7, true, ADD, TWO, SWAP>(p, row, work);
    multiply_row<7, 5, 6, false, ADD, TWO, SWAP>(p, row + 1, work);
    tile_store<7>(p.c + (row + 1) * kTile, 64);
    tile_store<5>(p.c + (row + 1) * kTile + p.c_half, 64);
    row += 2;
  }
  for (; row < p.rows; ++row) {
    multiply_row<5, 6, 7, true, ADD, TWO, SWAP>(p, row, work);
    tile_store<5>(p.c + row * kTile, 64);
    tile_store<6>(p.c + row * kTile + p.c_half, 64);
  }
}

template <bool SWAP = false, class Work>
PYGPT_INLINE void multiply_tiles(const TileProduct& p, bool add, bool two, Work& work) {
  if (add)
    two ? multiply_tiles<true, true, SWAP>(p, work) : multiply_tiles<true, false, SWAP>(p, work);
  else
    two ? multiply_tiles<false, true, SWAP>(p, work) : multiply_tiles<false, false, SWAP>(p, work);
}

// --- softmax -------------------------------------------------------------------------------------------------------

// 2^x, to be rounded to bfloat16 by dropping its lower half: the polynomial's result is in [1, 2), and its constant has
// half a last place more. Its largest relative error is the least of degree 3, 7e-5. scalef takes x's whole part itself.
PYGPT_INLINE vf exp2_to_drop(vf x) {
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
  const vf p = ((splat(7.8024521e-2f) * f + 0.22606716f) * f + 0.69583356f) * f + (0.9999252f + 0.00390625f);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// The upper halves of two vectors as units.
PYGPT_INLINE vf pair_upper(vf low, vf high) {
  const __m512i move = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  return (vf)_mm512_mask_shuffle_epi8((__m512i)high, 0x3333333333333333, (__m512i)low, move);
}

PYGPT_INLINE vf drop_lower(vf x) { return (vf)((vu)x & 0xffff0000u); }

// log2 of a positive number, by 2 artanh((m - 1) / (m + 1)) of its mantissa m in [0.75, 1.5): 1e-7 beside the exponent.
PYGPT_INLINE vf vlog2(vf x) {
  const vf m = (vf)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  const vf whole = (vf)_mm512_getexp_ps((__m512)(x / m)), t = (m - 1.0f) / (m + 1.0f), u = t * t;
  return (((((splat(1.0f / 9) * u + 1.0f / 7) * u + 1.0f / 5) * u + 1.0f / 3) * u + 1.0f) * t) * (2 * kLog2E) + whole;
}

// 2^x of fixed-point numbers x in 16 bits, 11 of them fraction, from 2^-31 on, which stands for less. Read as one number, a
// float's exponent and mantissa are x to within the 9% by which 1 + f exceeds 2^f for fractions f: the table holds the mean of
// that for each 64th, in units of 2^-11. x is half a last place of bfloat16 too large, so that dropping bits rounds.
constexpr float kFixedHalf = 8.0f / 2048;
constexpr float kFixedLeast = 4096 + kFixedHalf, kFixedOne = kFixedLeast + 31;  // whose last place is 2^-11
// The powers of 2 by which a new reference exceeds the largest score: most larger ones to come then leave it, and so all that
// was summed, as it is. Powers below 2^-31 of it count as that, as 2^-27 of the largest at most: of S keys an error of
// S 2^-27.
constexpr float kMargin = 4;

constexpr double power_of_two(double x) {
  double sum = 1, term = 1;
  for (int i = 1; i < 30; ++i) sum += term *= x * 0.693147180559945309417 / i;
  return sum;
}

struct Corrections {
  uint8_t of[64];
  constexpr Corrections() : of() {
    for (int i = 0; i < 64; ++i) {
      double sum = 0;
      for (int j = 0; j < 32; ++j) {
        const double x = (32 * i + j) / 2048.0 - kFixedHalf, f = x < 0 ? x + 1 : x;
        sum += (1 + f - power_of_two(f)) * 2048;
      }
      of[i] = static_cast<uint8_t>(sum / 32 + 0.5 + 0.5);  // to nearest; and truncation is half a unit more than rounding
    }
  }
};
static constexpr Corrections kCorrections;

// Probabilities from scores of half of a step's queries, eight keys at a time, by the table.
template <bool DROPOUT>
struct Exponentials {
  const float* scores;
  float* probabilities;
  int64_t left;  // eights of keys
  const __mmask16* keep;
  vf scale, offset, sum[2];  // of what multiplies V, as rounded; but before dropout
  __m512i bits = {};         // that are set in any fixed-point number

  Exponentials(const float* from, float* to, int64_t count, const __mmask16* keep, float scale_by, vf reference)
      : scores(from), probabilities(to), left(count), keep(keep), scale(splat(scale_by)),
        offset(kFixedOne - reference), sum{} {}
  __attribute__((always_inline)) void take() {
    if (left == 0) return;
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    const __m512i lower = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
    const __m512i fraction = _mm512_set1_epi64(0x0035002500150005);
    const __m512i table = _mm512_loadu_si512(kCorrections.of);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      vf even = load(scores + i * kSide), odd = load(scores + (i + 1) * kSide);
#ifndef PYGPT_AVX512_EMULATED
      asm("" : "+v"(even), "+v"(odd));  // or the compiler copies `scale` instead, by an instruction more
#endif
      const __m512i x = (__m512i)vmax(splat(kFixedLeast), even * scale + offset);  // in this order: NaN stays
      const __m512i y = (__m512i)vmax(splat(kFixedLeast), odd * scale + offset);
      bits = _mm512_ternarylogic_epi32(bits, x, y, 0xfe);  // or
      const __m512i both = _mm512_mask_shuffle_epi8(x, 0xcccccccccccccccc, y, lower);
      const __m512i at = _mm512_multishift_epi64_epi8(fraction, both);
      const __m512i less = _mm512_maskz_permutexvar_epi8(0x5555555555555555, at, table);
      __m512i p = _mm512_shrdi_epi16(_mm512_sub_epi16(both, less), _mm512_set1_epi16(3), 4);  // 2^-31 and x's upper bits
      sum[i / 2 % 2] = (vf)_mm512_dpbf16_ps((__m512)sum[i / 2 % 2], (__m512bh)p, (__m512bh)ones);
      if constexpr (DROPOUT)
        p = _mm512_maskz_mov_epi16(_pdep_u32(keep[i], 0x55555555) | _pdep_u32(keep[i + 1], 0xaaaaaaaa), p);
      store(probabilities + i / 2 * kSide, (vf)p);
    }
    scores += 8 * kSide, probabilities += 4 * kSide, keep += 8, --left;
  }
  __attribute__((always_inline)) void take_rest() {
    while (left > 0) take();
  }
  // The queries of which a score had no place in 16 bits: floats of that range have these upper bits, others further ones.
  __mmask16 exceeded() const { return _mm512_test_epi32_mask(bits, _mm512_set1_epi32(static_cast<int>(~0x4580ffffu))); }
};

// --- packing -------------------------------------------------------------------------------------------------------

// Elements d .. d + 32 of a row, zero beyond D. Absent rows are zero. WHOLE: neither is needed; masks cost more than the loads.
template <bool WHOLE>
PYGPT_INLINE __m512i load_slice(const bf16* row, int64_t d, int64_t D, bool present) {
  if constexpr (WHOLE) return _mm512_loadu_si512(row + d);
  return _mm512_maskz_loadu_epi16(present ? _bzhi_u32(~0u, static_cast<unsigned>(smaller(D - d, 32))) : 0, row + d);
}

template <bool WHOLE>
PYGPT_INLINE void store_slice(bf16* row, int64_t d, int64_t D, __m512i slice) {
  if constexpr (WHOLE) return _mm512_storeu_si512(row + d, slice);
  _mm512_mask_storeu_epi16(row + d, _bzhi_u32(~0u, static_cast<unsigned>(smaller(D - d, 32))), slice);
}

// Slices of 16 rows, rounded, from two tiles that hold 32 columns in their rows, each times `factor`, a lane per row.
PYGPT_INLINE void load_rows_of_columns(const float* tile, int64_t next_tile, vf factor, __m512i row[kLanes]) {
  vf pairs[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const float* columns = tile + i / 8 * next_tile + i % 8 * 2 * kSide;
    pairs[i] = pair_across(load(columns) * factor, load(columns + kSide) * factor);
  }
  transpose<kLanes / 2>(pairs);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) row[i] = (__m512i)pairs[i];
}

// Elements' magnitudes are in the order of their bits.
PYGPT_INLINE __m512i larger_magnitudes(__m512i largest, __m512i of) {
  return _mm512_max_epu16(largest, _mm512_and_si512(of, _mm512_set1_epi16(0x7fff)));
}

PYGPT_INLINE float largest_of(__m512i magnitudes) {
  const __m512i upper = _mm512_max_epu16(magnitudes, _mm512_slli_epi32(magnitudes, 16));
  return reduce_max((vf)drop_lower((vf)upper));
}

// Units of elements of rows 2i and 2i + 1, i < 16, one row of units per element: half of the elements d .. d + 32, those
// that unpacking takes from the low (or HIGH) halves of 128 bits, 4 of every 8.
template <bool HIGH, bool WHOLE>
static void pack_columns_of_slice(const bf16* row, int64_t stride, int64_t count, int64_t d, int64_t D, float* to,
                                  int64_t next_tile) {
  vf block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const __m512i even = load_slice<WHOLE>(row + 2 * i * stride, d, D, 2 * i < count);
    const __m512i odd = load_slice<WHOLE>(row + (2 * i + 1) * stride, d, D, 2 * i + 1 < count);
    block[i] = (vf)(HIGH ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd));
  }
  transpose<kLanes / 2>(block);
  to += HIGH ? 4 * kSide : 0;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (WHOLE || i < 8 || next_tile) store(to + i / 8 * next_tile + (i % 8 / 4 * 8 + i % 4) * kSide, block[i]);
}

// --- dropout -------------------------------------------------------------------------------------------------------

// dropout_keep for 16 queries: of each of the 64 keys of a block, which queries keep it.
static void dropout_keep_by_key(const Dropout& dropout, int64_t head, int64_t query, int64_t key_block,
                                __mmask16 keep[kBlock]) {
  const vu zero = {}, queries = (vu)lane_numbers() + static_cast<uint32_t>(query);
  for (int i = 0; i < 16; ++i) {
    vu words[4];
    philox(zero + static_cast<uint32_t>(key_block * 16 + i), queries, zero + static_cast<uint32_t>(head), zero,
           dropout.key[0], dropout.key[1], words);
    for (int word = 0; word < 4; ++word)
      keep[word * 16 + i] = _mm512_cmp_epu32_mask((__m512i)words[word], _mm512_set1_epi32(dropout.threshold),
                                                  _MM_CMPINT_NLT);
  }
}

}  // namespace pygpt::PYGPT_ISA
