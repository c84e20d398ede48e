// Backward of causal attention for one instruction set (see foreach_isa.h), after FlashAttention-2 (Dao, 2023): scores
// and probabilities are computed again per 64 x 64 tile from the saved log-sum-exp.
//
// With P the probabilities, Z the dropout mask over 1 - p (or 1), o the element-wise product:
//   dV = (P o Z)^T dO,   dP = Z o (dO V^T),   dS = P o (dP - delta),   delta = rowsum(dO o O)
//   dQ = scale dS K,     dK = scale dS^T Q
// A block's sums run over the other blocks in ascending order, whichever range a call is given: hence the same bits
// however the work is divided.

namespace pygpt::PYGPT_ISA {

// Where the parts of the workspace lie. rows: first operands (T x width / kPair); summed: second operands.
struct BackwardBuffers {
  float *query_rows, *grad_rows, *query_summed, *grad_summed, *grad_q, *lse2, *delta;   // of the head
  float *key_panel, *value_panel, *key_summed, *grad_k, *grad_v;                        // of a block of keys
  float *p_across, *ds_across, *ds_rows;     // of a tile: P and dS by pairs of queries, dS by pairs of keys
  float *scores, *grad_p;                    // (kGroup x kBlock), with pairs; without them P and dS are made where they stay
};

template <class T>
static BackwardBuffers lay_out(const AttentionShape& shape, float* at) {
  constexpr int P = kPair<T>;
  BackwardBuffers w;
  const int64_t block = kBlock * shape.width(), whole = shape.query_blocks() * block;
  w.query_rows = at, at += whole / P;
  w.grad_rows = at, at += whole / P;
  w.query_summed = w.query_rows, w.grad_summed = w.grad_rows;
  if (P == 2) {
    w.query_summed = at, at += whole / P;
    w.grad_summed = at, at += whole / P;
  }
  w.grad_q = at, at += whole;
  w.key_panel = at, at += block;
  w.value_panel = at, at += block;
  w.key_summed = at, at += block;
  w.grad_k = at, at += block;
  w.grad_v = at, at += block;
  w.p_across = at, at += kBlock * kBlock;
  w.ds_across = at, at += kBlock * kBlock;
  w.ds_rows = w.ds_across;
  if (P == 2) {
    w.ds_rows = at, at += kBlock * kBlock / 2;
    w.scores = at, at += kGroup * kBlock;
    w.grad_p = at, at += kGroup * kBlock;
  }
  w.lse2 = at, at += shape.query_blocks() * kBlock;
  w.delta = at;
  return w;
}

// Packs the queries' side of a head for some blocks of queries; rows beyond the last query are zero.
template <class T>
static void pack_queries(const AttentionShape& shape, const BackwardInputs<T>& in, const BackwardBuffers& w,
                         int64_t head, Range blocks) {
  constexpr int P = kPair<T>;
  const int64_t b = head / shape.H, h = head % shape.H, D = shape.D, width = shape.width(), units = width / P;
  const int64_t first = blocks.begin * kBlock, end = blocks.end * kBlock;
  const int64_t last = smaller(shape.T, end), rows = last - first;
  if (rows <= 0) return;
  const T* q = in.q.data + b * in.q.batch + h * in.q.head + first * in.q.time;
  const T* grad = in.grad.data + b * in.grad.batch + h * in.grad.head + first * in.grad.time;
  pack_rows(q, in.q.time, rows, D, width, w.query_rows + first * units);
  pack_rows(grad, in.grad.time, rows, D, width, w.grad_rows + first * units);
  std::memset(w.query_rows + last * units, 0, (end - last) * units * sizeof(float));
  std::memset(w.grad_rows + last * units, 0, (end - last) * units * sizeof(float));
  if (P == 2) {
    pack_summed_rows(q, in.q.time, rows, D, width, w.query_summed + first / P * width);
    pack_summed_rows(grad, in.grad.time, rows, D, width, w.grad_summed + first / P * width);
  }
  for (int64_t t = first; t < end; ++t, grad += in.grad.time) {
    vf sum = {};
    if (t < last) {
      const T* out = in.out + ((b * shape.T + t) * shape.H + h) * D;
      PYGPT_FOR_LANES(D, sum += load_step(out + i, n) * load_step(grad + i, n);)
    }
    w.delta[t] = reduce_add(sum);
    w.lse2[t] = t < last ? in.lse[head * shape.T + t] * kLog2E : 0;
  }
}

// P and dS of one query for the columns from .. columns of a block of keys; the rest of the row is zero.
// p is P o Z without the factor 1 / (1 - p), which waits until the end. In place: p over scores, ds over grad_p.
template <class T>
PYGPT_INLINE void softmax_backward_row(const AttentionShape& shape, float* scores, float* grad_p, int64_t from,
                                       int64_t columns, Seen seen, float lse2, float delta, const vi* keep) {
  const float scale = shape.scale * kLog2E, inverse_keep = shape.dropout.inverse_keep;
  const vf zero = {};
  for (int64_t j = 0; j < from; j += kLanes) store(scores + j, zero), store(grad_p + j, zero);
  for (int64_t j = from; j < columns; j += kLanes) {
    vf p = softmax_exp2<T>(load(scores + j) * scale - lse2), dp = load(grad_p + j);
    const bool some = !seen.all(j, j + kLanes);
    if (some) p = visible(p, j, seen, zero);
    vf dropped = p;
    if (keep) {
      dropped = keep[j / kLanes] ? p : zero;
      dp = keep[j / kLanes] ? dp * inverse_keep : zero;
    }
    vf ds = p * (dp - delta);
    if (some) ds = visible(ds, j, seen, zero);  // 0 * NaN of a key that the query does not see
    store(scores + j, dropped);
    store(grad_p + j, ds);
  }
  for (int64_t j = columns; j < kBlock; j += kLanes) store(scores + j, zero), store(grad_p + j, zero);
}

#ifdef PYGPT_AVX512_BF16
// A group's P and dS as pairs, rows r .. r + rows of the tile.
static void store_pairs(const BackwardBuffers& w, int64_t r, int64_t rows) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const float *p = w.scores + i * kBlock + j, *ds = w.grad_p + i * kBlock + j;
      store(w.p_across + (r + i) / 2 * kBlock + j, pair_across(load(p), load(p + kBlock)));
      store(w.ds_across + (r + i) / 2 * kBlock + j, pair_across(load(ds), load(ds + kBlock)));
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < kBlock; j += 2 * kLanes)
      store(w.ds_rows + (r + i) * (kBlock / 2) + j / 2,
            pair_along(load(w.grad_p + i * kBlock + j), load(w.grad_p + i * kBlock + j + kLanes)));
}
#endif

// The first column of a block of keys that a sum for a group of queries begins with: before it nobody sees any.
template <class T, bool DOCUMENTS>
PYGPT_INLINE int64_t first_column(const AttentionShape& shape, int64_t head, int64_t query, int64_t k0) {
  return DOCUMENTS ? larger(0, shape.first_key(head, query) - k0) / kLanes * kLanes : 0;
}

// Adds to the gradients of a block's keys and values what the queries q0 .. q0 + rows contribute; count as below.
template <class T, bool DOCUMENTS>
PYGPT_INLINE void add_key_gradients(const AttentionShape& shape, const BackwardBuffers& w, int64_t head, int64_t q0,
                                    int64_t k0, int64_t rows, int64_t keys, int64_t count) {
  constexpr int P = kPair<T>;
  const int64_t D = shape.D, width = shape.width();
  const int64_t step = !DOCUMENTS && count >= keys ? kGroup : kRows;
  for (int64_t j = 0, end = DOCUMENTS ? 0 : rows; j < keys; j += step) {
    const int64_t from = larger(0, j + 1 - count) / kRows * kRows;  // the first queries that see these keys
    const int64_t here = smaller(step, round_up(keys - j, kRows));
    while (DOCUMENTS && end < rows && shape.first_key(head, q0 + end) < k0 + j + kRows) ++end;
    if (from >= end) continue;
    const int64_t n = (end - from + P - 1) / P, at = from / P * kBlock + j;
    const int64_t operand = (q0 + from) / P * width;
    product<P, true, Into::add>(w.p_across + at, kBlock, w.grad_summed + operand, width, w.grad_v + j * width, width, n, here,
                                D);
    product<P, true, Into::add>(w.ds_across + at, kBlock, w.query_summed + operand, width, w.grad_k + j * width, width, n,
                                here, D);
  }
}

// The columns of a block of keys up to the last that a group of queries sees, whose first query sees `count` of them.
PYGPT_INLINE int64_t seen_columns(int64_t keys, int64_t count, int64_t queries) {
  return round_up(smaller(keys, count + queries - 1), kLanes);
}

// One 64 x 64 tile: queries q0 .. q0 + 64, of which those before end_query see a key of the tile, keys k0 .. k0 + 64.
// DOCUMENTS: whether the shape has any. Asking in the loops would cost the others 1 to 2%.
template <class T, bool DOCUMENTS>
static void backward_tile(const AttentionShape& shape, const BackwardBuffers& w, int64_t head, int64_t q0, int64_t k0,
                          int64_t end_query, bool want_keys, bool want_queries) {
  constexpr int P = kPair<T>;
  const int64_t D = shape.D, width = shape.width(), stride = width / P, units = (D + P - 1) / P;
  const int64_t rows = smaller(kBlock, end_query - q0), keys = smaller(kBlock, shape.S - k0);
  const int64_t count = shape.end_key(q0) - k0;           // keys of this block that query q0 sees, but for its document
  const int64_t first = count > 0 ? 0 : 1 - count;        // the first query that sees any
  if (first >= rows) return;
  const int64_t step = !DOCUMENTS && count >= keys ? kGroup : kRows;  // where some see more than others, small groups hide less
  for (int64_t r = first / kRows * kRows; r < rows; r += step) {
    const int64_t here = smaller(step, round_up(rows - r, kRows));
    const int64_t from = first_column<T, DOCUMENTS>(shape, head, q0 + r, k0), columns = seen_columns(keys, count + r, here);
    float *scores = P == 2 ? w.scores : w.p_across + r * kBlock, *grad_p = P == 2 ? w.grad_p : w.ds_across + r * kBlock;
    product<P, false, Into::assign>(w.query_rows + (q0 + r) * stride, stride, w.key_panel + from, kBlock, scores + from,
                                    kBlock, units, here, columns - from);
    product<P, false, Into::assign>(w.grad_rows + (q0 + r) * stride, stride, w.value_panel + from, kBlock, grad_p + from,
                                    kBlock, units, here, columns - from);
    for (int64_t i = 0; i < here; ++i) {
      vi keep[kBlock / kLanes];
      if (shape.dropout.on) dropout_keep(shape.dropout, head, q0 + r + i, k0 / kBlock, keep);
      const Seen seen{DOCUMENTS ? shape.first_key(head, q0 + r + i) - k0 : 0, count + r + i};
      softmax_backward_row<T>(shape, scores + i * kBlock, grad_p + i * kBlock, from, columns, seen, w.lse2[q0 + r + i],
                              w.delta[q0 + r + i], shape.dropout.on ? keep : nullptr);
    }
#ifdef PYGPT_AVX512_BF16
    if constexpr (P == 2) store_pairs(w, r, here);
#endif
  }
  if (want_keys) add_key_gradients<T, DOCUMENTS>(shape, w, head, q0, k0, rows, keys, count);
  if (want_queries)
    for (int64_t r = first / kRows * kRows; r < rows; r += step) {
      const int64_t here = smaller(step, round_up(rows - r, kRows));
      const int64_t from = first_column<T, DOCUMENTS>(shape, head, q0 + r, k0);
      const int64_t seen = smaller(keys, count + r + here - 1) - from;
      product<P, false, Into::add>(w.ds_rows + (r * kBlock + from) / P, kBlock / P, w.key_summed + from / P * width,
                                   width, w.grad_q + (q0 + r) * width, width, (seen + P - 1) / P, here, D);
    }
}

template <class T>
static void store_gradient(const float* from, int64_t rows, int64_t D, int64_t width, float factor, T* to,
                           int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += width, to += stride)
    PYGPT_FOR_LANES(D, store_step(to + i, load(from + i) * factor, n);)
}

// Gradients of one head: of k and v for the blocks of keys in `key_blocks` if out.k has data, and of q for the blocks
// of queries in `query_blocks` if out.q has. Together they share the tiles; then both ranges must be whole.
template <class T>
void attention_backward(const AttentionShape& shape, const BackwardInputs<T>& in, const BackwardOutputs<T>& out,
                        float* workspace, int64_t head, Range key_blocks, Range query_blocks) {
  const BackwardBuffers w = lay_out<T>(shape, workspace);
  const int64_t b = head / shape.H, h = head % shape.H, D = shape.D, width = shape.width();
  const bool want_keys = out.k.data != nullptr, want_queries = out.q.data != nullptr;
  const auto tile = shape.document_start ? backward_tile<T, true> : backward_tile<T, false>;
  pack_queries(shape, in, w, head,
               {larger(query_blocks.begin, shape.first_query_block(key_blocks.begin)),
                smaller(query_blocks.end, shape.end_query_block(head, key_blocks.end - 1))});
  if (want_queries)
    std::memset(w.grad_q + query_blocks.begin * kBlock * width, 0,
                (query_blocks.end - query_blocks.begin) * kBlock * width * sizeof(float));
  for (int64_t key_block = key_blocks.begin; key_block < key_blocks.end; ++key_block) {
    const int64_t k0 = key_block * kBlock, keys = smaller(kBlock, shape.S - k0);
    const int64_t end_query = shape.end_query(head, key_block);
    const T* k = in.k.data + b * in.k.batch + h * in.k.head + k0 * in.k.time;
    const T* v = in.v.data + b * in.v.batch + h * in.v.head + k0 * in.v.time;
    pack_transposed(k, in.k.time, keys, D, width, w.key_panel);
    pack_transposed(v, in.v.time, keys, D, width, w.value_panel);
    if (want_queries) pack_summed_rows(k, in.k.time, keys, D, width, w.key_summed);
    if (want_keys) {
      std::memset(w.grad_k, 0, kBlock * width * sizeof(float));
      std::memset(w.grad_v, 0, kBlock * width * sizeof(float));
    }
    for (int64_t q = larger(query_blocks.begin, shape.first_query_block(key_block));
         q < query_blocks.end && q * kBlock < end_query; ++q)
      tile(shape, w, head, q * kBlock, k0, end_query, want_keys, want_queries);
    if (want_keys) {
      const float keep = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
      store_gradient(w.grad_k, keys, D, width, shape.scale, out.k.at(b, k0, h), out.k.time);
      store_gradient(w.grad_v, keys, D, width, keep, out.v.at(b, k0, h), out.v.time);
    }
  }
  if (want_queries) {
    const int64_t q0 = query_blocks.begin * kBlock;
    store_gradient(w.grad_q + q0 * width, smaller(shape.T, query_blocks.end * kBlock) - q0, D, width, shape.scale,
                   out.q.at(b, q0, h), out.q.time);
  }
}

}  // namespace pygpt::PYGPT_ISA
