// Cross-entropy of a row of logits and its gradient, for one instruction set (see foreach_isa.h). T: dtype of the logits.
// A row of a usual vocabulary stays in the second-level cache between the passes: memory sees one read and one write.

namespace pygpt::PYGPT_ISA {

constexpr float kLog2E = 1.4426950409f;

// The largest logit and the sum of exp(logit - largest). Blocks fit the first-level cache, so that the largest of a block
// is known before its exponentials: one for each logit, and one for each block that brings a new maximum.
template <class T>
void softmax_statistics(const T* x, int64_t V, float* largest, double* sum) {
  constexpr int kSums = 4;
  constexpr int64_t kBlock = 1024;
  float top = -std::numeric_limits<float>::max();  // not -inf, which would make a NaN of a masked logit
  double total = 0;
  for (int64_t begin = 0; begin < V; begin += kBlock, x += kBlock) {
    const int64_t count = V - begin < kBlock ? V - begin : kBlock;
    vf most[kSums], part[kSums] = {};
    for (int u = 0; u < kSums; ++u) most[u] = splat(top);
    PYGPT_FOR_LANES_BY(kSums, count, {
      vf v = load_step(x + i, n);
      if (n < kLanes)
        for (int64_t lane = n; lane < kLanes; ++lane) v[lane] = top;
      most[u] = vmax(most[u], v);
    })
    const float block_top = reduce_max(vmax(vmax(most[0], most[1]), vmax(most[2], most[3])));
    if (block_top > top) {
      if (begin) total *= std::exp(double(top) - block_top);
      top = block_top;
    }
    PYGPT_FOR_LANES_BY(kSums, count, {
      vf e = vexp2((load_step(x + i, n) - splat(top)) * kLog2E);
      if (n < kLanes)
        for (int64_t lane = n; lane < kLanes; ++lane) e[lane] = 0;
      part[u] += e;
    })
    total += reduce_add((part[0] + part[1]) + (part[2] + part[3]));
  }
  *largest = top;
  *sum = total;
}

// losses[row] = -log softmax(logits)[target], and with `factor` logits = (softmax - one_hot) * *factor; both 0 for ignored
// rows.
template <class T>
void cross_entropy_rows(T* x, const int64_t* targets, float* losses, int64_t rows, int64_t V, int64_t ignore_index,
                        const float* factor) {
  for (int64_t row = 0; row < rows; ++row, x += V) {
    const int64_t target = targets[row];
    if (target == ignore_index) {
      losses[row] = 0;
      if (factor) std::memset(static_cast<void*>(x), 0, V * sizeof(T));
      continue;
    }
    float top;
    double sum;
    softmax_statistics(x, V, &top, &sum);
    const float of_target = load(x + target, 1)[0];
    losses[row] = static_cast<float>(std::log(sum) - (double(of_target) - top));
    if (!factor) continue;
    const float scale = static_cast<float>(*factor / sum);
    PYGPT_FOR_LANES(V, store_step(x + i, vexp2((load_step(x + i, n) - splat(top)) * kLog2E) * scale, n);)
    store(x + target, splat(static_cast<float>((std::exp(double(of_target) - top) / sum - 1) * *factor)), 1);
  }
}

}  // namespace pygpt::PYGPT_ISA
