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
// along the summed dimension are strides.k apart. TRANSPOSE: as left tiles, which need them the other way round. All panels
// advance together, so that memory is read in long runs.
template <bool TRANSPOSE>
static void pack_across(const bf16* from, MatmulStrides strides, MatmulStrides panels, int64_t count, int64_t k, bf16* to) {
  const int64_t size = matmul_panel_elements(k), stride = strides.k;
  for (int64_t i = 0; i < k; i += kMatmulStep, from += panels.k, to += kMatmulPanelStep)
    for (int64_t c = 0; c < round_up(count, kMatmulPanel); c += 16) {
      const bf16* tile_from = from + c / kMatmulPanel * panels.free + c % kMatmulPanel;
      bf16* tile_to = to + c / kMatmulPanel * size + c % kMatmulPanel / 16 * kTileElements;
      vf tile[16];
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p)
        tile[p] = load_pairs(tile_from + 2 * p * stride, stride, k - i - 2 * p, larger(count - c, 0));
      if constexpr (TRANSPOSE) transpose<8>(tile);
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) store(reinterpret_cast<float*>(tile_to + 32 * p), tile[p]);
    }
}

// `count` rows (or columns) whose elements along the summed dimension are neighbours. TRANSPOSE: as right tiles.
template <bool TRANSPOSE>
static void pack_along(const bf16* from, int64_t stride, int64_t count, int64_t k, bf16* to) {
  for (int64_t c = 0; c < count; c += kMatmulPanel, from += kMatmulPanel * stride, to += matmul_panel_elements(k))
    for (int64_t half = 0; half < kMatmulPanel; half += 16)  // 16 rows at a time: no more are fetched ahead of being read
      for (int64_t i = 0; i < k; i += kMatmulStep) {
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
static void matmul_pack(const bf16* from, MatmulStrides strides, MatmulStrides panels, bool left, int64_t count, int64_t k,
                        bf16* to) {
  if (strides.k == 1)
    (left ? pack_along<false> : pack_along<true>)(from, strides.free, count, k, to);
  else
    (left ? pack_across<true> : pack_across<false>)(from, strides, panels, count, k, to);
}

PYGPT_INLINE vf load_upper_masked(const bf16* from, __mmask16 mask) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
}

// Where row r of a panel of sums lies; its second half is 256 further on.
PYGPT_INLINE int64_t row_of_sums(int64_t r) { return r / 16 * 512 + r % 16 * 16; }

// A panel of sums that are complete, of which `done` rows are finished: the others follow while the next panels are multiplied.
struct Pending {
  const float* sums;
  int64_t row, column, rows = 0, columns, done = 0;  // of the result
};

// Rounds a row of sums (+ bias, + what `out` holds). Past the caches where `out` is too large for them: then no line is read
// before it is written.
PYGPT_INLINE void round_row(const Pending& of, const MatmulOut& out) {
  const __mmask32 mask = of.columns >= 32 ? ~0u : _bzhi_u32(~0u, of.columns);
  const __mmask16 low = mask, high = mask >> 16;
  const float* from = of.sums + row_of_sums(of.done);
  bf16* to = out.data + (of.row + of.done) * out.stride + of.column;
  vf x = load(from), y = load(from + 256);
  if (out.bias) x += load_upper_masked(out.bias + of.column, low), y += load_upper_masked(out.bias + of.column + 16, high);
  if (out.add) x += load_upper_masked(to, low), y += load_upper_masked(to + 16, high);
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  if (out.past_caches && of.columns >= 32)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), rounded);
  else
    _mm512_mask_storeu_epi16(to, mask, rounded);
}

// The softmax of 32 rows over the columns of a block, as far as they are known: 16 lanes each.
struct Softmax {
  float largest[kMatmulPanel][16], sum[kMatmulPanel][16];

  void clear() {
    for (int64_t r = 0; r < kMatmulPanel; ++r)
      store(largest[r], splat(-std::numeric_limits<float>::max())), store(sum[r], vf{});  // not -inf: no -inf - -inf
  }
};

// Takes a row of logits into the statistics of its softmax.
PYGPT_INLINE void take_row(const Pending& of, const MatmulOut& out, Softmax& softmax) {
  const vf lowest = splat(-std::numeric_limits<float>::infinity());
  const vi lane = lane_numbers();
  const int64_t r = of.done;
  const float* from = of.sums + row_of_sums(r);
  vf x = load(from) * kLog2E, y = load(from + 256) * kLog2E;
  if (of.columns < kMatmulPanel)
    x = lane < (int32_t)of.columns ? x : lowest, y = lane + 16 < (int32_t)of.columns ? y : lowest;
  const vf before = load(softmax.largest[r]), top = vmax(vmax(x, y), before);
  vf sum = load(softmax.sum[r]);
  if (_mm512_cmp_ps_mask((__m512)top, (__m512)before, _CMP_NEQ_UQ)) {
    sum *= vexp2<4>(before - top);
    store(softmax.largest[r], top);
  }
  store(softmax.sum[r], sum + (vexp2<4>(x - top) + vexp2<4>(y - top)));
  const uint64_t at = out.targets[of.row + r] - out.first_column - of.column;
  if (at < static_cast<uint64_t>(of.columns)) out.of_target[of.row + r] = from[at / 16 * 256 + at % 16] * kLog2E;
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

// (softmax - one_hot) * factor of a row of logits.
PYGPT_INLINE void gradient_row(const Pending& of, const MatmulOut& out) {
  const __mmask32 mask = of.columns >= 32 ? ~0u : _bzhi_u32(~0u, of.columns);
  const int64_t row = of.row + of.done;
  const float* from = of.sums + row_of_sums(of.done);
  const vf log_sum = splat(out.log_sum[row]);
  vf p[2];
  for (int half = 0; half < 2; ++half) p[half] = vexp2<4>(load(from + 256 * half) * kLog2E - log_sum) * out.factor;
  const uint64_t at = out.targets[row] - out.first_column - of.column;
  if (at < static_cast<uint64_t>(of.columns))
    p[at / 16] = lane_numbers() == (int32_t)(at % 16) ? splat(out.at_target[row]) : p[at / 16];
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]);
  if (out.packed)  // the panel's two tiles of a step lie one after the other, and so do their rows
    _mm512_store_si512(out.data + row / kMatmulPanel * out.stride + of.column * kMatmulPanel + of.done * kMatmulStep,
                       _mm512_maskz_mov_epi16(mask, rounded));
  else
    _mm512_mask_storeu_epi16(out.data + row * out.stride + of.column, mask, rounded);
}

// At most `rows` more.
template <Finish FINISH>
PYGPT_INLINE void finish_rows(Pending& of, int64_t rows, const MatmulOut& out, Softmax& softmax) {
  for (const int64_t end = smaller(of.rows, of.done + rows); of.done < end; ++of.done) {
    if constexpr (FINISH == Finish::round)
      round_row(of, out);
    else if constexpr (FINISH == Finish::gradient)
      gradient_row(of, out);
    else
      take_row(of, out, softmax);
  }
}

// Cache lines that are written soon: `rows` of `lines` neighbours, `stride` elements apart.
struct Fetch {
  const bf16* from;
  int64_t stride, rows = 0, lines;
};

// What goes on beside a product of two panels, a part in each of its steps: memory takes long to answer, and vectors have time.
struct Beside {
  const bf16* ahead;  // of the other operand's panel: so many lines a step come into the second-level cache
  int64_t lines;
  Fetch written;
  Pending& pending;
};

// to (2 x 2 tiles) = sums, if there are any, + the product of two panels over `steps` steps. Panels of the block are read past
// the first-level cache, which has room for the other one alone.
template <bool ADD, bool BLOCK_IS_LEFT, Finish FINISH>
static void multiply_panels(const bf16* of_block, const bf16* of_other, const float* sums, float* to, int64_t steps,
                            Beside beside, const MatmulOut& out, Softmax& softmax) {
  // Tiles 4 and 5 are the left panel, 6 and 7 the right one.
  constexpr int BLOCK = BLOCK_IS_LEFT ? 4 : 6, OTHER = BLOCK_IS_LEFT ? 6 : 4;
  if constexpr (ADD) {
    tile_load<0>(sums, 64), tile_load<1>(sums + 256, 64), tile_load<2>(sums + 512, 64), tile_load<3>(sums + 768, 64);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  const int64_t rows = (kMatmulPanel + steps - 1) / steps;
  Fetch& written = beside.written;
  for (int64_t i = 0; i < steps; ++i, of_block += kMatmulPanelStep, of_other += kMatmulPanelStep) {
    tile_load_once<BLOCK>(of_block, 64), tile_load<OTHER>(of_other, 64);
    tile_dot_bf16<0, 4, 6>();
    tile_load<OTHER + 1>(of_other + kTileElements, 64);
    if constexpr (BLOCK_IS_LEFT)
      tile_dot_bf16<1, 4, 7>();
    else
      tile_dot_bf16<2, 5, 6>();
    for (int64_t l = 0; l < beside.lines; ++l, beside.ahead += 32) __builtin_prefetch(beside.ahead, 0, 2);
    for (int64_t r = 0; r < rows && written.rows > 0; ++r, --written.rows, written.from += written.stride)
      for (int64_t l = 0; l < written.lines; ++l) __builtin_prefetch(written.from + l * 32, 1, 3);
    tile_load_once<BLOCK + 1>(of_block + kTileElements, 64);
    if constexpr (BLOCK_IS_LEFT)
      tile_dot_bf16<2, 5, 6>();
    else
      tile_dot_bf16<1, 4, 7>();
    tile_dot_bf16<3, 5, 7>();
    finish_rows<FINISH>(beside.pending, rows, out, softmax);
  }
  tile_store<0>(to, 64), tile_store<1>(to + 256, 64), tile_store<2>(to + 512, 64), tile_store<3>(to + 768, 64);
}

// Where the panels of an operand lie, `stride` elements apart.
struct MatmulPanels {
  const bf16* data;
  int64_t stride;
};

constexpr int64_t kRun = 2;  // panels of columns, whose lines of the result are fetched together

// The part of the result to fetch while panel p of the block is multiplied with panel q of the other operand: some rows, and
// columns of the next kRun panels.
template <bool BLOCK_IS_LEFT>
static Fetch fetch_result(const MatmulOut& out, int64_t begin, int64_t end, int64_t p, int64_t q) {
  const int64_t of_columns = BLOCK_IS_LEFT ? q : p, last_column = BLOCK_IS_LEFT ? out.columns : end;
  int64_t row = BLOCK_IS_LEFT ? begin + p * kMatmulPanel : q * kMatmulPanel;
  int64_t column = (BLOCK_IS_LEFT ? 0 : begin) + (of_columns / kRun + 1) * kRun * kMatmulPanel;
  if (!BLOCK_IS_LEFT && column >= end) row += kMatmulPanel, column = begin;
  row += of_columns % kRun * (kMatmulPanel / kRun);
  if (!out.data || out.packed || out.past_caches || row >= out.rows || column >= last_column) return {};
  return {out.data + row * out.stride + column, out.stride, smaller(kMatmulPanel / kRun, out.rows - row),
          smaller(kRun, matmul_panels(last_column - column))};
}

// Multiplies packed operands. One is a block of few panels, which the second-level cache holds; each panel of the other is
// multiplied with them, in parts that the first-level cache holds. The block is number `number`, of rows (or columns)
// begin .. end. sums: where they lie between parts, a panel of the block each; with `across`, from one call to the next and
// those of all blocks.
template <bool BLOCK_IS_LEFT, Finish FINISH>
static void multiply_block(const MatmulOut& out, MatmulPanels block, int64_t number, int64_t begin, int64_t end,
                           MatmulPanels other, int64_t k, float* sums, bool across, bool first, bool last) {
  const TileScope tiles;
  const int64_t steps = (k + kMatmulStep - 1) / kMatmulStep;
  const int64_t parts = (steps + kMatmulSteps - 1) / kMatmulSteps, in_part = (steps + parts - 1) / parts;
  const int64_t panels = matmul_panels(BLOCK_IS_LEFT ? out.columns : out.rows), in_block = matmul_panels(end - begin);
  const int64_t lines = (32 + in_block - 1) / in_block;  // to fetch ahead in a step, of two tiles in as many as there are
  alignas(64) float complete[kMatmulSums];  // written when those that are pending have been finished
  Pending pending{};
  Softmax softmax;
  for (int64_t q = 0; q < panels; ++q) {
    if (FINISH == Finish::statistics) softmax.clear();
    for (int64_t step = 0; step < steps; step += in_part) {
      const int64_t here = smaller(in_part, steps - step);
      const bool ends = last && step + here >= steps;
      const bf16* of_other = other.data + q * other.stride + step * kMatmulPanelStep;
      for (int64_t p = 0; p < in_block; ++p) {
        float* so_far = sums + (across ? p * panels + q : p) * kMatmulSums;
        float* to = ends ? complete : so_far;
        Beside beside{of_other + in_part * kMatmulPanelStep + p * lines * here * 32, lines, {}, pending};
        if (ends) {
          beside.written = fetch_result<BLOCK_IS_LEFT>(out, begin, end, p, q);
        } else if (across && step == 0) {
          const int64_t next_q = smaller(q + 1, panels - 1);
          const float* next = p + 1 < in_block ? so_far + panels * kMatmulSums : sums + next_q * kMatmulSums;
          beside.written = {reinterpret_cast<const bf16*>(next), 4 * 32, kMatmulSums / 64, 4};
        }
        (first && step == 0 ? multiply_panels<false, BLOCK_IS_LEFT, FINISH> : multiply_panels<true, BLOCK_IS_LEFT, FINISH>)(
            block.data + p * block.stride + step * kMatmulPanelStep, of_other, so_far, to, here, beside, out, softmax);
        if (!ends) continue;
        const int64_t row = BLOCK_IS_LEFT ? begin + p * kMatmulPanel : q * kMatmulPanel;
        const int64_t column = BLOCK_IS_LEFT ? q * kMatmulPanel : begin + p * kMatmulPanel;
        pending = {to, row, column, smaller(kMatmulPanel, out.rows - row), smaller(kMatmulPanel, out.columns - column)};
      }
    }
    if (FINISH == Finish::statistics) {
      finish_rows<FINISH>(pending, kMatmulPanel, out, softmax);
      end_statistics(softmax, out, number, q * kMatmulPanel, smaller(kMatmulPanel, out.rows - q * kMatmulPanel));
    }
  }
  finish_rows<FINISH>(pending, kMatmulPanel, out, softmax);
  if (out.past_caches) _mm_sfence();  // other threads are to see it
}

static void matmul_block(const MatmulOut& out, bool block_is_left, MatmulPanels block, int64_t number, int64_t begin,
                         int64_t end, MatmulPanels other, int64_t k, float* sums, bool across, bool first, bool last) {
  const auto multiply = out.finish == Finish::statistics ? multiply_block<false, Finish::statistics>
                        : out.finish == Finish::gradient ? multiply_block<false, Finish::gradient>
                        : block_is_left                  ? multiply_block<true, Finish::round>
                                                         : multiply_block<false, Finish::round>;
  multiply(out, block, number, begin, end, other, k, sums, across, first, last);
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
