// Dynamic shared memory, carved into arrays. Every kernel gets its shared memory here, and the host passes the sum of
// the takes (each rounded up to its alignment) as the launch's shared_bytes.
#pragma once

#include <cuda_runtime.h>

#ifdef PYGPT_CUDA_EMULATION
#include <emulated_shared.h>
#else

namespace pygpt::cuda {

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

class SharedMemory {
 public:
  template <class T>
  __device__ T* take(int count, int alignment = 16) {
    used_ = (used_ + alignment - 1) / alignment * alignment;
    T* array = reinterpret_cast<T*>(dynamic_shared + used_);
    used_ += count * static_cast<int>(sizeof(T));
    return array;
  }

 private:
  int used_ = 0;
};

}  // namespace pygpt::cuda

#endif
