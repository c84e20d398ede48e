#include "cpu/capability.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace pygpt {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

int best() {
#if PYGPT_X86_LEVELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
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
