// Runs every CUDA kernel once on buffers that are exactly as large as they must be, for the sanitizer builds: only they
// judge here, the numbers are compared elsewhere.      run_kernels SEED

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/attention.h"
#include "cuda/embedding.h"
#include "cuda/gelu.h"
#include "cuda/layer_norm.h"

namespace {

using namespace pygpt::cuda;

const Launch kAt{nullptr, 2, "run_kernels"};

// Random finite values of any element type.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t count) : data(static_cast<T*>(malloc(count * sizeof(T)))) {
    for (int64_t i = 0; i < count; ++i) set(data[i], static_cast<float>(rand()) / static_cast<float>(RAND_MAX) - 0.5f);
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  template <class I>
  static void set(I& to, float) { to = 0; }
  static void set(float& to, float x) { to = x; }
  static void set(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
  static void set(__half& to, float x) { to = __float2half_rn(x); }
};

template <class T>
void layer_norm(DType dtype, int64_t rows, int64_t C) {
  Buffer<T> x(rows * C), residual(rows * C), weight(C), bias(C), sum(rows * C), y(rows * C), grad_weight(C), grad_bias(C);
  const int64_t partials = layer_norm_partials(rows, C, dtype, kAt.multiprocessors);
  Buffer<float> mean(rows), rstd(rows), partial(partials * 2 * C);
  layer_norm_forward({dtype, dtype, x.data, residual.data, weight.data, bias.data, sum.data, y.data, mean.data, rstd.data,
                      rows, C, 1e-5f}, kAt);
  layer_norm_backward({dtype, dtype, y.data, residual.data, sum.data, weight.data, mean.data, rstd.data, x.data,
                       grad_weight.data, grad_bias.data, partial.data, rows, C}, kAt);
}

template <class T>
void embedding(DType dtype, int64_t B, int64_t T_, int64_t V, int64_t C) {
  Buffer<T> token(V * C), position((T_ + 1) * C), out(B * T_ * C);
  Buffer<int64_t> idx(B * T_);
  for (int64_t i = 0; i < B * T_; ++i) idx.data[i] = rand() % 3 ? rand() % V : V / 2;
  embedding_forward({dtype, idx.data, token.data, position.data, out.data, B * T_, T_, V, C, 1}, kAt);
  Buffer<int32_t> keys(B * T_), keys2(B * T_), places(B * T_), places2(B * T_), counts(embedding_counts(B * T_));
  Buffer<float> partial(embedding_chunks(B * T_) * 2 * C);
  embedding_backward({dtype, dtype, idx.data, out.data, token.data, position.data, B * T_, T_, V, C, 1,
                      {keys.data, keys2.data}, {places.data, places2.data}, counts.data, partial.data}, kAt);
}

template <class T>
void gelu(DType dtype, int64_t rows, int64_t C, bool biased) {
  Buffer<T> x(rows * C), bias(C), y(rows * C), grad(rows * C), grad_x(rows * C), grad_bias(C);
  Buffer<float> partial(gelu_partials(rows, C, dtype, kAt.multiprocessors) * C);
  Gelu p{.dtype = dtype, .x = x.data, .bias = biased ? bias.data : nullptr, .y = y.data, .count = rows * C, .C = C};
  gelu_forward(p, kAt);
  p.grad = grad.data;
  p.grad_x = grad_x.data;
  p.grad_bias = grad_bias.data;
  p.partial = partial.data;
  gelu_backward(p, kAt);
}

template <class T>
void attention(DType dtype, int B, int T_, int S, int H, int D, bool dropout, int document = 0) {
  const int64_t queries = int64_t(B) * T_ * H * D, keys = int64_t(B) * S * H * D, rows = int64_t(B) * H * T_;
  Buffer<T> q(queries), k(keys), v(keys), out(queries), grad(queries), grad_q(queries), grad_k(keys), grad_v(keys);
  Buffer<float> lse(rows), delta(rows);
  Buffer<int64_t> seed(1);
  Buffer<int32_t> starts(B * T_);  // documents of so many tokens, and starts out of range where the contract allows them
  for (int i = 0; i < B * T_; ++i)
    starts.data[i] = i % T_ == 0 ? -9 : i % T_ == T_ - 1 ? S + 9 : document ? (i % T_ + S - T_) / document * document : 0;
  const auto heads = [&](Buffer<T>& x, int64_t tokens) { return Heads{x.data, tokens * H * D, int64_t(H) * D, D}; };
  Attention p{.dtype = dtype, .B = B, .T = T_, .S = S, .H = H, .D = D, .scale = 0.1f,
              .dropout = {dropout ? seed.data : nullptr, 1u << 30, 4.0f / 3.0f},
              .document_start = document ? starts.data : nullptr, .section = 1,
              .q = heads(q, T_), .k = heads(k, S), .v = heads(v, S), .out = heads(out, T_), .lse = lse.data, .splits = 1,
              .partial_out = nullptr, .partial_lse = nullptr, .grad = heads(grad, T_), .grad_q = heads(grad_q, T_),
              .grad_k = heads(grad_k, S), .grad_v = heads(grad_v, S), .delta = delta.data};
  p.section = heads_in_section(p, 200'000);
  attention_delta(p, kAt);
  p.splits = attention_splits(p, kAt.multiprocessors);
  Buffer<float> partial_out(p.splits * queries), partial_lse(p.splits * rows);
  p.partial_out = partial_out.data;
  p.partial_lse = partial_lse.data;
  const bool tensor_cores = attention_on_tensor_cores(p, true);
  tensor_cores ? attention_forward(p, kAt) : attention_plain_forward(p, kAt);
  if (p.splits > 1) attention_join_splits(p, kAt);
  if (!tensor_cores) return attention_plain_backward(p, kAt);
  if (attention_on_hopper(p, false)) attention_hopper_forward(p, kAt);
  attention_backward(p, kAt);
  if (attention_on_hopper(p, true)) attention_hopper_backward(p, kAt);
}

}  // namespace

int main(int argc, char** argv) {
  emulation::set_seed(argc > 1 ? strtoull(argv[1], nullptr, 10) : 1);
  attention<__nv_bfloat16>(DType::bf16, 1, 70, 131, 2, 64, true);
  attention<__nv_bfloat16>(DType::bf16, 1, 70, 131, 1, 40, false);
  attention<__half>(DType::f16, 1, 3, 200, 1, 72, true);
  attention<__half>(DType::f16, 1, 130, 270, 1, 72, true);
  attention<__half>(DType::f16, 1, 3, 20, 1, 128, false);
  attention<float>(DType::f32, 1, 9, 40, 1, 33, true);
  attention<__nv_bfloat16>(DType::bf16, 2, 140, 150, 1, 64, true, 30);
  attention<__half>(DType::f16, 1, 330, 330, 1, 128, false);
  attention<__half>(DType::f16, 1, 3, 200, 1, 72, false, 70);
  attention<float>(DType::f32, 2, 40, 50, 1, 5, false, 7);
  puts("attention");
  embedding<float>(DType::f32, 2, 37, 300, 72);
  embedding<__nv_bfloat16>(DType::bf16, 1, 1100, 7, 5);
  puts("embedding");
  for (const bool biased : {false, true}) {
    gelu<float>(DType::f32, 9, 33, biased);
    gelu<__nv_bfloat16>(DType::bf16, 70, 264, biased);
    gelu<__half>(DType::f16, 3, 2056, biased);
  }
  puts("gelu");
  for (const auto& [rows, C] : {std::pair<int64_t, int64_t>{1, 1}, {3, 7}, {21, 72}, {19, 1608}, {5, 4104}}) {
    layer_norm<float>(DType::f32, rows, C);
    layer_norm<__nv_bfloat16>(DType::bf16, rows, C);
  }
  puts("layer_norm");
  return 0;
}
