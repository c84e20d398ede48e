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

constexpr int64_t kTokens = 4096;                      // at a time; beyond them gradients of weight are added up
constexpr int64_t kGradientElements = 12 << 20;        // of the vocabulary's columns that are at hand
constexpr int64_t kColumns = 512, kMaxColumns = 4096;  // of which those are a multiple, and the most
constexpr float kLog2E = 1.44269504088896341f;

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

// Of T tokens: the sum of their losses, and gradients. `add` to that of weight.
double chunk(const Head& head, const Tensor& like, const int64_t* targets, int64_t T, bool add) {
  const int64_t V = head.V, C = head.C, blocks = (V + statistics_block(C) - 1) / statistics_block(C);
  Tensor panels = new_empty(like, {matmul_panels(T) * matmul_panel_elements(C)}, ScalarType::BFloat16);
  const MatmulOperand hidden = pack({head.hidden, {1, C}}, true, T, C, static_cast<bf16*>(panels.mutable_data_ptr()));
  std::vector<float> statistics((2 * blocks + 3) * T);
  float *log_sum = statistics.data() + (2 * blocks + 1) * T, *at_target = log_sum + T;
  MatmulOut out{T, V, Finish::statistics};
  out.targets = targets, out.largest = statistics.data();
  out.sum = out.largest + blocks * T, out.of_target = out.sum + blocks * T;
  Workspace workspace(like);
  multiply(hidden, {head.weight, {1, C}}, C, out, workspace);
  const double loss = log_sums(out, blocks, head.factor, log_sum, at_target);
  if (!head.grad_hidden && !head.grad_weight) return loss;

  const int64_t columns = std::clamp(kGradientElements / T / kColumns * kColumns, kColumns, kMaxColumns);
  const int64_t stride = matmul_panel_elements(columns);  // gradients are packed where they are computed
  Tensor space = new_empty(like, {matmul_panels(T) * stride}, ScalarType::BFloat16);
  Tensor sums = new_empty(like, {head.grad_hidden ? matmul_panels(T) * matmul_panels(C) * kMatmulSums : 0}, ScalarType::Float);
  Tensor turned = new_empty(like, {head.grad_weight ? matmul_panels(C) * matmul_panel_elements(T) : 0}, ScalarType::BFloat16);
  MatmulOperand hidden_right{head.hidden, {C, 1}};
  if (head.grad_weight) hidden_right = pack(hidden_right, false, C, T, static_cast<bf16*>(turned.mutable_data_ptr()));
  bf16* gradient = static_cast<bf16*>(space.mutable_data_ptr());
  for (int64_t v = 0; v < V; v += columns) {
    const int64_t here = std::min(columns, V - v);
    const bf16* weight = head.weight + v * C;
    MatmulOut logits{T, here, Finish::gradient, gradient, stride};
    logits.first_column = v, logits.targets = targets, logits.log_sum = log_sum;
    logits.at_target = at_target, logits.factor = head.factor, logits.packed = true;
    multiply(hidden, {weight, {1, C}}, C, logits, workspace);
    if (head.grad_hidden) {
      const MatmulOut to{T, C, Finish::round, head.grad_hidden, C};
      multiply(packed_operand(gradient, columns), {weight, {C, 1}}, here, to, workspace, sums.mutable_data_ptr<float>(), v == 0,
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
  const int64_t chunks = (N + kTokens - 1) / kTokens, length = matmul_panels((N + chunks - 1) / chunks) * kMatmulPanel;
  for (int64_t n = 0; n < N; n += length) {
    const bf16* of_hidden = static_cast<const bf16*>(hidden.const_data_ptr()) + n * C;
    const Head head{of_hidden, of_weight, V, C, at(grad_hidden, need_hidden, n), at(grad_weight, need_weight, 0),
                    1.0f / static_cast<float>(std::max<int64_t>(count, 1))};
    total += chunk(head, hidden, of_tokens.data() + n, std::min(length, N - n), n > 0);
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total / static_cast<double>(count));
  return {loss, grad_hidden, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) { m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy)); }

}  // namespace pygpt
