// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011) and attention's dropout mask made from it: a function of the seed and
// the element's place alone. For batch b, head h, query i and key j the counter is (j / 64 * 16 + j % 16, i, b * H + h, 0),
// the key is the seed's (low, high) 32 bits, the word is j / 16 % 4, and the element stays if that is at least threshold.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pygpt::cuda {

struct Dropout {
  const int64_t* seed;  // on the device; null: no dropout
  uint32_t threshold;   // floor(p * 2^32)
  float kept_scale;     // 1 / (1 - p)
};

struct Words {
  uint32_t at[4];
};

__device__ inline Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(c0) * 0xD2511F53u, second = uint64_t(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(second);
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of the four keys j, j + 16, j + 32, j + 48 for j % 64 < 16.
__device__ inline Words dropout_words(uint64_t seed, uint32_t head, uint32_t query, uint32_t key) {
  return philox(key / 64 * 16 + key % 16, query, head, 0, seed);
}

}  // namespace pygpt::cuda
