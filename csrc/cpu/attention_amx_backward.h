// Backward of causal attention in bfloat16 by AMX tiles (see foreach_isa.h and attention_backward_kernel.h, whose formulas
// these are). Scores are computed transposed, keys in rows and queries in the lanes of a vector: then what belongs to a
// query, its log-sum-exp and delta, is a vector too, and no number is ever spread over a vector or summed across one.
//
//   S^T = K Q^T,  dP^T = V dO^T,  dV = P^T dO,  dK = scale dS^T Q,  dQ^T = scale K^T dS^T
//
// Everything is made of blocks of 32 x 32, 2 x 2 tiles: an operand's are 2 KB, a result's 4 KB, each tile 1 KB of its own.
// A first operand has rows of 32 elements, a second one rows of 16 pairs; what is absent is zero. Pairs of queries are 16
// apart, so that P^T becomes an operand lane by lane: the low half of a unit is of one vector, the high half of the next.
// Pairs of keys are neighbours.
//
// Any result is one chain of sums over ascending steps of 32, wherever a call begins and ends, and whether a step is left
// out depends on where it lies alone: hence the same bits however the work is divided.

namespace pygpt::PYGPT_ISA {

constexpr int64_t kStep = 32;
// Queries and keys that are taken together, all in the second-level cache: the deeper sums over them are, the less often
// a result is loaded and stored.
constexpr int64_t kBlockQueries = kTileQueries, kBlockKeys = kTileKeys;
// Floats of a block of an operand, of a block of a result.
constexpr int64_t kOperand = 2 * kTile, kResult = 4 * kTile;

// Where the parts of the workspace lie. n: the head dimension in steps; a block is of an operand unless it is a result.
struct TileBuffers {
  // Of the head. Per step of queries, n blocks of each: second operands Q^T and dO^T (two columns of n tiles), second operands Q
  // and dO, the result dQ^T.
  float *query_across, *grad_across, *query, *grad, *grad_q;
  // Of kBlockKeys keys. Per step, n blocks of each: first operands K and V, the results dK and dV. First operand K^T: per step
  // of the head dimension the blocks of all keys.
  float *key, *value, *grad_k, *grad_v, *key_across;
  float *scores, *grad_p;        // results S^T and dP^T, one block
  float *p, *ds;                 // of 32 keys and all queries, first operands P^T and dS^T: a block per step of queries
  float* ds_across;              // second operand dS^T: per step of queries the blocks of all keys
  float *lse2, *minus_delta;     // per query
  int32_t *first_key, *end_key;  // per query: which keys it sees; queries after the last see none
  uint16_t* keep;                // dropout: per 64 keys and 16 queries a bit for each query, (kBlockQueries / 16 x 64)
};

static TileBuffers lay_out_tiles(const AttentionShape& shape, float* at) {
  TileBuffers w;
  const int64_t n = shape.width() / kStep, steps = (shape.T + kStep - 1) / kStep, keys = kBlockKeys / kStep;
  const int64_t queries = kBlockQueries / kStep;
  w.query_across = at, at += steps * n * kOperand;
  w.grad_across = at, at += steps * n * kOperand;
  w.query = at, at += steps * n * kOperand;
  w.grad = at, at += steps * n * kOperand;
  w.grad_q = at, at += steps * n * kResult;
  w.key = at, at += keys * n * kOperand;
  w.value = at, at += keys * n * kOperand;
  w.grad_k = at, at += keys * n * kResult;
  w.grad_v = at, at += keys * n * kResult;
  w.key_across = at, at += keys * n * kOperand;
  w.scores = at, at += kResult;
  w.grad_p = at, at += kResult;
  w.p = at, at += queries * kOperand;
  w.ds = at, at += queries * kOperand;
  w.ds_across = at, at += queries * keys * kOperand;
  w.lse2 = at, at += steps * kStep;
  w.minus_delta = at, at += steps * kStep;
  w.first_key = reinterpret_cast<int32_t*>(at), at += steps * kStep;
  w.end_key = reinterpret_cast<int32_t*>(at), at += steps * kStep;
  w.keep = reinterpret_cast<uint16_t*>(at);
  return w;
}

// --- packing -------------------------------------------------------------------------------------------------------

// Rows are loaded by load_slice, which has no branch: the processor then has more of them, which often no cache holds, under
// way at once.

// 32 rows as the first operand of a product over D: n blocks.
template <bool WHOLE>
static void pack_first(const bf16* from, int64_t stride, int64_t rows, int64_t D, int64_t n, float* to) {
  for (int64_t r = 0; r < kStep; ++r, from += stride, to += kLanes)
    for (int64_t i = 0; i < n; ++i) store(to + i * kOperand, (vf)load_slice<WHOLE>(from, i * kStep, D, r < rows));
}

// 32 rows, transposed, as the second operand of a product over D: two columns of tiles, of n tiles each.
template <bool WHOLE>
static void pack_second_across(const bf16* from, int64_t stride, int64_t rows, int64_t D, int64_t n, float* to) {
  for (int64_t r = 0; r < kStep; r += kLanes)
    for (int64_t i = 0; i < n; ++i) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = (vf)load_slice<WHOLE>(from + (r + j) * stride, i * kStep, D, r + j < rows);
      transpose<kLanes / 2>(block);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + (r / kLanes * n + i) * kTile + j * kLanes, block[j]);
    }
}

// 32 rows as the second operand of a product that sums over them, in pairs 16 apart: n blocks.
template <bool WHOLE>
static void pack_second(const bf16* from, int64_t stride, int64_t rows, int64_t D, int64_t n, float* to) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // so that unpacking leaves elements in theirs
  for (int64_t r = 0; r < kLanes; ++r, from += stride, to += kLanes)
    for (int64_t i = 0; i < n; ++i) {
      const __m512i low = _mm512_permutexvar_epi64(order, load_slice<WHOLE>(from, i * kStep, D, r < rows));
      const __m512i high =
          _mm512_permutexvar_epi64(order, load_slice<WHOLE>(from + kLanes * stride, i * kStep, D, r + kLanes < rows));
      store(to + i * kOperand, (vf)_mm512_unpacklo_epi16(low, high));
      store(to + i * kOperand + kTile, (vf)_mm512_unpackhi_epi16(low, high));
    }
}

// 32 rows, transposed, as the first operand of a product that sums over them, in pairs of neighbours: n blocks, `step`
// floats apart.
template <bool WHOLE>
static void pack_first_across(const bf16* from, int64_t stride, int64_t rows, int64_t D, int64_t n, float* to,
                              int64_t step) {
  for (int64_t i = 0; i < n; ++i, to += step) {
    pack_columns_of_slice<false, WHOLE>(from, stride, rows, i * kStep, D, to, kTile);
    pack_columns_of_slice<true, WHOLE>(from, stride, rows, i * kStep, D, to, kTile);
  }
}

// Of 16 rows, the sums of the products of two of their kind.
template <bool WHOLE>
static vf sums_of_products(const bf16* a, int64_t a_stride, const bf16* b, int64_t b_stride, int64_t rows, int64_t D) {
  vf sums[kLanes] = {};
  for (int64_t d = 0; d < D; d += kStep)
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j)
      sums[j] = (vf)_mm512_dpbf16_ps((__m512)sums[j], (__m512bh)load_slice<WHOLE>(a + j * a_stride, d, D, j < rows),
                                     (__m512bh)load_slice<WHOLE>(b + j * b_stride, d, D, j < rows));
  transpose<kLanes / 2>(sums);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// --- products ------------------------------------------------------------------------------------------------------

// One step of a product of 32 x 32: tiles 0 and 1 hold a, 2 and 3 b, 4 to 7 the sum, which begins as `from` in the FIRST step
// (c, or one row of kZeros, of stride 0) and goes to c in the LAST. Each tile is loaded and stored beside its own product: four
// stores in a row, which all wait, would fill the window in which the processor looks for other work.
template <bool FIRST, bool LAST>
PYGPT_INLINE void product_step(const float* a, const float* b, float* c, const float* from, int64_t stride) {
  const int64_t next = stride ? kTile : 0;
  tile_load<0>(a, 64);
  tile_load_once<2>(b, 64);
  if constexpr (FIRST) tile_load<4>(from, stride);
  tile_dot_bf16<4, 0, 2>();
  if constexpr (LAST) tile_store<4>(c, 64);
  tile_load_once<3>(b + kTile, 64);
  if constexpr (FIRST) tile_load<5>(from + next, stride);
  tile_dot_bf16<5, 0, 3>();
  if constexpr (LAST) tile_store<5>(c + kTile, 64);
  tile_load<1>(a + kTile, 64);
  if constexpr (FIRST) tile_load<6>(from + 2 * next, stride);
  tile_dot_bf16<6, 1, 2>();
  if constexpr (LAST) tile_store<6>(c + 2 * kTile, 64);
  if constexpr (FIRST) tile_load<7>(from + 3 * next, stride);
  tile_dot_bf16<7, 1, 3>();
  if constexpr (LAST) tile_store<7>(c + 3 * kTile, 64);
}

// c (32 x 32) += the product of a (32 x 32 steps) and b (32 steps x 32), whose blocks lie a_step and b_step floats apart;
// c = it if `first`.
static void add_product(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t steps, float* c,
                        bool first) {
  const float* from = first ? kZeros : c;
  const int64_t stride = first ? 0 : 64;
  if (steps == 1) return product_step<true, true>(a, b, c, from, stride);
  product_step<true, false>(a, b, c, from, stride);
  for (a += a_step, b += b_step; steps > 2; --steps, a += a_step, b += b_step)
    product_step<false, false>(a, b, c, from, stride);
  product_step<false, true>(a, b, c, from, stride);
}

// S^T of 32 keys and 32 queries, and dP^T, less delta unless there is dropout: columns of tiles against keys held in tiles.
template <bool DROPOUT>
static void score(const TileBuffers& w, const float* key, const float* value, int64_t step, int64_t n) {
  const int64_t queries = step * n * kOperand;
  const float* start = DROPOUT ? kZeros : w.minus_delta + step * kStep;
  Nothing nothing;
  for (int64_t i = 0; i < n; i += 2)
    multiply_tiles<true>({w.query_across + queries + i * kTile, n * kTile, kTile, key + i * kOperand, kTile, kOperand,
                          w.scores, 2 * kTile, 2}, i > 0, i + 1 < n, nothing);
  for (int64_t i = 0; i < n; i += 2)
    multiply_tiles<true>({w.grad_across + queries + i * kTile, n * kTile, kTile, value + i * kOperand, kTile, kOperand,
                          w.grad_p, 2 * kTile, 2, start, DROPOUT ? 0 : kSide}, i > 0, i + 1 < n, nothing);
}

// --- rows ahead ----------------------------------------------------------------------------------------------------

// Rows to be read or written later. They lie apart, where the processor does not fetch ahead by itself, and waiting for them is
// most of what packing and writing cost; so they are asked for in the course of the softmax, whose own data are in the
// first-level cache, and a few at a time: tiles that products load would wait behind many.
struct RowsAhead {
  struct Rows {
    const bf16* at;
    int64_t stride, left;
  } of[12];
  int now = 0, end = 0;
  int64_t D, left = 0, each = 0;  // rows; of these at a time

  explicit RowsAhead(int64_t D) : D(D) {}
  template <class T>
  void add(const HeadView<T>& x, const AttentionShape& shape, int64_t head, int64_t first, int64_t last) {
    if (!x.data || first >= last) return;
    of[end++] = {x.at(head / shape.H, first, head % shape.H), x.time, last - first};
    left += last - first;
  }
  // All, in so many calls of take().
  void spread(int64_t calls) { each = calls > 0 ? (left + calls - 1) / calls : 0; }
  void take() {
    for (int64_t i = each; i > 0 && now < end; --i) {
      Rows& rows = of[now];
      for (int64_t d = 0; d < D; d += 32) __builtin_prefetch(rows.at + d, 0, 2);
      rows.at += rows.stride;
      if (--rows.left == 0) ++now;
    }
  }
};

// --- softmax -------------------------------------------------------------------------------------------------------

// Of a vector of queries, the key's row: P^T o Z without 1 / (1 - p) over the scores, dS^T over dP^T. Both are to be rounded by
// dropping their lower halves. P has half of a last place more for that. dS has as much by it as P's mantissa says, not its own:
// right in the mean over mantissas, 0.1% too large or small where all of a query's keys have the same probability, and its
// error is 1.05 times that of rounding (bench/LOG.md).
template <bool DROPOUT, bool MASKED>
PYGPT_INLINE void softmax_backward_lanes(const AttentionShape& shape, vf& score, vf& grad_p, vf lse2, vf minus_delta,
                                         __mmask16 seen, __mmask16 keep) {
  vf p = exp2_to_drop(score * (shape.scale * kLog2E) - lse2), dp = grad_p;
  if constexpr (DROPOUT) {
    const __m512 inverse_keep = _mm512_set1_ps(shape.dropout.inverse_keep);
    dp = (vf)_mm512_maskz_mul_ps(keep, (__m512)dp, inverse_keep) + minus_delta;
  }
  vf ds = p * dp;
  if constexpr (MASKED) {
    ds = (vf)_mm512_maskz_mov_ps(seen, (__m512)ds);  // not p = 0 alone: 0 * NaN of a key that the query does not see
    p = (vf)_mm512_maskz_mov_ps(seen, (__m512)p);
  }
  if constexpr (DROPOUT) p = (vf)_mm512_maskz_mov_ps(keep, (__m512)p);
  score = p, grad_p = ds;
}

// P^T and dS^T of 32 keys and 32 queries from w.scores and w.grad_p, as operands: to w.p and w.ds, if KEYS, and
// to ds_across, if QUERIES.
template <bool DROPOUT, bool MASKED, bool KEYS, bool QUERIES>
static void softmax_backward(const AttentionShape& shape, const TileBuffers& w, int64_t step, int64_t key, float* p_to,
                             float* ds_to, float* across, RowsAhead& ahead) {
  const int64_t query = step * kStep;
  const vf lse2[2] = {load(w.lse2 + query), load(w.lse2 + query + kLanes)};
  vf minus_delta[2] = {};
  if constexpr (DROPOUT)
    for (int v = 0; v < 2; ++v) minus_delta[v] = load(w.minus_delta + query + v * kLanes);
  __m512i first[2] = {}, end[2] = {};
  if constexpr (MASKED)
    for (int v = 0; v < 2; ++v) {
      std::memcpy(first + v, w.first_key + query + v * kLanes, 64);
      std::memcpy(end + v, w.end_key + query + v * kLanes, 64);
    }
  const uint16_t* keep = w.keep + (step % (kBlockQueries / kStep)) * 128 + key % 64;
  for (int r = 0; r < kStep; r += 2, across += kLanes) {
    ahead.take();
    vf p[2][2], ds[2][2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int64_t at = (r / kLanes * 2 + v) * kTile + (r % kLanes + i) * kLanes;
        vf s = load(w.scores + at), d = load(w.grad_p + at);
        __mmask16 seen = 0, kept = 0;
        if constexpr (MASKED) {
          const __m512i at_key = _mm512_set1_epi32(static_cast<int32_t>(key) + r + i);
          const __mmask16 begun = _mm512_cmp_epi32_mask(at_key, first[v], _MM_CMPINT_NLT);
          seen = _mm512_mask_cmp_epi32_mask(begun, at_key, end[v], _MM_CMPINT_LT);
        }
        if constexpr (DROPOUT) kept = keep[v * 64 + r + i];
        softmax_backward_lanes<DROPOUT, MASKED>(shape, s, d, lse2[v], minus_delta[v], seen, kept);
        p[i][v] = s, ds[i][v] = d;
      }
    if constexpr (KEYS)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        store(p_to + (r + i) * kLanes, pair_upper(p[i][0], p[i][1]));
        store(ds_to + (r + i) * kLanes, pair_upper(ds[i][0], ds[i][1]));
      }
    if constexpr (QUERIES) {
      store(across, pair_upper(ds[0][0], ds[1][0]));
      store(across + kTile, pair_upper(ds[0][1], ds[1][1]));
    }
  }
}

// Which of 64 keys the queries of a step keep: per vector of queries a mask for each key.
static void fill_keep(const AttentionShape& shape, int64_t head, int64_t step, int64_t key, uint16_t* to) {
  const vu zero = {};
  for (int64_t v = 0; v < 2; ++v, to += 64)
    for (int64_t j = 0; j < 16; ++j) {
      vu words[4];
      const vu query = (vu)lane_numbers() + static_cast<uint32_t>(step * kStep + v * kLanes);
      philox(zero + static_cast<uint32_t>(key / 64 * 16 + j), query, zero + static_cast<uint32_t>(head), zero,
             shape.dropout.key[0], shape.dropout.key[1], words);
      const __m512i threshold = _mm512_set1_epi32(static_cast<int32_t>(shape.dropout.threshold));
      for (int64_t i = 0; i < 4; ++i)
        to[i * 16 + j] = _mm512_cmp_epu32_mask((__m512i)words[i], threshold, _MM_CMPINT_NLT);
    }
}

// --- a head --------------------------------------------------------------------------------------------------------

static void pack_queries_for_tiles(const AttentionShape& shape, const BackwardInputs<bf16>& in, const TileBuffers& w,
                                   int64_t head, Range steps) {
  const int64_t b = head / shape.H, h = head % shape.H, D = shape.D, n = shape.width() / kStep;
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    const int64_t first = step * kStep, rows = smaller(kStep, shape.T - first), to = step * n * kOperand;
    const bf16* q = in.q.data + b * in.q.batch + h * in.q.head + first * in.q.time;
    const bf16* grad = in.grad.data + b * in.grad.batch + h * in.grad.head + first * in.grad.time;
    const bf16* out = in.out + ((b * shape.T + first) * shape.H + h) * D;
    const auto pack = [&]<bool WHOLE>(std::bool_constant<WHOLE>) {
      pack_second_across<WHOLE>(q, in.q.time, rows, D, n, w.query_across + to);
      pack_second<WHOLE>(q, in.q.time, rows, D, n, w.query + to);
      pack_second_across<WHOLE>(grad, in.grad.time, rows, D, n, w.grad_across + to);
      pack_second<WHOLE>(grad, in.grad.time, rows, D, n, w.grad + to);
      for (int64_t r = 0; r < kStep; r += kLanes)
        store(w.minus_delta + first + r, -sums_of_products<WHOLE>(out + r * shape.H * D, shape.H * D,
                                                                  grad + r * in.grad.time, in.grad.time, rows - r, D));
    };
    rows == kStep && D % kStep == 0 ? pack(std::true_type{}) : pack(std::false_type{});
  }
}

static void describe_queries(const AttentionShape& shape, const BackwardInputs<bf16>& in, const TileBuffers& w, int64_t head,
                             Range steps) {
  for (int64_t t = steps.begin * kStep; t < steps.end * kStep; ++t) {
    const bool present = t < shape.T;
    w.lse2[t] = present ? in.lse[head * shape.T + t] * kLog2E : 0;
    w.first_key[t] = static_cast<int32_t>(shape.first_key(head, t));
    w.end_key[t] = present ? static_cast<int32_t>(shape.end_key(t)) : 0;
  }
}

// The steps of queries, of those in `within`, that see any of `count` keys from `key` on.
static Range steps_that_see(const AttentionShape& shape, const TileBuffers& w, int64_t key, int64_t count,
                            Range within) {
  const int64_t first = larger(0, key - (shape.S - shape.T)) / kStep;
  int64_t end = within.end;
  if (shape.document_start)
    while (end > within.begin && w.first_key[(end - 1) * kStep] >= key + count) --end;
  return {larger(first, within.begin), end};
}

// P^T and dS^T of 32 keys from `key` on, the row-th of those packed, for some steps of queries, of which `block` is the
// first in the buffers.
template <bool DROPOUT, bool KEYS, bool QUERIES>
static void backward_row(const AttentionShape& shape, const TileBuffers& w, int64_t key, int64_t row, Range steps,
                         int64_t block, RowsAhead& ahead) {
  const int64_t n = shape.width() / kStep;
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    const int64_t last = smaller(shape.T, (step + 1) * kStep) - 1, at = step - block;
    score<DROPOUT>(w, w.key + row * n * kOperand, w.value + row * n * kOperand, step, n);
    const bool all_seen = key + kStep <= w.end_key[step * kStep] && w.first_key[last] <= key;
    const bool whole = all_seen && (step + 1) * kStep <= shape.T;
    (whole ? softmax_backward<DROPOUT, false, KEYS, QUERIES> : softmax_backward<DROPOUT, true, KEYS, QUERIES>)(
        shape, w, step, key, w.p + at * kOperand, w.ds + at * kOperand,
        w.ds_across + (at * (kBlockKeys / kStep) + row) * kOperand, ahead);
  }
}

// Up to 32 rows of a gradient times `factor`, from its blocks, which are transposed if ACROSS.
template <bool ACROSS, bool WHOLE>
static void store_rows(const float* from, int64_t rows, int64_t D, float factor, bf16* to, int64_t stride) {
  for (int64_t d = 0; d < D; d += kStep, from += kResult)
    for (int64_t r = 0; r < rows; r += kLanes) {
      __m512i row[kLanes];
      if constexpr (ACROSS) {
        load_rows_of_columns(from + r / kLanes * kTile, 2 * kTile, splat(factor), row);
      } else {
        const float* tile = from + r / kLanes * 2 * kTile;
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l)
          row[l] = (__m512i)pair_along(load(tile + l * kLanes) * factor, load(tile + kTile + l * kLanes) * factor);
      }
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l)
        if (WHOLE || r + l < rows) store_slice<WHOLE>(to + (r + l) * stride, d, D, row[l]);
    }
}

template <bool ACROSS>
static void store_result_rows(const float* from, int64_t rows, int64_t D, float factor, bf16* to, int64_t stride) {
  rows % kLanes == 0 && D % kStep == 0 ? store_rows<ACROSS, true>(from, rows, D, factor, to, stride)
                                       : store_rows<ACROSS, false>(from, rows, D, factor, to, stride);
}

// Packs keys and values from k0 on.
template <bool QUERIES>
static void pack_keys_for_tiles(const AttentionShape& shape, const BackwardInputs<bf16>& in, const TileBuffers& w,
                                int64_t head, int64_t k0, int64_t key_steps) {
  const int64_t b = head / shape.H, h = head % shape.H, D = shape.D, n = shape.width() / kStep;
  for (int64_t j = 0; j < key_steps; ++j) {
    const int64_t key = k0 + j * kStep, rows = smaller(kStep, shape.S - key), to = j * n * kOperand;
    const bf16* k = in.k.data + b * in.k.batch + h * in.k.head + key * in.k.time;
    const bf16* v = in.v.data + b * in.v.batch + h * in.v.head + key * in.v.time;
    const auto pack = [&]<bool WHOLE>(std::bool_constant<WHOLE>) {
      pack_first<WHOLE>(k, in.k.time, rows, D, n, w.key + to);
      pack_first<WHOLE>(v, in.v.time, rows, D, n, w.value + to);
      if (QUERIES)
        pack_first_across<WHOLE>(k, in.k.time, rows, D, n, w.key_across + j * kOperand, kBlockKeys / kStep * kOperand);
    };
    rows == kStep && D % kStep == 0 ? pack(std::true_type{}) : pack(std::false_type{});
  }
}

// Adds to dQ what the keys from k0 on contribute, for some steps of queries, of which those from `fresh` on have none yet; see
// backward_row for `block`.
static void add_query_gradients(const AttentionShape& shape, const TileBuffers& w, int64_t k0, int64_t key_steps,
                                Range steps, int64_t block, int64_t fresh) {
  const int64_t n = shape.width() / kStep;
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    const int64_t last = smaller(shape.T, (step + 1) * kStep) - 1;
    const int64_t from = larger(0, w.first_key[step * kStep] - k0) / kStep;
    const int64_t end = smaller(key_steps, (w.end_key[last] - k0 + kStep - 1) / kStep);
    const float* ds = w.ds_across + ((step - block) * (kBlockKeys / kStep) + from) * kOperand;
    for (int64_t i = 0; from < end && i < n; ++i)
      add_product(w.key_across + (i * (kBlockKeys / kStep) + from) * kOperand, kOperand, ds, kOperand, end - from,
                  w.grad_q + (step * n + i) * kResult, step >= fresh);
  }
}

// The end of those steps of queries that none of the keys key .. end - 1, the ones still to come, adds to.
static int64_t finished_steps(const AttentionShape& shape, Range steps, int64_t key, int64_t end) {
  return key >= end ? steps.end : smaller(steps.end, larger(0, key - (shape.S - shape.T)) / kStep);
}

// dK and dV of `keys`, if KEYS, from the queries of `steps`; dQ of those, if QUERIES, from these keys.
template <bool DROPOUT, bool KEYS, bool QUERIES>
static void backward_head(const AttentionShape& shape, const BackwardInputs<bf16>& in, const BackwardOutputs<bf16>& out,
                          const TileBuffers& w, int64_t head, Range keys, Range steps) {
  const int64_t b = head / shape.H, h = head % shape.H, D = shape.D, n = shape.width() / kStep;
  const HeadView<const bf16> attended = {in.out, shape.T * shape.H * D, shape.H * D, D};
  constexpr int64_t most = kBlockQueries / kStep;
  int64_t packed = steps.begin, written = steps.begin;  // up to which the queries are, and dQ is
  describe_queries(shape, in, w, head, steps);
  for (int64_t k0 = keys.begin; k0 < keys.end; k0 += kBlockKeys) {
    const int64_t count = smaller(kBlockKeys, keys.end - k0), key_steps = (count + kStep - 1) / kStep;
    pack_keys_for_tiles<QUERIES>(shape, in, w, head, k0, key_steps);
    bool begun[kBlockKeys / kStep] = {};  // dK and dV
    const Range seeing = steps_that_see(shape, w, k0, count, steps);
    for (int64_t block = seeing.begin / most * most; block < seeing.end; block += most) {
      const Range within = {larger(block, seeing.begin), smaller(block + most, seeing.end)};
      const int64_t fresh = packed, finished = finished_steps(shape, within, k0 + count, keys.end);
      RowsAhead ahead(D);
      if (packed < within.end) {
        pack_queries_for_tiles(shape, in, w, head, {larger(packed, within.begin), within.end});
        packed = within.end;
        const int64_t first = packed * kStep, last = smaller(first + kBlockQueries, smaller(steps.end * kStep, shape.T));
        ahead.add(in.q, shape, head, first, last);
        ahead.add(in.grad, shape, head, first, last);
        ahead.add(attended, shape, head, first, last);
      }
      ahead.add(out.q, shape, head, written * kStep, smaller(finished * kStep, shape.T));
      if (within.end == seeing.end) {
        const int64_t next = k0 + kBlockKeys, last = smaller(next + kBlockKeys, keys.end);
        ahead.add(in.k, shape, head, next, last);
        ahead.add(in.v, shape, head, next, last);
        ahead.add(out.k, shape, head, k0, k0 + count);
        ahead.add(out.v, shape, head, k0, k0 + count);
      } else if (  // the next head's, while the last block of keys but one has queries to go
          KEYS && QUERIES && (keys.end - k0 - 1) / kBlockKeys == 1 && head + 1 < shape.B * shape.H) {
        const int64_t last = smaller(kBlockQueries, shape.T);
        ahead.add(in.q, shape, head + 1, 0, last);
        ahead.add(in.grad, shape, head + 1, 0, last);
        ahead.add(attended, shape, head + 1, 0, last);
        ahead.add(in.k, shape, head + 1, 0, smaller(kBlockKeys, shape.S));
        ahead.add(in.v, shape, head + 1, 0, smaller(kBlockKeys, shape.S));
      }
      int64_t pairs = 0;  // of 32 keys and 32 queries
      for (int64_t j = 0; j < key_steps; ++j) {
        const Range some = steps_that_see(shape, w, k0 + j * kStep, kStep, within);
        pairs += larger(0, some.end - some.begin);
      }
      ahead.spread(pairs * (kStep / 2));
      for (int64_t j = 0; j < key_steps; ++j) {
        const int64_t key = k0 + j * kStep;
        if (DROPOUT && key % 64 == 0) {
          const Range some = steps_that_see(shape, w, key, 64, within);
          for (int64_t step = some.begin; step < some.end; ++step)
            fill_keep(shape, head, step, key, w.keep + (step - block) * 128);
        }
        const Range some = steps_that_see(shape, w, key, kStep, within);
        if (some.begin >= some.end) continue;
        backward_row<DROPOUT, KEYS, QUERIES>(shape, w, key, j, some, block, ahead);
        for (int64_t i = 0; KEYS && i < n; ++i) {
          const int64_t at = (some.begin - block) * kOperand, queries = (some.begin * n + i) * kOperand;
          const int64_t depth = some.end - some.begin, to = (j * n + i) * kResult;
          add_product(w.p + at, kOperand, w.grad + queries, n * kOperand, depth, w.grad_v + to, !begun[j]);
          add_product(w.ds + at, kOperand, w.query + queries, n * kOperand, depth, w.grad_k + to, !begun[j]);
        }
        begun[j] = true;
      }
      if (QUERIES) add_query_gradients(shape, w, k0, key_steps, within, block, fresh);
      for (; QUERIES && written < finished; ++written) {
        const int64_t query = written * kStep, rows = smaller(kStep, shape.T - query);
        store_result_rows<true>(w.grad_q + written * n * kResult, rows, D, shape.scale, out.q.at(b, query, h), out.q.time);
      }
    }
    for (int64_t j = 0; KEYS && j < key_steps; ++j) {
      const int64_t key = k0 + j * kStep, rows = smaller(kStep, shape.S - key), from = j * n * kResult;
      if (!begun[j])  // no query sees these keys
        for (float* grad : {w.grad_k, w.grad_v}) std::memset(grad + from, 0, n * kResult * sizeof(float));
      const float keep = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
      store_result_rows<false>(w.grad_k + from, rows, D, shape.scale, out.k.at(b, key, h), out.k.time);
      store_result_rows<false>(w.grad_v + from, rows, D, keep, out.v.at(b, key, h), out.v.time);
    }
  }
}

// As attention_backward of the other instruction sets, for bfloat16.
template <class T>
void attention_backward(const AttentionShape& shape, const BackwardInputs<T>& in, const BackwardOutputs<T>& out,
                        float* workspace, int64_t head, Range key_blocks, Range query_blocks) {
  const TileBuffers w = lay_out_tiles(shape, workspace);
  const TileScope tiles;
  constexpr int64_t per_block = kBlock / kStep;
  const Range keys = {key_blocks.begin * kBlock, smaller(shape.S, key_blocks.end * kBlock)};
  const Range seeing = {larger(query_blocks.begin, shape.first_query_block(key_blocks.begin)),
                        smaller(query_blocks.end, shape.end_query_block(head, key_blocks.end - 1))};
  const int64_t all_steps = (shape.T + kStep - 1) / kStep;
  const Range seeing_steps = {seeing.begin * per_block, smaller(all_steps, seeing.end * per_block)};
  const Range query_steps = {query_blocks.begin * per_block, smaller(all_steps, query_blocks.end * per_block)};
  if (!out.q.data)
    (shape.dropout.on ? backward_head<true, true, false> : backward_head<false, true, false>)(shape, in, out, w, head,
                                                                                             keys, seeing_steps);
  else if (!out.k.data)
    (shape.dropout.on ? backward_head<true, false, true> : backward_head<false, false, true>)(shape, in, out, w, head,
                                                                                             keys, query_steps);
  else
    (shape.dropout.on ? backward_head<true, true, true> : backward_head<false, true, true>)(shape, in, out, w, head, keys,
                                                                                           query_steps);
}

}  // namespace pygpt::PYGPT_ISA
