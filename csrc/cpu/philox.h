// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw ("Parallel random numbers: as easy as
// 1, 2, 3", 2011), one counter per lane, and the dropout mask of attention made from it. Included per instruction set.
//
// The mask is a function of (seed, head, query, key) alone, so backward regenerates what forward used and every backend
// drops the same elements: for batch b, head h, query i and key j the counter is
// (j / 64 * 16 + j % 16, i, b * H + h, 0), the key is the seed's (low, high) 32 bits, and the word is j / 16 % 4.

namespace pygpt::PYGPT_ISA {

typedef uint64_t vq __attribute__((vector_size(4 * PYGPT_LANES)));

// The even 32-bit lanes of a times m, as 64-bit products.
PYGPT_INLINE vq multiply_even(vq a, uint32_t m) {
#if PYGPT_X86_LEVELS && PYGPT_LANES == 16
  return (vq)_mm512_maskz_mul_epu32(-1, (__m512i)a, _mm512_set1_epi64(m));  // plain: GCC 12 warns of its own header
#elif PYGPT_X86_LEVELS && PYGPT_LANES == 8
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif PYGPT_X86_LEVELS
  return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * m;
#endif
}

PYGPT_INLINE void multiply_wide(vu a, uint32_t m, vu& high, vu& low) {
  const vq even = multiply_even((vq)a, m), odd = multiply_even((vq)a >> 32, m);
  low = (vu)((even & 0xffffffffu) | (odd << 32));
  high = (vu)((even >> 32) | (odd & ~uint64_t{0xffffffffu}));
}

PYGPT_INLINE void philox(vu c0, vu c1, vu c2, vu c3, uint32_t k0, uint32_t k1, vu words[4]) {
  for (int round = 0; round < 10; ++round) {
    vu high0, low0, high2, low2;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high2, low2);
    c0 = high2 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low2;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Which of the 64 keys of a block the query keeps: all bits set where kept. One mask per vector, in the keys' order.
PYGPT_INLINE void dropout_keep(const Dropout& dropout, int64_t head, int64_t query, int64_t key_block,
                               vi keep[kAttentionBlock / kLanes]) {
  constexpr int kSplit = 16 / kLanes;  // vectors per word's 16 keys
  const vu zero = {};
  for (int part = 0; part < kSplit; ++part) {
    vu words[4];
    const vu c0 = (vu)lane_numbers() + static_cast<uint32_t>(key_block * 16 + part * kLanes);
    philox(c0, zero + static_cast<uint32_t>(query), zero + static_cast<uint32_t>(head), zero, dropout.key[0],
           dropout.key[1], words);
    for (int word = 0; word < 4; ++word) keep[word * kSplit + part] = (vi)(words[word] >= dropout.threshold);
  }
}

}  // namespace pygpt::PYGPT_ISA
