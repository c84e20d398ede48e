// Stands in for CUDA's header of this name: float16 by the compiler's own type.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  _Float16 value;
  memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}

inline __half __float2half_rn(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  __half half;
  memcpy(&half.bits, &value, 2);
  return half;
}
