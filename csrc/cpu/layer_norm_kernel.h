// LayerNorm over rows of C elements, for one instruction set (see foreach_isa.h). T: dtype of x and y; W: of the weights.
// A row stays in the first-level cache between its passes, so memory sees each input and output once.

namespace pygpt::PYGPT_ISA {

// Sums are kept in this many vectors: one would make each addition wait for the one before it.
constexpr int kSums = 4;

PYGPT_INLINE float add_sums(const vf* s) { return reduce_add((s[0] + s[1]) + (s[2] + s[3])); }

// residual and sum are null for plain layer_norm. weight: C floats, and bias too; bias may be null.
template <class T>
void layer_norm_rows(const T* x, const T* residual, const float* weight, const float* bias, T* sum, T* y, float* mean,
                     float* rstd, int64_t rows, int64_t C, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += C, y += C) {
    const T* in = x;
    vf total[kSums] = {};
    if (residual) {
      PYGPT_FOR_LANES_BY(kSums, C, {
        store_step(sum + i, load_step(x + i, n) + load_step(residual + i, n), n);
        total[u] += load_step(sum + i, n);  // read back: the statistics are those of the rounded sum, as in two eager ops
      })
      in = sum;
      residual += C;
      sum += C;
    } else {
      PYGPT_FOR_LANES_BY(kSums, C, total[u] += load_step(in + i, n);)
    }
    const float mu = add_sums(total) / C;

    // The row is in the first-level cache now and memory idle: it fetches the next row meanwhile.
    vf squares[kSums] = {};
    PYGPT_FOR_LANES_BY(kSums, C, {
      vf d = load_step(in + i, n) - splat(mu);
      if (n < kLanes)
        for (int64_t lane = n; lane < kLanes; ++lane) d[lane] = 0;
      squares[u] += d * d;
      __builtin_prefetch(x + C + i);
      if (residual) __builtin_prefetch(residual + i);
    })
    const float r = 1.0f / std::sqrt(add_sums(squares) / C + eps);

    const vf vr = splat(r), vmu = splat(mu);
    if (bias) {
      PYGPT_FOR_LANES(C, store_step(y + i, (load_step(in + i, n) - vmu) * vr * load_step(weight + i, n) +
                                             load_step(bias + i, n), n);)
    } else {
      PYGPT_FOR_LANES(C, store_step(y + i, (load_step(in + i, n) - vmu) * vr * load_step(weight + i, n), n);)
    }
    mean[row] = mu;
    rstd[row] = r;
  }
}

// grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = grad * weight; + grad_sum where given (add_layer_norm).
// Adds these rows' share of the weight and bias gradients into dweight and dbias (C floats each; dbias may be null).
// One row at a time, weight gradients in the pass that reads memory: measured 1.3 times faster on tensors larger than the
// caches than four rows together, which saves loads of dweight but makes memory wait for the arithmetic.
template <class T>
void layer_norm_backward_rows(const T* grad, const T* grad_sum, const T* x, const float* weight, const float* mean,
                              const float* rstd, T* grad_x, float* dweight, float* dbias, int64_t rows, int64_t C) {
  for (int64_t row = 0; row < rows; ++row, grad += C, x += C, grad_x += C) {
    const vf r = splat(rstd[row]), mu = splat(mean[row]);
    vf sum_g[kSums] = {}, sum_gx[kSums] = {};
    PYGPT_FOR_LANES_BY(kSums, C, {
      const vf xhat = (load_step(x + i, n) - mu) * r, dy = load_step(grad + i, n), g = dy * load_step(weight + i, n);
      store_step(dweight + i, load_step(dweight + i, n) + dy * xhat, n);
      if (dbias) store_step(dbias + i, load_step(dbias + i, n) + dy, n);
      sum_g[u] += g;
      sum_gx[u] += g * xhat;  // beyond the row's end g is 0
    })
    const vf mean_g = splat(add_sums(sum_g) / C), mean_gx = splat(add_sums(sum_gx) / C);
    PYGPT_FOR_LANES(C, {
      const vf dy = load_step(grad + i, n), xhat = (load_step(x + i, n) - mu) * r;
      vf dx = (dy * load_step(weight + i, n) - mean_g - xhat * mean_gx) * r;
      if (grad_sum) dx += load_step(grad_sum + i, n);
      store_step(grad_x + i, dx, n);
    })
    if (grad_sum) grad_sum += C;
  }
}

// out[c] = the sum of partial[chunk][c] over chunks in order, rounded once.
template <class W>
void add_chunks(const float* partial, int64_t chunks, W* out, int64_t C) {
  PYGPT_FOR_LANES(C, {
    vf total = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += load_step(partial + chunk * C + i, n);
    store_step(out + i, total, n);
  })
}

}  // namespace pygpt::PYGPT_ISA
