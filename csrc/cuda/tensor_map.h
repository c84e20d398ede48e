// What the copy engine (TMA) is told of a tensor in global memory: made on the host, passed to the kernel by value.
#pragma once

#include "cuda/launch.h"
#include "cuda/types.h"

#ifdef PYGPT_CUDA_EMULATION
#include <emulated_tensor_map.h>
#else

#include <cuda.h>

namespace pygpt::cuda {

using TensorMap = CUtensorMap;

// 16-bit elements (d0, d1, d2, d3), d0 contiguous, the other strides in bytes, multiples of 16; what is outside reads as 0.
// A copy takes `box` of them, box[0] * 2 bytes being 128, and permutes as ptx_sm90.h says.
inline TensorMap tensor_map(DType dtype, void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                            const uint32_t (&box)[4], const Launch& at) {
  // A function of the driver, which the library is not linked with: asked for by its name, once.
  static const auto encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer), at);
    if (answer != cudaDriverEntryPointSuccess) throw std::runtime_error(at.what + ": the CUDA driver is older than 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  constexpr uint32_t kEveryElement[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult status = encode(
      &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, data, sizes, strides,
      box, kEveryElement, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error(at.what + ": cuTensorMapEncodeTiled failed, code " + std::to_string(status));
  return map;
}

}  // namespace pygpt::cuda

#endif
