// Products of bfloat16 matrices by AMX tiles: packed panels, and what becomes of two of them. For the level amx alone.
//
// A panel holds 32 rows of the left operand, or 32 columns of the right one, in steps of 32 along the summed dimension: two
// tiles of 1 KiB each. A left tile is 16 rows of 32 neighbours, a right one 16 pairs of neighbours by 16 columns. What lies
// beyond the matrix is zero. Sums are float32.

#ifdef PYGPT_AMX

namespace pygpt::PYGPT_ISA {

constexpr float kLog2E = 1.44269504088896341f;

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

PYGPT_INLINE vf load_upper_masked(const bf16* from, __mmask16 mask) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
}

// Where row r of a panel of sums lies; its second half is 256 further on.
PYGPT_INLINE int64_t row_of_sums(int64_t r) { return r / 16 * 512 + r % 16 * 16; }

// Rounds sums (+ bias, + what `out` holds) to `rows` x `columns` of out.
static void finish_round(const float* sums, const MatmulOut& out, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  const __mmask32 mask = columns >= 32 ? ~0u : _bzhi_u32(~0u, columns);
  const __mmask16 low = mask, high = mask >> 16;
  vf bias[2] = {};
  if (out.bias) bias[0] = load_upper_masked(out.bias + column, low), bias[1] = load_upper_masked(out.bias + column + 16, high);
  bf16* to = out.data + row * out.stride + column;
  for (int64_t r = 0; r < rows; ++r, to += out.stride) {
    const float* from = sums + row_of_sums(r);
    vf x = load(from) + bias[0], y = load(from + 256) + bias[1];
    if (out.add) x += load_upper_masked(to, low), y += load_upper_masked(to + 16, high);
    _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
  }
}

// The softmax of 32 rows over the columns of a block, as far as they are known: 16 lanes each.
struct Softmax {
  float largest[kMatmulPanel][16], sum[kMatmulPanel][16];

  void clear() {
    for (int64_t r = 0; r < kMatmulPanel; ++r)
      store(largest[r], splat(-std::numeric_limits<float>::max())), store(sum[r], vf{});  // not -inf: no -inf - -inf
  }
};

// Takes logits into the statistics of the rows' softmax.
static void finish_statistics(const float* sums, const MatmulOut& out, int64_t row, int64_t column, int64_t rows,
                              int64_t columns, Softmax& softmax) {
  const vf lowest = splat(-std::numeric_limits<float>::infinity());
  const vi lane = lane_numbers();
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = sums + row_of_sums(r);
    vf x = load(from) * kLog2E, y = load(from + 256) * kLog2E;
    if (columns < kMatmulPanel) x = lane < (int32_t)columns ? x : lowest, y = lane + 16 < (int32_t)columns ? y : lowest;
    const vf before = load(softmax.largest[r]), top = vmax(vmax(x, y), before);
    vf sum = load(softmax.sum[r]);
    if (_mm512_cmp_ps_mask((__m512)top, (__m512)before, _CMP_NEQ_UQ)) {
      sum *= vexp2<4>(before - top);
      store(softmax.largest[r], top);
    }
    store(softmax.sum[r], sum + (vexp2<4>(x - top) + vexp2<4>(y - top)));
    const uint64_t at = out.targets[row + r] - out.first_column - column;
    if (at < static_cast<uint64_t>(columns)) out.of_target[row + r] = from[at / 16 * 256 + at % 16] * kLog2E;
  }
}

// Of 32 rows at the end of block number `block`.
static void end_statistics(const Softmax& softmax, const MatmulOut& out, int64_t block, int64_t row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const vf largest = load(softmax.largest[r]);
    const float top = reduce_max(largest);
    out.largest[block * out.rows + row + r] = top;
    out.sum[block * out.rows + row + r] = reduce_add(load(softmax.sum[r]) * vexp2(largest - splat(top)));
  }
}

// (softmax - one_hot) * factor of logits.
static void finish_gradient(const float* sums, const MatmulOut& out, int64_t row, int64_t column, int64_t rows,
                            int64_t columns) {
  const __mmask32 mask = columns >= 32 ? ~0u : _bzhi_u32(~0u, columns);
  bf16* to = out.data + row * out.stride + column;
  for (int64_t r = 0; r < rows; ++r, to += out.stride) {
    const float* from = sums + row_of_sums(r);
    const vf log_sum = splat(out.log_sum[row + r]);
    vf p[2];
    for (int half = 0; half < 2; ++half) p[half] = vexp2<4>(load(from + 256 * half) * kLog2E - log_sum) * out.factor;
    const uint64_t at = out.targets[row + r] - out.first_column - column;
    if (at < static_cast<uint64_t>(columns))
      p[at / 16] = lane_numbers() == (int32_t)(at % 16) ? splat(out.at_target[row + r]) : p[at / 16];
    _mm512_mask_storeu_epi16(to, mask, (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]));
  }
}

// Multiplies packed operands. One is a block of few panels, which the second-level cache holds; each panel of the other is
// multiplied with them, in parts that the first-level cache holds. The block is number `number`, of rows (or columns)
// begin .. end. sums: where they lie between parts, a panel of the block each; with `across`, from one call to the next and
// those of all blocks.
static void matmul_block(const MatmulOut& out, bool block_is_left, const bf16* block, int64_t number, int64_t begin,
                         int64_t end, const bf16* other, int64_t k, float* sums, bool across, bool first, bool last) {
  const TileScope tiles;
  const int64_t steps = (k + kMatmulStep - 1) / kMatmulStep, size = steps * kMatmulPanelStep;
  const int64_t panels = matmul_panels(block_is_left ? out.columns : out.rows), in_block = matmul_panels(end - begin);
  const int64_t lines = (32 + in_block - 1) / in_block;  // to fetch ahead in a step, of two tiles in as many as there are
  Softmax softmax;
  for (int64_t q = 0; q < panels; ++q) {
    const int64_t in_other = q * kMatmulPanel;
    if (out.finish == Finish::statistics) softmax.clear();
    for (int64_t step = 0; step < steps; step += kMatmulSteps) {
      const int64_t here = smaller(kMatmulSteps, steps - step);
      const bf16* of_other = other + q * size + step * kMatmulPanelStep;
      for (int64_t p = 0; p < in_block; ++p) {
        const bf16* of_block = block + p * size + step * kMatmulPanelStep;
        float* to = sums + (across ? p * panels + q : p) * kMatmulSums;
        const auto multiply = first && step == 0 ? multiply_panels<false> : multiply_panels<true>;
        multiply(block_is_left ? of_block : of_other, block_is_left ? of_other : of_block, to, here,
                 of_other + kMatmulSteps * kMatmulPanelStep + p * lines * here * 32, lines);
        if (!last || step + here < steps) continue;
        const int64_t row = block_is_left ? begin + p * kMatmulPanel : in_other;
        const int64_t column = block_is_left ? in_other : begin + p * kMatmulPanel;
        const int64_t rows = smaller(kMatmulPanel, out.rows - row), columns = smaller(kMatmulPanel, out.columns - column);
        if (out.finish == Finish::round)
          finish_round(to, out, row, column, rows, columns);
        else if (out.finish == Finish::gradient)
          finish_gradient(to, out, row, column, rows, columns);
        else
          finish_statistics(to, out, row, column, rows, columns, softmax);
      }
    }
    if (out.finish == Finish::statistics)
      end_statistics(softmax, out, number, in_other, smaller(kMatmulPanel, out.rows - in_other));
  }
}

// --- few rows --------------------------------------------------------------------------------------------------------

// weight (N x K) times packed (K x PANELS * 16), a right operand: N rows, K a multiple of 32, weight of whole cache lines. The
// weight is read as it lies, once and in order: what comes next is under way while a block of 32 rows is multiplied. sums:
// (2 x PANELS) tiles.
template <int PANELS>
static void multiply_weight_rows(const bf16* weight, int64_t K, const bf16* packed, float* sums) {
  const int64_t stride = K * 2;
  const bf16 *second = weight + 16 * K, *ahead = weight + 32 * K;
  tile_zero<0>(), tile_zero<2>();
  if constexpr (PANELS > 1) tile_zero<1>(), tile_zero<3>();
  for (int64_t k = 0; k < K; k += 32, packed += kMatmulPanelStep) {
    for (int64_t l = 0; l < 32; ++l, ahead += 32) __builtin_prefetch(ahead, 0, 2);
    tile_load<4>(weight + k, stride), tile_load<6>(packed, 64);
    tile_dot_bf16<0, 4, 6>();
    tile_load<5>(second + k, stride);
    tile_dot_bf16<2, 5, 6>();
    if constexpr (PANELS > 1) {
      tile_load<7>(packed + kTileElements, 64);
      tile_dot_bf16<1, 4, 7>(), tile_dot_bf16<3, 5, 7>();
    }
  }
  tile_store<0>(sums, 64), tile_store<2>(sums + 512, 64);
  if constexpr (PANELS > 1) tile_store<1>(sums + 256, 64), tile_store<3>(sums + 768, 64);
}

// y (rows x N, `stride` apart) = the product of packed x, at most 32 rows, with rows begin .. end of weight, + bias.
static void matmul_few_rows(const bf16* packed, int64_t rows, const bf16* weight, int64_t K, const bf16* bias, bf16* y,
                            int64_t stride, int64_t begin, int64_t end) {
  const TileScope tiles;
  alignas(64) float sums[kMatmulSums];
  alignas(64) bf16 last[32 * 32];
  for (int64_t n = begin; n < end; n += 32) {
    const int64_t count = smaller(32, end - n);
    const bf16* from = weight + n * K;
    if (count == 32) {
      (rows > 16 ? multiply_weight_rows<2> : multiply_weight_rows<1>)(from, K, packed, sums);
    } else {  // the last rows, a step at a time: beyond them there is nothing to read
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      for (int64_t k = 0; k < K; k += 32) {
        for (int64_t r = 0; r < 32; ++r)
          _mm512_store_si512(last + r * 32, r < count ? _mm512_loadu_si512(from + r * K + k) : _mm512_setzero_si512());
        const bf16* x = packed + k * kMatmulPanel;
        tile_load<4>(last, 64), tile_load<5>(last + 512, 64), tile_load<6>(x, 64), tile_load<7>(x + kTileElements, 64);
        tile_dot_bf16<0, 4, 6>(), tile_dot_bf16<1, 4, 7>(), tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
      }
      tile_store<0>(sums, 64), tile_store<1>(sums + 256, 64), tile_store<2>(sums + 512, 64), tile_store<3>(sums + 768, 64);
    }
    const __mmask32 mask = count >= 32 ? ~0u : _bzhi_u32(~0u, count);
    vf of_bias[2] = {};
    if (bias) of_bias[0] = load_upper_masked(bias + n, mask), of_bias[1] = load_upper_masked(bias + n + 16, mask >> 16);
    for (int64_t panel = 0; panel * 16 < rows; ++panel) {
      vf low[16], high[16];  // of 16 rows of x
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        low[i] = load(sums + panel * 256 + 16 * i), high[i] = load(sums + 512 + panel * 256 + 16 * i);
      transpose<8>(low);
      transpose<8>(high);
      for (int64_t r = 0; r < smaller(16, rows - panel * 16); ++r)
        _mm512_mask_storeu_epi16(y + (panel * 16 + r) * stride + n, mask,
                                 (__m512i)_mm512_cvtne2ps_pbh((__m512)(high[r] + of_bias[1]), (__m512)(low[r] + of_bias[0])));
    }
  }
}

}  // namespace pygpt::PYGPT_ISA

#endif
