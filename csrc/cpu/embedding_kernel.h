// Gather and scatter-add of table rows of C elements, for one instruction set (see foreach_isa.h).

namespace pygpt::PYGPT_ISA {

// Asks for a row that will be needed next: rows lie anywhere in a table larger than the caches, and the processor's own
// prefetching only notices a row when it is half read.
template <class T>
PYGPT_INLINE void prefetch_row(const T* row, int64_t C) {
  for (int64_t i = 0; i < C; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

// Rows begin .. end of out (B * T, C): token[idx[row]] + position[row % T]; position may be null. Rows whose token id is
// not in 0 .. V are left alone; returns the first of them, or `end`.
template <class T>
int64_t embedding_rows(const int64_t* idx, const T* token, const T* position, T* out, int64_t begin, int64_t end,
                       int64_t length, int64_t V, int64_t C) {
  int64_t bad = end, t = position ? begin % length : 0;
  for (int64_t row = begin; row < end; ++row) {
    if (static_cast<uint64_t>(idx[row]) >= static_cast<uint64_t>(V)) {
      bad = bad < row ? bad : row;
    } else {
      if (row + 1 < end && static_cast<uint64_t>(idx[row + 1]) < static_cast<uint64_t>(V))
        prefetch_row(token + idx[row + 1] * C, C);
      const T* from = token + idx[row] * C;
      T* to = out + row * C;
      if (position) {
        const T* add = position + t * C;
        PYGPT_FOR_LANES(C, store_step(to + i, load_step(from + i, n) + load_step(add + i, n), n);)
      } else if (C > 0) {  // rows of no columns may lie at no address, which memcpy does not take
        std::memcpy(to, from, C * sizeof(T));
      }
    }
    if (++t == length) t = 0;
  }
  return bad;
}

// to[c] += sum over k of grad[rows[k], c], for c in first .. last, in the order of rows: summed in float32, rounded once.
// zero: `to` is known to be, and is not read.
template <class T>
PYGPT_INLINE void add_rows(const T* grad, const Scatter* rows, int64_t count, T* to, bool zero, int64_t first, int64_t last,
                           int64_t C) {
  constexpr int kVectors = 8;  // accumulators in registers
  int64_t c = first;
  for (; c + kVectors * kLanes <= last; c += kVectors * kLanes) {
    vf sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = zero ? vf{} : load(to + c + v * kLanes);
    for (int64_t k = 0; k < count; ++k) {
      const T* from = grad + rows[k].from * C + c;
      for (int v = 0; v < kVectors; ++v) sum[v] += load(from + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) store(to + c + v * kLanes, sum[v]);
  }
  to += c;
  grad += c;
  PYGPT_FOR_LANES(last - c, {
    vf sum = zero ? vf{} : load_step(to + i, n);
    for (int64_t k = 0; k < count; ++k) sum += load_step(grad + rows[k].from * C + i, n);
    store_step(to + i, sum, n);
  })
}

// table[rows[k].to] += grad[rows[k].from] for rows sorted by `to`. The work is cut into units, a run of equal `to` by
// `block` columns, numbered run by run; this call does those whose number is in begin .. end of 0 .. N * ceil(C / block).
// A unit is done by one thread from its first row to its last, so the bits do not depend on how units are spread.
template <class T>
void scatter_add_units(const T* grad, const Scatter* rows, int64_t N, T* table, bool zero, int64_t C, int64_t block,
                       int64_t begin, int64_t end) {
  const int64_t blocks = (C + block - 1) / block;
  int64_t k = begin / blocks;
  while (k > 0 && rows[k - 1].to == rows[k].to) --k;
  while (k < N && k * blocks < end) {
    int64_t count = 1;
    while (k + count < N && rows[k + count].to == rows[k].to) ++count;
    if (k + count < N) {
      prefetch_row(table + rows[k + count].to * C, C);
      prefetch_row(grad + rows[k + count].from * C, C);
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t unit = k * blocks + b * count, last = (b + 1) * block;
      if (unit >= begin && unit < end)
        add_rows(grad, rows + k, count, table + rows[k].to * C, zero, b * block, last < C ? last : C, C);
    }
    k += count;
  }
}

}  // namespace pygpt::PYGPT_ISA
