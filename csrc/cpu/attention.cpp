// causal_attention on the CPU: checks, threads and registration. The arithmetic is attention_*kernel.h.

#include "cpu/attention.h"

#include <algorithm>
#include <type_traits>

#include "cpu/operators.h"
#include "cpu/threads.h"

#define PYGPT_KERNELS_FOR_AMX
#define PYGPT_KERNELS "cpu/attention_kernels.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

// Floating-point operations a thread takes at least: with less, waking it costs more than it saves.
constexpr double kMinOperations = 2e6;

int64_t threads_for(double operations) {
  return std::clamp<int64_t>(static_cast<int64_t>(operations / kMinOperations), 1, torch::stable::get_num_threads());
}

// First of the work items of thread `part` of `parts`. Items are (head, block), and cost(head, block) is the same for
// all heads of a batch. No result depends on where the bounds lie.
template <class Cost>
int64_t bound(const AttentionShape& shape, int64_t blocks, int64_t part, int64_t parts, const Cost& cost) {
  const int64_t heads = shape.B * shape.H;
  if (part == parts) return heads * blocks;
  const auto per_head = [&](int64_t head) {
    int64_t sum = 0;
    for (int64_t i = 0; i < blocks; ++i) sum += cost(head, i);
    return sum;
  };
  int64_t total = 0, head = 0;
  for (int64_t b = 0; b < shape.B; ++b) total += per_head(b * shape.H) * shape.H;
  int64_t target = total / parts * part + total % parts * part / parts;
  for (; target > 0; head += shape.H) {
    const int64_t here = per_head(head);
    if (target >= here * shape.H) {
      target -= here * shape.H;
      continue;
    }
    head += target / here;
    int64_t i = 0;
    for (target %= here; target > 0 && target >= cost(head, i) / 2; ++i) target -= cost(head, i);
    return head * blocks + i;
  }
  return head * blocks;
}

void check_settings(const Tensor& x, int64_t head_dim, double dropout_p, const std::optional<Tensor>& seed, const char* op) {
  PYGPT_CHECK(head_dim >= 1 && head_dim <= 256, op, ": the head dimension must be 1 to 256");
  PYGPT_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, op,
              ": tensors must be float32 or bfloat16");
  PYGPT_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1)");
  PYGPT_CHECK(dropout_p == 0 || (seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long), op,
              ": dropout needs a seed, int64 of shape (1,)");
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p, const std::optional<Tensor>& seed,
           const char* op) {
  PYGPT_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k, v must be (B, T or S, H, D)");
  for (int i = 0; i < 4; ++i)
    PYGPT_CHECK(k.size(i) == v.size(i) && (i == 1 ? k.size(i) >= q.size(i) : k.size(i) == q.size(i)), op,
                ": q must be (B, T, H, D) and k, v (B, S, H, D) with S >= T");
  PYGPT_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
              ": q, k, v must have the same dtype");
  check_settings(q, q.size(3), dropout_p, seed, op);
}

void check_packed(const Tensor& qkv, int64_t n_head, double dropout_p, const std::optional<Tensor>& seed, const char* op) {
  PYGPT_CHECK(qkv.dim() == 3 && n_head >= 1 && qkv.size(2) % (3 * n_head) == 0, op,
              ": qkv must be (B, T, 3C), C a multiple of n_head");
  check_settings(qkv, qkv.size(2) / (3 * n_head), dropout_p, seed, op);
}

}  // namespace

std::optional<Tensor> first_keys(const AttentionShape& sizes, const std::optional<Tensor>& document_start, const char* op) {
  if (!document_start) return std::nullopt;
  const Tensor& from = *document_start;
  const int64_t B = sizes.B, T = sizes.T;
  PYGPT_CHECK(from.scalar_type() == ScalarType::Int && from.dim() == 2 && from.size(0) == B && from.size(1) == T, op,
              ": document_start must be int32 (B, T)");
  Tensor to = new_empty(from, {B, T}, ScalarType::Int);
  const int32_t* given = from.const_data_ptr<int32_t>();
  int32_t* clamped = to.mutable_data_ptr<int32_t>();
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < T; ++t) {
      const int64_t start = given[b * from.stride(0) + t * from.stride(1)];
      *clamped++ = static_cast<int32_t>(std::clamp<int64_t>(start, 0, t + sizes.S - T));
      PYGPT_CHECK(t == 0 || clamped[-2] <= clamped[-1], op, ": document_start must not decrease along T");
    }
  return to;
}

namespace {

AttentionShape sizes_of(const Tensor& q, const Tensor& k) {
  return {q.size(0), q.size(1), q.size(2), k.size(1), q.size(3)};
}

AttentionShape sizes_of(const Tensor& qkv, int64_t n_head, int64_t past = 0) {
  return {qkv.size(0), qkv.size(1), n_head, past + qkv.size(1), qkv.size(2) / (3 * n_head)};
}

AttentionShape shape_of(AttentionShape shape, double scale, double dropout_p, const std::optional<Tensor>& seed,
                        const std::optional<Tensor>& first_keys) {
  shape.scale = static_cast<float>(scale);
  shape.pairs = static_cast<double>(shape.B) * shape.T * (shape.S - shape.T / 2);
  if (first_keys) {
    shape.document_start = first_keys->const_data_ptr<int32_t>();
    for (int64_t i = 0; i < shape.B * shape.T; ++i) shape.pairs -= shape.document_start[i];
  }
  if (dropout_p > 0) {
    const uint64_t key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    shape.dropout = {true,
                     static_cast<uint32_t>(dropout_p * 4294967296.0),
                     static_cast<float>(1 / (1 - dropout_p)),
                     {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}};
  }
  return shape;
}

Tensor unit_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) == 1 ? x : torch::stable::contiguous(x);
}

template <class T>
HeadView<const T> view(const Tensor& x) {
  return {static_cast<const T*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <class T>
HeadView<T> mutable_view(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// q, k or v, part 0, 1 or 2 of the last dimension of x, or, with one part, all of it.
template <class T>
HeadView<const T> view_of_part(const Tensor& x, const AttentionShape& shape, int64_t part = 0) {
  return {static_cast<const T*>(x.const_data_ptr()) + part * shape.H * shape.D, x.stride(0), x.stride(1), shape.D};
}
template <class T>
HeadView<T> mutable_view_of_part(const Tensor& x, const AttentionShape& shape, int64_t part) {
  return {static_cast<T*>(x.mutable_data_ptr()) + part * shape.H * shape.D, x.stride(0), x.stride(1), shape.D};
}

template <class T>
auto forward_kernel() {
#ifdef PYGPT_AMX_LEVEL
  if constexpr (std::is_same_v<T, bf16>)
    if (capability() >= Capability::amx) return amx::attention_forward_tiles;
#endif
  return PYGPT_DISPATCH_PRODUCTS(attention_forward<T>);
}

template <class T>
auto backward_kernel() {
#ifdef PYGPT_AMX_LEVEL
  if constexpr (std::is_same_v<T, bf16>)
    if (capability() >= Capability::amx) return amx::attention_backward<T>;
#endif
  return PYGPT_DISPATCH_PRODUCTS(attention_backward<T>);
}

template <class T>
int64_t backward_workspace(const AttentionShape& shape) {
  if (std::is_same_v<T, bf16> && capability() >= Capability::amx) return shape.tiles_backward_workspace();
  return shape.backward_workspace();
}

Tensor workspace(const Tensor& like, int64_t floats) { return new_empty(like, {floats}, ScalarType::Float); }

template <class T>
struct ForwardInputs {
  HeadView<const T> q, k, v;
};

// Of the forward pass, for each thread.
constexpr int64_t kLeastParts = 4, kMostParts = 16;

template <class T>
void forward(const AttentionShape& shape, const ForwardInputs<T>& in, T* out, float* lse, const Tensor& like) {
  const int64_t blocks = shape.query_blocks(), size = shape.forward_workspace();
  const auto cost = [&](int64_t head, int64_t block) {
    return shape.end_key_block(block) - shape.first_key_block(head, block);
  };
  const int64_t heads = shape.B * shape.H, workers = threads_for(4.0 * shape.H * shape.pairs * shape.D);
  // A part packs the keys and values that it needs: so whole heads, where there are enough of them.
  const bool whole_heads = workers == 1 || heads >= kLeastParts * workers;
  const int64_t parts = whole_heads ? std::min(heads, kMostParts * workers) : kLeastParts * workers;
  Tensor space = workspace(like, workers * size);
  float* base = space.mutable_data_ptr<float>();
  const auto kernel = forward_kernel<T>();
  const auto begin = [&](int64_t part) {
    return whole_heads ? heads * part / parts * blocks : bound(shape, blocks, part, parts, cost);
  };
  in_turn(parts, workers, [&](int64_t worker, int64_t part) {
    kernel(shape, in.q, in.k, in.v, out, lse, base + worker * size, begin(part), begin(part + 1));
  });
}

// What reading a key and a value for a head costs a thread, in operations: it waits for memory, not for arithmetic.
constexpr double kOperationsPerElementRead = 128;
constexpr int64_t kDecodeItems = 2;  // for each thread, where there are heads enough

template <class T>
void decode(const AttentionShape& shape, const ForwardInputs<T>& in, T* out, float* lse, const Tensor& like) {
  const int64_t heads = shape.B * shape.H, chunks = shape.decode_chunks(), others = shape.B * chunks;
  const int64_t threads = threads_for(kOperationsPerElementRead * heads * shape.S * shape.D);
  // Groups of as many heads as the caches hold, but enough of them for every thread, of about the same size.
  const int64_t most = std::clamp<int64_t>(kDecodeElements / shape.D, 1, shape.H);
  const int64_t least = threads == 1 ? 1 : kDecodeItems * threads;
  const int64_t wanted = std::max((shape.H + most - 1) / most, (least + others - 1) / others);
  const int64_t group = (shape.H + wanted - 1) / wanted, items = others * ((shape.H + group - 1) / group);
  Tensor space = workspace(like, heads * chunks * shape.decode_workspace());
  float* base = space.mutable_data_ptr<float>();
  const auto kernel = PYGPT_DISPATCH_PRODUCTS(attention_decode<T>);
  in_turn(items, std::min(items, threads), [&](int64_t, int64_t item) {
    kernel(shape, in.q, in.k, in.v, base, group, item);
  });
  PYGPT_DISPATCH_PRODUCTS(attention_decode_join<T>)(shape, base, out, lse);
}

// Fills out, of B x T x H x D elements, and returns lse (B, H, T). inputs(T{}): ForwardInputs<T>.
template <class Inputs>
Tensor attend(const AttentionShape& shape, const Inputs& inputs, Tensor& out) {
  Tensor lse = new_empty(out, {shape.B, shape.H, shape.T}, ScalarType::Float);
  const auto run = [&]<class T>(T) {
    const auto path = shape.T <= kDecodeQueries ? decode<T> : forward<T>;
    path(shape, inputs(T{}), static_cast<T*>(out.mutable_data_ptr()), lse.mutable_data_ptr<float>(), out);
  };
  if (lse.numel()) out.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16{});
  return lse;
}

}  // namespace

std::tuple<Tensor, Tensor> causal_attention_forward(Tensor q, Tensor k, Tensor v, double scale, double dropout_p,
                                                    std::optional<Tensor> seed,
                                                    std::optional<Tensor> document_start) {
  const char* op = "causal_attention_forward";
  check(q, k, v, dropout_p, seed, op);
  q = unit_stride(q), k = unit_stride(k), v = unit_stride(v);
  document_start = first_keys(sizes_of(q, k), document_start, op);
  const AttentionShape shape = shape_of(sizes_of(q, k), scale, dropout_p, seed, document_start);
  Tensor out = new_like(q);
  Tensor lse = attend(shape, [&]<class T>(T) { return ForwardInputs<T>{view<T>(q), view<T>(k), view<T>(v)}; }, out);
  return {out, lse};
}

Tensor causal_attention_of_cache(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, int64_t layer,
                                 int64_t past, const std::optional<Tensor>& first_keys) {
  const AttentionShape sizes = sizes_of(qkv, k_cache.size(3), past);
  const AttentionShape shape = shape_of(sizes, 1 / std::sqrt(static_cast<double>(sizes.D)), 0, std::nullopt, first_keys);
  Tensor out = new_empty(qkv, {shape.B, shape.T, shape.H * shape.D}, qkv.scalar_type());
  attend(shape, [&]<class X>(X) {
    const auto of_cache = [&](const Tensor& cache) {
      const X* data = static_cast<const X*>(cache.const_data_ptr()) + layer * cache.stride(0);
      return HeadView<const X>{data, cache.stride(1), cache.stride(2), cache.stride(3)};
    };
    return ForwardInputs<X>{view_of_part<X>(qkv, shape), of_cache(k_cache), of_cache(v_cache)};
  }, out);
  return out;
}

namespace {

// Whole heads in parallel, five products per tile; or, where that would leave threads idle, blocks of keys and then
// blocks of queries, seven products per tile. The bits are the same: see attention_backward_kernel.h.
template <class T>
void backward(const AttentionShape& shape, const BackwardInputs<T>& in, const BackwardOutputs<T>& out,
              const Tensor& like) {
  const int64_t heads = shape.B * shape.H, q_blocks = shape.query_blocks(), k_blocks = shape.key_blocks();
  const int64_t size = backward_workspace<T>(shape);
  const int64_t threads = threads_for(10.0 * shape.H * shape.pairs * shape.D);
  const auto kernel = backward_kernel<T>();
  const bool by_head = 5 * ((heads + threads - 1) / threads) * threads <= 7 * heads;
  const int64_t parts = by_head ? std::min(threads, heads) : threads;
  Tensor space = workspace(like, parts * size);
  float* base = space.mutable_data_ptr<float>();
  if (by_head) {
    in_turn(heads, parts, [&](int64_t worker, int64_t head) {
      kernel(shape, in, out, base + worker * size, head, {0, k_blocks}, {0, q_blocks});
    });
    return;
  }
  const auto in_blocks = [&](int64_t blocks, const auto& cost, const auto& run) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t end = bound(shape, blocks, part + 1, parts, cost);
        for (int64_t item = bound(shape, blocks, part, parts, cost); item < end;) {
          const int64_t head = item / blocks, count = std::min(blocks - item % blocks, end - item);
          run(base + part * size, head, Range{item % blocks, item % blocks + count});
          item += count;
        }
      }
    });
  };
  in_blocks(k_blocks,
            [&](int64_t head, int64_t block) {
              return shape.end_query_block(head, block) - shape.first_query_block(block);
            },
            [&](float* space, int64_t head, Range range) {
              kernel(shape, in, {{}, out.k, out.v}, space, head, range, {0, q_blocks});
            });
  in_blocks(q_blocks,
            [&](int64_t head, int64_t block) {
              return shape.end_key_block(block) - shape.first_key_block(head, block);
            },
            [&](float* space, int64_t head, Range range) {
              const Range keys{shape.first_key_block(head, range.begin), shape.end_key_block(range.end - 1)};
              kernel(shape, in, {out.q, {}, {}}, space, head, keys, range);
            });
}

// Backward's other arguments: grad and out in x's dtype and of this shape, (B, T, H, D) or (B, T, C).
void check_saved(const AttentionShape& sizes, const Tensor& x, const Tensor& grad, const Tensor& out, const Tensor& lse,
                 std::initializer_list<int64_t> shape, const char* op) {
  for (const Tensor* of : {&grad, &out})
    PYGPT_CHECK(of->scalar_type() == x.scalar_type() && of->dim() == static_cast<int64_t>(shape.size()) &&
                    std::equal(shape.begin(), shape.end(), of->sizes().begin()),
                op, ": grad and out must have the output's shape and dtype");
  PYGPT_CHECK(lse.scalar_type() == ScalarType::Float && lse.numel() == sizes.B * sizes.H * sizes.T, op,
              ": lse must be float32 (B, H, T)");
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out,
                                                             Tensor lse, double scale, double dropout_p,
                                                             std::optional<Tensor> seed,
                                                             std::optional<Tensor> document_start) {
  const char* op = "causal_attention_backward";
  check(q, k, v, dropout_p, seed, op);
  check_saved(sizes_of(q, k), q, grad, out, lse, {q.size(0), q.size(1), q.size(2), q.size(3)}, op);
  document_start = first_keys(sizes_of(q, k), document_start, op);
  const AttentionShape shape = shape_of(sizes_of(q, k), scale, dropout_p, seed, document_start);
  q = unit_stride(q), k = unit_stride(k), v = unit_stride(v), grad = unit_stride(grad);
  out = as_contiguous(out), lse = as_contiguous(lse);
  const Tensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  const auto run = [&]<class T>(T) {
    backward<T>(shape, {view<T>(q), view<T>(k), view<T>(v), view<T>(grad), static_cast<const T*>(out.const_data_ptr()),
                        lse.const_data_ptr<float>()},
                {mutable_view<T>(grad_q), mutable_view<T>(grad_k), mutable_view<T>(grad_v)}, q);
  };
  if (k.numel()) q.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16{});
  return {grad_q, grad_k, grad_v};
}

std::tuple<Tensor, Tensor> causal_attention_qkvpacked_forward(Tensor qkv, int64_t n_head, double scale, double dropout_p,
                                                              std::optional<Tensor> seed,
                                                              std::optional<Tensor> document_start) {
  const char* op = "causal_attention_qkvpacked_forward";
  check_packed(qkv, n_head, dropout_p, seed, op);
  qkv = unit_stride(qkv);
  document_start = first_keys(sizes_of(qkv, n_head), document_start, op);
  const AttentionShape shape = shape_of(sizes_of(qkv, n_head), scale, dropout_p, seed, document_start);
  Tensor out = new_empty(qkv, {shape.B, shape.T, shape.H * shape.D}, qkv.scalar_type());
  Tensor lse = attend(shape, [&]<class T>(T) {
    return ForwardInputs<T>{view_of_part<T>(qkv, shape, 0), view_of_part<T>(qkv, shape, 1), view_of_part<T>(qkv, shape, 2)};
  }, out);
  return {out, lse};
}

Tensor causal_attention_qkvpacked_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int64_t n_head, double scale,
                                           double dropout_p, std::optional<Tensor> seed,
                                           std::optional<Tensor> document_start) {
  const char* op = "causal_attention_qkvpacked_backward";
  check_packed(qkv, n_head, dropout_p, seed, op);
  check_saved(sizes_of(qkv, n_head), qkv, grad, out, lse, {qkv.size(0), qkv.size(1), qkv.size(2) / 3}, op);
  document_start = first_keys(sizes_of(qkv, n_head), document_start, op);
  const AttentionShape shape = shape_of(sizes_of(qkv, n_head), scale, dropout_p, seed, document_start);
  qkv = unit_stride(qkv), grad = unit_stride(grad), out = as_contiguous(out), lse = as_contiguous(lse);
  const Tensor packed = new_like(qkv);
  const auto run = [&]<class T>(T) {
    const auto in = [&](int64_t part) { return view_of_part<T>(qkv, shape, part); };
    const auto to = [&](int64_t part) { return mutable_view_of_part<T>(packed, shape, part); };
    backward<T>(shape, {in(0), in(1), in(2), view_of_part<T>(grad, shape), static_cast<const T*>(out.const_data_ptr()),
                        lse.const_data_ptr<float>()},
                {to(0), to(1), to(2)}, qkv);
  };
  if (qkv.numel()) qkv.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16{});
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("causal_attention_forward", TORCH_BOX(&causal_attention_forward));
  m.impl("causal_attention_backward", TORCH_BOX(&causal_attention_backward));
  m.impl("causal_attention_qkvpacked_forward", TORCH_BOX(&causal_attention_qkvpacked_forward));
  m.impl("causal_attention_qkvpacked_backward", TORCH_BOX(&causal_attention_qkvpacked_backward));
}

}  // namespace pygpt
