// Causal attention for a few queries against many keys (decoding with a KV cache), for one instruction set. Keys and
// values are read once, where they lie; the work is split over chunks of keys as in Flash-Decoding (Dao et al., 2023).
//
// A row of a cache holds all heads, side by side. Of one head alone the rows lie so far apart that the processor does not fetch
// ahead: so a block of keys is read for one head of a group after the other, and each asks for what the next one needs.

namespace pygpt::PYGPT_ISA {

// sum[l] += the products of n elements of a query and of key l.
template <class T>
PYGPT_INLINE void add_scores(vf* sum, const float* query, const T* key, int64_t stride, int64_t n) {
  const vf x = load_step(query, n);
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) sum[l] += x * load_step(key + l * stride, n);
}

// Scores of a query with kLanes keys, or with fewer.
template <class T>
PYGPT_INLINE void score_keys(const float* query, const T* key, int64_t stride, int64_t D, int64_t keys, float* scores) {
  vf sum[kLanes] = {};
  if (keys >= kLanes) {
    PYGPT_FOR_LANES(D, add_scores(sum, query + i, key + i, stride, n);)
  } else {
    for (int64_t l = 0; l < keys; ++l)
      PYGPT_FOR_LANES(D, sum[l] += load_step(query + i, n) * load_step(key + l * stride + i, n);)
  }
  store(scores, sum_each(sum));
}

// o = o * factor + sum over keys of p[key] * v[key], for VECTORS * kLanes columns, or one vector of n of them.
template <class T, int VECTORS>
PYGPT_INLINE void add_values(const float* p, const T* v, int64_t stride, int64_t keys, float factor, float* o,
                             int64_t n) {
  vf sum[VECTORS];
#pragma GCC unroll 8
  for (int c = 0; c < VECTORS; ++c) sum[c] = load(o + c * kLanes) * factor;
  for (int64_t j = 0; j < keys; ++j, v += stride)
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) sum[c] += load_step(v + c * kLanes, n) * p[j];
#pragma GCC unroll 8
  for (int c = 0; c < VECTORS; ++c) store(o + c * kLanes, sum[c]);
}

// Where a head's share of a chunk lies: the unnormalised output (T x width), the largest scores (T) and the sums (T), which are
// the result; and the queries (T x width) and sums by lane (T x kLanes).
struct DecodedHead {
  DecodedHead(const AttentionShape& shape, float* workspace, int64_t head, int64_t chunk)
      : o(workspace + (head * shape.decode_chunks() + chunk) * shape.decode_workspace()),
        largest(o + shape.T * shape.width()),
        sum(largest + shape.T),
        queries(sum + shape.T),
        lane_sums(queries + shape.T * shape.width()) {}

  float *o, *largest, *sum, *queries, *lane_sums;
};

// Work item (batch, group of heads, chunk).
template <class T>
void attention_decode(const AttentionShape& shape, HeadView<const T> q, HeadView<const T> k, HeadView<const T> v,
                      float* workspace, int64_t group, int64_t item) {
  constexpr int kWide = kLanes == 16 ? 4 : 8;  // vectors of a value: as many sums as hide how long an addition takes
  const int64_t D = shape.D, width = shape.width(), chunks = shape.decode_chunks(), groups = (shape.H + group - 1) / group;
  const int queries_here = static_cast<int>(shape.T);
  alignas(64) float scores[kDecodeQueries * kBlock];
  float factor[kLanes];
  const int64_t chunk = item % chunks, b = item / chunks / groups, first_head = item / chunks % groups * group;
  const int64_t end = smaller(shape.S, (chunk + 1) * shape.decode_keys()), end_head = smaller(shape.H, first_head + group);
  for (int64_t h = first_head; h < end_head; ++h) {
    const DecodedHead state(shape, workspace, b * shape.H + h, chunk);
    std::memset(state.o, 0, shape.T * width * sizeof(float));
    std::memset(state.lane_sums, 0, shape.T * kLanes * sizeof(float));
    for (int t = 0; t < queries_here; ++t) {
      state.largest[t] = -std::numeric_limits<float>::infinity();
      const T* from = q.at(b, t, h);
      float* query = state.queries + t * width;
      PYGPT_FOR_LANES(D, store_step(query + i, load_step(from + i, n) * (shape.scale * kLog2E), n);)
    }
  }
  // Keys before the first query's document are not read: nobody sees them.
  const int64_t begin = larger(chunk * shape.decode_keys(), shape.first_key(b * shape.H, 0) / kBlock * kBlock);
  for (int64_t k0 = begin; k0 < end; k0 += kBlock)
    for (int64_t h = first_head; h < end_head; ++h) {
      const int64_t head = b * shape.H + h, keys = smaller(kBlock, end - k0);
      const DecodedHead state(shape, workspace, head, chunk);
      const T *key = k.at(b, k0, h), *value = v.at(b, k0, h);
      const int64_t next_h = h + 1 < end_head ? h + 1 : first_head, next_k = next_h > h ? k0 : k0 + kBlock;
      const int64_t next_keys = larger(0, smaller(kBlock, end - next_k));
      for (int64_t j = 0; j < keys; j += kLanes) {
        for (int64_t l = j; l < smaller(next_keys, j + kLanes); ++l) {
          prefetch_row<2>(k.at(b, next_k + l, next_h), D);
          prefetch_row<2>(v.at(b, next_k + l, next_h), D);
        }
        for (int t = 0; t < queries_here; ++t)
          score_keys(state.queries + t * width, key + j * k.time, k.time, D, keys - j, scores + t * kBlock + j);
      }
      softmax_rows<float>(shape, scores, queries_here, round_up(keys, kLanes), {state.largest, state.lane_sums}, factor, head,
                          0, k0);
      for (int t = 0; t < queries_here; ++t) {
        // Only values that the query sees: 0 times one that is no number is none either.
        const int64_t from = larger(0, smaller(keys, shape.first_key(head, t) - k0));
        const int64_t seen = larger(from, smaller(keys, shape.end_key(t) - k0)) - from;
        const float* p = scores + t * kBlock + from;
        const T* first_value = value + from * v.time;
        float* to = state.o + t * width;
        int64_t d = 0;
        for (; d + kWide * kLanes <= D; d += kWide * kLanes)
          add_values<T, kWide>(p, first_value + d, v.time, seen, factor[t], to + d, kLanes);
        for (; d + kWide / 2 * kLanes <= D; d += kWide / 2 * kLanes)
          add_values<T, kWide / 2>(p, first_value + d, v.time, seen, factor[t], to + d, kLanes);
        for (; d < D; d += kLanes)
          add_values<T, 1>(p, first_value + d, v.time, seen, factor[t], to + d, smaller(kLanes, D - d));
      }
    }
  for (int64_t h = first_head; h < end_head; ++h) {
    const DecodedHead state(shape, workspace, b * shape.H + h, chunk);
    for (int t = 0; t < queries_here; ++t) state.sum[t] = reduce_add(load(state.lane_sums + t * kLanes));
  }
}

// Joins the chunks of every head in order, and writes out (B, T, H, D) and lse (B, H, T).
template <class T>
void attention_decode_join(const AttentionShape& shape, const float* workspace, T* out, float* lse) {
  const int64_t D = shape.D, width = shape.width(), chunks = shape.decode_chunks(), size = shape.decode_workspace();
  const float keep = shape.dropout.on ? shape.dropout.inverse_keep : 1.0f;
  for (int64_t head = 0; head < shape.B * shape.H; ++head)
    for (int64_t t = 0; t < shape.T; ++t) {
      const float* part = workspace + head * chunks * size;
      const float* largest = part + shape.T * width + t;  // of chunk c: largest[c * size]; the sum lies T behind it
      float top = largest[0], sum = 0;
      for (int64_t c = 1; c < chunks; ++c) top = largest[c * size] > top ? largest[c * size] : top;
      alignas(64) float o[256] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        const vf weight = vexp2(splat(largest[c * size] - top));
        sum += weight[0] * largest[c * size + shape.T];
        for (int64_t d = 0; d < D; d += kLanes)
          store(o + d, load(o + d) + load(part + c * size + t * width + d) * weight);
      }
      T* to = out + (((head / shape.H) * shape.T + t) * shape.H + head % shape.H) * D;
      PYGPT_FOR_LANES(D, store_step(to + i, load(o + i) * splat(keep / sum), n);)
      lse[head * shape.T + t] = (top + std::log2(sum)) * kLn2;
    }
}

}  // namespace pygpt::PYGPT_ISA
