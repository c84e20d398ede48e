// The head and its loss on processors with AMX: logits exist as sums of the product alone, never as a tensor.
//
// One pass over the vocabulary takes each block's logits into the statistics of the softmax. A second one computes them again,
// turns them into the gradient of as many columns as a small workspace holds, and multiplies it at once with weight and hidden.
// The product that is done twice costs less than logits in memory, and a gradient of weight that is added to once for each
// chunk of tokens. To recompute instead of to store is the idea of Cut Cross-Entropy (Wijmans et al., 2024).

#include <cmath>
#include <vector>

#include "cpu/matmul.h"

namespace pygpt {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

int64_t blocks_of(int64_t V, int64_t C) { return (V + statistics_block(C) - 1) / statistics_block(C); }

// How many tokens at a time, and for how many columns of the vocabulary their gradients are at hand: as much as a workspace of
// 64 MB holds besides what `multiply` packs. Gradients of weight are added up where there are more tokens.
struct Sizes {
  static constexpr int64_t kBytes = 48 << 20, kMaxTokens = 4096;
  static constexpr int64_t kColumns = 512, kFewColumns = 2048, kMaxColumns = 4096;  // multiples of the first

  Sizes(int64_t N, int64_t V, int64_t C) {
    // Of a token: hidden, packed for two products, the sums of its gradient, and statistics of each block.
    const int64_t bytes = 8 * C + 8 * blocks_of(V, C), gradient = sizeof(bf16);
    const int64_t most = std::clamp<int64_t>(kBytes / (bytes + kFewColumns * gradient), kMatmulPanel, kMaxTokens);
    const int64_t chunks = (N + most - 1) / most;
    tokens = matmul_panels((N + chunks - 1) / chunks) * kMatmulPanel;
    columns = std::clamp((kBytes / tokens - bytes) / gradient / kColumns * kColumns, kColumns, kMaxColumns);
  }

  int64_t tokens, columns;
};

// Of some tokens: log2 of the softmax's denominator, the gradient at the target, and the sum of the losses.
double log_sums(const MatmulOut& of, int64_t blocks, float factor, float* log_sum, float* at_target) {
  double total = 0;
  for (int64_t row = 0; row < of.rows; ++row) {
    float top = of.largest[row];
    for (int64_t b = 1; b < blocks; ++b) top = std::max(top, of.largest[b * of.rows + row]);
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * of.rows + row;
      sum += of.sum[at] * std::exp2(double(of.largest[at]) - top);
    }
    const double log = top + std::log2(sum), loss = (log - of.of_target[row]) / kLog2E;
    const bool counts = of.targets[row] >= 0;
    log_sum[row] = counts ? static_cast<float>(log) : std::numeric_limits<float>::infinity();
    at_target[row] = static_cast<float>(std::expm1(-loss) * factor);
    if (counts) total += loss;
  }
  return total;
}

struct Head {
  const bf16 *hidden, *weight;
  int64_t V, C;
  bf16 *grad_hidden, *grad_weight;  // or null
  float factor;
};

// For the tokens at hand, one lot after the other.
struct Buffers {
  Buffers(const Tensor& like, int64_t T, int64_t V, int64_t C, int64_t columns, bool of_hidden, bool of_weight)
      : hidden(of_bf16(like, matmul_panels(T) * matmul_panel_elements(C))),
        turned(of_bf16(like, of_weight ? matmul_panels(C) * matmul_panel_elements(T) : 0)),
        gradient(of_bf16(like, of_hidden || of_weight ? matmul_panels(T) * matmul_panel_elements(columns) : 0)),
        sums(new_empty(like, {of_hidden ? matmul_panels(T) * matmul_panels(C) * kMatmulSums : 0}, ScalarType::Float)),
        statistics((2 * blocks_of(V, C) + 3) * T),
        workspace(like) {}

  static Tensor of_bf16(const Tensor& like, int64_t count) { return new_empty(like, {count}, ScalarType::BFloat16); }
  static bf16* data(Tensor& x) { return static_cast<bf16*>(x.mutable_data_ptr()); }

  Tensor hidden, turned;  // packed, for the products by weight and by the gradient of the logits
  Tensor gradient;        // of the logits, of some columns, packed where it is computed
  Tensor sums;            // of the gradient of hidden
  std::vector<float> statistics;
  Workspace workspace;
};

// Of T tokens: the sum of their losses, and gradients. `add` to that of weight.
double chunk(const Head& head, Buffers& buffers, const int64_t* targets, int64_t T, int64_t columns, bool add) {
  const int64_t V = head.V, C = head.C, blocks = blocks_of(V, C);
  const MatmulOperand hidden = pack({head.hidden, {1, C}}, true, T, C, Buffers::data(buffers.hidden));
  float* statistics = buffers.statistics.data();
  float *log_sum = statistics + (2 * blocks + 1) * T, *at_target = log_sum + T;
  MatmulOut out{T, V, Finish::statistics};
  out.targets = targets, out.largest = statistics;
  out.sum = out.largest + blocks * T, out.of_target = out.sum + blocks * T;
  Workspace& workspace = buffers.workspace;
  multiply(hidden, {head.weight, {1, C}}, C, out, workspace);
  const double loss = log_sums(out, blocks, head.factor, log_sum, at_target);
  if (!head.grad_hidden && !head.grad_weight) return loss;

  const int64_t stride = matmul_panel_elements(columns);
  MatmulOperand hidden_right{head.hidden, {C, 1}};
  if (head.grad_weight) hidden_right = pack(hidden_right, false, C, T, Buffers::data(buffers.turned));
  bf16* gradient = Buffers::data(buffers.gradient);
  for (int64_t v = 0; v < V; v += columns) {
    const int64_t here = std::min(columns, V - v);
    const bf16* weight = head.weight + v * C;
    MatmulOut logits{T, here, Finish::gradient, gradient, stride};
    logits.first_column = v, logits.targets = targets, logits.log_sum = log_sum;
    logits.at_target = at_target, logits.factor = head.factor, logits.packed = true;
    multiply(hidden, {weight, {1, C}}, C, logits, workspace);
    if (head.grad_hidden) {
      const MatmulOut to{T, C, Finish::round, head.grad_hidden, C};
      multiply(packed_operand(gradient, columns), {weight, {C, 1}}, here, to, workspace, buffers.sums.mutable_data_ptr<float>(), v == 0,
               v + here == V);
    }
    if (head.grad_weight) {
      MatmulOut to{here, C, Finish::round, head.grad_weight + v * C, C};
      to.add = add;
      const MatmulOperand transposed(gradient, {kMatmulStep, 1}, {stride, kMatmulPanelStep});
      multiply(transposed, hidden_right, T, to, workspace);
    }
  }
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int64_t ignore_index,
                                                        bool need_hidden, bool need_weight) {
  const char* op = "linear_cross_entropy";
  PYGPT_CHECK(has_tiles(), op, ": this processor, or the capability in use, has no AMX");
  PYGPT_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && targets.dim() == 1 &&
                  targets.size(0) == hidden.size(0),
              op, ": hidden must be (N, C), weight (V, C) and targets (N,)");
  PYGPT_CHECK(hidden.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16 &&
                  targets.scalar_type() == ScalarType::Long,
              op, ": hidden and weight must be bfloat16, targets int64");
  hidden = as_contiguous(hidden), weight = as_contiguous(weight), targets = as_contiguous(targets);
  const int64_t N = hidden.size(0), V = weight.size(0), C = weight.size(1);
  PYGPT_CHECK(N > 0 && V > 0 && C > 0, op, ": there is nothing to sum");
  std::vector<int64_t> of_tokens(targets.const_data_ptr<int64_t>(), targets.const_data_ptr<int64_t>() + N);
  int64_t count = 0;
  for (int64_t& target : of_tokens) {
    PYGPT_CHECK(target == ignore_index || (target >= 0 && target < V), op,
                ": a target is outside the vocabulary and is not ignore_index");
    if (target == ignore_index)
      target = -1 - V;  // no column of any block
    else
      ++count;
  }
  Tensor loss = new_empty(hidden, {}, ScalarType::Float);
  Tensor grad_hidden = new_empty(hidden, {need_hidden ? N : 0, C}, ScalarType::BFloat16);
  Tensor grad_weight = new_empty(hidden, {need_weight ? V : 0, C}, ScalarType::BFloat16);
  const auto at = [&](Tensor& x, bool need, int64_t row) {
    return need ? static_cast<bf16*>(x.mutable_data_ptr()) + row * C : nullptr;
  };
  const bf16* of_weight = static_cast<const bf16*>(weight.const_data_ptr());
  double total = 0;
  const Sizes sizes(N, V, C);
  Buffers buffers(hidden, sizes.tokens, V, C, sizes.columns, need_hidden, need_weight);
  for (int64_t n = 0; n < N; n += sizes.tokens) {
    const bf16* of_hidden = static_cast<const bf16*>(hidden.const_data_ptr()) + n * C;
    const Head head{of_hidden, of_weight, V, C, at(grad_hidden, need_hidden, n), at(grad_weight, need_weight, 0),
                    1.0f / static_cast<float>(std::max<int64_t>(count, 1))};
    total += chunk(head, buffers, of_tokens.data() + n, std::min(sizes.tokens, N - n), sizes.columns, n > 0);
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total / static_cast<double>(count));
  return {loss, grad_hidden, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) { m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy)); }

}  // namespace pygpt
