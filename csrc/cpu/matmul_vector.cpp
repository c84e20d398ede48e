// Products of matrices by vectors: blocks and threads. The arithmetic is matmul_vector_kernel.h.
//
// The summed dimension goes in parts. Of each the smaller operand is packed once, by all threads, and read from the last-level
// cache; of the other each thread packs a block at a time that stays in its second-level cache. Blocks depend on the number of
// threads, the order of every sum does not.

#include "cpu/matmul.h"
#include "cpu/threads.h"

#include <type_traits>

#define PYGPT_KERNELS "cpu/matmul_vector_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

constexpr int64_t kMaxK = 768;  // of the summed dimension, at a time: a panel of the left operand fits the first-level cache
constexpr int64_t kBlockFloats = 64 << 10;  // of a thread's block
constexpr int64_t kMaxSums = 2 << 20;       // that wait in float32 beside a result of bfloat16

}  // namespace

template <class T, class W>
void multiply_by_vectors(VectorOperand<T> left, VectorOperand<W> right, int64_t K, VectorOut<T> out, Workspace& workspace) {
  constexpr bool in_place = std::is_same_v<T, float>;  // where sums wait
  const int64_t parts = (K + kMaxK - 1) / kMaxK, k_part = (K + parts - 1) / parts;
  const bool waits = !in_place && parts > 1;
  if (waits && out.rows * out.columns > kMaxSums) {  // one half of the result after the other
    VectorOut<T> second = out;
    if (out.rows >= out.columns) {
      out.rows /= 2, second.rows -= out.rows, second.data += out.rows * out.stride;
      multiply_by_vectors(left, right, K, out, workspace);
      return multiply_by_vectors(left.at(0, out.rows), right, K, second, workspace);
    }
    out.columns /= 2, second.columns -= out.columns, second.data += out.columns;
    if (out.bias) second.bias += out.columns;
    multiply_by_vectors(left, right, K, out, workspace);
    return multiply_by_vectors(left, right.at(0, out.columns), K, second, workspace);
  }

  // The smaller operand is shared.
  const bool left_is_block = out.rows >= out.columns;
  const int64_t count = left_is_block ? out.rows : out.columns, shared_count = left_is_block ? out.columns : out.rows;
  const MatmulTile tile = PYGPT_DISPATCH(vector_tile)();
  const int64_t size = left_is_block ? tile.rows : tile.columns, shared_size = left_is_block ? tile.columns : tile.rows;
  const int64_t panels = (count + size - 1) / size, shared_panels = (shared_count + shared_size - 1) / shared_size;
  // As many blocks as a multiple of the threads, none larger than the cache allows, and about equally large.
  const int64_t threads = torch::stable::get_num_threads(), largest = std::max<int64_t>(1, kBlockFloats / (size * k_part));
  const int64_t rounds = (panels + largest * threads - 1) / (largest * threads), items = std::min(panels, rounds * threads);
  const int64_t in_block = (panels + items - 1) / items, workers = std::min(threads, items);

  const int64_t of_shared = shared_panels * shared_size * k_part, of_block = in_block * size * k_part;
  float* packed = workspace.floats(of_shared + workers * of_block + (waits ? out.rows * out.columns : 0));
  float* own = packed + of_shared;
  if constexpr (in_place)
    out.sums = out.data, out.sums_stride = out.stride;
  else
    out.sums = own + workers * of_block, out.sums_stride = out.columns;
  const auto pack_part = [&](bool of_left, int64_t k, int64_t from, int64_t to, int64_t here, float* at) {
    if (of_left)
      PYGPT_DISPATCH(vector_pack<T>)(left.at(k, from), true, to - from, here, at);
    else
      PYGPT_DISPATCH(vector_pack<W>)(right.at(k, from), false, to - from, here, at);
  };
  const bool begin_with_result = in_place && out.add;
  if (in_place) out.add = false;
  for (int64_t k = 0; k < K; k += k_part) {
    const int64_t here = std::min(k_part, K - k);
    out.first = k == 0 && !begin_with_result, out.last = k + here == K;
    torch::stable::parallel_for(0, shared_panels, 1, [&](int64_t begin, int64_t end) {
      const int64_t from = begin * shared_size, to = std::min(shared_count, end * shared_size);
      pack_part(!left_is_block, k, from, to, here, packed + from * here);
    });
    in_turn(items, workers, [&](int64_t worker, int64_t item) {
      const int64_t from = panels * item / items * size, to = std::min(count, panels * (item + 1) / items * size);
      float* block = own + worker * of_block;
      pack_part(left_is_block, k, from, to, here, block);
      PYGPT_DISPATCH(vector_block<T>)(out, left_is_block, block, from, to, packed, here);
    });
  }
}

template void multiply_by_vectors(VectorOperand<float>, VectorOperand<float>, int64_t, VectorOut<float>, Workspace&);
template void multiply_by_vectors(VectorOperand<bf16>, VectorOperand<bf16>, int64_t, VectorOut<bf16>, Workspace&);
template void multiply_by_vectors(VectorOperand<float>, VectorOperand<int8_t>, int64_t, VectorOut<float>, Workspace&);
template void multiply_by_vectors(VectorOperand<bf16>, VectorOperand<int8_t>, int64_t, VectorOut<bf16>, Workspace&);

}  // namespace pygpt
