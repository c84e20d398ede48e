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

#ifdef PYGPT_AMX_LEVEL
// Whether the processor has AMX tiles of bfloat16, and the operating system grants them to this process.
bool has_amx() {
#ifdef PYGPT_AMX_EMULATED
  return true;
#elif defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kTile | kBf16)) != (kTile | kBf16)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

int find_best() {
#if PYGPT_X86_LEVELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
#ifdef PYGPT_AMX_LEVEL
  if (has_amx()) return 4;
#endif
  return 3;
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

int initial() {
  const char* wanted = std::getenv("PYGPT_CPU_CAPABILITY");
  return wanted && *wanted ? level_of(wanted, "PYGPT_CPU_CAPABILITY") : best();
}

// -1: not read yet. Every reader throws while the variable holds a bad name: so does each kernel, and no import.
std::atomic<int> current{-1};

}  // namespace

Capability capability() {
  int level = current.load(std::memory_order_relaxed);
  if (level < 0) {
    level = initial();
    current.store(level, std::memory_order_relaxed);
  }
  return static_cast<Capability>(level);
}

void set_capability(const std::string& name) { current.store(level_of(name, "CPU capability"), std::memory_order_relaxed); }

std::string capability_name() { return kNames[static_cast<int>(capability())]; }

std::vector<std::string> available_capabilities() { return {kNames, kNames + best() + 1}; }

}  // namespace pygpt
