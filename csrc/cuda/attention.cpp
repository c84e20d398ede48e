// Causal attention on CUDA: checks, scratch and registration. The kernels are attention*.cu.

#include "cuda/attention.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "cuda/tensor.h"

namespace pygpt::cuda {
namespace {

// Views of a packed projection are read in place; only a last stride other than 1 costs a copy.
Tensor rows(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }

void check_dimensions(const Tensor& q, const Tensor& k, const Tensor& v, const char* op) {
  PYGPT_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k and v must have 4 dimensions");
}

Heads heads(const Tensor& x) { return {mutable_data(x), x.stride(0), x.stride(1), x.stride(2)}; }

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double dropout_p,
                   const std::optional<Tensor>& seed, const std::optional<Tensor>& document_start, const char* op) {
  PYGPT_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                  q.size(3) == k.size(3) && same_shape(k, v) && k.size(1) >= q.size(1),
              op, ": q must be (B, T, H, D) and k, v (B, S, H, D) with S >= T");
  PYGPT_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), op, ": q, k and v must have one dtype");
  PYGPT_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, op, ": the head dimension must be 1 to 256");
  PYGPT_CHECK(dropout_p >= 0.0 && dropout_p < 1.0 && (dropout_p == 0.0 || seed), op,
              ": dropout_p must be in [0, 1), with a seed unless it is 0");
  PYGPT_CHECK(!seed || (seed->scalar_type() == ScalarType::Long && seed->numel() == 1), op, ": the seed must be int64 (1,)");
  PYGPT_CHECK(!document_start || (document_start->scalar_type() == ScalarType::Int && document_start->dim() == 2 &&
                                  document_start->size(0) == q.size(0) && document_start->size(1) == q.size(1) &&
                                  document_start->get_device_index() == q.get_device_index()),
              op, ": document_start must be int32 (B, T), on the device of q");
  // One block per 8 rows of a head at most, in the first dimension of the grid.
  PYGPT_CHECK(k.size(1) < (int64_t{1} << 30) && q.size(0) * q.size(2) * (k.size(1) / 8 + 1) < (int64_t{1} << 31), op,
              ": too many heads or keys for one launch");
  const double threshold = std::floor(dropout_p * 4294967296.0);
  Attention p{};
  p.dtype = dtype_of(q, op);
  p.B = static_cast<int>(q.size(0));
  p.T = static_cast<int>(q.size(1));
  p.S = static_cast<int>(k.size(1));
  p.H = static_cast<int>(q.size(2));
  p.D = static_cast<int>(q.size(3));
  p.scale = static_cast<float>(scale);
  p.dropout = {dropout_p > 0.0 ? data<int64_t>(*seed) : nullptr, static_cast<uint32_t>(threshold),
               static_cast<float>(1.0 / (1.0 - dropout_p))};
  p.document_start = data<int32_t>(document_start);
  p.q = heads(q);
  p.k = heads(k);
  p.v = heads(v);
  p.splits = 1;
  return p;
}

int l2_bytes(const OnDevice& device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device.device), device);
  return bytes;
}

// Runs the Hopper kernels, 1.4 to 2 times as fast as the portable ones on an H100 (bench/LOG.md), and says whether it did.
// PYGPT_CUDA_HOPPER=0 asks for the portable ones.
bool run_on_hopper([[maybe_unused]] const Attention& p, [[maybe_unused]] bool backward, const OnDevice& device) {
  const char* asked = std::getenv("PYGPT_CUDA_HOPPER");
  if (asked && std::string_view(asked) == "0") return false;
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.device), device);
  if (major != 9) return false;
#ifdef PYGPT_CUDA_HOPPER
  if (!attention_on_hopper(p, backward)) return false;
  backward ? attention_hopper_backward(p, device) : attention_hopper_forward(p, device);
  return true;
#else
  return false;
#endif
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, double scale, double dropout_p,
                                   std::optional<Tensor> seed, std::optional<Tensor> document_start) {
  const char* op = "causal_attention_forward";
  check_dimensions(q, k, v, op);
  q = rows(q);
  k = rows(k);
  v = rows(v);
  if (document_start) document_start = torch::stable::contiguous(*document_start);
  Attention p = describe(q, k, v, scale, dropout_p, seed, document_start, op);
  const OnDevice device(op, q);
  p.section = heads_in_section(p, l2_bytes(device));
  Tensor out = new_empty(q, {p.B, p.T, p.H, p.D}, q.scalar_type());
  Tensor lse = new_empty(q, {p.B, p.H, p.T}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  p.out = heads(out);
  p.lse = mutable_data<float>(lse);
  const bool tensor_cores = attention_on_tensor_cores(p, false);
  if (tensor_cores && run_on_hopper(p, false, device)) return {out, lse};
  p.splits = attention_splits(p, device.multiprocessors);
  const int64_t parts = p.splits > 1 ? p.splits : 0;
  Tensor partial_out = new_empty(q, {parts, p.B, p.H, p.T, p.D}, ScalarType::Float);
  Tensor partial_lse = new_empty(q, {parts, p.B, p.H, p.T}, ScalarType::Float);
  p.partial_out = mutable_data<float>(partial_out);
  p.partial_lse = mutable_data<float>(partial_lse);
  tensor_cores ? attention_forward(p, device) : attention_plain_forward(p, device);
  if (p.splits > 1) attention_join_splits(p, device);
  return {out, lse};
}

struct Gradients {  // of q, k and v; unit stride in the last dimension
  Tensor q, k, v;
};

// The backward operators but for their results' memory. q, k and v have 4 dimensions, and their gradients their shapes.
void fill_gradients(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, double scale, double dropout_p,
                    const std::optional<Tensor>& seed, std::optional<Tensor> document_start, Gradients grads, const char* op) {
  PYGPT_CHECK(same_shape(grad, q) && same_shape(out, q) && grad.scalar_type() == q.scalar_type() &&
                  out.scalar_type() == q.scalar_type(),
              op, ": grad and out must match q in shape and dtype");
  q = rows(q);
  k = rows(k);
  v = rows(v);
  grad = rows(grad);
  out = rows(out);
  lse = torch::stable::contiguous(lse);
  if (document_start) document_start = torch::stable::contiguous(*document_start);
  Attention p = describe(q, k, v, scale, dropout_p, seed, document_start, op);
  PYGPT_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == int64_t(p.B) * p.H * p.T, op,
              ": lse must be (B, H, T) float32");
  const OnDevice device(op, q);
  p.section = heads_in_section(p, l2_bytes(device));
  if (lse.numel() == 0) {  // no query: nothing reaches the keys
    torch::stable::zero_(grads.k);
    torch::stable::zero_(grads.v);
    return;
  }
  Tensor delta = new_empty(q, {p.B, p.H, p.T}, ScalarType::Float);
  p.out = heads(out);
  p.grad = heads(grad);
  p.lse = mutable_data<float>(lse);
  p.delta = mutable_data<float>(delta);
  p.grad_q = heads(grads.q);
  p.grad_k = heads(grads.k);
  p.grad_v = heads(grads.v);
  attention_delta(p, device);
  if (!attention_on_tensor_cores(p, true))
    attention_plain_backward(p, device);
  else if (!run_on_hopper(p, true, device))
    attention_backward(p, device);
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, double scale,
                                            double dropout_p, std::optional<Tensor> seed,
                                            std::optional<Tensor> document_start) {
  const char* op = "causal_attention_backward";
  check_dimensions(q, k, v, op);
  const auto new_like = [](const Tensor& x) {
    return new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  };
  const Gradients grads{new_like(q), new_like(k), new_like(v)};
  fill_gradients(grad, q, k, v, out, lse, scale, dropout_p, seed, document_start, grads, op);
  return {grads.q, grads.k, grads.v};
}

// q, k and v, (B, T, H, D) each, of a packed projection.
std::array<Tensor, 3> split(const Tensor& qkv, int64_t n_head, const char* op) {
  PYGPT_CHECK(qkv.dim() == 3 && n_head >= 1 && qkv.size(2) % (3 * n_head) == 0, op,
              ": qkv must be (B, T, 3C), C a multiple of n_head");
  const Tensor heads =
      torch::stable::view(qkv, {qkv.size(0), qkv.size(1), 3, n_head, qkv.size(2) / (3 * n_head)});
  return {torch::stable::select(heads, 2, 0), torch::stable::select(heads, 2, 1), torch::stable::select(heads, 2, 2)};
}

// (B, T, C) as (B, T, H, D), and the other way round.
Tensor by_head(const Tensor& x, const Tensor& q, const char* op) {
  PYGPT_CHECK(x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == q.size(2) * q.size(3), op,
              ": grad and out must be (B, T, C)");
  return torch::stable::view(x, {q.size(0), q.size(1), q.size(2), q.size(3)});
}
Tensor side_by_side(const Tensor& x) {
  return torch::stable::view(x, {x.size(0), x.size(1), x.size(2) * x.size(3)});
}

std::tuple<Tensor, Tensor> qkvpacked_forward(Tensor qkv, int64_t n_head, double scale, double dropout_p,
                                             std::optional<Tensor> seed, std::optional<Tensor> document_start) {
  const auto [q, k, v] = split(qkv, n_head, "causal_attention_qkvpacked_forward");
  const auto [out, lse] = forward(q, k, v, scale, dropout_p, seed, document_start);
  return {side_by_side(out), lse};
}

Tensor qkvpacked_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int64_t n_head, double scale, double dropout_p,
                          std::optional<Tensor> seed, std::optional<Tensor> document_start) {
  const char* op = "causal_attention_qkvpacked_backward";
  const auto [q, k, v] = split(qkv, n_head, op);
  const Tensor packed = new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2)}, qkv.scalar_type());
  const auto [grad_q, grad_k, grad_v] = split(packed, n_head, op);
  fill_gradients(by_head(grad, q, op), q, k, v, by_head(out, q, op), lse, scale, dropout_p, seed, document_start,
                 {grad_q, grad_k, grad_v}, op);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, PYGPT_CUDA_KEY, m) {
  m.impl("causal_attention_forward", TORCH_BOX(&forward));
  m.impl("causal_attention_backward", TORCH_BOX(&backward));
  m.impl("causal_attention_qkvpacked_forward", TORCH_BOX(&qkvpacked_forward));
  m.impl("causal_attention_qkvpacked_backward", TORCH_BOX(&qkvpacked_backward));
}

}  // namespace pygpt::cuda
