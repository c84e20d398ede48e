// Forward of causal attention in bfloat16 by AMX tiles (see foreach_isa.h): the online softmax of attention_kernel.h.
//
// Scores are computed transposed, S^T = K Q^T: a vector holds 16 queries' scores of one key, so that the queries' maxima
// need nothing across lanes, and two keys' probabilities, packed, are a row of P^T as the next product, O^T = V^T P^T,
// takes it.
//
// A step is 32 queries against up to 64 keys. What bounds it is the traffic of tiles, then the vectors' arithmetic, and only
// then products; so all three go on at once: between the rows of the product that makes the next step's scores, and of the
// one that adds the last step's output, stand the exponentials of this step. All that a step works on but keys and values
// stays in the first-level cache, which those pass by.
//
// The reference that a query's scores are taken from, elsewhere the largest so far, is one that they exceed by less than a factor
// of 2: it is chosen larger than them (kMargin), and what exceeds it by more is done again. So there is no pass over the
// scores for their largest, and what was summed is seldom multiplied.

namespace pygpt::PYGPT_ISA {

// 32 queries of a block, a group, against tiles from .. to of a block of keys.
struct TileStep {
  int64_t group, block, from, to;
  bool first;      // that its queries see
  Range seen[2];   // of each half of the queries: the tiles of keys that all of them see, whose exponentials go by the table
  bool raised[2];  // their reference has risen, and what was summed before is to be multiplied by
  vf factor[2];
  float *scores, *probabilities;  // of each half of the queries kKeyTiles and kKeySlices tiles
};

// The state of one thread: a head's keys and values, a block of queries, and the step under way.
struct TiledForward {
  const AttentionShape& shape;
  const HeadView<const bf16> q, k, v;
  const HeadView<bf16> out;
  const float scale;                         // of scores as powers of 2
  const int64_t depth, tiles;                // slices of a sum over D; rows of tiles of O^T
  float *keys, *values;                      // per block of keys (kKeyTiles x depth) tiles, (tiles x kKeySlices) tiles
  float *queries, *output;                   // per group (2 x depth) tiles, (2 x tiles) tiles
  float *scores[2], *probabilities[2];       // of two steps: (2 x kKeyTiles) tiles, (2 x kKeySlices) tiles
  float *reference, *sums;                   // of the softmax, per query: (kBlock)
  float* magnitudes;                         // per block of keys the largest element
  float query_magnitude = 0;
  bool by_table = false;  // the exponentials of the block of queries, of keys that all of a half see
  int64_t head = -1, query, packed_end = 0;  // the block's first query; the blocks of keys packed so far

  TiledForward(const AttentionShape& of, HeadView<const bf16> q, HeadView<const bf16> k, HeadView<const bf16> v,
               bf16* to, float* space)
      : shape(of), q(q), k(k), v(v), out{to, of.T * of.H * of.D, of.H * of.D, of.D},
        // not 0, nor what the processor may take for it, which times the -infinity of a hidden score is no number
        scale(std::fmax(std::fabs(of.scale) * kLog2E, std::numeric_limits<float>::min())), depth(of.width() / 32),
        tiles((of.D + kSide - 1) / kSide) {
    keys = space, space += shape.key_blocks() * kKeyTiles * depth * kTile;
    values = space, space += shape.key_blocks() * kKeySlices * tiles * kTile;
    queries = space, space += kGroups * depth * 2 * kTile;
    output = space, space += kGroups * tiles * 2 * kTile;
    for (int i = 0; i < 2; ++i) {
      scores[i] = space, space += kKeyTiles * 2 * kTile;
      probabilities[i] = space, space += kKeySlices * 2 * kTile;
    }
    reference = space, space += kBlock;
    sums = space, space += kBlock;
    magnitudes = space;
  }

  void pack_keys_and_values(int64_t of_head, Range blocks);
  template <bool WHOLE>
  void pack_block(int64_t block, int64_t count);
  void pack_queries(int64_t first);
  template <bool WHOLE>
  void pack_rows(int64_t rows);
  bool next_step(TileStep& step, Range blocks) const;
  bool fits_table(Range blocks) const;
  template <class Work>
  void compute_scores(const TileStep& step, Work& work);
  template <class Work>
  void add_to_output(const TileStep& step, Work& work);
  void mask_scores(TileStep& step) const;
  void hide(const TileStep& step, int half, Range tiles) const;
  void raise_reference(TileStep& step, int half, __mmask16 queries);
  void rescale(const TileStep& step);
  template <bool DROPOUT>
  void exponentials(const TileStep& step, int half, Range tiles, __mmask16 queries, const __mmask16* keep);
  template <bool DROPOUT>
  Exponentials<DROPOUT> exponentials_by_table(const TileStep& step, int half, const __mmask16* keep) const;
  template <bool DROPOUT>
  void finish_exponentials(TileStep& step, int half, Exponentials<DROPOUT>& by, const __mmask16* keep);
  void fill_slice(const TileStep& step);
  template <bool DROPOUT>
  void prepare(TileStep& step, int half, const __mmask16* keep);
  template <bool DROPOUT>
  void attend(Range blocks);
  void finish(float* lse) const;
  template <bool WHOLE>
  void finish_rows(int64_t rows, float* lse) const;
};

// Packs the blocks of keys that were not yet, of queries that never move back.
inline void TiledForward::pack_keys_and_values(int64_t of_head, Range blocks) {
  packed_end = head == of_head ? larger(packed_end, blocks.begin) : blocks.begin;
  head = of_head;
  for (; packed_end < blocks.end; ++packed_end) {
    const int64_t count = smaller(kBlock, shape.S - packed_end * kBlock);
    count == kBlock && shape.D % 32 == 0 ? pack_block<true>(packed_end, count) : pack_block<false>(packed_end, count);
  }
}

template <bool WHOLE>
void TiledForward::pack_block(int64_t block, int64_t count) {
  const int64_t b = head / shape.H, h = head % shape.H, first = block * kBlock, D = shape.D;
  const bf16* row = k.at(b, first, h);
  float* to = keys + block * kKeyTiles * depth * kTile;
  __m512i magnitude = {};
  for (int64_t r = 0; r < kBlock; ++r, row += k.time)
    for (int64_t i = 0; i < depth; ++i) {
      const __m512i slice = load_slice<WHOLE>(row, i * 32, D, r < count);
      magnitude = larger_magnitudes(magnitude, slice);
      store(to + (r / kSide * depth + i) * kTile + r % kSide * kSide, (vf)slice);
    }
  magnitudes[block] = largest_of(magnitude);
  row = v.at(b, first, h);
  to = values + block * kKeySlices * tiles * kTile;
  for (int64_t r = 0; r < kBlock; r += 32, row += 32 * v.time, to += kTile)
    for (int64_t d = 0; d < D; d += 32) {
      float* tile = to + d / kSide * kKeySlices * kTile;
      const int64_t next = D - d > kSide ? kKeySlices * kTile : 0;
      pack_columns_of_slice<false, WHOLE>(row, v.time, count - r, d, D, tile, next);
      pack_columns_of_slice<true, WHOLE>(row, v.time, count - r, d, D, tile, next);
    }
}

inline void TiledForward::pack_queries(int64_t first) {
  query = first;
  const int64_t rows = smaller(kBlock, shape.T - query);
  rows % kQueries == 0 && shape.D % 32 == 0 ? pack_rows<true>(rows) : pack_rows<false>(rows);
}

template <bool WHOLE>
void TiledForward::pack_rows(int64_t rows) {
  const bf16* row = q.at(head / shape.H, query, head % shape.H);
  const vu sign = vu{} + (shape.scale < 0 ? 0x80008000u : 0);  // scales the scores by a factor that keeps their order
  __m512i magnitude = {};
  for (int64_t r = 0; r < round_up(rows, kQueries); r += kSide, row += kSide * q.time)
    for (int64_t i = 0; i < depth; ++i) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const __m512i slice = load_slice<WHOLE>(row + j * q.time, i * 32, shape.D, r + j < rows);
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
  return query_magnitude * key_magnitude * static_cast<float>(shape.D) * scale < 4000;
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

// Hides the scores of keys that are not seen.
inline void TiledForward::hide(const TileStep& step, int half, Range tiles) const {
  const int64_t first = query + step.group * kQueries + half * kSide, key = step.block * kBlock;
  vi begin, end = lane_numbers() + static_cast<int32_t>(shape.end_key(first));
  for (int i = 0; i < kLanes; ++i) begin[i] = static_cast<int32_t>(shape.first_key(head, first + i));
  float* s = step.scores + half * kKeyTiles * kTile;
  for (int64_t i = tiles.begin * kSide; i < tiles.end * kSide; ++i) {
    const vi at = vi{} + static_cast<int32_t>(key + i);
    store(s + i * kSide, (begin <= at) & (at < end) ? load(s + i * kSide) : splat(-std::numeric_limits<float>::infinity()));
  }
}

inline void TiledForward::mask_scores(TileStep& step) const {
  const int64_t key = step.block * kBlock;
  for (int half = 0; half < 2; ++half) {
    const int64_t first = query + step.group * kQueries + half * kSide, last = smaller(first + kSide, shape.T) - 1;
    const int64_t begin = shape.first_key(head, last) - key, end = shape.end_key(first) - key;
    Range& seen = step.seen[half];
    seen.end = larger(step.from, smaller(step.to, end / kSide));
    seen.begin = smaller(seen.end, larger(step.from, (begin + kSide - 1) / kSide));
    hide(step, half, {step.from, seen.begin});
    hide(step, half, {seen.end, step.to});
  }
}

// References, fixed-point numbers, of some of half of the queries rise kMargin beyond this step's largest scores, where these
// are larger, and sums with them.
inline void TiledForward::raise_reference(TileStep& step, int half, __mmask16 queries) {
  vf top[4];  // that do not wait for each other
  for (vf& x : top) x = splat(-std::numeric_limits<float>::infinity());
  const float* s = step.scores + half * kKeyTiles * kTile;
  for (int64_t i = step.from * kSide; i < step.to * kSide; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) top[j] = vmax(load(s + (i + j) * kSide), top[j]);
  const vf most = vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
  const int64_t at = step.group * kQueries + half * kSide;
  const vf before = load(reference + at), needed = kFixedOne - (kFixedOne - most * scale);
  const __mmask16 higher = _mm512_mask_cmp_ps_mask(queries, (__m512)needed, (__m512)before, _CMP_GT_OQ);
  step.raised[half] = higher != 0;
  if (!step.raised[half]) return;
  const vf after = (vf)_mm512_mask_add_ps((__m512)before, higher, (__m512)needed, (__m512)splat(kMargin));
  step.factor[half] = vexp2(before - after);
  store(reference + at, after);
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

// Scores of some of half of the queries -> probabilities, unnormalised: of any scores.
template <bool DROPOUT>
void TiledForward::exponentials(const TileStep& step, int half, Range tiles, __mmask16 queries, const __mmask16* keep) {
  if (tiles.begin == tiles.end) return;
  const float* s = step.scores + half * kKeyTiles * kTile;
  float* p = step.probabilities + half * kKeySlices * kTile;
  const int64_t at = step.group * kQueries + half * kSide;
  const vf from = load(reference + at);
  vf sum_even = {}, sum_odd = {};  // of what multiplies V, as rounded; but before dropout
#pragma GCC unroll 4
  for (int64_t i = tiles.begin * kSide; i < tiles.end * kSide; i += 2) {
    vf even = drop_lower(exp2_to_drop(load(s + i * kSide) * scale - from));
    vf odd = drop_lower(exp2_to_drop(load(s + (i + 1) * kSide) * scale - from));
    sum_even += even;
    sum_odd += odd;
    if constexpr (DROPOUT) {
      even = (vf)_mm512_maskz_mov_ps(keep[i], (__m512)even);
      odd = (vf)_mm512_maskz_mov_ps(keep[i + 1], (__m512)odd);
    }
    _mm512_mask_store_ps(p + i / 2 * kSide, queries, (__m512)pair_upper(even, odd));
  }
  _mm512_mask_store_ps(sums + at, queries, (__m512)(load(sums + at) + (sum_even + sum_odd)));
}

// The table's part of them.
template <bool DROPOUT>
Exponentials<DROPOUT> TiledForward::exponentials_by_table(const TileStep& step, int half, const __mmask16* keep) const {
  const Range seen = step.seen[half];
  return {step.scores + (half * kKeyTiles + seen.begin) * kTile,
          step.probabilities + half * kKeySlices * kTile + seen.begin * (kTile / 2),
          by_table ? 2 * (seen.end - seen.begin) : 0, keep + seen.begin * kSide, scale,
          load(reference + step.group * kQueries + half * kSide)};
}

template <bool DROPOUT>
void TiledForward::finish_exponentials(TileStep& step, int half, Exponentials<DROPOUT>& by, const __mmask16* keep) {
  by.take_rest();
  if (!by_table) return;
  const __mmask16 again = by.exceeded();
  float* to = sums + step.group * kQueries + half * kSide;
  _mm512_mask_store_ps(to, static_cast<__mmask16>(~again), (__m512)(load(to) + (by.sum[0] + by.sum[1])));
  if (again == 0) return;
  raise_reference(step, half, again);  // for the first time: one that prepare() raised is above all scores of the step
  exponentials<DROPOUT>(step, half, step.seen[half], again, keep);
}

// The sum over keys goes in whole slices: the probabilities of keys that are missing are 0.
inline void TiledForward::fill_slice(const TileStep& step) {
  if (step.to % 2 == 0) return;
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < kSide / 2; ++i)
      store(step.probabilities + half * kKeySlices * kTile + step.to * (kTile / 2) + i * kSide, vf{});
}

// What of the exponentials stands beside no product: those that do not go by the table. They need a reference that holds; so do
// a query's first scores.
template <bool DROPOUT>
void TiledForward::prepare(TileStep& step, int half, const __mmask16* keep) {
  const Range all = {step.from, step.to}, seen = step.seen[half];
  step.raised[half] = false;
  if (by_table && !step.first && seen.begin == all.begin && seen.end == all.end) return;
  raise_reference(step, half, 0xffff);
  if (!by_table) return exponentials<DROPOUT>(step, half, all, 0xffff, keep);
  exponentials<DROPOUT>(step, half, {all.begin, seen.begin}, 0xffff, keep);
  exponentials<DROPOUT>(step, half, {seen.end, all.end}, 0xffff, keep);
}

// The block of queries against blocks of keys.
template <bool DROPOUT>
void TiledForward::attend(Range blocks) {
  for (int64_t i = 0; i < kBlock; ++i) reference[i] = std::numeric_limits<float>::lowest(), sums[i] = 0;
  by_table = fits_table(blocks);
  Nothing nothing;
  TileStep steps[3];  // by turns
  int64_t n = 0;
  steps[0].block = -1;
  bool more = next_step(steps[0], blocks);
  steps[0].scores = scores[0], steps[0].probabilities = probabilities[0];
  compute_scores(steps[0], nothing);
  mask_scores(steps[0]);
  for (; more; ++n) {
    TileStep &now = steps[n % 3], &next = steps[(n + 1) % 3], &before = steps[(n + 2) % 3];
    __mmask16 keep[2][kBlock];
    for (int half = 0; half < 2; ++half) {
      if constexpr (DROPOUT)
        dropout_keep_by_key(shape.dropout, head, query + now.group * kQueries + half * kSide, now.block, keep[half]);
      prepare<DROPOUT>(now, half, keep[half]);
    }
    next.group = now.group, next.block = now.block;
    more = next_step(next, blocks);
    next.scores = scores[(n + 1) % 2], next.probabilities = probabilities[(n + 1) % 2];

    Exponentials<DROPOUT> first = exponentials_by_table<DROPOUT>(now, 0, keep[0]);
    if (more) {
      compute_scores(next, first);
      mask_scores(next);
    }
    finish_exponentials(now, 0, first, keep[0]);

    Exponentials<DROPOUT> second = exponentials_by_table<DROPOUT>(now, 1, keep[1]);
    if (n > 0) {
      rescale(before);
      add_to_output(before, second);
    }
    finish_exponentials(now, 1, second, keep[1]);
    fill_slice(now);
  }
  const TileStep& last = steps[(n + 2) % 3];
  rescale(last);
  add_to_output(last, nothing);
}

// Divides by the sums and writes out (B, T, H, D) and lse (B, H, T).
inline void TiledForward::finish(float* lse) const {
  const int64_t rows = smaller(kBlock, shape.T - query);
  lse += head * shape.T + query;
  rows % kSide == 0 && shape.D % 32 == 0 ? finish_rows<true>(rows, lse) : finish_rows<false>(rows, lse);
}

template <bool WHOLE>
void TiledForward::finish_rows(int64_t rows, float* lse) const {
  const int64_t D = shape.D;
  bf16* to = out.at(head / shape.H, query, head % shape.H);
  const float kept = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
  for (int64_t r = 0; r < rows; r += kSide, to += kSide * out.time) {
    const float* o = output + r / kSide * tiles * kTile;
    const vf sum = load(sums + r), factor = kept / sum;
    for (int64_t d = 0; d < D; d += 32, o += 2 * kTile) {
      __m512i row[kLanes];
      load_rows_of_columns(o, D - d > kSide ? kTile : 0, factor, row);  // where there is no second tile, none is stored
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (WHOLE || r + i < rows) store_slice<WHOLE>(to + i * out.time, d, D, row[i]);
    }
    store_step(lse + r, (load(reference + r) + vlog2(sum)) * kLn2, smaller(kSide, rows - r));
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
