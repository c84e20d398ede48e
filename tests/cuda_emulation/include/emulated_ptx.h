// csrc/cuda/ptx.h's wrappers on the emulated device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pygpt::cuda::ptx {

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row, EMULATION_SITE) {
  ::emulation::load_matrix(to, row, 4, false, {file, line});
}
inline void ldmatrix_x4_transposed(uint32_t (&to)[4], const void* row, EMULATION_SITE) {
  ::emulation::load_matrix(to, row, 4, true, {file, line});
}

inline void mma_m16n8k16(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATION_SITE) {
  const uint32_t b[2] = {b0, b1};
  ::emulation::mma_m16n8k16(c, a, b, ::emulation::Element::bf16, {file, line});
}
inline void mma_m16n8k16(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATION_SITE) {
  const uint32_t b[2] = {b0, b1};
  ::emulation::mma_m16n8k16(c, a, b, ::emulation::Element::f16, {file, line});
}

inline void cp_async_16(void* to, const void* from, bool valid) { ::emulation::copy_async(to, from, 16, valid ? 16 : 0); }
inline void cp_async_commit() { ::emulation::copy_async_commit(); }
template <int kGroupsLeft>
void cp_async_wait() {
  ::emulation::copy_async_wait(kGroupsLeft);
}

inline uint32_t pack(__nv_bfloat16, float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pack(__half, float low, float high) {
  return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16;
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // .ftz
}

}  // namespace pygpt::cuda::ptx
