// What matmul.cpp and its kernel share: how panels lie in memory, and what a product is written to.
#pragma once

#include "cpu/capability.h"

namespace pygpt {

constexpr int64_t kMatmulPanel = 32;                              // rows of the left operand, columns of the right one
constexpr int64_t kMatmulStep = 32;                               // along the summed dimension
constexpr int64_t kTileElements = 512;                            // of bfloat16
constexpr int64_t kMatmulPanelStep = kMatmulPanel * kMatmulStep;  // elements of a panel in a step: two tiles
constexpr int64_t kMatmulSums = kMatmulPanel * kMatmulPanel;      // of a panel with a panel
// Steps between which sums wait in memory: two panels of so many, and the sums, fit the first-level cache.
constexpr int64_t kMatmulSteps = 8;

constexpr int64_t matmul_panels(int64_t count) { return (count + kMatmulPanel - 1) / kMatmulPanel; }
constexpr int64_t matmul_panel_elements(int64_t k) { return (k + kMatmulStep - 1) / kMatmulStep * kMatmulPanelStep; }

// Of an operand, in elements: along the summed dimension, and along the one that the result has too. One of them is 1.
struct MatmulStrides {
  int64_t k, free;
};

struct MatmulOut {
  bf16* data;
  int64_t rows, columns, stride;
  const bf16* bias;  // (columns,) or null
  bool add;          // to what is there
};

}  // namespace pygpt
