// Compiles the file named by PYGPT_KERNELS once per instruction set, each time in a namespace of its own, pygpt::baseline,
// pygpt::avx2, ...: PYGPT_DISPATCH (capability.h) then picks one at run time.
//
// Regions of one translation unit, not per-file -m flags: with those, an inline function from a shared header compiled
// with wide instructions can be the one copy that the linker keeps for everybody. Hence also the rule that everything
// PYGPT_KERNELS needs is included before this file, and that kernels use no lambdas (they do not inherit the target).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/capability.h"

#if PYGPT_X86_LEVELS
#include <immintrin.h>
#endif
#ifdef PYGPT_AVX512_EMULATED
#include "avx512_emulation.h"  // make test-amx, on a processor without AVX-512
#endif
#ifdef PYGPT_AMX_LEVEL
#include "cpu/amx.h"
#endif

#define PYGPT_ISA baseline
#define PYGPT_LANES 4
#include "cpu/simd.h"
#include PYGPT_KERNELS
#undef PYGPT_ISA
#undef PYGPT_LANES

#if PYGPT_X86_LEVELS

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#define PYGPT_ISA avx2
#define PYGPT_LANES 8
#include "cpu/simd.h"
#include PYGPT_KERNELS
#undef PYGPT_ISA
#undef PYGPT_LANES
#pragma GCC pop_options

#pragma GCC push_options
#ifdef PYGPT_AVX512_EMULATED
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define PYGPT_ISA avx512
#define PYGPT_LANES 16
#include "cpu/simd.h"
#include PYGPT_KERNELS
#undef PYGPT_ISA
#undef PYGPT_LANES
#pragma GCC pop_options

#pragma GCC push_options
#ifdef PYGPT_AVX512_EMULATED
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#endif
#define PYGPT_ISA avx512_bf16
#define PYGPT_LANES 16
#define PYGPT_AVX512_BF16 1  // the pragma does not define the compiler's own macro in C++ (GCC 12)
#include "cpu/simd.h"
#include PYGPT_KERNELS
#undef PYGPT_ISA
#undef PYGPT_LANES
#undef PYGPT_AVX512_BF16
#pragma GCC pop_options
#if defined(PYGPT_AMX_LEVEL) && defined(PYGPT_KERNELS_FOR_AMX)  // defined by a file whose kernels have variants for it
#pragma GCC push_options
#ifdef PYGPT_AVX512_EMULATED
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vbmi2,prefer-vector-width=512")
#endif
#define PYGPT_ISA amx
#define PYGPT_AVX512_BF16 1
#define PYGPT_LANES 16
#define PYGPT_AMX 1
#include "cpu/simd.h"
#include PYGPT_KERNELS
#undef PYGPT_ISA
#undef PYGPT_LANES
#undef PYGPT_AMX
#undef PYGPT_AVX512_BF16
#pragma GCC pop_options
#endif

#endif  // PYGPT_X86_LEVELS

#undef PYGPT_KERNELS
