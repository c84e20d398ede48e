// csrc/cuda/ptx_sm90.h's wrappers on the emulated device.
#pragma once

namespace pygpt::cuda::ptx {

inline uint32_t shared_address(const void* generic) { return ::emulation::shared_offset(generic); }

inline void mbarrier_init(uint64_t* barrier, int arrivals) { ::emulation::barrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { ::emulation::barrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { ::emulation::barrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, EMULATION_SITE) {
  ::emulation::barrier_wait(barrier, parity, {file, line});
}
inline void tma_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  ::emulation::tensor_load(to, map, barrier, x, y, z, w);
}

inline void wgmma_fence(EMULATION_SITE) { ::emulation::wgmma_fence({file, line}); }
inline void wgmma_commit(EMULATION_SITE) { ::emulation::wgmma_commit({file, line}); }
template <int kGroupsLeft, int N>
void wgmma_wait(float (&)[N][4], EMULATION_SITE) {
  ::emulation::wgmma_wait(kGroupsLeft, {file, line});
}

inline ::emulation::Element element_of(__nv_bfloat16) { return ::emulation::Element::bf16; }
inline ::emulation::Element element_of(__half) { return ::emulation::Element::f16; }

template <class T, int N>
void wgmma_by_rows(T, float (&d)[N][4], uint64_t a, uint64_t b, bool accumulate, EMULATION_SITE) {
  static_assert(N == 8 || N == 16);
  ::emulation::wgmma(&d[0][0], N * 8, nullptr, a, b, true, accumulate, element_of(T{}), {file, line});
}
template <class T, int N>
void wgmma_by_columns(T, float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, EMULATION_SITE) {
  static_assert(N == 8 || N == 16);
  ::emulation::wgmma(&d[0][0], N * 8, a, 0, b, false, true, element_of(T{}), {file, line});
}

template <int kRegisters>
void registers_give_back() {}
template <int kRegisters>
void registers_take() {}

}  // namespace pygpt::cuda::ptx
