// Forward of causal attention for one instruction set (see foreach_isa.h): the online softmax of Milakov and Gimelshein
// (2018) over blocks of keys, as in FlashAttention (Dao et al., 2022). No T x S matrix exists: a group of queries
// has 64 scores each at a time, in the first-level cache.
//
// Scores are kept in units of log2: s = scale * log2(e) * q.k, probabilities are 2^(s - max). Sums are float32.

namespace pygpt::PYGPT_ISA {

// The exponential of the softmax: bfloat16 products round probabilities to 8 bits, so 3e-6 is exact enough there.
template <class T>
PYGPT_INLINE vf softmax_exp2(vf x) {
  return vexp2<kPair<T> == 2 ? 4 : 5>(x);
}

// The running softmax of a group of queries: largest score, sum of probabilities per lane.
struct Running {
  float* largest;  // (rows)
  float* sum;      // (rows x kLanes)
};

// The keys that a query sees, counted from the first column of its scores: begin may be negative, end beyond the last.
struct Seen {
  int64_t begin, end;
  bool all(int64_t from, int64_t to) const { return begin <= from && to <= end; }
};

PYGPT_INLINE Seen seen_from(const AttentionShape& shape, int64_t head, int64_t query, int64_t key) {
  return {shape.first_key(head, query) - key, shape.end_key(query) - key};
}

PYGPT_INLINE vf visible(vf x, int64_t j, Seen seen, vf otherwise) {
  const vi lane = lane_numbers() + static_cast<int32_t>(j);
  return (lane >= static_cast<int32_t>(seen.begin)) & (lane < static_cast<int32_t>(seen.end)) ? x : otherwise;
}

// Hides the keys that are not seen, and returns the largest score, at least `largest`.
PYGPT_INLINE float mask_scores(float* scores, int64_t columns, Seen seen, float largest) {
  vf top = splat(largest);
  for (int64_t j = 0; j < columns; j += kLanes) {
    vf x = load(scores + j);
    if (!seen.all(j, j + kLanes)) {
      x = visible(x, j, seen, splat(-std::numeric_limits<float>::infinity()));
      store(scores + j, x);
    }
    top = vmax(top, x);
  }
  return reduce_max(top);
}

// Replaces the scores by probabilities (units of kPair<T>), unnormalised, and adds them to the running sum. Dropped
// ones count in the sum and become zero. With pairs, the sum is that of the rounded probabilities which multiply V.
template <class T>
PYGPT_INLINE vf probabilities(float* scores, int64_t columns, float largest, vf sum, const vi* keep) {
  const vf top = splat(largest), zero = {};
#ifdef PYGPT_AVX512_BF16
  if constexpr (kPair<T> == 2) {
    const vf ones = (vf)_mm512_set1_epi32(0x3f803f80);
    for (int64_t j = 0; j < columns; j += 2 * kLanes) {
      const vf a = softmax_exp2<T>(load(scores + j) - top);
      const vf b = j + kLanes < columns ? softmax_exp2<T>(load(scores + j + kLanes) - top) : zero;
      vf both = pair_along(a, b);
      sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)ones);
      if (keep) {  // of an odd number of vectors the last pair has but one mask
        const vf kept_b = j + kLanes < columns ? (keep[j / kLanes + 1] ? b : zero) : zero;
        both = pair_along(keep[j / kLanes] ? a : zero, kept_b);
      }
      store(scores + j / 2, both);
    }
    return sum;
  }
#endif
  for (int64_t j = 0; j < columns; j += kLanes) {
    const vf x = softmax_exp2<T>(load(scores + j) - top);
    sum += x;
    store(scores + j, keep ? (keep[j / kLanes] ? x : zero) : x);
  }
  return sum;
}

// Scores (rows x `columns`, rows kBlock apart) -> probabilities. The first row is that of `query`, the first column of
// `key`, a multiple of kLanes; all columns are of one block. factor[r]: by what to multiply the output and sum so far.
template <class T>
static void softmax_rows(const AttentionShape& shape, float* scores, int rows, int64_t columns, Running running,
                         float* factor, int64_t head, int64_t query, int64_t key) {
  float before[kLanes] = {}, after[kLanes] = {};
  for (int r = 0; r < rows; ++r) {
    before[r] = running.largest[r];
    const Seen seen = seen_from(shape, head, query + r, key);
    const float top = mask_scores(scores + r * kBlock, columns, seen, before[r]);
    running.largest[r] = top;
    // Where no key was seen so far, or scores overflowed, there must be no -inf - -inf.
    after[r] = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
  }
  store(factor, vexp2(load(before) - load(after)));
  for (int r = 0; r < rows; ++r) {
    vi keep[kBlock / kLanes];
    if (shape.dropout.on) dropout_keep(shape.dropout, head, query + r, key / kBlock, keep);
    float* sum = running.sum + r * kLanes;
    store(sum, probabilities<T>(scores + r * kBlock, columns, after[r], load(sum) * factor[r],
                                shape.dropout.on ? keep + key % kBlock / kLanes : nullptr));
  }
}

// Packed keys and values of one head: the blocks of the queries so far, whose ranges never move back.
template <class T>
struct PackedHead {
  float *keys, *values;  // per block of keys: (width / kPair x kBlock), (kBlock / kPair x width)
  int64_t head = -1, blocks = 0;

  void need(const AttentionShape& shape, HeadView<const T> k, HeadView<const T> v, int64_t of_head,
            Range range) {
    blocks = head == of_head ? larger(blocks, range.begin) : range.begin;
    head = of_head;
    const int64_t b = head / shape.H, h = head % shape.H, width = shape.width(), size = kBlock * width / kPair<T>;
    for (; blocks < range.end; ++blocks) {
      const int64_t first = blocks * kBlock, count = smaller(kBlock, shape.S - first);
      pack_transposed(k.data + b * k.batch + h * k.head + first * k.time, k.time, count, shape.D, width,
                      keys + blocks * size);
      pack_summed_rows(v.data + b * v.batch + h * v.head + first * v.time, v.time, count, shape.D, width,
                       values + blocks * size);
    }
  }
};

// Divides by the sums and writes out (B, T, H, D) and lse (B, H, T).
template <class T>
static void finish_rows(const AttentionShape& shape, const float* o, Running running, int64_t rows, T* out,
                        float* lse) {
  const float keep = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
  const int64_t D = shape.D, width = shape.width(), stride = shape.H * D;
  for (int64_t r = 0; r < rows; ++r) lse[r] = reduce_add(load(running.sum + r * kLanes));
  for (int64_t r = 0; r < rows; ++r, o += width, out += stride) {
    const vf factor = splat(keep / lse[r]);
    PYGPT_FOR_LANES(D, store_step(out + i, load(o + i) * factor, n);)
  }
  for (int64_t r = 0; r < rows; ++r) lse[r] = (running.largest[r] + std::log2(lse[r])) * kLn2;
}

template <int LEVEL = 3, class T>
PYGPT_INLINE void prefetch_row(const T* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, 0, LEVEL);
}

// Asks for `rows` rows of a head, from `first` on and before `end`, so that packing finds them in the cache.
template <class T>
PYGPT_INLINE void prefetch_rows(HeadView<const T> x, int64_t H, int64_t D, int64_t head, int64_t first, int64_t rows,
                                int64_t end) {
  const T* row = x.data + head / H * x.batch + head % H * x.head + first * x.time;
  for (int64_t r = first; r < smaller(end, first + rows); ++r, row += x.time) prefetch_row(row, D);
}

// A group of queries, `rows` of them or up to kRows - 1 less, the first of them row `row` of its block, against `seen` keys of
// one block from `from` on.
struct Group {
  int64_t row, rows, key_block, from, seen;
  float* scores;  // (rows x kBlock)
};

// Of a group whose scores are computed: the softmax, and what it adds to the output.
template <class T>
PYGPT_INLINE void attend(const AttentionShape& shape, const PackedHead<T>& packed, const Group& group, Running running,
                   float* o, int64_t head, int64_t q0) {
  constexpr int P = kPair<T>;
  const int64_t r = group.row, width = shape.width(), first_key = group.key_block * kBlock + group.from;
  float factor[kGroup + kLanes];
  for (int64_t i = 0; i < group.rows; i += kRows)
    softmax_rows<T>(shape, group.scores + i * kBlock, static_cast<int>(smaller(kRows, shape.T - q0 - r - i)),
                    round_up(group.seen, kLanes), {running.largest + r + i, running.sum + (r + i) * kLanes}, factor + i, head,
                    q0 + r + i, first_key);
  product<P, false, Into::rescale>(group.scores, kBlock, packed.values + first_key / P * width, width, o + r * width,
                                   width, (group.seen + P - 1) / P, group.rows, shape.D, factor);
}

// Work items first .. last, an item being (batch, head, block of queries) in this order, ascending.
template <class T>
void attention_forward(const AttentionShape& shape, HeadView<const T> q, HeadView<const T> k, HeadView<const T> v,
                       T* out, float* lse, float* workspace, int64_t first, int64_t last) {
  constexpr int P = kPair<T>;
  const int64_t D = shape.D, width = shape.width(), units = (D + P - 1) / P, panel = kBlock * width / P;
  const float scale = shape.scale * kLog2E;
  PackedHead<T> packed;
  packed.keys = workspace;
  packed.values = packed.keys + shape.key_blocks() * panel;
  float* queries = packed.values + shape.key_blocks() * panel;
  float* o = queries + panel;
  float* scores = o + kBlock * width;
  const Running running = {scores + kGroup * kBlock, scores + kGroup * kBlock + kBlock};
  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item / shape.query_blocks(), block = item % shape.query_blocks();
    const int64_t b = head / shape.H, h = head % shape.H, q0 = block * kBlock, rows = smaller(kBlock, shape.T - q0);
    const Range key_blocks = {shape.first_key_block(head, block), shape.end_key_block(block)};
    packed.need(shape, k, v, head, key_blocks);
    pack_rows(q.data + b * q.batch + h * q.head + q0 * q.time, q.time, rows, D, width, queries);
    std::memset(queries + rows * (width / P), 0, (round_up(rows, kRows) - rows) * (width / P) * sizeof(float));
    std::memset(o, 0, round_up(rows, kRows) * width * sizeof(float));
    std::memset(running.sum, 0, kBlock * kLanes * sizeof(float));
    for (int64_t r = 0; r < kBlock; ++r) running.largest[r] = -std::numeric_limits<float>::infinity();
    for (int64_t key_block = key_blocks.begin; key_block < key_blocks.end; ++key_block) {
      // Where some see more than others, small groups have less to hide.
      const int64_t k0 = key_block * kBlock, group = shape.all_see(q0, k0 + kBlock) ? kGroup : kRows;
      for (int64_t r = 0; r < rows; r += group) {
        const int64_t here = smaller(group, round_up(rows - r, kRows));
        // Keys of this block that the group sees: its first query begins first, its last query ends last.
        const int64_t first_key = larger(0, shape.first_key(head, q0 + r) - k0);
        const int64_t from = first_key / kLanes * kLanes;
        const int64_t seen = smaller(kBlock, shape.end_key(q0 + smaller(r + here, rows) - 1) - k0) - from;
        if (seen <= 0) continue;
        if (key_block == key_blocks.begin && item + 1 < last) {
          const int64_t next_head = (item + 1) / shape.query_blocks(), next = (item + 1) % shape.query_blocks();
          const int64_t next_key = (shape.end_key_block(next) - 1) * kBlock + r;
          prefetch_rows(q, shape.H, D, next_head, next * kBlock + r, here, shape.T);
          prefetch_rows(k, shape.H, D, next_head, next_key, here, shape.S);
          prefetch_rows(v, shape.H, D, next_head, next_key, here, shape.S);
        }
        product<P, false, Into::scale>(queries + r * (width / P), width / P, packed.keys + key_block * panel + from, kBlock,
                                       scores, kBlock, units, here, seen, &scale);
        attend<T>(shape, packed, {r, here, key_block, from, seen, scores}, running, o, head, q0);
      }
    }
    finish_rows(shape, o, running, rows, out + ((b * shape.T + q0) * shape.H + h) * D, lse + head * shape.T + q0);
  }
}

}  // namespace pygpt::PYGPT_ISA
