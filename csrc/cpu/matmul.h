// What the products of matrices and their callers share: operands, how panels lie in memory, and what becomes of a product. By
// AMX tiles: matmul_amx.cpp; by vectors: matmul_vector.cpp.
#pragma once

#include "cpu/capability.h"
#include "cpu/tensor.h"

namespace pygpt {

constexpr int64_t kMatmulPanel = 32;                              // rows of the left operand, columns of the right one
constexpr int64_t kMatmulStep = 32;                               // along the summed dimension
constexpr int64_t kTileElements = 512;                            // of bfloat16
constexpr int64_t kMatmulPanelStep = kMatmulPanel * kMatmulStep;  // elements of a panel in a step: two tiles
constexpr int64_t kMatmulSums = kMatmulPanel * kMatmulPanel;      // of a panel with a panel
// Steps between which sums wait in memory: so much of a panel, and the sums, fit the first-level cache.
constexpr int64_t kMatmulSteps = 16;
constexpr int64_t kMatmulMaxK = 1024;  // of the summed dimension, packed at a time where it may be split: blocks are then wide

constexpr int64_t matmul_panels(int64_t count) { return (count + kMatmulPanel - 1) / kMatmulPanel; }
constexpr int64_t matmul_panel_elements(int64_t k) { return (k + kMatmulStep - 1) / kMatmulStep * kMatmulPanelStep; }

// Of an operand, in elements: along the summed dimension, and along the one that the result has too.
struct MatmulStrides {
  int64_t k, free;
};

// Of the strides of its elements one is 1. `panels`: how far 32 elements take one, which need not be 32 of those: blocks of
// 32 x 32 may lie by themselves. `packed`: as panels already, which lie panels.free apart.
struct MatmulOperand {
  MatmulOperand(const bf16* data, MatmulStrides strides)
      : MatmulOperand(data, strides, {kMatmulStep * strides.k, kMatmulPanel * strides.free}) {}
  MatmulOperand(const bf16* data, MatmulStrides strides, MatmulStrides panels, bool packed = false)
      : data(data), strides(strides), panels(panels), packed(packed) {}

  const bf16* at(int64_t k, int64_t panel) const { return data + k / kMatmulStep * panels.k + panel * panels.free; }

  const bf16* data;
  MatmulStrides strides, panels;
  bool packed;
};

// `packed` as an operand: of K summed elements, as matmul_pack leaves it.
inline MatmulOperand packed_operand(const bf16* packed, int64_t K) {
  return {packed, {1, kMatmulStep}, {kMatmulPanelStep, matmul_panel_elements(K)}, true};
}

// What becomes of sums that are complete: rounded (with a bias, or added to what is there); or, where they are logits, the
// statistics of their softmax, or the gradient of the cross-entropy.
enum class Finish { round, statistics, gradient };

struct MatmulOut {
  int64_t rows, columns;
  Finish finish = Finish::round;
  bf16* data = nullptr;  // rounded sums or gradients
  int64_t stride = 0;
  const bf16* bias = nullptr;  // (columns,)
  bool add = false;
  bool packed = false;       // of gradients: as panels of a left operand, `stride` apart
  bool past_caches = false;  // whether `data` is written so: `multiply` decides
  // Of a softmax over the vocabulary, whose columns from first_column on are these; in units of log2.
  int64_t first_column = 0;
  const int64_t* targets = nullptr;               // (rows,), or what is no column
  float *largest = nullptr, *sum = nullptr;       // (blocks, rows): the largest logit, sum of 2^(logit - largest)
  float* of_target = nullptr;                     // (rows,)
  const float* log_sum = nullptr;                 // (rows,); infinite where the gradient is to be zero
  const float* at_target = nullptr;               // (rows,) the gradient there, where 1 - softmax may be tiny
  float factor = 1;                               // of the gradient
};

// Memory for packed operands and sums, which grows as calls need it and is kept from one to the next: fresh memory would cost
// page faults each time.
class Workspace {
 public:
  explicit Workspace(const Tensor& like) : like_(like) {}

  float* floats(int64_t count) {
    if (!space_ || space_->numel() < count) space_ = new_empty(like_, {count}, ScalarType::Float);
    return space_->mutable_data_ptr<float>();
  }

 private:
  Tensor like_;
  std::optional<Tensor> space_;
};

// Columns of a block of `statistics`: they depend on nothing but K.
int64_t statistics_block(int64_t K);

// Packs `count` rows of a left operand, or columns of a right one, by all threads.
MatmulOperand pack(const MatmulOperand& operand, bool left, int64_t count, int64_t K, bf16* to);

// left (rows x K) times right (K x columns), by AMX tiles. `sums`: where sums wait for the next call, which goes on with
// them unless it is the `first`; they are finished in the `last`. rows x columns, each rounded up to whole panels; null where
// there is but one call.
void multiply(const MatmulOperand& left, const MatmulOperand& right, int64_t K, MatmulOut out, Workspace& workspace,
              float* sums = nullptr, bool first = true, bool last = true);

// x (rows x K) times weight (N x K) transposed + bias -> y (rows x N), all contiguous, at the pace of reading weight. Whether
// it can: by AMX tiles, at most 32 rows, K a multiple of 32, weight at the beginning of a cache line.
bool multiply_few_rows(const bf16* x, int64_t rows, int64_t K, const bf16* weight, int64_t N, const bf16* bias, bf16* y);

// --- by vectors ------------------------------------------------------------------------------------------------------

// Rows and columns of the register block.
struct MatmulTile {
  int64_t rows, columns;
};

// Of the strides of its elements one is 1; of int8 that along the summed dimension, and each column has a scale.
template <class T>
struct VectorOperand {
  VectorOperand at(int64_t k, int64_t free) const {
    return {data + k * strides.k + free * strides.free, strides, scale ? scale + free : nullptr};
  }

  const T* data;
  MatmulStrides strides;
  const float* scale = nullptr;
};

// The result, `stride` elements from row to row. Sums that are not complete wait in `sums`, which may be the result itself.
template <class T>
struct VectorOut {
  int64_t rows, columns;
  T* data;
  int64_t stride;
  const float* bias = nullptr;  // (columns,)
  bool add = false;             // to what is there
  float* sums = nullptr;
  int64_t sums_stride = 0;
  bool first = true, last = true;  // whether no sums wait, and whether none are to wait
};

// left (rows x K) times right (K x columns), in float32 whatever they are. T: float or bf16; W: T or, scaled, int8_t.
template <class T, class W>
void multiply_by_vectors(VectorOperand<T> left, VectorOperand<W> right, int64_t K, VectorOut<T> out, Workspace& workspace);

}  // namespace pygpt
