// Forward of causal attention in bfloat16 by AMX tiles (see foreach_isa.h): the online softmax of attention_kernel.h.
//
// Scores are computed transposed, S^T = K Q^T: a vector holds 16 queries' scores of one key, so that the queries' maxima
// need nothing across lanes, and two keys' probabilities, packed, are a row of P^T as the next product, O^T = V^T P^T,
// takes it. V^T has a row of ones below its D rows: there the product sums the probabilities as rounded. Every operand
// is stored as tiles, 16 rows of 64 bytes one after another.
//
// A step is 16 queries against up to 64 keys. Products and exponentials overlap: the scores of the next step and the
// output of the one before are computed between the exponentials of this one.

namespace pygpt::PYGPT_ISA {

constexpr int64_t kSide = 16, kTile = kSide * kSide;  // rows of a tile, its 32-bit units
constexpr int64_t kGroups = kBlock / kSide;           // of a block: groups of queries, tiles of keys
constexpr int64_t kSums = 5;                          // tiles that a product sums at a time

// --- products ------------------------------------------------------------------------------------------------------

// Tiles c[0 .. count] = (or +=) the sums over i < slices of a[i][0 .. count] b[i]. Tile 0 holds b, 1 and 2 a, 3 to 7 c.
struct TileProduct {
  const float* a;
  int64_t a_slice, a_tile;  // from one slice or tile to the next
  const float* b;           // slices follow one another
  float* c;                 // tiles follow one another
  int64_t count, slices;
  bool add;
};

enum class Tiles { zero, load, multiply, store };

template <Tiles WHAT, int I = 0>
PYGPT_INLINE void each_tile(const TileProduct& p, int64_t slice) {
  if (I >= p.count) return;
  if constexpr (WHAT == Tiles::zero) tile_zero<3 + I>();
  if constexpr (WHAT == Tiles::load) tile_load<3 + I>(p.c + I * kTile, 64);
  if constexpr (WHAT == Tiles::store) tile_store<3 + I>(p.c + I * kTile, 64);
  if constexpr (WHAT == Tiles::multiply) {
    tile_load<1 + I % 2>(p.a + slice * p.a_slice + I * p.a_tile, 64);
    tile_dot_bf16<3 + I, 1 + I % 2, 0>();
  }
  if constexpr (I + 1 < kSums) each_tile<WHAT, I + 1>(p, slice);
}

static void multiply_slice(const TileProduct& p, int64_t slice) {
  if (slice == 0) p.add ? each_tile<Tiles::load>(p, 0) : each_tile<Tiles::zero>(p, 0);
  tile_load<0>(p.b + slice * kTile, 64);
  each_tile<Tiles::multiply>(p, slice);
  if (slice == p.slices - 1) each_tile<Tiles::store>(p, 0);
}

// Products that wait to be done, in order, some slices at a time.
struct TileWork {
  TileProduct products[2 + (256 / kSide + 1) / kSums];
  int64_t count = 0, at = 0, slice = 0, slices = 0;  // slices: in all, of those added

  void add(const TileProduct& product) {
    products[count++] = product;
    slices += product.slices;
  }
  void advance(int64_t n) {
    for (; n > 0; --n) {
      multiply_slice(products[at], slice);
      if (++slice == products[at].slices) ++at, slice = 0;
    }
  }
  void clear() { count = at = slice = slices = 0; }
};

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

// 16 queries of a block, a group, against tiles from .. to of a block of keys.
struct TileStep {
  int64_t group, block, from, to;
  bool first;   // that its queries see
  float scale;  // by what to multiply the scores
};

// The state of one thread: a head's keys and values, a block of queries, and the steps under way.
struct TiledForward {
  const AttentionShape& shape;
  const int64_t depth, tiles;  // slices of a sum over D; tiles of O^T
  float *keys, *values;        // per block of keys (kGroups x depth) tiles, (kBlock / 32 x tiles) tiles
  float *queries, *output;     // (kGroups x depth) tiles, (kGroups x tiles) tiles
  float *scores[2], *probabilities[2];  // of a step: (kBlock x kSide), (kBlock / 2 x kSide units)
  float *largest, *sums;       // (kBlock); sums where dropout hides them from the product
  int64_t head = -1, query, packed_end = 0;  // query: the block's first one
  TileWork work;

  TiledForward(const AttentionShape& of, float* space)
      : shape(of), depth(of.width() / 32), tiles((of.D + kSide) / kSide) {
    keys = space, space += shape.key_blocks() * kGroups * depth * kTile;
    values = space, space += shape.key_blocks() * (kBlock / 32) * tiles * kTile;
    queries = space, space += kGroups * depth * kTile;
    output = space, space += kGroups * tiles * kTile;
    for (float*& at : scores) at = space, space += kBlock * kSide;
    for (float*& at : probabilities) at = space, space += kBlock / 2 * kSide;
    largest = space, space += kBlock;
    sums = space;
  }

  void pack_keys_and_values(HeadView<const bf16> k, HeadView<const bf16> v, int64_t of_head, Range blocks);
  void pack_queries(HeadView<const bf16> q);
  bool next_step(TileStep& step, Range blocks) const;
  void add_scores(const TileStep& step, int parity);
  void add_output(const TileStep& step, int parity);
  void mask(TileStep& step, float* s) const;
  vf raise_largest(TileStep& step, float* s);
  void rescale(const TileStep& step, vf factor);
  template <bool DROPOUT>
  void exponentials(const TileStep& step, int64_t tile, int parity, const __mmask16* keep);
  void attend(Range blocks);
  void finish(bf16* out, float* lse) const;
};

// Packs the blocks of keys that were not yet, of queries that never move back.
inline void TiledForward::pack_keys_and_values(HeadView<const bf16> k, HeadView<const bf16> v, int64_t of_head,
                                               Range blocks) {
  packed_end = head == of_head ? larger(packed_end, blocks.begin) : blocks.begin;
  head = of_head;
  const int64_t b = head / shape.H, h = head % shape.H, D = shape.D;
  for (; packed_end < blocks.end; ++packed_end) {
    const int64_t first = packed_end * kBlock, count = smaller(kBlock, shape.S - first);
    const bf16* row = k.data + b * k.batch + h * k.head + first * k.time;
    float* to = keys + packed_end * kGroups * depth * kTile;
    for (int64_t r = 0; r < kBlock; ++r, row += k.time)
      for (int64_t i = 0; i < depth; ++i)
        store(to + (r / kSide * depth + i) * kTile + r % kSide * kSide,
              r < count ? load_units(row, i * 32, D) : vf{});
    row = v.data + b * v.batch + h * v.head + first * v.time;
    to = values + packed_end * (kBlock / 32) * tiles * kTile;
    for (int64_t r = 0; r < kBlock; r += 32)
      for (int64_t d = 0; d < tiles * kSide; d += kSide, to += kTile) {
        vf block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int64_t even = r + 2 * i;
          const bf16* at = row + even * v.time + d;
          block[i] = even < count ? load_pair_of_rows(at, even + 1 < count ? at + v.time : nullptr, D - d) : vf{};
        }
        transpose<kLanes / 2>(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * kSide, block[i]);
        if (D >= d && D < d + kSide) store(to + (D - d) * kSide, (vf)(vu{} + 0x3f803f80u));
      }
  }
}

inline void TiledForward::pack_queries(HeadView<const bf16> q) {
  const int64_t rows = smaller(kBlock, shape.T - query);
  const bf16* row = q.data + head / shape.H * q.batch + head % shape.H * q.head + query * q.time;
  const vu sign = vu{} + (shape.scale < 0 ? 0x80008000u : 0);  // scales the scores by a factor that keeps their order
  for (int64_t r = 0; r < rows; r += kSide)
    for (int64_t i = 0; i < depth; ++i) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        block[j] = r + j < rows ? (vf)((vu)load_units(row + (r + j) * q.time, i * 32, shape.D) ^ sign) : vf{};
      transpose<kLanes / 2>(block);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(queries + (r / kSide * depth + i) * kTile + j * kSide, block[j]);
    }
}

// The step after this one, of block -1 before the first: false where there is none. Keys that no query of a group sees
// are left out by tiles, but the sum over keys begins at a multiple of 32.
inline bool TiledForward::next_step(TileStep& step, Range blocks) const {
  const int64_t groups = (smaller(kBlock, shape.T - query) + kSide - 1) / kSide;
  for (;;) {
    if (step.block < 0)
      step.block = blocks.begin, step.group = 0;
    else if (++step.group == groups)
      ++step.block, step.group = 0;
    if (step.block == blocks.end) return false;
    const int64_t first = query + step.group * kSide, last = smaller(first + kSide, shape.T) - 1;
    const int64_t begin = shape.first_key(head, first), key = step.block * kBlock;
    const int64_t end = smaller(kBlock, shape.end_key(last) - key);
    step.from = larger(0, begin - key) / 32 * 2, step.to = (end + kSide - 1) / kSide;
    step.first = step.block == begin / kBlock;
    step.scale = std::fabs(shape.scale) * kLog2E;
    if (step.from < step.to && end > 0) return true;
  }
}

inline void TiledForward::add_scores(const TileStep& step, int parity) {
  work.add({keys + (step.block * kGroups + step.from) * depth * kTile, kTile, depth * kTile,
            queries + step.group * depth * kTile, scores[parity] + step.from * kTile, step.to - step.from, depth,
            false});
}

inline void TiledForward::add_output(const TileStep& step, int parity) {
  const float* p = probabilities[parity] + step.from / 2 * kTile;
  for (int64_t i = 0; i < tiles; i += kSums)
    work.add({values + ((step.block * (kBlock / 32) + step.from / 2) * tiles + i) * kTile, tiles * kTile, kTile, p,
              output + (step.group * tiles + i) * kTile, smaller(kSums, tiles - i), (step.to - step.from + 1) / 2,
              !step.first});
}

// Where some query of the step does not see some key: scales the scores and hides those.
inline void TiledForward::mask(TileStep& step, float* s) const {
  const int64_t first = query + step.group * kSide, last = smaller(first + kSide, shape.T) - 1;
  const int64_t from = step.block * kBlock + step.from * kSide, to = step.block * kBlock + step.to * kSide;
  if (shape.first_key(head, last) <= from && to <= shape.end_key(first)) return;
  vi begin, end = lane_numbers() + static_cast<int32_t>(shape.end_key(first));
  for (int i = 0; i < kLanes; ++i) begin[i] = static_cast<int32_t>(shape.first_key(head, first + i));
  for (int64_t key = from; key < to; ++key, s += kSide) {
    const vi at = vi{} + static_cast<int32_t>(key);
    store(s, (begin <= at) & (at < end) ? load(s) * step.scale : splat(-std::numeric_limits<float>::infinity()));
  }
  step.scale = 1;
}

// The queries' largest score becomes that with this step's. Returns by what to multiply what is summed so far.
inline vf TiledForward::raise_largest(TileStep& step, float* s) {
  s += step.from * kTile;
  mask(step, s);
  vf top[4];
  for (vf& t : top) t = splat(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < (step.to - step.from) * kTile; i += 4 * kSide)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) top[j] = vmax(load(s + i + j * kSide), top[j]);
  float* at = largest + step.group * kSide;
  const vf before = load(at);
  const vf after = vmax(vmax(vmax(top[0], top[1]), vmax(top[2], top[3])) * step.scale, before);
  store(at, after);
  const vf factor = vexp2(before - after);
  float* sum = sums + step.group * kSide;
  store(sum, load(sum) * factor);
  return factor;
}

inline void TiledForward::rescale(const TileStep& step, vf factor) {
  if (step.first || _mm512_cmp_ps_mask((__m512)factor, _mm512_set1_ps(1), _CMP_NEQ_UQ) == 0) return;
  float* o = output + step.group * tiles * kTile;
  for (int64_t i = 0; i <= shape.D; ++i, o += kSide) store(o, load(o) * factor);
}

// Scores of a tile of keys -> probabilities, unnormalised.
template <bool DROPOUT>
void TiledForward::exponentials(const TileStep& step, int64_t tile, int parity, const __mmask16* keep) {
  const float* s = scores[parity] + tile * kTile;
  float* p = probabilities[parity] + tile / 2 * kTile + tile % 2 * (kTile / 2);
  const vf scale = splat(step.scale), top = load(largest + step.group * kSide);
  [[maybe_unused]] vf sum = {};
#pragma GCC unroll 8
  for (int i = 0; i < kSide; i += 2) {
    vf even = exp2_to_drop(load(s + i * kSide) * scale - top);
    vf odd = exp2_to_drop(load(s + (i + 1) * kSide) * scale - top);
    if constexpr (DROPOUT) {
      sum += drop_lower(even) + drop_lower(odd);
      even = (vf)_mm512_maskz_mov_ps(keep[tile * kSide + i], (__m512)even);
      odd = (vf)_mm512_maskz_mov_ps(keep[tile * kSide + i + 1], (__m512)odd);
    }
    store(p + i / 2 * kSide, pair_upper(even, odd));
  }
  if constexpr (DROPOUT) {
    float* at = sums + step.group * kSide;
    store(at, load(at) + sum);
  }
  if (tile % 2 == 0 && tile + 1 == step.to) std::memset(p + kTile / 2, 0, kTile / 2 * sizeof(float));
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
inline void TiledForward::attend(Range blocks) {
  for (int64_t i = 0; i < kBlock; ++i) largest[i] = std::numeric_limits<float>::lowest(), sums[i] = 0;
  TileStep before = {}, now = {}, next = {};
  next.block = -1;
  bool more = next_step(next, blocks);
  int parity = 0;
  work.clear();
  add_scores(next, parity);
  work.advance(work.slices);
  vf factor = raise_largest(next, scores[parity]);
  for (bool any_before = false; more; any_before = true, parity ^= 1) {
    now = next;
    more = next_step(next, blocks);
    work.clear();
    if (more) add_scores(next, parity ^ 1);
    if (any_before) add_output(before, parity ^ 1);
    __mmask16 keep[kBlock];
    if (shape.dropout.on) dropout_keep_by_key(shape.dropout, head, query + now.group * kSide, now.block, keep);
    const int64_t count = now.to - now.from;
    for (int64_t i = 0, done = 0; i < count; ++i) {
      const int64_t until = (i + 1) * work.slices / count;
      work.advance(until - done);
      done = until;
      shape.dropout.on ? exponentials<true>(now, now.from + i, parity, keep)
                       : exponentials<false>(now, now.from + i, parity, nullptr);
    }
    rescale(now, factor);
    if (more) factor = raise_largest(next, scores[parity ^ 1]);
    before = now;
  }
  work.clear();
  add_output(before, parity ^ 1);
  work.advance(work.slices);
}

// Divides by the sums and writes out (B, T, H, D) and lse (B, H, T).
inline void TiledForward::finish(bf16* out, float* lse) const {
  const int64_t rows = smaller(kBlock, shape.T - query), D = shape.D, stride = shape.H * D;
  const float kept = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
  for (int64_t r = 0; r < rows; r += kSide, out += kSide * stride) {
    const float* o = output + r * tiles * kSide;
    const vf sum = shape.dropout.on ? load(sums + r) : load(o + D * kSide), factor = kept / sum;
    for (int64_t d = 0; d < D; d += kSide) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(o + (d + i) * kSide) * factor;
      transpose<kLanes / 2>(block);
      for (int64_t i = 0; i < smaller(kSide, rows - r); ++i)
        D - d >= kSide ? store(out + i * stride + d, block[i]) : store(out + i * stride + d, block[i], D - d);
    }
    for (int64_t i = 0; i < smaller(kSide, rows - r); ++i) lse[r + i] = (largest[r + i] + std::log2(sum[i])) * kLn2;
  }
}

// Work items first .. last, an item being (batch, head, block of queries) in this order, ascending.
inline void attention_forward_tiles(const AttentionShape& shape, HeadView<const bf16> q, HeadView<const bf16> k,
                                    HeadView<const bf16> v, bf16* out, float* lse, float* workspace, int64_t first,
                                    int64_t last) {
  const TileScope tiles;
  TiledForward forward(shape, workspace);
  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item / shape.query_blocks(), block = item % shape.query_blocks(), query = block * kBlock;
    const Range blocks = {shape.first_key_block(head, block), shape.end_key_block(block)};
    forward.pack_keys_and_values(k, v, head, blocks);
    forward.query = query;
    forward.pack_queries(q);
    forward.attend(blocks);
    forward.finish(out + ((head / shape.H * shape.T + query) * shape.H + head % shape.H) * shape.D,
                   lse + head * shape.T + query);
  }
}

}  // namespace pygpt::PYGPT_ISA
