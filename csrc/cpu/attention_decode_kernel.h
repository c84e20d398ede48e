// Causal attention for a few queries against many keys (decoding with a KV cache), for one instruction set. Keys and
// values are read once, where they lie; the work is split over chunks of keys as in Flash-Decoding (Dao et al., 2023).

namespace pygpt::PYGPT_ISA {

// Rows of a cache lie far apart, where the processor's own prefetching does not follow: keys are asked for this many
// rows ahead, values while the scores of their block are computed.
constexpr int64_t kAhead = 16;

template <class T>
PYGPT_INLINE float dot(const float* a, const T* b, int64_t n_elements) {
  vf sum = {};
  PYGPT_FOR_LANES(n_elements, sum += load_step(a + i, n) * load_step(b + i, n);)
  return reduce_add(sum);
}

// o = o * factor + sum over keys of p[key] * v[key], for VECTORS * kLanes columns, or one vector of n of them.
template <class T, int VECTORS>
PYGPT_INLINE void add_values(const float* p, const T* v, int64_t stride, int64_t keys, float factor, float* o,
                             int64_t n) {
  vf sum[VECTORS];
#pragma GCC unroll 4
  for (int c = 0; c < VECTORS; ++c) sum[c] = load(o + c * kLanes) * factor;
  for (int64_t j = 0; j < keys; ++j, v += stride)
#pragma GCC unroll 4
    for (int c = 0; c < VECTORS; ++c) sum[c] += load_step(v + c * kLanes, n) * p[j];
#pragma GCC unroll 4
  for (int c = 0; c < VECTORS; ++c) store(o + c * kLanes, sum[c]);
}

// The share of one chunk of keys, for work items (batch, head, chunk) first .. last. Of an item in the workspace: the
// unnormalised output (T x width), the largest scores (T) and the sums (T).
template <class T>
void attention_decode(const AttentionShape& shape, HeadView<const T> q, HeadView<const T> k, HeadView<const T> v,
                      float* workspace, int64_t first, int64_t last) {
  const int64_t D = shape.D, width = shape.width(), chunks = shape.decode_chunks();
  alignas(64) float queries[kDecodeQueries * 256], scores[kDecodeQueries * kBlock];
  float factor[kLanes], largest[kDecodeQueries], sums[kDecodeQueries * kLanes];
  const int queries_here = static_cast<int>(shape.T);
  for (int64_t item = first; item < last; ++item) {
    const int64_t head = item / chunks, chunk = item % chunks, b = head / shape.H, h = head % shape.H;
    const int64_t end = smaller(shape.S, (chunk + 1) * kDecodeKeys);
    float* o = workspace + item * shape.decode_workspace();
    std::memset(o, 0, shape.T * width * sizeof(float));
    std::memset(sums, 0, sizeof sums);
    for (int t = 0; t < queries_here; ++t) {
      largest[t] = -std::numeric_limits<float>::infinity();
      const T* from = q.data + b * q.batch + h * q.head + t * q.time;
      PYGPT_FOR_LANES(D, store_step(queries + t * width + i, load_step(from + i, n) * (shape.scale * kLog2E), n);)
    }
    // Keys before the first query's document are not read: nobody sees them.
    const int64_t begin = larger(chunk * kDecodeKeys, shape.first_key(head, 0) / kBlock * kBlock);
    for (int64_t k0 = begin; k0 < end; k0 += kBlock) {
      const int64_t keys = smaller(kBlock, end - k0);
      const T* key = k.data + b * k.batch + h * k.head + k0 * k.time;
      const T* value = v.data + b * v.batch + h * v.head + k0 * v.time;
      for (int64_t j = 0; j < keys; ++j, key += k.time) {
        prefetch_row(value + j * v.time, D);
        if (k0 + j + kAhead < end) prefetch_row(key + kAhead * k.time, D);
        for (int t = 0; t < queries_here; ++t) scores[t * kBlock + j] = dot(queries + t * width, key, D);
      }
      softmax_rows<float>(shape, scores, queries_here, round_up(keys, kLanes), {largest, sums}, factor, head, 0, k0);
      for (int t = 0; t < queries_here; ++t) {
        // Only values that the query sees: 0 times one that is no number is none either.
        const int64_t from = larger(0, smaller(keys, shape.first_key(head, t) - k0));
        const int64_t seen = larger(from, smaller(keys, shape.end_key(t) - k0)) - from;
        const float* p = scores + t * kBlock + from;
        const T* first_value = value + from * v.time;
        float* to = o + t * width;
        int64_t d = 0;
        for (; d + 4 * kLanes <= D; d += 4 * kLanes)
          add_values<T, 4>(p, first_value + d, v.time, seen, factor[t], to + d, kLanes);
        for (; d < D; d += kLanes)
          add_values<T, 1>(p, first_value + d, v.time, seen, factor[t], to + d, smaller(kLanes, D - d));
      }
    }
    for (int t = 0; t < queries_here; ++t) {
      o[shape.T * width + t] = largest[t];
      o[shape.T * width + shape.T + t] = reduce_add(load(sums + t * kLanes));
    }
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
