// Which instruction set the CPU kernels use: the best the machine has, or less if PYGPT_CPU_CAPABILITY asks for less.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pygpt {

// bfloat16 as it lies in memory: one type for every variant of a kernel.
struct bf16 {
  uint16_t bits;
};

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The level in use. Read once from the environment, then only changed by set_capability. Throws std::invalid_argument if
// the environment asks for a name that the machine lacks.
Capability capability();
// The level for products of bfloat16, which is a lower one where those of float32 are faster (see capability.cpp), unless
// the level was asked for by its name.
Capability product_capability();
// Whether a library's products of bfloat16 are faster than those of float32.
bool multiplies_bf16();
// Whether products of matrices, of float32 and of bfloat16, are faster by matmul_vector.cpp than by a library. With AVX-512 not measured.
bool multiplies_by_vectors();
// Whether the level in use has AMX tiles.
bool has_tiles();
// Lowers (or raises again) the level, or for "" puts back what it was at first; throws std::invalid_argument for a name the
// machine lacks. For tests and benches.
void set_capability(const std::string& name);
std::string capability_name();
// Every level this machine has, lowest first.
std::vector<std::string> available_capabilities();

}  // namespace pygpt

// The variant of a kernel for the level in use. Kernels are compiled once per level, each in a namespace of its own:
// see foreach_isa.h. AMX has variants of bfloat16 attention and products alone, which their files pick by themselves; left out
// where the assembler does not know it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYGPT_X86_LEVELS 1
#ifdef PYGPT_WITH_AMX
#define PYGPT_AMX_LEVEL 1
#endif
#define PYGPT_DISPATCH_AT(level, ...)                                     \
  (level >= ::pygpt::Capability::avx512_bf16 ? avx512_bf16::__VA_ARGS__ \
   : level >= ::pygpt::Capability::avx512    ? avx512::__VA_ARGS__      \
   : level >= ::pygpt::Capability::avx2      ? avx2::__VA_ARGS__        \
                                             : baseline::__VA_ARGS__)
#else
#define PYGPT_X86_LEVELS 0
#define PYGPT_DISPATCH_AT(level, ...) (baseline::__VA_ARGS__)
#endif
#define PYGPT_DISPATCH(...) PYGPT_DISPATCH_AT(::pygpt::capability(), __VA_ARGS__)
#define PYGPT_DISPATCH_PRODUCTS(...) PYGPT_DISPATCH_AT(::pygpt::product_capability(), __VA_ARGS__)
