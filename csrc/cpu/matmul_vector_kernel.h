// Products of matrices by vectors, in float32 whatever their dtype, for one instruction set (see foreach_isa.h): packed panels, and
// what becomes of two of them.
//
// The scheme is that of GotoBLAS (Goto and van de Geijn, 2008) and BLIS: a register block of sums takes, for each element of
// the summed dimension, a column of one panel and a row of another, which lie one after the other in memory. A panel holds
// kTileRows rows of the left operand, or kTileColumns columns of the right one; what lies beyond the matrix is zero.

namespace pygpt::PYGPT_ISA {

// Of the register block: 24, 12 or 8 sums in as many registers, and as many multiplications for 14, 8 or 6 loads.
constexpr int kTileRows = PYGPT_LANES == 16 ? 12 : PYGPT_LANES == 8 ? 6 : 4;
constexpr int kTileVectors = 2, kTileColumns = kTileVectors * kLanes;
constexpr int64_t kPackedRows = 16;  // of neighbours, packed at a time: so many pages are at hand

static MatmulTile vector_tile() { return {kTileRows, kTileColumns}; }

// A panel of P rows (columns), of which there are `count`, whose elements along the summed dimension are neighbours.
template <int P, class T>
static void pack_panel_along(const VectorOperand<T>& from, int64_t count, int64_t k, float* to) {
  static_assert(P <= kLanes || P % kLanes == 0);
  for (int64_t i = 0; i < k; i += kLanes)
    for (int64_t g = 0; g < P; g += kLanes) {
      const int64_t n = smaller(kLanes, k - i), width = smaller(kLanes, P - g);
      vf square[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r) {
        square[r] = r < width && g + r < count ? load_step(from.data + (g + r) * from.strides.free + i, n) : vf{};
        if constexpr (std::is_same_v<T, int8_t>) square[r] *= g + r < count ? from.scale[g + r] : 0.0f;
      }
      transpose<kLanes / 2>(square);
      float* at = to + i * P + g;
      if (i + kLanes < k) {  // what a store writes beyond its row the next one writes again
#pragma GCC unroll 16
        for (int64_t l = 0; l < kLanes; ++l) store(at + l * P, square[l]);
      } else {
        for (int64_t l = 0; l < n; ++l) store_step(at + l * P, square[l], width);
      }
    }
}

// Elements i .. end along the summed dimension, of k, of a panel whose rows (columns) are neighbours in memory.
template <int P, class T>
PYGPT_INLINE void pack_panel_across(const T* from, int64_t stride, int64_t count, int64_t i, int64_t end, int64_t k, float* to) {
  for (; i < end; ++i)
    for (int64_t g = 0; g < P; g += kLanes) {
      const int64_t width = smaller(kLanes, P - g);
      const T* at = from + i * stride + g;
      const vf x = g + kLanes <= count ? load(at) : g < count ? load_step(at, smaller(width, count - g)) : vf{};
      if (i + 1 < k)
        store(to + i * P + g, x);
      else
        store_step(to + i * P + g, x, width);
    }
}

template <int P, class T>
static void pack_panels(const VectorOperand<T>& from, int64_t count, int64_t k, float* to) {
  if (from.strides.k == 1) {
    for (int64_t c = 0; c < count; c += P) pack_panel_along<P>(from.at(0, c), count - c, k, to + c * k);
  } else {
    for (int64_t i = 0; i < k; i += kPackedRows)
      for (int64_t c = 0; c < count; c += P)
        pack_panel_across<P>(from.data + c, from.strides.k, count - c, i, smaller(i + kPackedRows, k), k, to + c * k);
  }
}

// `count` rows of a left operand, or columns of a right one, as panels of k elements of the summed dimension.
template <class T>
static void vector_pack(const VectorOperand<T>& from, bool left, int64_t count, int64_t k, float* to) {
  (left ? pack_panels<kTileRows, T> : pack_panels<kTileColumns, T>)(from, count, k, to);
}

// to (rows x columns, the register block or the part of it that lies in the matrix) = from + the product of two panels of k
// elements; with `add`, + what is there. from_stride 0: a row for all.
template <class T>
static void multiply_tile(const float* a, const float* b, int64_t k, const float* from, int64_t from_stride, T* to, int64_t stride,
                          int64_t rows, int64_t columns, bool add) {
  vf sum[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = vf{};
  for (int64_t r = 0; r < smaller(rows, kTileRows); ++r) __builtin_prefetch(to + r * stride, 1, 3);
  for (int64_t i = 0; i < k; ++i, a += kTileRows, b += kTileColumns) {
    vf row[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += row[v] * a[r];
  }
  if (rows >= kTileRows && columns >= kTileColumns) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        T* at = to + r * stride + v * kLanes;
        const vf x = sum[r][v] + load(from + r * from_stride + v * kLanes);
        store(at, add ? x + load(at) : x);
      }
  } else {
    float sums[kTileRows * kTileColumns];
    std::memcpy(sums, sum, sizeof sums);
    for (int64_t r = 0; r < smaller(rows, kTileRows); ++r, from += from_stride, to += stride)
      PYGPT_FOR_LANES(smaller(columns, kTileColumns), {
        const vf x = load(sums + r * kTileColumns + i) + load_step(from + i, n);
        store_step(to + i, add ? x + load_step(to + i, n) : x, n);
      })
  }
}

// Multiplies packed operands. One is a block of few panels, rows (or columns) begin .. end, which the second-level cache holds;
// each panel of the other is multiplied with them.
template <class T>
static void vector_block(const VectorOut<T>& out, bool block_is_left, const float* block, int64_t begin, int64_t end,
                         const float* other, int64_t k) {
  alignas(64) static constexpr float kZeros[kTileColumns] = {};
  const int64_t in_block = block_is_left ? kTileRows : kTileColumns, in_other = block_is_left ? kTileColumns : kTileRows;
  for (int64_t q = 0; q < (block_is_left ? out.columns : out.rows); q += in_other)
    for (int64_t p = begin; p < end; p += in_block) {
      const float *of_block = block + (p - begin) * k, *of_other = other + q * k;
      const float *a = block_is_left ? of_block : of_other, *b = block_is_left ? of_other : of_block;
      const int64_t row = block_is_left ? p : q, column = block_is_left ? q : p;
      const int64_t rows = out.rows - row, columns = out.columns - column;
      float* sums = out.sums + row * out.sums_stride + column;
      const float* from = !out.first ? sums : out.bias ? out.bias + column : kZeros;
      const int64_t from_stride = out.first ? 0 : out.sums_stride;
      if (out.last)
        multiply_tile(a, b, k, from, from_stride, out.data + row * out.stride + column, out.stride, rows, columns, out.add);
      else
        multiply_tile(a, b, k, from, from_stride, sums, out.sums_stride, rows, columns, false);
    }
}

}  // namespace pygpt::PYGPT_ISA
