// LayerNorm over rows of C elements, for one instruction set (see foreach_isa.h). T: dtype of x and y; W: of the weights.
// A row stays in the first-level cache between its passes, so memory sees each input and output once.

#include "cpu/pair.h"

namespace pygpt::PYGPT_ISA {

// Sums are kept in this many pairs of vectors: in one, each addition would wait for the one before it.
constexpr int kSums = 2;

PYGPT_INLINE float add_sums(const Pair* s) { return reduce_add((s[0].a + s[1].a) + (s[0].b + s[1].b)); }

// weight, C elements, in the order of pairs of T; zeros up to a whole pair.
template <class T, class W>
void to_row_order(const W* weight, float* to, int64_t C) {
  PYGPT_FOR_PAIRS(C, store_pair(to + i, to_pair_order<T>(from_pair_order<W>(load_pair_step(weight + i, n))));)
}

// residual and sum are null for plain layer_norm. weight, and bias, which may be null: from to_row_order.
template <class T>
void layer_norm_rows(const T* x, const T* residual, const float* weight, const float* bias, T* sum, T* y, float* mean,
                     float* rstd, int64_t rows, int64_t C, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += C, y += C) {
    const T* in = x;
    Pair total[kSums] = {};
    if (residual) {
      PYGPT_FOR_PAIRS_BY(kSums, C, {
        store_pair_step(sum + i, load_pair_step(x + i, n) + load_pair_step(residual + i, n), n);
        // Read back: the statistics are those of the rounded sum, as in two eager ops.
        total[u] = total[u] + load_pair_step(sum + i, n);
      })
      in = sum;
      residual += C;
      sum += C;
    } else {
      PYGPT_FOR_PAIRS_BY(kSums, C, total[u] = total[u] + load_pair_step(in + i, n);)
    }
    const float mu = add_sums(total) / C;
    const vf vmu = splat(mu);

    // The row is in the first-level cache now and memory idle: it fetches the next row meanwhile.
    Pair squares[kSums] = {};
    PYGPT_FOR_PAIRS_BY(kSums, C, {
      Pair d = load_pair_step(in + i, n) - vmu;
      if (n < kPair) d = first_of_pair<T>(d, n);
      squares[u] = squares[u] + d * d;
      prefetch_pair(x + C + i);
      if (residual) prefetch_pair(residual + i);
    })
    const float r = 1.0f / std::sqrt(add_sums(squares) / C + eps);

    const vf vr = splat(r);
    if (bias) {
      PYGPT_FOR_PAIRS(C, {
        const Pair xhat = (load_pair_step(in + i, n) - vmu) * vr;
        store_pair_step(y + i, xhat * load_pair(weight + i) + load_pair(bias + i), n);
      })
    } else {
      PYGPT_FOR_PAIRS(C, store_pair_step(y + i, (load_pair_step(in + i, n) - vmu) * vr * load_pair(weight + i), n);)
    }
    mean[row] = mu;
    rstd[row] = r;
  }
}

// grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = grad * weight; + grad_sum where given (add_layer_norm).
// dweight and dbias, which may be null: these rows' share of the gradients of weight and bias, in the order of weight.
// One row at a time, weight gradients in the pass that reads memory: measured 1.3 times faster on tensors larger than the
// caches than four rows together, which saves loads of dweight but makes memory wait for the arithmetic.
template <class T>
void layer_norm_backward_rows(const T* grad, const T* grad_sum, const T* x, const float* weight, const float* mean,
                              const float* rstd, T* grad_x, float* dweight, float* dbias, int64_t rows, int64_t C) {
  const int64_t padded = (C + kPair - 1) / kPair * kPair;
  std::memset(dweight, 0, padded * sizeof *dweight);
  if (dbias) std::memset(dbias, 0, padded * sizeof *dbias);
  for (int64_t row = 0; row < rows; ++row, grad += C, x += C, grad_x += C) {
    const float r = rstd[row];
    const vf vr = splat(r), mu = splat(mean[row]);
    Pair sum_g[kSums] = {}, sum_gd[kSums] = {};  // of g and g * (x - mean); beyond the row's end grad is 0
    PYGPT_FOR_PAIRS_BY(kSums, C, {
      const Pair dy = load_pair_step(grad + i, n), w = load_pair(weight + i), dyd = dy * (load_pair_step(x + i, n) - mu);
      store_pair(dweight + i, load_pair(dweight + i) + dyd * vr);
      if (dbias) store_pair(dbias + i, load_pair(dbias + i) + dy);
      sum_g[u] = sum_g[u] + dy * w;
      sum_gd[u] = sum_gd[u] + dyd * w;
    })
    const vf mean_g = splat(add_sums(sum_g) / C), slope = splat(add_sums(sum_gd) * r / C * r);
    PYGPT_FOR_PAIRS(C, {
      const Pair d = load_pair_step(x + i, n) - mu, g = load_pair_step(grad + i, n) * load_pair(weight + i);
      Pair dx = (g - mean_g - d * slope) * vr;
      if (grad_sum) dx = dx + load_pair_step(grad_sum + i, n);
      store_pair_step(grad_x + i, dx, n);
      if constexpr (sizeof(T) < sizeof(float)) {  // the next row, as in forward; of float32 the loads cost more than the wait
        prefetch_pair(x + C + i);
        prefetch_pair(grad + C + i);
      }
    })
    if (grad_sum) grad_sum += C;
  }
}

// out[c] = the sum of partial[chunk][c], `stride` apart and in the order of pairs of T, over chunks in order, rounded once.
template <class T, class W>
void add_chunks(const float* partial, int64_t chunks, int64_t stride, W* out, int64_t C) {
  PYGPT_FOR_PAIRS(C, {
    Pair total = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total = total + load_pair(partial + chunk * stride + i);
    store_pair_step(out + i, to_pair_order<W>(from_pair_order<T>(total)), n);
  })
}

}  // namespace pygpt::PYGPT_ISA
