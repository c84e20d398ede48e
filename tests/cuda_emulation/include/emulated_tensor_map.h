// csrc/cuda/tensor_map.h's helper on the emulated device, with the driver's rules.
#pragma once

namespace pygpt::cuda {

using TensorMap = ::emulation::TensorMap;

inline TensorMap tensor_map(DType, void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                            const uint32_t (&box)[4], const Launch& at) {
  bool valid = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * 2 == 128;
  for (uint64_t stride : strides) valid = valid && stride % 16 == 0 && stride < uint64_t(1) << 40;
  for (uint64_t size : sizes) valid = valid && size >= 1 && size <= uint64_t(1) << 32;
  for (uint32_t size : box) valid = valid && size >= 1 && size <= 256;
  if (!valid) throw std::runtime_error(at.what + ": cuTensorMapEncodeTiled would fail");
  return {static_cast<unsigned char*>(data), {sizes[0], sizes[1], sizes[2], sizes[3]}, {strides[0], strides[1], strides[2]},
          {box[0], box[1], box[2], box[3]}};
}

}  // namespace pygpt::cuda
