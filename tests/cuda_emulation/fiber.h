// One stack each, switched by hand; the sanitizers are told of every switch. Included by runtime.cpp alone.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef EMULATION_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
extern "C" void __asan_poison_memory_region(void const volatile* begin, size_t size);
extern "C" void __asan_unpoison_memory_region(void const volatile* begin, size_t size);
extern "C" void* __asan_region_is_poisoned(void* begin, size_t size);
#else
static void* __asan_region_is_poisoned(void*, size_t) { return nullptr; }
static void __asan_poison_memory_region(void const volatile*, size_t) {}
static void __asan_unpoison_memory_region(void const volatile*, size_t) {}
#endif

#ifdef EMULATION_TSAN
extern "C" void* __tsan_get_current_fiber();
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
extern "C" void __tsan_read_range(void* address, size_t size);
extern "C" void __tsan_write_range(void* address, size_t size);
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static void __tsan_read_range(void*, size_t) {}
static void __tsan_write_range(void*, size_t) {}
#endif

namespace emulation {

constexpr size_t kStackBytes = 128 << 10;

struct Fiber {
  char* stack = nullptr;  // null: the scheduler's own
  void* pointer = nullptr;
  void* tsan = nullptr;
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
#ifndef __x86_64__
  ucontext_t context;
#endif
};

extern "C" void emulation_fiber_main();

#ifdef __x86_64__
// Saves the callee-saved registers on the old stack and takes them from the new one.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch,@function
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#endif

static void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fiber.stack = static_cast<char*>(memory);
  }
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
  fiber.asan_bottom = fiber.stack;
  fiber.asan_size = kStackBytes;
#ifdef __x86_64__
  uint64_t* top = reinterpret_cast<uint64_t*>(fiber.stack + kStackBytes) - 1;  // entered as if by a call
  *--top = reinterpret_cast<uint64_t>(&emulation_fiber_main);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber.pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &emulation_fiber_main, 0);
#endif
#ifdef EMULATION_TSAN
  if (!fiber.tsan) fiber.tsan = __tsan_create_fiber(0);  // costly: kept from block to block
#endif
}

// Called first thing on a fiber's own stack, and by switch_fiber when it comes back.
static void arrived(void* fake_stack) {
#ifdef EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  (void)fake_stack;
}

static void switch_fiber(Fiber& from, Fiber& to, bool leaving_for_good) {
  void* fake_stack = nullptr;
#ifdef EMULATION_ASAN
  __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &fake_stack, to.asan_bottom, to.asan_size);
#endif
#ifdef EMULATION_TSAN
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: the switch itself orders nothing
#endif
  (void)leaving_for_good;
#ifdef __x86_64__
  emulation_switch(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(fake_stack);
}

}  // namespace emulation
