// The products of attention by AMX tiles (see foreach_isa.h). What attention_tile.h calls units, pairs of bfloat16 that
// are neighbours along the summed dimension, is how AMX wants both operands: no panel changes, only the numbers of rows
// and columns that a product takes at a time, and that sums run in whole steps of 16 units. Panels are zero beyond.

namespace pygpt::PYGPT_ISA {

// c (16 x COUNT * 16), or c + the product a b over k units, in whole steps of 16. Tile 0 holds a, 1 to 3 b, 4 to 7 c.
template <bool ADD, int COUNT>
static void product_tiles(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k) {
  const int64_t a_stride = lda * 4, b_stride = ldb * 4, c_stride = ldc * 4;
  if constexpr (ADD) {
    tile_load<4>(c, c_stride);
    if constexpr (COUNT > 1) tile_load<5>(c + 16, c_stride);
    if constexpr (COUNT > 2) tile_load<6>(c + 32, c_stride);
    if constexpr (COUNT > 3) tile_load<7>(c + 48, c_stride);
  } else {
    tile_zero<4>();
    if constexpr (COUNT > 1) tile_zero<5>();
    if constexpr (COUNT > 2) tile_zero<6>();
    if constexpr (COUNT > 3) tile_zero<7>();
  }
  for (int64_t i = 0; i < k; i += 16) {
    const float* row = b + i * ldb;
    tile_load<0>(a + i, a_stride);
    tile_load<1>(row, b_stride);
    tile_dot_bf16<4, 0, 1>();
    if constexpr (COUNT > 1) {
      tile_load<2>(row + 16, b_stride);
      tile_dot_bf16<5, 0, 2>();
    }
    if constexpr (COUNT > 2) {
      tile_load<3>(row + 32, b_stride);
      tile_dot_bf16<6, 0, 3>();
    }
    if constexpr (COUNT > 3) {
      tile_load<1>(row + 48, b_stride);
      tile_dot_bf16<7, 0, 1>();
    }
  }
  tile_store<4>(c, c_stride);
  if constexpr (COUNT > 1) tile_store<5>(c + 16, c_stride);
  if constexpr (COUNT > 2) tile_store<6>(c + 32, c_stride);
  if constexpr (COUNT > 3) tile_store<7>(c + 48, c_stride);
}

// c[r] *= factor[r], unless all are 1.
static void rescale_rows(float* c, int64_t ldc, int64_t columns, const float* factor) {
  if (_mm512_cmp_ps_mask((__m512)load(factor), _mm512_set1_ps(1), _CMP_NEQ_UQ) == 0) return;
  for (int r = 0; r < kRows; ++r, c += ldc)
    for (int64_t j = 0; j < columns; j += kLanes) store(c + j, load(c + j) * factor[r]);
}

template <int PAIR, bool ACROSS, Into INTO>
PYGPT_INLINE void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                          int64_t columns, const float* factor = nullptr) {
  static_assert(PAIR == 2 && !ACROSS && INTO != Into::scale);
  constexpr bool ADD = INTO != Into::assign;
  if constexpr (INTO == Into::rescale) rescale_rows(c, ldc, columns, factor);
  for (; columns > 48; columns -= 64, b += 64, c += 64) product_tiles<ADD, 4>(a, lda, b, ldb, c, ldc, k);
  if (columns > 32)
    product_tiles<ADD, 3>(a, lda, b, ldb, c, ldc, k);
  else if (columns > 16)
    product_tiles<ADD, 2>(a, lda, b, ldb, c, ldc, k);
  else if (columns > 0)
    product_tiles<ADD, 1>(a, lda, b, ldb, c, ldc, k);
}

}  // namespace pygpt::PYGPT_ISA
