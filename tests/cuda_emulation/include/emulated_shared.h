// csrc/cuda/shared.h's helper on the emulated device: arrays that were not taken, and the gaps between, are out of bounds.
#pragma once

#include "../runtime.h"

namespace pygpt::cuda {

class SharedMemory {
 public:
  template <class T>
  T* take(int count, int alignment = 16) {
    return static_cast<T*>(::emulation::take_shared(used_, count * sizeof(T), alignment));
  }

 private:
  size_t used_[2] = {0, 0};
};

}  // namespace pygpt::cuda
