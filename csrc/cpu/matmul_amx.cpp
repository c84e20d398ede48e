// Products of bfloat16 matrices on processors with AMX: blocks and threads. The arithmetic is matmul_amx_kernel.h.
//
// The library is half as fast where it has to turn an operand round: bench/LOG.md has the figures. Here the
// smaller operand is packed once, by all threads, and read from the last-level cache; of the other each thread packs a block
// at a time that stays in its second-level cache. Blocks depend on the number of threads, the order of every sum does not.

#include "cpu/matmul.h"

#include <vector>

#define PYGPT_KERNELS_FOR_AMX
#define PYGPT_KERNELS "cpu/matmul_amx_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {

#ifdef PYGPT_AMX_LEVEL

namespace {

constexpr int64_t kBlockElements = 384 << 10;  // of a thread's block: with what passes by it fits a second-level cache of 2 MiB
constexpr int64_t kMaxBlock = 512;             // rows or columns of it

constexpr int64_t kMaxSums = 8 << 20;  // that wait in memory, in float32, between parts of the summed dimension

// The summed dimension goes in parts of this length, about equally long; in one where too many sums would wait meanwhile.
int64_t part_of(int64_t K, const MatmulOut& out) {
  const bool whole = out.finish != Finish::round || out.rows * out.columns > kMaxSums;
  const int64_t parts = whole ? 1 : (K + kMatmulMaxK - 1) / kMatmulMaxK;
  return ((K + parts - 1) / parts + kMatmulStep - 1) / kMatmulStep * kMatmulStep;
}

int64_t largest_block(int64_t k) {  // in panels of k
  return std::clamp<int64_t>(kBlockElements / matmul_panel_elements(k), 1, kMaxBlock / kMatmulPanel);
}

// Whether to write a result past the caches: no second-level cache holds it, and each 32 columns are a cache line.
bool goes_past_caches(const MatmulOut& out) {
  return out.finish == Finish::round && !out.add && out.rows * out.columns > (1 << 20) && out.stride % 32 == 0 &&
         reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
}

// Elements k .. k + count_k of the summed dimension.
void pack_panels(const MatmulOperand& operand, bool left, int64_t count, int64_t k, int64_t count_k, bf16* to) {
  torch::stable::parallel_for(0, matmul_panels(count), 1, [&](int64_t begin, int64_t end) {
    amx::matmul_pack(operand.at(k, begin), operand.strides, operand.panels, left,
                     std::min(count, end * kMatmulPanel) - begin * kMatmulPanel, count_k,
                     to + begin * matmul_panel_elements(count_k));
  });
}

}  // namespace

MatmulOperand pack(const MatmulOperand& operand, bool left, int64_t count, int64_t K, bf16* to) {
  pack_panels(operand, left, count, 0, K, to);
  return packed_operand(to, K);
}

int64_t statistics_block(int64_t K) { return largest_block(K) * kMatmulPanel; }

void multiply(const MatmulOperand& left, const MatmulOperand& right, int64_t K, MatmulOut out, Workspace& workspace,
              float* sums, bool first, bool last) {
  out.past_caches = goes_past_caches(out);
  // The smaller operand is shared; but rather long rows of the result from each block than short ones.
  const bool left_is_block = out.finish == Finish::round && out.rows >= 2 * out.columns;
  const MatmulOperand &blocks = left_is_block ? left : right, &shared = left_is_block ? right : left;
  const int64_t count = left_is_block ? out.rows : out.columns, shared_count = left_is_block ? out.columns : out.rows;
  const int64_t threads = torch::stable::get_num_threads(), k_part = part_of(K, out), size = matmul_panel_elements(k_part);
  const int64_t panels = matmul_panels(count), shared_panels = matmul_panels(shared_count), largest = largest_block(k_part);
  // As many blocks as a multiple of the threads, none larger than the cache allows, and about equally large.
  const bool fixed = out.finish == Finish::statistics;
  const int64_t rounds = (panels + largest * threads - 1) / (largest * threads);
  const int64_t items = fixed ? (panels + largest - 1) / largest : std::min(panels, rounds * threads);
  const int64_t in_block = fixed ? largest : (panels + items - 1) / items, parts = std::min(threads, items);
  const auto first_panel = [&](int64_t item) { return fixed ? std::min(panels, item * largest) : panels * item / items; };
  const bool across = sums || K > k_part, own_sums = across && !sums;

  // In floats.
  const int64_t of_block = blocks.packed ? 0 : in_block * size / 2, of_shared = shared.packed ? 0 : shared_panels * size / 2;
  const int64_t per_part = of_block + (across ? 0 : in_block * kMatmulSums);
  float* base = workspace.floats(parts * per_part + of_shared + (own_sums ? panels * shared_panels * kMatmulSums : 0));
  bf16* packed = reinterpret_cast<bf16*>(base + parts * per_part);
  if (own_sums) sums = base + parts * per_part + of_shared;
  for (int64_t k = 0; k < K; k += k_part) {
    const int64_t here = std::min(k_part, K - k);
    const int64_t here_size = matmul_panel_elements(here);
    amx::MatmulPanels other{shared.at(k, 0), shared.panels.free};
    if (!shared.packed) pack_panels(shared, !left_is_block, shared_count, k, here, packed), other = {packed, here_size};
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
          const int64_t panel = first_panel(item), from = panel * kMatmulPanel;
          const int64_t to = std::min(count, first_panel(item + 1) * kMatmulPanel);
          float* of_item = across ? sums + panel * shared_panels * kMatmulSums : base + part * per_part + of_block;
          amx::MatmulPanels block{blocks.at(k, panel), blocks.panels.free};
          if (!blocks.packed) {
            bf16* own = reinterpret_cast<bf16*>(base + part * per_part);
            amx::matmul_pack(block.data, blocks.strides, blocks.panels, left_is_block, to - from, here, own);
            block = {own, here_size};
          }
          amx::matmul_block(out, left_is_block, block, item, from, to, other, here, of_item, across, first && k == 0,
                            last && k + here == K);
        }
    });
  }
}

bool multiply_few_rows(const bf16* x, int64_t rows, int64_t K, const bf16* weight, int64_t N, const bf16* bias, bf16* y) {
  constexpr int64_t kBlock = 32, kMinBlocks = 8;  // rows of weight; blocks that a thread takes at least
  if (!has_tiles() || rows > kMatmulPanel || K == 0 || K % 32 || reinterpret_cast<uintptr_t>(weight) % 64) return false;
  std::vector<bf16> space(matmul_panel_elements(K) + 32);
  bf16* packed = reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
  amx::matmul_pack(x, {1, K}, {}, false, rows, K, packed);
  torch::stable::parallel_for(0, (N + kBlock - 1) / kBlock, kMinBlocks, [&](int64_t begin, int64_t end) {
    amx::matmul_few_rows(packed, rows, weight, K, bias, y, N, begin * kBlock, std::min(N, end * kBlock));
  });
  return true;
}

#else

int64_t statistics_block(int64_t) { return 1; }

MatmulOperand pack(const MatmulOperand& operand, bool, int64_t, int64_t, bf16*) { return operand; }

void multiply(const MatmulOperand&, const MatmulOperand&, int64_t, MatmulOut, Workspace&, float*, bool, bool) {}

bool multiply_few_rows(const bf16*, int64_t, int64_t, const bf16*, int64_t, const bf16*, bf16*) { return false; }

#endif

}  // namespace pygpt
