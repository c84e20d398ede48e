// Element types of the kernels: conversion to and from float32, and 16-byte loads and stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pygpt::cuda {

enum class DType { f32, bf16, f16 };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Elements in one 16-byte access.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// N elements that are read or written by 16-byte accesses: N is a multiple of kVector<T>, or 1 for a single element.
template <class T, int N>
struct alignas(N == 1 ? sizeof(T) : 16) Vector {
  T at[N];

  __device__ float get(int i) const { return to_float(at[i]); }
  __device__ void set(int i, float x) { at[i] = from_float<T>(x); }
};

template <int N, class T>
__device__ Vector<T, N> load(const T* from) {
  Vector<T, N> v;
  if constexpr (N == 1) {
    v.at[0] = *from;
  } else {
    static_assert(N % kVector<T> == 0);
#pragma unroll
    for (int i = 0; i < N / kVector<T>; ++i) reinterpret_cast<uint4*>(&v)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  return v;
}

template <int N, class T>
__device__ void store(T* to, const Vector<T, N>& v) {
  if constexpr (N == 1) {
    *to = v.at[0];
  } else {
#pragma unroll
    for (int i = 0; i < N / kVector<T>; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&v)[i];
  }
}

// Host: whether 16-byte accesses may be used on a pointer (absent ones do not matter).
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace pygpt::cuda
