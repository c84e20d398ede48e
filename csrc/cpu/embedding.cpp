// embedding on the CPU: checks, the sort that makes its backward deterministic, threads, registration. The arithmetic is
// embedding_kernel.h.

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __linux__
#include <unistd.h>
#endif

#include "cpu/tensor.h"

namespace pygpt {
// One step of a scatter-add: row `from` of the gradient goes to row `to` of a table.
struct Scatter {
  int64_t to, from;
};
}  // namespace pygpt

#define PYGPT_KERNELS "cpu/embedding_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

// Elements a thread takes at least: below that, waking a second thread costs more than it saves.
constexpr int64_t kGrainElements = 8192;
// Columns that one thread takes of a run of equal token ids: the row of a very frequent token is shared among threads.
constexpr int64_t kBlock = 256;

int64_t grain(int64_t row_elements) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(row_elements, 1)); }

// std::out_of_range arrives in Python as IndexError.
[[noreturn]] void out_of_range(const int64_t* idx, int64_t at, int64_t length, int64_t V) {
  throw std::out_of_range("embedding: token id " + std::to_string(idx[at]) + " at row " + std::to_string(at / length) +
                          ", position " + std::to_string(at % length) + " is outside the vocabulary of " +
                          std::to_string(V) + " (0 to " + std::to_string(V - 1) + ")");
}

void check_idx(const Tensor& idx) {
  PYGPT_CHECK(idx.dim() == 2 && idx.scalar_type() == ScalarType::Long, "embedding: idx must be (B, T) int64");
}

void check_table(const Tensor& table, ScalarType dtype, int64_t C, const char* what) {
  PYGPT_CHECK(table.dim() == 2 && table.size(1) == C, "embedding: ", what, " must be (rows, ", C, ")");
  PYGPT_CHECK(table.scalar_type() == dtype && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
              "embedding: tables and gradients must have one dtype, float32 or bfloat16");
}

void check_positions(int64_t offset, int64_t T, int64_t P) {
  PYGPT_CHECK(offset >= 0 && offset <= P - T, "embedding: ", T, " positions from ", offset,
              " on do not fit the position table of ", P, " rows");
}

template <class T>
void forward(const Tensor& idx, const Tensor& token, const std::optional<Tensor>& position, int64_t offset, Tensor& out) {
  const int64_t length = idx.size(1), rows = idx.numel(), V = token.size(0), C = token.size(1);
  const int64_t* ids = idx.const_data_ptr<int64_t>();
  const T *from = static_cast<const T*>(token.const_data_ptr()),
          *add = position ? static_cast<const T*>(position->const_data_ptr()) + offset * C : nullptr;
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const auto kernel = PYGPT_DISPATCH(embedding_rows<T>);
  std::atomic<int64_t> bad{rows};  // the first row with a bad id: threads must not throw
  torch::stable::parallel_for(0, rows, grain(C), [&](int64_t begin, int64_t end) {
    const int64_t found = kernel(ids, from, add, to, begin, end, length, V, C);
    int64_t known = bad.load();
    while (found < end && found < known && !bad.compare_exchange_weak(known, found)) {}
  });
  if (bad < rows) out_of_range(ids, bad, length, V);
}

Tensor embedding_forward(Tensor idx, Tensor token_table, std::optional<Tensor> position_table, int64_t position_offset) {
  check_idx(idx);
  const auto dtype = token_table.scalar_type();
  check_table(token_table, dtype, token_table.dim() == 2 ? token_table.size(1) : 0, "token_table");
  const int64_t C = token_table.size(1);
  if (position_table) {
    check_table(*position_table, dtype, C, "position_table");
    check_positions(position_offset, idx.size(1), position_table->size(0));
    position_table = as_contiguous(*position_table);
  }
  idx = as_contiguous(idx);
  token_table = as_contiguous(token_table);
  Tensor out = new_empty(token_table, {idx.size(0), idx.size(1), C}, dtype);
  (dtype == ScalarType::Float ? forward<float> : forward<bf16>)(idx, token_table, position_table, position_offset, out);
  return out;
}

// Tokens sorted by id, equal ids in their order: a radix sort, a byte a pass.
std::vector<Scatter> sort_tokens(const Tensor& idx, int64_t V) {
  const int64_t N = idx.numel();
  const int64_t* ids = idx.const_data_ptr<int64_t>();
  std::vector<Scatter> sorted(N), other(N);
  for (int64_t k = 0; k < N; ++k) {
    if (ids[k] < 0 || ids[k] >= V) out_of_range(ids, k, idx.size(1), V);
    sorted[k] = {ids[k], k};
  }
  for (int shift = 0; (V - 1) >> shift > 0; shift += 8) {
    int64_t start[257] = {};
    for (const Scatter& s : sorted) ++start[(s.to >> shift & 255) + 1];
    for (int digit = 0; digit < 256; ++digit) start[digit + 1] += start[digit];
    for (const Scatter& s : sorted) other[start[s.to >> shift & 255]++] = s;
    sorted.swap(other);
  }
  return sorted;
}

// Positions in order, and for each the rows of the batch.
std::vector<Scatter> sort_positions(int64_t B, int64_t T, int64_t offset) {
  std::vector<Scatter> sorted;
  sorted.reserve(B * T);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t b = 0; b < B; ++b) sorted.push_back({offset + t, b * T + t});
  return sorted;
}

template <class T>
void scatter_add(const Tensor& grad, const std::vector<Scatter>& rows, Tensor& table, bool zero) {
  const int64_t N = rows.size(), C = table.size(1);
  const T* from = static_cast<const T*>(grad.const_data_ptr());
  T* to = static_cast<T*>(table.mutable_data_ptr());
  const auto kernel = PYGPT_DISPATCH(scatter_add_units<T>);
  torch::stable::parallel_for(0, N * ((C + kBlock - 1) / kBlock), grain(std::min(C, kBlock)), [&](int64_t begin, int64_t end) {
    kernel(from, rows.data(), N, to, zero, C, kBlock, begin, end);
  });
}

// zero: token_grad and position_grad are known to be.
void add_gradients(Tensor grad, Tensor idx, Tensor& token_grad, std::optional<Tensor> position_grad, int64_t position_offset,
                   bool zero) {
  check_idx(idx);
  const int64_t B = idx.size(0), T = idx.size(1);
  PYGPT_CHECK(grad.dim() == 3 && grad.size(0) == B && grad.size(1) == T, "embedding: grad must be (B, T, C) for idx (B, T)");
  const auto dtype = grad.scalar_type();
  check_table(token_grad, dtype, grad.size(2), "token_grad");
  PYGPT_CHECK(token_grad.is_contiguous() && (!position_grad || position_grad->is_contiguous()),
              "embedding: token_grad and position_grad are written in place and must be contiguous");
  if (position_grad) {
    check_table(*position_grad, dtype, grad.size(2), "position_grad");
    check_positions(position_offset, T, position_grad->size(0));
  }
  grad = as_contiguous(grad);
  idx = as_contiguous(idx);
  const auto add = dtype == ScalarType::Float ? scatter_add<float> : scatter_add<bf16>;
  const std::vector<Scatter> tokens = sort_tokens(idx, token_grad.size(0));  // throws before anything is written
  add(grad, tokens, token_grad, zero);
  if (position_grad) add(grad, sort_positions(B, T, position_offset), *position_grad, zero);
}

void embedding_backward_(Tensor grad, Tensor idx, Tensor token_grad, std::optional<Tensor> position_grad,
                         int64_t position_offset) {
  add_gradients(grad, idx, token_grad, position_grad, position_offset, false);
}

// Whether the whole pages of [first, last), at most kHugePage bytes, were made to read as zeros without writing them; first
// and last then become their bounds. Fresh memory reads as zeros, and the system fills it anyway when it is first written (not
// read: that maps a shared page of zeros, and the write after it costs a second fault and an interrupt of the other threads).
// Memory that the process has used before is left alone: filling it costs less than new pages do.
bool discard([[maybe_unused]] uintptr_t& first, [[maybe_unused]] uintptr_t& last) {
#ifdef __linux__
  constexpr uintptr_t kSmallest = 4096;
  const uintptr_t size = sysconf(_SC_PAGESIZE), begin = (first + size - 1) / size * size, end = last / size * size;
  if (size < kSmallest || begin >= end) return false;
  unsigned char resident[kHugePage / kSmallest];  // a flag for each page
  void* const memory = reinterpret_cast<void*>(begin);
  if (mincore(memory, end - begin, resident) != 0) return false;
  if (std::any_of(resident, resident + (end - begin) / size, [](unsigned char flags) { return flags & 1; })) return false;
  if (madvise(memory, end - begin, MADV_DONTNEED) != 0) return false;  // not resident may also mean swapped out
  first = begin;
  last = end;
  return true;
#else
  return false;
#endif
}

void fill_with_zeros(uintptr_t first, uintptr_t last) { std::memset(reinterpret_cast<void*>(first), 0, last - first); }

// Filling the table with zeros takes most of the time of its gradient.
Tensor zero_table(const Tensor& like, int64_t rows, int64_t C) {
  Tensor table = new_empty(like, {rows, C}, like.scalar_type());
  const uintptr_t start = reinterpret_cast<uintptr_t>(table.mutable_data_ptr());
  const uintptr_t end = start + table.numel() * table.element_size();
  torch::stable::parallel_for(start / kHugePage, (end + kHugePage - 1) / kHugePage, 1, [&](int64_t from, int64_t to) {
    for (uintptr_t page = from * kHugePage; page < to * kHugePage; page += kHugePage) {
      const uintptr_t begin = std::max(page, start), stop = std::min(page + kHugePage, end);
      uintptr_t first = begin, last = stop;
      if (!discard(first, last)) first = last;
      fill_with_zeros(begin, first);
      fill_with_zeros(last, stop);
    }
  });
  return table;
}

// position_rows absent: no position table, and the second result is an unused empty tensor.
std::tuple<Tensor, Tensor> embedding_backward(Tensor grad, Tensor idx, int64_t token_rows,
                                              std::optional<int64_t> position_rows, int64_t position_offset) {
  PYGPT_CHECK(grad.dim() == 3, "embedding: grad must be (B, T, C)");
  const int64_t C = grad.size(2);
  Tensor token_grad = zero_table(grad, token_rows, C), position_grad = zero_table(grad, position_rows.value_or(0), C);
  add_gradients(grad, idx, token_grad, position_rows ? std::optional(position_grad) : std::nullopt, position_offset, true);
  return {token_grad, position_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("embedding_forward", TORCH_BOX(&embedding_forward));
  m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
  m.impl("embedding_backward_", TORCH_BOX(&embedding_backward_));
}

}  // namespace pygpt
