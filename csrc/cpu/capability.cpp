#include "cpu/capability.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#if PYGPT_X86_LEVELS
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pygpt {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16", "amx"};

#if PYGPT_X86_LEVELS
// Whether the processor has AMX tiles of bfloat16, and the operating system grants them to this process.
bool find_amx() {
#ifdef __linux__
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kTile | kBf16)) != (kTile | kBf16)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  static const bool found = find_amx();
  return found;
}

// Intel's processors since Sapphire Rapids, made for AMX, execute vdpbf16ps every other cycle: half of the multiplications
// that two float32 FMAs a cycle make (bench/LOG.md has the figures). AMD's execute as many of it as of FMAs.
bool has_slow_dot() { return __builtin_cpu_is("intel") && !__builtin_cpu_is("cooperlake"); }
#endif

int find_best() {
#if PYGPT_X86_LEVELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
#ifdef PYGPT_AVX512_EMULATED
  return 4;
#else
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
  // All processors with AMX have these; its kernels use them.
  if (!__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vbmi2")) return 3;
#ifdef PYGPT_AMX_EMULATED
  return 4;
#elif defined(PYGPT_AMX_LEVEL)
  if (has_amx()) return 4;
#endif
  return 3;
#endif
#else
  return 0;
#endif
}

int best() {
  static const int level = find_best();
  return level;
}

int level_of(const std::string& name, const char* source) {
  std::string known;
  for (int i = 0; i <= best(); ++i) {
    if (name == kNames[i]) return i;
    known += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::invalid_argument(std::string(source) + " '" + name + "' is unknown or not on this machine; choose one of " + known);
}

// -1: not read yet. Every reader throws while the environment holds a bad name: so does each kernel, and no import.
std::atomic<int> current{-1}, current_for_products{-1};

void use(int level, bool asked_for) {
  int for_products = level;
#if PYGPT_X86_LEVELS
  if (!asked_for && level > 2 && has_slow_dot()) for_products = 2;
#endif
  current_for_products = for_products;
  current = level;
}

int read(const std::atomic<int>& level) {
  if (level < 0) set_capability("");
  return level;
}

}  // namespace

Capability capability() { return static_cast<Capability>(read(current)); }

Capability product_capability() { return static_cast<Capability>(read(current_for_products)); }

bool multiplies_bf16() {
#if PYGPT_X86_LEVELS
  return product_capability() >= Capability::avx512_bf16 || (capability() >= Capability::avx512_bf16 && has_amx());
#else
  return true;  // not known: the library decides
#endif
}

bool multiplies_by_vectors() { return capability() == Capability::avx2; }

bool has_tiles() { return capability() >= Capability::amx; }

void set_capability(const std::string& name) {
  if (!name.empty()) return use(level_of(name, "CPU capability"), true);
  const char* wanted = std::getenv("PYGPT_CPU_CAPABILITY");
  const bool asked_for = wanted && *wanted;
  use(asked_for ? level_of(wanted, "PYGPT_CPU_CAPABILITY") : best(), asked_for);
}

std::string capability_name() { return kNames[static_cast<int>(capability())]; }

std::vector<std::string> available_capabilities() { return {kNames, kNames + best() + 1}; }

}  // namespace pygpt
