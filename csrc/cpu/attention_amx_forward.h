// Forward of causal attention in bfloat16 by AMX tiles (see foreach_isa.h): the online softmax of attention_kernel.h.
//
// Scores are computed transposed, S^T = K Q^T: a vector holds 16 queries' scores of one key, so that the queries' maxima
// need nothing across lanes, and two keys' probabilities, packed, are a row of P^T as the next product, O^T = V^T P^T,
// takes it. Every operand is stored as tiles, 16 rows of 64 bytes one after another.
//
// A step is 32 queries against up to 64 keys. What bounds it is the traffic of tiles, then the vectors' arithmetic, and only
// then products; so all three go on at once: between the rows of the product that makes the next step's scores, and of the
// one that adds the last step's output, stand the exponentials of this step and the maxima of the next. All that a step
// works on but keys and values stays in the first-level cache, which those pass by.

namespace pygpt::PYGPT_ISA {

constexpr int64_t kSide = 16, kTile = kSide * kSide;  // rows of a tile, its 32-bit units
constexpr int64_t kQueries = 2 * kSide;               // of a step
constexpr int64_t kGroups = kBlock / kQueries, kKeyTiles = kBlock / kSide, kKeySlices = kBlock / 32;  // of a block

// --- products ------------------------------------------------------------------------------------------------------

// c = a b, or with ADD c += a b, in tiles: c is (rows x 2), a (rows x slices) and b (slices x 2), with one or TWO slices.
// Columns of b and of c, the halves of the queries, lie apart, rows of c one after another.
struct TileProduct {
  const float* a;
  int64_t a_row, a_slice;  // from one row, or from one slice, to the next
  const float* b;
  int64_t b_half, b_slice;
  float* c;
  int64_t c_half, rows;
};

// Other work of a product's time: take() does a part, twice a row. This is none.
struct Nothing {
  void take() {}
};

alignas(64) static const float kZeros[kSide] = {};

// A new value, not tilezero, which waits for the last product into this tile.
template <int TILE, bool ADD>
PYGPT_INLINE void start_sum(const float* c) {
  ADD ? tile_load<TILE>(c, 64) : tile_load<TILE>(kZeros, 0);
}

// A row of c to tiles X and Y; of the row before, which is in Y and Z, the tiles are stored meanwhile: stores that wait for
// their product would fill the window in which the processor looks for other work. Tiles 0 to 3 hold b.
template <int X, int Y, int Z, bool FIRST, bool ADD, bool TWO, class Work>
PYGPT_INLINE void multiply_row(const float* a, int64_t a_slice, float* c, int64_t c_half, Work& work) {
  tile_load_once<4>(a, 64);
  start_sum<X, ADD>(c);
  tile_dot_bf16<X, 4, 0>();
  if constexpr (!FIRST) tile_store<Y>(c - kTile, 64);
  start_sum<Y, ADD>(c + c_half);
  tile_dot_bf16<Y, 4, 2>();
  work.take();
  if constexpr (TWO) {
    tile_load_once<4>(a + a_slice, 64);
    tile_dot_bf16<X, 4, 1>();
  }
  if constexpr (!FIRST) tile_store<Z>(c - kTile + c_half, 64);
  if constexpr (TWO) tile_dot_bf16<Y, 4, 3>();
  work.take();
}

template <bool ADD, bool TWO, class Work>
PYGPT_INLINE void multiply_tiles(const TileProduct& p, Work& work) {
  tile_load<0>(p.b, 64);
  tile_load<2>(p.b + p.b_half, 64);
  if constexpr (TWO) {
    tile_load<1>(p.b + p.b_slice, 64);
    tile_load<3>(p.b + p.b_slice + p.b_half, 64);
  }
  const float* a = p.a;
  float* c = p.c;
  int64_t left = p.rows;
  for (; left >= 4; left -= 4, a += 4 * p.a_row, c += 4 * kTile) {
    multiply_row<5, 6, 7, true, ADD, TWO>(a, p.a_slice, c, p.c_half, work);
    multiply_row<7, 5, 6, false, ADD, TWO>(a + p.a_row, p.a_slice, c + kTile, p.c_half, work);
    multiply_row<6, 7, 5, false, ADD, TWO>(a + 2 * p.a_row, p.a_slice, c + 2 * kTile, p.c_half, work);
    multiply_row<5, 6, 7, false, ADD, TWO>(a + 3 * p.a_row, p.a_slice, c + 3 * kTile, p.c_half, work);
    tile_store<5>(c + 3 * kTile, 64);
    tile_store<6>(c + 3 * kTile + p.c_half, 64);
  }
  for (; left > 0; --left, a += p.a_row, c += kTile) {
    multiply_row<5, 6, 7, true, ADD, TWO>(a, p.a_slice, c, p.c_half, work);
    tile_store<5>(c, 64);
    tile_store<6>(c + p.c_half, 64);
  }
}

template <class Work>
PYGPT_INLINE void multiply_tiles(const TileProduct& p, bool add, bool two, Work& work) {
  if (add)
    two ? multiply_tiles<true, true>(p, work) : multiply_tiles<true, false>(p, work);
  else
    two ? multiply_tiles<false, true>(p, work) : multiply_tiles<false, false>(p, work);
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

// 2^x of fixed-point numbers x in 16 bits, 11 of them fraction, from 2^-31 on, which stands for nothing. Read as one number, a
// float's exponent and mantissa are x to within the 9% by which 1 + f exceeds 2^f for fractions f: the table holds the mean of
// that for each 64th, in units of 2^-11. x is half a last place of bfloat16 too large, so that dropping bits rounds.
constexpr float kFixedHalf = 8.0f / 2048;
constexpr float kFixedLeast = 4096 + kFixedHalf, kFixedOne = kFixedLeast + 31;  // whose last place is 2^-11

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

// 32 queries of a block, a group, against tiles from .. to of a block of keys.
struct TileStep {
  int64_t group, block, from, to;
  bool first;      // that its queries see
  float scale[2];  // of each half of the queries: by what to multiply the scores
  bool by_table[2];  // their exponentials
  bool raised[2];  // their reference has risen, and what was summed before is to be multiplied by
  vf factor[2];
  float *scores, *probabilities;  // of each half of the queries kKeyTiles and kKeySlices tiles
};

// Probabilities from scores of half of a step's queries, eight keys at a time, by the table.
template <bool DROPOUT>
struct Exponentials {
  const float* scores;
  float* probabilities;
  int64_t left;  // eights of keys
  const __mmask16* keep;
  vf scale, offset, sum[2];  // of what multiplies V, as rounded; but before dropout

  Exponentials(const float* from, float* to, int64_t count, const __mmask16* keep, float scale_by, vf reference)
      : scores(from), probabilities(to), left(count), keep(keep), scale(splat(scale_by)),
        offset(kFixedOne - reference), sum{} {}
  __attribute__((always_inline)) void take() {
    if (left == 0) return;
    const __m512i least = _mm512_castps_si512(_mm512_set1_ps(kFixedLeast)), ones = _mm512_set1_epi16(0x3f80);
    const __m512i lower = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
    const __m512i fraction = _mm512_set1_epi64(0x0035002500150005);
    const __m512i table = _mm512_loadu_si512(kCorrections.of);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      vf even = load(scores + i * kSide), odd = load(scores + (i + 1) * kSide);
      asm("" : "+v"(even), "+v"(odd));  // or the compiler copies `scale` instead, by an instruction more
      const __m512i x = _mm512_max_epi32((__m512i)(even * scale + offset), least);
      const __m512i y = _mm512_max_epi32((__m512i)(odd * scale + offset), least);
      const __m512i both = _mm512_mask_shuffle_epi8(x, 0xcccccccccccccccc, y, lower);
      const __m512i at = _mm512_multishift_epi64_epi8(fraction, both);
      const __m512i less = _mm512_maskz_permutexvar_epi8(0x5555555555555555, at, table);
      __m512i p = _mm512_or_si512(_mm512_srli_epi16(_mm512_sub_epi16(both, less), 4), _mm512_set1_epi16(0x3000));
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
};

// The largest scores of half of a step's queries, of no scores at first: sixteen keys at a time.
struct Largest {
  vf top[4];  // that do not wait for each other

  Largest() : top{} {
    for (vf& x : top) x = splat(-std::numeric_limits<float>::infinity());
  }
  __attribute__((always_inline)) void take(const float* scores) {
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) top[i % 4] = vmax(load(scores + i * kSide), top[i % 4]);
  }
  __attribute__((always_inline)) vf all() const { return vmax(vmax(top[0], top[1]), vmax(top[2], top[3])); }
};

// The same of both halves, of all tiles of a block of keys.
struct LargestOfBlock {
  const float* scores;
  int64_t left;  // tiles
  Largest half[2];

  LargestOfBlock(const float* of, bool whole) : scores(of), left(whole ? 2 * kKeyTiles : 0) {}
  __attribute__((always_inline)) void take() {
    if (left == 0) return;
    half[left <= kKeyTiles].take(scores);
    scores += kTile, --left;
  }
  __attribute__((always_inline)) void take_rest() {
    while (left > 0) take();
  }
};

template <class A, class B>
struct Both {
  A& a;
  B& b;
  __attribute__((always_inline)) void take() { a.take(), b.take(); }
};

// The state of one thread: a head's keys and values, a block of queries, and the step under way.
struct TiledForward {
  const AttentionShape& shape;
  const HeadView<const bf16> q, k, v;
  const HeadView<bf16> out;
  const int64_t depth, tiles;                // slices of a sum over D; rows of tiles of O^T
  float *keys, *values;                      // per block of keys (kKeyTiles x depth) tiles, (tiles x kKeySlices) tiles
  float *queries, *output;                   // per group (2 x depth) tiles, (2 x tiles) tiles
  float *scores[2], *probabilities[2];       // of two steps: (2 x kKeyTiles) tiles, (2 x kKeySlices) tiles
  float *largest, *sums;                     // of the softmax, per query: (kBlock)
  float* magnitudes;                         // per block of keys the largest element
  float query_magnitude = 0;
  bool by_table = false;  // the exponentials of the block of queries, where all see all keys of a step
  int64_t head = -1, query, packed_end = 0;  // the block's first query; the blocks of keys packed so far

  TiledForward(const AttentionShape& of, HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
               bf16* to, float* space)
      : shape(of), q(q), k(k), v(v), out{to, of.T * of.H * of.D, of.H * of.D, of.D}, depth(of.width() / 32),
        tiles((of.D + kSide - 1) / kSide) {
    keys = space, space += shape.key_blocks() * kKeyTiles * depth * kTile;
    values = space, space += shape.key_blocks() * kKeySlices * tiles * kTile;
    queries = space, space += kGroups * depth * 2 * kTile;
    output = space, space += kGroups * tiles * 2 * kTile;
    for (int i = 0; i < 2; ++i) {
      scores[i] = space, space += kKeyTiles * 2 * kTile;
      probabilities[i] = space, space += kKeySlices * 2 * kTile;
    }
    largest = space, space += kBlock;
    sums = space, space += kBlock;
    magnitudes = space;
  }

  void pack_keys_and_values(int64_t of_head, Range blocks);
  void pack_queries(int64_t first);
  bool next_step(TileStep& step, Range blocks) const;
  bool fits_table(Range blocks) const;
  template <class Work>
  void compute_scores(const TileStep& step, Work& work);
  template <class Work>
  void add_to_output(const TileStep& step, Work& work);
  void mask_scores(TileStep& step) const;
  void hide(const TileStep& step, int half) const;
  void raise_largest(TileStep& step, int half, vf top);
  void rescale(const TileStep& step);
  template <bool DROPOUT>
  void exponentials(const TileStep& step, int half, const __mmask16* keep);
  template <bool DROPOUT>
  Exponentials<DROPOUT> exponentials_by_table(const TileStep& step, int half, const __mmask16* keep) const;
  template <bool DROPOUT>
  void finish_exponentials(const TileStep& step, int half, Exponentials<DROPOUT>& exponentials);
  void fill_slice(const TileStep& step);
  void largest_scores(const TileStep& step, vf top[2]) const;
  template <bool DROPOUT>
  void attend(Range blocks);
  void finish(float* lse) const;
};

// Elements d .. d + 32 of a row, zero beyond D. Absent rows are zero.
PYGPT_INLINE __m512i load_slice(const bf16* row, int64_t d, int64_t D, bool present) {
  return _mm512_maskz_loadu_epi16(present ? _bzhi_u32(~0u, static_cast<unsigned>(smaller(D - d, 32))) : 0, row + d);
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
template <bool HIGH>
static void pack_columns_of_slice(const bf16* row, int64_t stride, int64_t count, int64_t d, int64_t D, float* to,
                                  int64_t next_tile) {
  vf block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const __m512i even = load_slice(row + 2 * i * stride, d, D, 2 * i < count);
    const __m512i odd = load_slice(row + (2 * i + 1) * stride, d, D, 2 * i + 1 < count);
    block[i] = (vf)(HIGH ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd));
  }
  transpose<kLanes / 2>(block);
  to += HIGH ? 4 * kSide : 0;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (i < 8 || next_tile) store(to + i / 8 * next_tile + (i % 8 / 4 * 8 + i % 4) * kSide, block[i]);
}

// Packs the blocks of keys that were not yet, of queries that never move back.
inline void TiledForward::pack_keys_and_values(int64_t of_head, Range blocks) {
  packed_end = head == of_head ? larger(packed_end, blocks.begin) : blocks.begin;
  head = of_head;
  const int64_t b = head / shape.H, h = head % shape.H, D = shape.D;
  for (; packed_end < blocks.end; ++packed_end) {
    const int64_t first = packed_end * kBlock, count = smaller(kBlock, shape.S - first);
    const bf16* row = k.data + b * k.batch + h * k.head + first * k.time;
    float* to = keys + packed_end * kKeyTiles * depth * kTile;
    __m512i magnitude = {};
    for (int64_t r = 0; r < kBlock; ++r, row += k.time)
      for (int64_t i = 0; i < depth; ++i) {
        const __m512i slice = load_slice(row, i * 32, D, r < count);
        magnitude = larger_magnitudes(magnitude, slice);
        store(to + (r / kSide * depth + i) * kTile + r % kSide * kSide, (vf)slice);
      }
    magnitudes[packed_end] = largest_of(magnitude);
    row = v.data + b * v.batch + h * v.head + first * v.time;
    to = values + packed_end * kKeySlices * tiles * kTile;
    for (int64_t r = 0; r < kBlock; r += 32, row += 32 * v.time, to += kTile)
      for (int64_t d = 0; d < D; d += 32) {
        float* tile = to + d / kSide * kKeySlices * kTile;
        const int64_t next = D - d > kSide ? kKeySlices * kTile : 0;
        pack_columns_of_slice<false>(row, v.time, count - r, d, D, tile, next);
        pack_columns_of_slice<true>(row, v.time, count - r, d, D, tile, next);
      }
  }
}

inline void TiledForward::pack_queries(int64_t first) {
  query = first;
  const int64_t rows = smaller(kBlock, shape.T - query);
  const bf16* row = q.data + head / shape.H * q.batch + head % shape.H * q.head + query * q.time;
  const vu sign = vu{} + (shape.scale < 0 ? 0x80008000u : 0);  // scales the scores by a factor that keeps their order
  __m512i magnitude = {};
  for (int64_t r = 0; r < round_up(rows, kQueries); r += kSide, row += kSide * q.time)
    for (int64_t i = 0; i < depth; ++i) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const __m512i slice = load_slice(row + j * q.time, i * 32, shape.D, r + j < rows);
        magnitude = larger_magnitudes(magnitude, slice);
        block[j] = (vf)((vu)slice ^ sign);
      }
      transpose<kLanes / 2>(block);
      float* to = queries + (r / kSide * depth + i) * kTile;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + j * kSide, block[j]);
    }
  query_magnitude = largest_of(magnitude);
}

// Whether all scores, which are no larger than this, times log2(e), have a place in the table's fixed-point numbers.
inline bool TiledForward::fits_table(Range blocks) const {
  float key_magnitude = 0;
  for (int64_t i = blocks.begin; i < blocks.end; ++i) key_magnitude = key_magnitude > magnitudes[i] ? key_magnitude : magnitudes[i];
  return query_magnitude * key_magnitude * static_cast<float>(shape.D) * std::fabs(shape.scale) * kLog2E < 4000;
}

// The step after this one, of block -1 before the first: false where there is none. Keys that no query of a group sees
// are left out by tiles, but the sum over keys begins at a multiple of 32.
inline bool TiledForward::next_step(TileStep& step, Range blocks) const {
  const int64_t groups = (smaller(kBlock, shape.T - query) + kQueries - 1) / kQueries;
  for (;;) {
    if (step.block < 0)
      step.block = blocks.begin, step.group = 0;
    else if (++step.block == blocks.end)
      step.block = blocks.begin, ++step.group;
    if (step.group == groups) return false;
    const int64_t first = query + step.group * kQueries, last = smaller(first + kQueries, shape.T) - 1;
    const int64_t begin = shape.first_key(head, first), key = step.block * kBlock;
    const int64_t end = smaller(kBlock, shape.end_key(last) - key);
    step.from = larger(0, begin - key) / 32 * 2, step.to = (end + kSide - 1) / kSide;
    step.first = step.block == begin / kBlock;
    step.scale[0] = step.scale[1] = std::fabs(shape.scale) * kLog2E;
    if (step.from < step.to && end > 0) return true;
  }
}

template <class Work>
__attribute__((always_inline)) inline void TiledForward::compute_scores(const TileStep& step, Work& work) {
  for (int64_t i = 0; i < depth; i += 2)
    multiply_tiles({keys + ((step.block * kKeyTiles + step.from) * depth + i) * kTile, depth * kTile, kTile,
                    queries + (step.group * 2 * depth + i) * kTile, depth * kTile, kTile,
                    step.scores + step.from * kTile, kKeyTiles * kTile, step.to - step.from},
                   i > 0, i + 1 < depth, work);
}

template <class Work>
__attribute__((always_inline)) inline void TiledForward::add_to_output(const TileStep& step, Work& work) {
  const int64_t slice = step.from / 2;
  multiply_tiles({values + (step.block * tiles * kKeySlices + slice) * kTile, kKeySlices * kTile, kTile,
                  step.probabilities + slice * kTile, kKeySlices * kTile, kTile,
                  output + step.group * 2 * tiles * kTile, tiles * kTile, tiles},
                 !step.first, step.to - step.from > 2, work);
}

// Scales the scores of half of the queries, and hides those of keys that are not seen.
inline void TiledForward::hide(const TileStep& step, int half) const {
  const int64_t first = query + step.group * kQueries + half * kSide, key = step.block * kBlock;
  vi begin, end = lane_numbers() + static_cast<int32_t>(shape.end_key(first));
  for (int i = 0; i < kLanes; ++i) begin[i] = static_cast<int32_t>(shape.first_key(head, first + i));
  float* s = step.scores + half * kKeyTiles * kTile;
  for (int64_t i = step.from * kSide; i < step.to * kSide; ++i) {
    const vi at = vi{} + static_cast<int32_t>(key + i);
    const vf scaled = load(s + i * kSide) * step.scale[half];
    store(s + i * kSide, (begin <= at) & (at < end) ? scaled : splat(-std::numeric_limits<float>::infinity()));
  }
}

inline void TiledForward::mask_scores(TileStep& step) const {
  const int64_t from = step.block * kBlock + step.from * kSide, to = step.block * kBlock + step.to * kSide;
  for (int half = 0; half < 2; ++half) {
    const int64_t first = query + step.group * kQueries + half * kSide, last = smaller(first + kSide, shape.T) - 1;
    const bool masked = shape.first_key(head, last) > from || to > shape.end_key(first);
    step.by_table[half] = by_table && !masked;
    if (!masked) continue;
    hide(step, half);
    step.scale[half] = 1;
  }
}

// Largest scores and sums of half of the queries rise to this step's reference, a fixed-point number.
inline void TiledForward::raise_largest(TileStep& step, int half, vf top) {
  const int64_t at = step.group * kQueries + half * kSide;
  const vf before = load(largest + at), after = vmax(kFixedOne - (kFixedOne - top * step.scale[half]), before);
  step.raised[half] = _mm512_cmp_ps_mask((__m512)after, (__m512)before, _CMP_NEQ_UQ) != 0;
  if (!step.raised[half]) return;
  step.factor[half] = vexp2(before - after);
  store(largest + at, after);
  store(sums + at, load(sums + at) * step.factor[half]);
}

inline void TiledForward::rescale(const TileStep& step) {
  for (int half = 0; half < 2; ++half) {
    if (step.first || !step.raised[half]) continue;
    float* o = output + (step.group * 2 + half) * tiles * kTile;
    for (int64_t i = 0; i < tiles * kSide; i += 8)
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) store(o + (i + j) * kSide, load(o + (i + j) * kSide) * step.factor[half]);
  }
}

// Scores of half of the queries -> probabilities, unnormalised: of any scores.
template <bool DROPOUT>
void TiledForward::exponentials(const TileStep& step, int half, const __mmask16* keep) {
  const float* s = step.scores + half * kKeyTiles * kTile;
  float* p = step.probabilities + half * kKeySlices * kTile;
  const int64_t at = step.group * kQueries + half * kSide;
  const vf scale = splat(step.scale[half]), top = load(largest + at);
  vf sum_even = {}, sum_odd = {};  // of what multiplies V, as rounded; but before dropout
#pragma GCC unroll 4
  for (int64_t i = step.from * kSide; i < step.to * kSide; i += 2) {
    vf even = drop_lower(exp2_to_drop(load(s + i * kSide) * scale - top));
    vf odd = drop_lower(exp2_to_drop(load(s + (i + 1) * kSide) * scale - top));
    sum_even += even;
    sum_odd += odd;
    if constexpr (DROPOUT) {
      even = (vf)_mm512_maskz_mov_ps(keep[i], (__m512)even);
      odd = (vf)_mm512_maskz_mov_ps(keep[i + 1], (__m512)odd);
    }
    store(p + i / 2 * kSide, pair_upper(even, odd));
  }
  store(sums + at, load(sums + at) + (sum_even + sum_odd));
}

// The table's part of them: none where exponentials() does it.
template <bool DROPOUT>
Exponentials<DROPOUT> TiledForward::exponentials_by_table(const TileStep& step, int half, const __mmask16* keep) const {
  return {step.scores + (half * kKeyTiles + step.from) * kTile,
          step.probabilities + half * kKeySlices * kTile + step.from * (kTile / 2),
          step.by_table[half] ? 2 * (step.to - step.from) : 0, keep + step.from * kSide, step.scale[half],
          load(largest + step.group * kQueries + half * kSide)};
}

template <bool DROPOUT>
void TiledForward::finish_exponentials(const TileStep& step, int half, Exponentials<DROPOUT>& exponentials) {
  exponentials.take_rest();
  if (!step.by_table[half]) return;
  float* to = sums + step.group * kQueries + half * kSide;
  store(to, load(to) + (exponentials.sum[0] + exponentials.sum[1]));
}

// The sum over keys goes in whole slices: the probabilities of keys that are missing are 0.
inline void TiledForward::fill_slice(const TileStep& step) {
  if (step.to % 2 == 0) return;
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < kSide / 2; ++i)
      store(step.probabilities + half * kKeySlices * kTile + step.to * (kTile / 2) + i * kSide, vf{});
}

inline void TiledForward::largest_scores(const TileStep& step, vf top[2]) const {
  for (int half = 0; half < 2; ++half) {
    Largest largest;
    for (int64_t tile = step.from; tile < step.to; ++tile) largest.take(step.scores + (half * kKeyTiles + tile) * kTile);
    top[half] = largest.all();
  }
}

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

// The block of queries against blocks of keys.
template <bool DROPOUT>
void TiledForward::attend(Range blocks) {
  for (int64_t i = 0; i < kBlock; ++i) largest[i] = std::numeric_limits<float>::lowest(), sums[i] = 0;
  by_table = fits_table(blocks);
  Nothing nothing;
  TileStep before, now, next = {};
  next.block = -1;
  bool begun = false, more = next_step(next, blocks);
  next.scores = scores[0], next.probabilities = probabilities[0];
  compute_scores(next, nothing);
  mask_scores(next);
  vf top[2];
  largest_scores(next, top);
  while (more) {
    now = next;
    __mmask16 keep[2][kBlock];
    for (int half = 0; half < 2; ++half) {
      raise_largest(now, half, top[half]);
      if constexpr (DROPOUT)
        dropout_keep_by_key(shape.dropout, head, query + now.group * kQueries + half * kSide, now.block, keep[half]);
      if (!now.by_table[half]) exponentials<DROPOUT>(now, half, keep[half]);
    }
    more = next_step(next, blocks);
    const int other = now.scores == scores[0];
    next.scores = scores[other], next.probabilities = probabilities[other];

    Exponentials<DROPOUT> first = exponentials_by_table<DROPOUT>(now, 0, keep[0]);
    if (more) {
      compute_scores(next, first);
      mask_scores(next);
    }
    finish_exponentials(now, 0, first);

    Exponentials<DROPOUT> second = exponentials_by_table<DROPOUT>(now, 1, keep[1]);
    const bool whole = more && next.to - next.from == kKeyTiles;
    LargestOfBlock of_next(next.scores, whole);
    if (begun) {
      Both<Exponentials<DROPOUT>, LargestOfBlock> both{second, of_next};
      rescale(before);
      add_to_output(before, both);
    }
    finish_exponentials(now, 1, second);
    of_next.take_rest();
    fill_slice(now);
    if (whole)
      for (int half = 0; half < 2; ++half) top[half] = of_next.half[half].all();
    else if (more)
      largest_scores(next, top);
    before = now, begun = true;
  }
  rescale(before);
  add_to_output(before, nothing);
}

// Divides by the sums and writes out (B, T, H, D) and lse (B, H, T).
inline void TiledForward::finish(float* lse) const {
  const int64_t rows = smaller(kBlock, shape.T - query), D = shape.D;
  bf16* to = out.data + head / shape.H * out.batch + head % shape.H * out.head + query * out.time;
  lse += head * shape.T + query;
  const float kept = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
  for (int64_t r = 0; r < rows; r += kSide, to += kSide * out.time) {
    const float* o = output + r / kSide * tiles * kTile;
    const vf sum = load(sums + r), factor = kept / sum;
    for (int64_t d = 0; d < D; d += kSide, o += kTile) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(o + i * kSide) * factor;
      transpose<kLanes / 2>(block);
      for (int64_t i = 0; i < smaller(kSide, rows - r); ++i)
        store_step(to + i * out.time + d, block[i], smaller(kSide, D - d));
    }
    store_step(lse + r, (load(largest + r) + vlog2(sum)) * kLn2, smaller(kSide, rows - r));
  }
}

// Results below the normal range are zero while this lives: a scalef that has one takes 200 cycles otherwise.
struct FlushScope {
  const unsigned before = _mm_getcsr();
  FlushScope() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushScope() { _mm_setcsr(before); }
  FlushScope(const FlushScope&) = delete;
};

// Work items first .. last, an item being (batch, head, block of queries) in this order, ascending.
inline void attention_forward_tiles(const AttentionShape& shape, HeadView<const bf16> q, HeadView<const bf16> k,
                                    HeadView<const bf16> v, bf16* out, float* lse, float* workspace, int64_t first,
                                    int64_t last) {
  const TileScope tiles;
  const FlushScope flush;
  TiledForward forward(shape, q, k, v, out, workspace);
  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item / shape.query_blocks(), block = item % shape.query_blocks();
    const Range blocks = {shape.first_key_block(head, block), shape.end_key_block(block)};
    forward.pack_keys_and_values(head, blocks);
    forward.pack_queries(block * kBlock);
    shape.dropout.on ? forward.attend<true>(blocks) : forward.attend<false>(blocks);
    forward.finish(lse);
  }
}

}  // namespace pygpt::PYGPT_ISA
