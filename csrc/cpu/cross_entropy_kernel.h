// Cross-entropy of a row of logits and its gradient, for one instruction set (see foreach_isa.h). T: dtype of the logits.
// A row of a usual vocabulary stays in the second-level cache between the passes: memory sees one read and one write.

namespace pygpt::PYGPT_ISA {

constexpr float kLog2E = 1.4426950409f;

constexpr int64_t kBlock = 1024;  // logits: in float32 they fit the first-level cache

// The largest logit and the sum of exp(logit - largest). Blocks fit the first-level cache, so that the largest of a block
// is known before its exponentials: one for each logit, and one for each block that brings a new maximum.
template <class T>
void softmax_statistics(const T* x, int64_t V, float* largest, double* sum) {
  constexpr int kSums = 4;
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

// The same of kLanes .. kBlock logits, whose exponentials are kept. What fills no vector is taken together with logits before
// it: masked loads and stores, of one row after the other, took more time than the rest of rows as short as these.
template <class T>
void softmax_statistics_of_few(const T* x, int64_t V, float* kept, float* largest, double* sum) {
  const int64_t whole = V / kLanes * kLanes, last = V - kLanes;
  vf most[2] = {load(x + last), load(x + last)}, part[2] = {};
  PYGPT_FOR_LANES_BY(2, whole, most[u] = vmax(most[u], load_step(x + i, n));)
  *largest = reduce_max(vmax(most[0], most[1]));
  const vf top = splat(*largest);
  PYGPT_FOR_LANES_BY(2, whole, {
    const vf e = vexp2((load_step(x + i, n) - top) * kLog2E);
    store(kept + i, e);
    part[u] += e;
  })
  if (whole < V) {
    const vf e = vexp2((load(x + last) - top) * kLog2E);
    store(kept + last, e);
    part[0] += lane_numbers() < static_cast<int32_t>(whole - last) ? vf{} : e;
  }
  *sum = reduce_add(part[0] + part[1]);
}

template <class T>
void multiply_few(const float* kept, float scale, T* x, int64_t V) {
  for (int64_t i = 0; i + kLanes < V; i += kLanes) store(x + i, load(kept + i) * scale);
  store(x + V - kLanes, load(kept + V - kLanes) * scale);
}

// losses[row] = -log softmax(logits)[target], and with `factor` logits = (softmax - one_hot) * *factor; both 0 for ignored
// rows.
template <class T>
void cross_entropy_rows(T* x, const int64_t* targets, float* losses, int64_t rows, int64_t V, int64_t ignore_index,
                        const float* factor) {
  const bool few = V >= kLanes && V <= kBlock;
  float kept[kBlock];
  for (int64_t row = 0; row < rows; ++row, x += V) {
    const int64_t target = targets[row];
    if (target == ignore_index) {
      losses[row] = 0;
      if (factor) std::memset(static_cast<void*>(x), 0, V * sizeof(T));
      continue;
    }
    float top;
    double sum;
    few ? softmax_statistics_of_few(x, V, kept, &top, &sum) : softmax_statistics(x, V, &top, &sum);
    const double of_target = double(load(x + target, 1)[0]) - top;
    losses[row] = static_cast<float>(std::log(sum) - of_target);
    if (!factor) continue;
    const float scale = static_cast<float>(*factor / sum);
    if (few) {
      multiply_few(kept, scale, x, V);
    } else {
      PYGPT_FOR_LANES(V, store_step(x + i, vexp2((load_step(x + i, n) - splat(top)) * kLog2E) * scale, n);)
    }
    store(x + target, splat(static_cast<float>((std::exp(of_target) / sum - 1) * *factor)), 1);
  }
}

}  // namespace pygpt::PYGPT_ISA
