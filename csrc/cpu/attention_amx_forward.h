// Forward of causal attention in bfloat16 by AMX tiles (see foreach_isa.h): the online softmax of attention_kernel.h.
//
// Scores are computed transposed, S^T = K Q^T: a vector holds 16 queries' scores of one key, so that the queries' maxima
// need nothing across lanes, and two keys' probabilities, packed, are a row of P^T as the next product, O^T = V^T P^T,
// takes it. Every operand is stored as tiles, 16 rows of 64 bytes one after another.
//
// A step is 32 queries against up to 64 keys: all that it reads and writes but keys and values stays in the first-level
// cache. Products and exponentials take turns: tiles multiply on the port of one of the two vector units, and mixing both
// more finely gains nothing. But comparisons, which wait for loads, are hidden between the rows of a product.

namespace pygpt::PYGPT_ISA {

constexpr int64_t kSide = 16, kTile = kSide * kSide;  // rows of a tile, its 32-bit units
constexpr int64_t kQueries = 2 * kSide;               // of a step
constexpr int64_t kGroups = kBlock / kQueries, kKeyTiles = kBlock / kSide, kKeySlices = kBlock / 32;  // of a block

// --- products ------------------------------------------------------------------------------------------------------

// c = a b, or with ADD c += a b, in tiles: c is (rows x 2), a (rows x slices) and b (slices x 2), with one or TWO slices.
// Tiles 0 to 3 hold b for all rows, 4 and 5 a row of a, 6 and 7 one of c: so storing c overlaps with the next products.
struct TileProduct {
  const float* a;
  int64_t a_row, a_slice;  // from one row, or from one slice, to the next
  const float* b;
  float* c;
  int64_t rows;
};

// Other work of a product's time: take() after each row of tiles. This is none.
struct Nothing {
  void take() {}
};

template <bool ADD, bool TWO, class Between>
static Between multiply_tiles(const TileProduct& p, Between between) {
  tile_load<0>(p.b, 64);
  tile_load<1>(p.b + kTile, 64);
  if constexpr (TWO) {
    tile_load<2>(p.b + 2 * kTile, 64);
    tile_load<3>(p.b + 3 * kTile, 64);
  }
  const float* a = p.a;
  float* c = p.c;
  for (int64_t row = 0; row < p.rows; ++row, a += p.a_row, c += 2 * kTile) {
    tile_load<4>(a, 64);
    if constexpr (ADD) {
      tile_load<6>(c, 64);
      tile_load<7>(c + kTile, 64);
    } else {
      tile_zero<6>();
      tile_zero<7>();
    }
    tile_dot_bf16<6, 4, 0>();
    tile_dot_bf16<7, 4, 1>();
    if constexpr (TWO) {
      tile_load<5>(a + p.a_slice, 64);
      tile_dot_bf16<6, 5, 2>();
      tile_dot_bf16<7, 5, 3>();
    }
    tile_store<6>(c, 64);
    tile_store<7>(c + kTile, 64);
    between.take();
  }
  return between;
}

template <class Between = Nothing>
static Between multiply_tiles(const TileProduct& p, bool add, bool two, const Between& between = {}) {
  if (add) return two ? multiply_tiles<true, true>(p, between) : multiply_tiles<true, false>(p, between);
  return two ? multiply_tiles<false, true>(p, between) : multiply_tiles<false, false>(p, between);
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

// 32 queries of a block, a group, against tiles from .. to of a block of keys.
struct TileStep {
  int64_t group, block, from, to;
  bool first;      // that its queries see
  float scale[2];  // by what to multiply the scores of each half of the queries
};

// The largest scores of a step's queries, of no scores at first.
struct Largest {
  const float* scores;
  int64_t tiles;  // pairs of tiles still to be taken, one pair at a time
  vf top[8];      // four for each half of the queries, that do not wait for each other

  Largest(const float* of, int64_t count) : scores(of), tiles(count) {
    for (vf& x : top) x = splat(-std::numeric_limits<float>::infinity());
  }
  __attribute__((always_inline)) void take() {
    if (tiles == 0) return;
#pragma GCC unroll 32
    for (int i = 0; i < 2 * kSide; ++i) {
      vf& x = top[i / kSide * 4 + i % 4];
      x = vmax(load(scores + i * kSide), x);
    }
    scores += 2 * kTile, --tiles;
  }
  Largest& take_rest() {
    while (tiles > 0) take();
    return *this;
  }
  __attribute__((always_inline)) vf of_half(int half) const {
    const vf* x = top + half * 4;
    return vmax(vmax(x[0], x[1]), vmax(x[2], x[3]));
  }
};

// The state of one thread: a head's keys and values, a block of queries, and the step under way.
struct TiledForward {
  const AttentionShape& shape;
  const HeadView<const bf16> q, k, v;
  const HeadView<bf16> out;
  const int64_t depth, tiles;                // slices of a sum over D; rows of tiles of O^T
  float *keys, *values;                      // per block of keys (kKeyTiles x depth) tiles, (tiles x kKeySlices) tiles
  float *queries, *output;                   // per group (depth x 2) tiles, (tiles x 2) tiles
  float *scores, *probabilities;             // of a step: (kKeyTiles x 2) tiles, (kKeySlices x 2) tiles
  float *largest, *sums;                     // of the softmax, per query: (kBlock)
  int64_t head = -1, query, packed_end = 0;  // the block's first query; the blocks of keys packed so far

  TiledForward(const AttentionShape& of, HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
               bf16* to, float* space)
      : shape(of), q(q), k(k), v(v), out{to, of.T * of.H * of.D, of.H * of.D, of.D}, depth(of.width() / 32),
        tiles((of.D + kSide - 1) / kSide) {
    keys = space, space += shape.key_blocks() * kKeyTiles * depth * kTile;
    values = space, space += shape.key_blocks() * kKeySlices * tiles * kTile;
    queries = space, space += kGroups * depth * 2 * kTile;
    output = space, space += kGroups * tiles * 2 * kTile;
    scores = space, space += kKeyTiles * 2 * kTile;
    probabilities = space, space += kKeySlices * 2 * kTile;
    largest = space, space += kBlock;
    sums = space;
  }

  void pack_keys_and_values(int64_t of_head, Range blocks);
  void pack_queries(int64_t first);
  bool next_step(TileStep& step, Range blocks) const;
  void compute_scores(const TileStep& step);
  Largest mask_scores(TileStep& step) const;
  Largest add_to_output(const TileStep& step, const Largest& next);
  bool mask(const TileStep& step, int half, float* s) const;
  void raise_largest(const TileStep& step, int half, const Largest& top);
  template <bool DROPOUT>
  void exponentials(const TileStep& step, int64_t tile, int half, const __mmask16* keep);
  void attend(Range blocks);
  void finish(float* lse) const;
};

// Elements d .. d + 32 of a row, zero beyond D. Absent rows are zero.
PYGPT_INLINE __m512i load_slice(const bf16* row, int64_t d, int64_t D, bool present) {
  return _mm512_maskz_loadu_epi16(present ? _bzhi_u32(~0u, static_cast<unsigned>(smaller(D - d, 32))) : 0, row + d);
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
    for (int64_t r = 0; r < kBlock; ++r, row += k.time)
      for (int64_t i = 0; i < depth; ++i)
        store(to + (r / kSide * depth + i) * kTile + r % kSide * kSide, (vf)load_slice(row, i * 32, D, r < count));
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
  for (int64_t r = 0; r < round_up(rows, kQueries); r += kSide, row += kSide * q.time)
    for (int64_t i = 0; i < depth; ++i) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        block[j] = (vf)((vu)load_slice(row + j * q.time, i * 32, shape.D, r + j < rows) ^ sign);
      transpose<kLanes / 2>(block);
      float* to = queries + ((r / kQueries * depth + i) * 2 + r / kSide % 2) * kTile;
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + j * kSide, block[j]);
    }
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

inline void TiledForward::compute_scores(const TileStep& step) {
  for (int64_t i = 0; i < depth; i += 2)
    multiply_tiles({keys + ((step.block * kKeyTiles + step.from) * depth + i) * kTile, depth * kTile, kTile,
                    queries + (step.group * depth + i) * 2 * kTile, scores + step.from * 2 * kTile,
                    step.to - step.from}, i > 0, i + 1 < depth);
}

// Meanwhile it takes the largest scores of the next step.
inline Largest TiledForward::add_to_output(const TileStep& step, const Largest& next) {
  const int64_t slice = step.from / 2;
  return multiply_tiles({values + (step.block * tiles * kKeySlices + slice) * kTile, kKeySlices * kTile, kTile,
                         probabilities + slice * 2 * kTile, output + step.group * tiles * 2 * kTile, tiles},
                        !step.first, step.to - step.from > 2, next).take_rest();
}

// Where some query does not see some key: scales the scores, hides those that are not seen, and returns true.
inline bool TiledForward::mask(const TileStep& step, int half, float* s) const {
  const int64_t first = query + step.group * kQueries + half * kSide, last = smaller(first + kSide, shape.T) - 1;
  const int64_t from = step.block * kBlock + step.from * kSide, to = step.block * kBlock + step.to * kSide;
  if (shape.first_key(head, last) <= from && to <= shape.end_key(first)) return false;
  vi begin, end = lane_numbers() + static_cast<int32_t>(shape.end_key(first));
  for (int i = 0; i < kLanes; ++i) begin[i] = static_cast<int32_t>(shape.first_key(head, first + i));
  for (int64_t key = from; key < to; key += kSide, s += kTile)
    for (int i = 0; i < kSide; ++i, s += kSide) {
      const vi at = vi{} + static_cast<int32_t>(key + i);
      const vf scaled = load(s) * step.scale[half];
      store(s, (begin <= at) & (at < end) ? scaled : splat(-std::numeric_limits<float>::infinity()));
    }
  return true;
}

// Hides what queries do not see. Returns the search for the largest scores, to begin.
inline Largest TiledForward::mask_scores(TileStep& step) const {
  float* s = scores + step.from * 2 * kTile;
  for (int half = 0; half < 2; ++half)
    if (mask(step, half, s + half * kTile)) step.scale[half] = 1;
  return {s, step.to - step.from};
}

// Largest scores and sums of half of the queries rise to this step's reference; what was summed so far is rescaled.
inline void TiledForward::raise_largest(const TileStep& step, int half, const Largest& top) {
  const int64_t at = step.group * kQueries + half * kSide;
  const vf before = load(largest + at), after = vmax(top.of_half(half) * step.scale[half], before);
  if (_mm512_cmp_ps_mask((__m512)after, (__m512)before, _CMP_NEQ_UQ) == 0) return;
  const vf factor = vexp2(before - after);
  store(largest + at, after);
  store(sums + at, load(sums + at) * factor);
  if (step.first) return;
  float* o = output + (step.group * tiles * 2 + half) * kTile;
  for (int64_t d = 0; d < shape.D; d += kSide, o += 2 * kTile)
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) store(o + i * kSide, load(o + i * kSide) * factor);
}

// Scores of a tile of keys and half of the queries -> probabilities, unnormalised.
template <bool DROPOUT>
void TiledForward::exponentials(const TileStep& step, int64_t tile, int half, const __mmask16* keep) {
  const float* s = scores + (tile * 2 + half) * kTile;
  float* p = probabilities + (tile / 2 * 2 + half) * kTile + tile % 2 * (kTile / 2);
  const vf scale = splat(step.scale[half]), top = load(largest + step.group * kQueries + half * kSide);
  vf sum_even = {}, sum_odd = {};  // of what multiplies V, as rounded; but before dropout
#pragma GCC unroll 8
  for (int i = 0; i < kSide; i += 2) {
    vf even = drop_lower(exp2_to_drop(load(s + i * kSide) * scale - top));
    vf odd = drop_lower(exp2_to_drop(load(s + (i + 1) * kSide) * scale - top));
    sum_even += even;
    sum_odd += odd;
    if constexpr (DROPOUT) {
      even = (vf)_mm512_maskz_mov_ps(keep[tile * kSide + i], (__m512)even);
      odd = (vf)_mm512_maskz_mov_ps(keep[tile * kSide + i + 1], (__m512)odd);
    }
    store(p + i / 2 * kSide, pair_upper(even, odd));
  }
  float* sum = sums + step.group * kQueries + half * kSide;
  store(sum, load(sum) + (sum_even + sum_odd));
  if (tile % 2 == 0 && tile + 1 == step.to)  // the sum over keys goes in whole slices
    for (int i = 0; i < kSide / 2; ++i) store(p + kTile / 2 + i * kSide, vf{});
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

// The block of queries against blocks of keys. Between a product and what reads its result stands other work, so that
// nothing waits: the scores of the next step are computed before the output of this one.
inline void TiledForward::attend(Range blocks) {
  for (int64_t i = 0; i < kBlock; ++i) largest[i] = std::numeric_limits<float>::lowest(), sums[i] = 0;
  TileStep step = {};
  step.block = -1;
  next_step(step, blocks);
  compute_scores(step);
  Largest top = mask_scores(step).take_rest();
  for (bool more = true; more;) {
    for (int half = 0; half < 2; ++half) raise_largest(step, half, top);
    const TileStep now = step;
    more = next_step(step, blocks);
    for (int half = 0; half < 2; ++half) {
      __mmask16 keep[kBlock];
      const int64_t first = query + now.group * kQueries + half * kSide;
      if (shape.dropout.on) dropout_keep_by_key(shape.dropout, head, first, now.block, keep);
      for (int64_t tile = now.from; tile < now.to; ++tile) {
        shape.dropout.on ? exponentials<true>(now, tile, half, keep) : exponentials<false>(now, tile, half, keep);
      }
    }
    if (more) compute_scores(step);
    top = add_to_output(now, more ? mask_scores(step) : Largest(nullptr, 0));
  }
}

// Divides by the sums and writes out (B, T, H, D) and lse (B, H, T).
inline void TiledForward::finish(float* lse) const {
  const int64_t rows = smaller(kBlock, shape.T - query), D = shape.D;
  bf16* to = out.data + head / shape.H * out.batch + head % shape.H * out.head + query * out.time;
  lse += head * shape.T + query;
  const float kept = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
  for (int64_t r = 0; r < rows; r += kSide, to += kSide * out.time) {
    const float* o = output + (r / kQueries * tiles * 2 + r / kSide % 2) * kTile;
    const vf sum = load(sums + r), factor = kept / sum;
    for (int64_t d = 0; d < D; d += kSide, o += 2 * kTile) {
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
    forward.attend(blocks);
    forward.finish(lse);
  }
}

}  // namespace pygpt::PYGPT_ISA
