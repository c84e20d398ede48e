// The emulated device. Never compiled with a sanitizer; no heap and no std:: templates while threads run (a template
// compiled here and in an instrumented kernel would be merged by the linker).

#include "runtime.h"

#include <pthread.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "fiber.h"

namespace emulation {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarp = 32;
constexpr int kMaxCopies = 512;  // cp.async in flight per thread
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kSlack = 64 << 10;  // room for the gaps between arrays

enum class Wait : uint8_t { none, block, warp, mbarrier, finished };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid_bytes, group;
};

struct Warp {
  int arrived;
  int operation;  // what the threads that wait are doing: they must agree
  Site site;
  void* slots[kWarp];
  char tsan_sync[2][8];
  int phase;
};

struct Thread {
  Fiber fiber;
  Index index;
  int id;
  Wait wait;
  Site site;
  const void* barrier;  // the mbarrier it waits for
  Copy copies[kMaxCopies];
  int copy_begin, copy_end, group;
};

Thread* threads;  // kMaxThreads of them
Warp warps[kMaxThreads / kWarp];
int ready[kMaxThreads], ready_count;
int thread_count, finished_count;
int block_arrived, block_phase;
Site block_site;
char block_sync[2][8], begin_sync[8], end_sync[8];
Thread* current;
Fiber scheduler;
void (*kernel)(void*);
void* kernel_argument;
alignas(1024) unsigned char shared[kMaxShared + kSlack];
size_t shared_size;
char failure[1024];
bool failed;

uint64_t seed_in_use = 1, random_state = 1;

uint32_t random_below(uint32_t n) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1dull) >> 33) % n;
}

void make_ready(int id) {
  threads[id].wait = Wait::none;
  ready[ready_count++] = id;
}

int take_ready() {
  const int pick = seed_in_use ? static_cast<int>(random_below(ready_count)) : 0;
  const int id = ready[pick];
  ready[pick] = ready[--ready_count];
  return id;
}

void describe_deadlock() {
  int shown = 0, length = snprintf(failure, sizeof failure, "deadlock in block (%u, %u, %u): %d of %d threads have ended;",
                                   blockIdx.x, blockIdx.y, blockIdx.z, finished_count, thread_count);
  for (int i = 0; i < thread_count && shown < 4; ++i) {
    const Thread& t = threads[i];
    if (t.wait == Wait::none || t.wait == Wait::finished) continue;
    if (i > 0 && threads[i - 1].wait == t.wait && threads[i - 1].site.line == t.site.line) continue;
    length += snprintf(failure + length, sizeof failure - length, " thread %d waits at a %s barrier, %s:%d;", i,
                       t.wait == Wait::block ? "block" : t.wait == Wait::warp ? "warp" : "shared-memory", t.site.file,
                       t.site.line);
    ++shown;
  }
  failed = true;
}

bool tensor_copies_in_flight();
void deliver_tensor_copy();

// Leaves the running thread, which waits or has ended, for another one; for the scheduler if there is none.
void leave(bool for_good) {
  Thread* from = current;
  while (ready_count == 0 && tensor_copies_in_flight()) deliver_tensor_copy();
  if (ready_count == 0 || failed) {
    if (!failed && finished_count < thread_count) describe_deadlock();
    switch_fiber(from->fiber, scheduler, for_good);
    return;
  }
  const int id = take_ready();
  if (id != from->id || for_good) {
    current = &threads[id];
    threadIdx = current->index;
    switch_fiber(from->fiber, current->fiber, for_good);
  }
  // Back on this thread: whoever switched here has set `current`.
}

const char* name(int operation) {
  static const char* names[] = {"__syncwarp", "shuffle", "vote", "ldmatrix", "mma", "wgmma"};
  return names[operation];
}

enum Operation { kSync, kShuffle, kVote, kLoadMatrix, kMma, kWgmma };

// Waits for all threads of the warp; the last to come resolves the operation for all of them.
template <class Resolve>
void meet(Operation operation, Site at, void* slot, Resolve resolve) {
  Warp& warp = warps[current->id / kWarp];
  const int lane = current->id % kWarp, expected = thread_count - current->id / kWarp * kWarp;
  if (expected < kWarp) fail("%s:%d: %s in a warp of only %d threads", at.file, at.line, name(operation), expected);
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.site = at;
  } else if (warp.operation != operation || warp.site.line != at.line || strcmp(warp.site.file, at.file) != 0) {
    fail("divergent warp: thread %d is at %s, %s:%d, while others of its warp are at %s, %s:%d", current->id,
         name(operation), at.file, at.line, name(warp.operation), warp.site.file, warp.site.line);
  }
  warp.slots[lane] = slot;
  char* sync = warp.tsan_sync[warp.phase];
  if (operation == kSync) __tsan_release(sync);  // only __syncwarp orders memory
  if (++warp.arrived < kWarp) {
    current->wait = Wait::warp;
    current->site = at;
    leave(false);
  } else {
    resolve(warp.slots);
    warp.arrived = 0;
    warp.phase ^= operation == kSync;
    for (int i = 0; i < kWarp; ++i)
      if (i != lane) make_ready(current->id - lane + i);
  }
  if (operation == kSync) __tsan_acquire(sync);
}

// What an instruction reads or writes, told to the sanitizers as if this file were instrumented.
void touches(const void* begin, size_t size, bool writes, const char* what) {
  void* address = const_cast<void*>(begin);
  if (__asan_region_is_poisoned(address, size)) fail("out of bounds: %s of %zu bytes at %p", what, size, begin);
  writes ? __tsan_write_range(address, size) : __tsan_read_range(address, size);
}

float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

float element(uint32_t pair, int which, Element type) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
  if (type == Element::bf16) return from_bits(uint32_t(bits) << 16);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  return (sign ? -1.0f : 1.0f) * mantissa * 0x1p-24f;
}

}  // namespace
}  // namespace emulation

#include "hopper.h"

namespace emulation {
namespace {

void run_block() {
  memset(shared, 0xff, sizeof shared);
  __asan_poison_memory_region(shared, sizeof shared);
  memset(warps, 0, sizeof warps);
  ready_count = finished_count = block_arrived = block_phase = 0;
  for (int i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    t.id = i;
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t.copy_begin = t.copy_end = t.group = 0;
    prepare(t.fiber);
    make_ready(i);
  }
  reset_hopper();
  current = &threads[take_ready()];
  threadIdx = current->index;
  __tsan_release(begin_sync);
  switch_fiber(scheduler, current->fiber, false);
  __tsan_acquire(end_sync);  // blocks are ordered one after the other: races between blocks are not looked for
  __asan_unpoison_memory_region(shared, sizeof shared);
}

void thread_ends() {
  Thread& t = *current;
  for (int i = t.copy_begin; i < t.copy_end; ++i)
    if (t.copies[i].valid_bytes) fail("thread %d ends with a cp.async that it never waited for", t.id);
  if (block_arrived) fail("thread %d ends while others wait at the block barrier of %s:%d", t.id, block_site.file, block_site.line);
  thread_ends_hopper();
  t.wait = Wait::finished;
  ++finished_count;
  __tsan_release(end_sync);
  leave(true);
}

}  // namespace

extern "C" void emulation_fiber_main() {
  arrived(nullptr);
  __tsan_acquire(begin_sync);
  kernel(kernel_argument);
  thread_ends();
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(failure, sizeof failure, format, arguments);
  va_end(arguments);
  failed = true;
  switch_fiber(current->fiber, scheduler, true);  // the other threads are dropped where they stand
  abort();
}

void set_seed(uint64_t seed) { seed_in_use = seed; }

void run_grid(Index grid, Index block, size_t shared_bytes, void (*body)(void*), void* argument) {
  if (!threads) threads = new Thread[kMaxThreads];
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  thread_count = static_cast<int>(block.x * block.y * block.z);
  if (blocks == 0 || thread_count == 0 || thread_count > kMaxThreads || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("invalid configuration: the grid or the block is empty or too large");
  if (shared_bytes > kMaxShared) throw std::runtime_error("invalid configuration: too much shared memory");
  blockDim = block;
  gridDim = grid;
  shared_size = shared_bytes;
  kernel = body;
  kernel_argument = argument;
  failed = false;
  random_state = seed_in_use * 0x9e3779b97f4a7c15ull + 1;
#ifdef EMULATION_ASAN
  pthread_attr_t attributes;  // the stack that the scheduler itself is on
  pthread_getattr_np(pthread_self(), &attributes);
  void* bottom;
  pthread_attr_getstack(&attributes, &bottom, &scheduler.asan_size);
  scheduler.asan_bottom = bottom;
  pthread_attr_destroy(&attributes);
#endif
#ifdef EMULATION_TSAN
  scheduler.tsan = __tsan_get_current_fiber();
#endif
  const uint64_t start = seed_in_use ? random_below(blocks < (1u << 30) ? blocks : 1u << 30) : 0;
  for (uint64_t i = 0; i < blocks && !failed; ++i) {
    uint64_t at = (start + i) % blocks;
    if (seed_in_use % 2) at = blocks - 1 - at;
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                   static_cast<unsigned>(at / grid.x / grid.y)};
    run_block();
  }
  if (failed) throw std::runtime_error(failure);
}

void* take_shared(size_t* used, size_t bytes, size_t alignment) {
  // What the host pays for is counted without gaps; where arrays lie has gaps, which AddressSanitizer watches.
  size_t& paid = used[0];
  size_t& begin = used[1];
  paid = (paid + alignment - 1) / alignment * alignment + bytes;
  if (paid > shared_size) fail("shared memory: %zu bytes taken, %zu launched with", paid, shared_size);
  begin = (begin + alignment - 1) / alignment * alignment;
  unsigned char* array = shared + begin;
  begin += bytes + 64;
  if (begin > sizeof shared) fail("shared memory: too many arrays for the emulation");
  __asan_unpoison_memory_region(array, bytes);
  return array;
}

void block_barrier(Site at) {
  if (finished_count) fail("%s:%d: block barrier after a thread of the block has ended", at.file, at.line);
  if (block_arrived && (block_site.line != at.line || strcmp(block_site.file, at.file) != 0))
    fail("divergent block barrier: thread %d is at %s:%d, others wait at %s:%d", current->id, at.file, at.line,
         block_site.file, block_site.line);
  block_site = at;
  char* sync = block_sync[block_phase];
  __tsan_release(sync);
  if (++block_arrived < thread_count) {
    current->wait = Wait::block;
    current->site = at;
    leave(false);
  } else {
    block_arrived = 0;
    block_phase ^= 1;
    for (int i = 0; i < thread_count; ++i)
      if (i != current->id) make_ready(i);
  }
  __tsan_acquire(sync);
}

void warp_barrier(Site at) {
  meet(kSync, at, nullptr, [](void**) {});
}

uint32_t shuffle(uint32_t value, int source_lane, Site at) {
  struct Slot {
    uint32_t value, result;
    int source;
  } slot{value, 0, source_lane};
  meet(kShuffle, at, &slot, [](void** slots) {
    for (int i = 0; i < kWarp; ++i) {
      Slot& mine = *static_cast<Slot*>(slots[i]);
      mine.result = static_cast<Slot*>(slots[mine.source & 31])->value;
    }
  });
  return slot.result;
}

uint32_t ballot(bool predicate, Site at) {
  uint32_t slot = predicate;
  meet(kVote, at, &slot, [](void** slots) {
    uint32_t votes = 0;
    for (int i = 0; i < kWarp; ++i) votes |= *static_cast<uint32_t*>(slots[i]) << i;
    for (int i = 0; i < kWarp; ++i) *static_cast<uint32_t*>(slots[i]) = votes;
  });
  return slot;
}

void load_matrix(uint32_t* to, const void* row, int count, bool transposed, Site at) {
  struct Slot {
    uint32_t* to;
    uint16_t row[8];
    int count;
    bool transposed;
  } slot{to, {}, count, transposed};
  const bool reads = current->id % kWarp < 8 * count;
  if (reads) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("%s:%d: ldmatrix row is not 16-byte aligned", at.file, at.line);
    touches(row, 16, false, "ldmatrix");
    memcpy(slot.row, row, 16);
  }
  meet(kLoadMatrix, at, &slot, [](void** slots) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const Slot& mine = *static_cast<Slot*>(slots[lane]);
      for (int m = 0; m < mine.count; ++m) {
        const auto matrix = [&](int r, int c) { return uint32_t(static_cast<Slot*>(slots[8 * m + r])->row[c]); };
        const int a = lane / 4, b = lane % 4 * 2;
        mine.to[m] = mine.transposed ? matrix(b, a) | matrix(b + 1, a) << 16 : matrix(a, b) | matrix(a, b + 1) << 16;
      }
    }
  });
}

void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, Element type, Site at) {
  struct Slot {
    float* c;
    const uint32_t *a, *b;
    Element type;
  } slot{c, a, b, type};
  meet(kMma, at, &slot, [](void** slots) {
    float A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const Slot& s = *static_cast<Slot*>(slots[lane]);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        for (int part = 0; part < 4; ++part) A[g + part % 2 * 8][t + i + part / 2 * 8] = element(s.a[part], i, s.type);
        for (int part = 0; part < 2; ++part) B[t + i + part * 8][g] = element(s.b[part], i, s.type);
        for (int part = 0; part < 2; ++part) C[g + part * 8][t + i] = s.c[part * 2 + i];
      }
    }
    for (int k = 0; k < 16; ++k)
      for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
    for (int lane = 0; lane < kWarp; ++lane) {
      const Slot& s = *static_cast<Slot*>(slots[lane]);
      for (int part = 0; part < 4; ++part) s.c[part] = C[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2];
    }
  });
}

void copy_async(void* to, const void* from, int bytes, int valid_bytes) {
  Thread& t = *current;
  if (reinterpret_cast<uintptr_t>(to) % bytes || (valid_bytes && reinterpret_cast<uintptr_t>(from) % bytes))
    fail("cp.async of %d bytes: an address is not aligned to as much", bytes);
  if (t.copy_begin == t.copy_end) t.copy_begin = t.copy_end = 0;
  if (t.copy_end == kMaxCopies) fail("cp.async: more than %d copies in flight for a thread", kMaxCopies);
  t.copies[t.copy_end++] = {to, from, bytes, valid_bytes, t.group};
  touches(to, bytes, true, "cp.async to");
  memset(to, 0xff, bytes);
}

void copy_async_commit() { ++current->group; }

void copy_async_wait(int groups_left) {
  Thread& t = *current;
  while (t.copy_begin < t.copy_end && t.copies[t.copy_begin].group < t.group - groups_left) {
    const Copy& copy = t.copies[t.copy_begin++];
    touches(copy.to, copy.bytes, true, "cp.async to");
    if (copy.valid_bytes) touches(copy.from, copy.valid_bytes, false, "cp.async from");
    memset(copy.to, 0, copy.bytes);
    memcpy(copy.to, copy.from, copy.valid_bytes);
  }
}

}  // namespace emulation

emulation::Index threadIdx, blockIdx, blockDim, gridDim;
