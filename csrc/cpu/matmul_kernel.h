// Products of bfloat16 matrices by AMX tiles: packed panels, and what becomes of two of them. For the level amx alone.
//
// A panel holds 32 rows of the left operand, or 32 columns of the right one, in steps of 32 along the summed dimension: two
// tiles of 1 KiB each. A left tile is 16 rows of 32 neighbours, a right one 16 pairs of neighbours by 16 columns. What lies
// beyond the matrix is zero. Sums are float32.

#ifdef PYGPT_AMX

namespace pygpt::PYGPT_ISA {

// A tile whose rows are pairs: 16 columns of two rows of `from`, interleaved.
PYGPT_INLINE vf load_pairs(const bf16* from, int64_t stride, int64_t rows, int64_t columns) {
  const __mmask16 mask = columns >= 16 ? 0xffff : _bzhi_u32(0xffff, columns);
  const __m256i even = _mm256_maskz_loadu_epi16(rows > 0 ? mask : 0, from);
  const __m256i odd = _mm256_maskz_loadu_epi16(rows > 1 ? mask : 0, from + stride);
  return (vf)_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// `count` rows of the left operand (or columns of the right one) that are neighbours in memory, while the elements of each
// along the summed dimension are `stride` apart. TRANSPOSE: as left tiles, which need them the other way round. All panels
// advance together, so that memory is read in long runs.
template <bool TRANSPOSE>
static void pack_across(const bf16* from, int64_t stride, int64_t count, int64_t k, bf16* to) {
  const int64_t size = matmul_panel_elements(k);
  for (int64_t i = 0; i < k; i += kMatmulStep, from += kMatmulStep * stride, to += kMatmulPanelStep)
    for (int64_t c = 0; c < round_up(count, kMatmulPanel); c += 16) {
      bf16* tile_to = to + c / kMatmulPanel * size + c % kMatmulPanel / 16 * kTileElements;
      vf tile[16];
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p)
        tile[p] = load_pairs(from + 2 * p * stride + c, stride, k - i - 2 * p, larger(count - c, 0));
      if constexpr (TRANSPOSE) transpose<8>(tile);
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) store(reinterpret_cast<float*>(tile_to + 32 * p), tile[p]);
    }
}

// `count` rows (or columns) whose elements along the summed dimension are neighbours. TRANSPOSE: as right tiles.
template <bool TRANSPOSE>
static void pack_along(const bf16* from, int64_t stride, int64_t count, int64_t k, bf16* to) {
  for (int64_t c = 0; c < count; c += kMatmulPanel, from += kMatmulPanel * stride, to += matmul_panel_elements(k))
    for (int64_t i = 0; i < k; i += kMatmulStep)
      for (int64_t half = 0; half < kMatmulPanel; half += 16) {
        const __mmask32 mask = k - i >= 32 ? ~0u : _bzhi_u32(~0u, k - i);
        vf tile[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r)
          tile[r] = (vf)_mm512_maskz_loadu_epi16(c + half + r < count ? mask : 0, from + (half + r) * stride + i);
        if constexpr (TRANSPOSE) transpose<8>(tile);
        bf16* tile_to = to + i * kMatmulPanel + half / 16 * kTileElements;
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) store(reinterpret_cast<float*>(tile_to + 32 * r), tile[r]);
      }
}

// `count` rows or columns of an operand, as panels of the summed dimension's k elements.
static void matmul_pack(const bf16* from, MatmulStrides strides, bool left, int64_t count, int64_t k, bf16* to) {
  if (strides.k == 1)
    (left ? pack_along<false> : pack_along<true>)(from, strides.free, count, k, to);
  else
    (left ? pack_across<true> : pack_across<false>)(from, strides.k, count, k, to);
}

// sums (2 x 2 tiles), or sums + the product of two panels over `steps` steps. Meanwhile `lines` cache lines a step from
// `ahead` on come into the second-level cache.
template <bool ADD>
static void multiply_panels(const bf16* a, const bf16* b, float* sums, int64_t steps, const bf16* ahead, int64_t lines) {
  if constexpr (ADD) {
    tile_load<0>(sums, 64), tile_load<1>(sums + 256, 64), tile_load<2>(sums + 512, 64), tile_load<3>(sums + 768, 64);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t i = 0; i < steps; ++i, a += kMatmulPanelStep, b += kMatmulPanelStep) {
    tile_load<4>(a, 64), tile_load<6>(b, 64);
    tile_dot_bf16<0, 4, 6>();
    tile_load<7>(b + kTileElements, 64);
    tile_dot_bf16<1, 4, 7>();
    for (int64_t l = 0; l < lines; ++l, ahead += 32) __builtin_prefetch(ahead, 0, 2);
    tile_load<5>(a + kTileElements, 64);
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
  }
  tile_store<0>(sums, 64), tile_store<1>(sums + 256, 64), tile_store<2>(sums + 512, 64), tile_store<3>(sums + 768, 64);
}

// Rounds sums (+ bias, + what `out` holds) to `rows` x `columns` of out.
PYGPT_INLINE void finish_sums(const float* sums, const MatmulOut& out, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  const __mmask32 mask = columns >= 32 ? ~0u : _bzhi_u32(~0u, columns);
  const __mmask16 low = mask, high = mask >> 16;
  vf bias[2] = {};
  if (out.bias) {
    const bf16* from = out.bias + column;
    bias[0] = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, from)), 16);
    bias[1] = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, from + 16)), 16);
  }
  bf16* to = out.data + row * out.stride + column;
  for (int64_t r = 0; r < rows; ++r, to += out.stride) {
    const float* from = sums + r / 16 * 512 + r % 16 * 16;
    vf x = load(from) + bias[0], y = load(from + 256) + bias[1];
    if (out.add) {
      x += (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, to)), 16);
      y += (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, to + 16)), 16);
    }
    _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
  }
}

// Multiplies packed operands. One is a block of few panels, which the second-level cache holds; each panel of the other is
// multiplied with them, in parts that the first-level cache holds. `block` begins at row (or column) block_begin.
// sums: where the sums lie between parts, a panel of the block each; with `across`, those of panel p of the block and panel
// q of the other at sums + (p * panels + q) * 1024 and from one call to the next.
static void matmul_block(const MatmulOut& out, bool block_is_left, const bf16* block, int64_t block_begin, int64_t block_end,
                         const bf16* other, int64_t k, float* sums, bool across, bool first, bool last) {
  const TileScope tiles;
  const int64_t steps = (k + kMatmulStep - 1) / kMatmulStep, size = steps * kMatmulPanelStep;
  const int64_t end = block_is_left ? out.columns : out.rows, panels = (end + kMatmulPanel - 1) / kMatmulPanel;
  const int64_t lines = (32 + matmul_panels(block_end - block_begin) - 1) / matmul_panels(block_end - block_begin);
  for (int64_t q = 0; q < panels; ++q)
    for (int64_t step = 0; step < steps; step += kMatmulSteps) {
      const int64_t here = smaller(kMatmulSteps, steps - step);
      const bf16* of_other = other + q * size + step * kMatmulPanelStep;
      for (int64_t p = 0; block_begin + p * kMatmulPanel < block_end; ++p) {
        const bf16* of_block = block + p * size + step * kMatmulPanelStep;
        float* to = sums + (across ? p * panels + q : p) * kMatmulSums;
        const auto multiply = first && step == 0 ? multiply_panels<false> : multiply_panels<true>;
        multiply(block_is_left ? of_block : of_other, block_is_left ? of_other : of_block, to, here,
                 of_other + kMatmulSteps * kMatmulPanelStep + p * lines * here * 32, lines);
        if (!last || step + here < steps) continue;
        const int64_t in_block = block_begin + p * kMatmulPanel, in_other = q * kMatmulPanel;
        const int64_t row = block_is_left ? in_block : in_other, column = block_is_left ? in_other : in_block;
        finish_sums(to, out, row, column, smaller(kMatmulPanel, out.rows - row), smaller(kMatmulPanel, out.columns - column));
      }
    }
}

}  // namespace pygpt::PYGPT_ISA

#endif
