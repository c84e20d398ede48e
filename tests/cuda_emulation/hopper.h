// Hopper's instructions on the emulated device: barriers in shared memory, tensor copies, warpgroup products. A part of
// runtime.cpp, which alone includes it.
//
// What is asynchronous on a GPU is so here. A copy fills its target with NaN at once and delivers some time before the
// barrier's phase ends; a product fills its accumulator with NaN until the wait, and at the wait its operands must still be
// what they were.
#pragma once

namespace emulation {
namespace {

constexpr int kMaxLoads = 256;
constexpr int kMaxProducts = 64;  // in flight per warp
constexpr int kMaxAccumulators = 4;
constexpr uint64_t kBarrierMark = 0x2a;

struct Barrier {  // the 8 bytes in shared memory
  uint64_t phase : 1, mark : 7, arrivals : 12, missing : 12;
  int64_t bytes : 32;
};
static_assert(sizeof(Barrier) == 8);

struct Load {
  unsigned char* to;
  TensorMap map;  // a copy: the parameter is on the stack of a thread that may end
  Barrier* barrier;
  int64_t at[4];
};
Load loads[kMaxLoads];
int load_count;

struct Accumulator {
  float* d;
  int count, products;  // in flight
  float values[64];
};

// A thread's side of the products in flight, and (lane 0's is used) the warp's.
struct Product {
  Accumulator* accumulator;
  const uint32_t* a;
  uint32_t a_was[4];
  uint64_t a_operand, b_operand;
  int columns, group;
  bool b_by_rows;
  uint64_t tiles_were;
};
struct Products {
  Accumulator accumulators[kMaxAccumulators];
  Product queue[kMaxProducts];
  int begin, end, group, issued;
  bool fenced;
};
Products* products;  // one per thread
uint64_t products_issued;

Barrier& barrier_at(uint64_t* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 8) fail("%s: the barrier is not 8-byte aligned", what);
  if (__asan_region_is_poisoned(address, 8)) fail("out of bounds: %s at %p", what, static_cast<void*>(address));
  Barrier& barrier = *reinterpret_cast<Barrier*>(address);
  if (barrier.mark != kBarrierMark) fail("%s: the barrier was not initialised", what);
  return barrier;
}

char* sync_of(Barrier& barrier, int phase) { return reinterpret_cast<char*>(&barrier) + phase; }

void end_phase_if_done(Barrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.missing = barrier.arrivals;
  for (int i = 0; i < thread_count; ++i)
    if (threads[i].wait == Wait::mbarrier && threads[i].barrier == &barrier) make_ready(i);
}

void copy_row(const Load& load, int row, int64_t y, int64_t z, int64_t w) {
  const TensorMap& map = load.map;
  const bool inside = y >= 0 && z >= 0 && w >= 0 && y < int64_t(map.sizes[1]) && z < int64_t(map.sizes[2]) && w < int64_t(map.sizes[3]);
  const unsigned char* from = map.data + y * int64_t(map.strides[0]) + z * int64_t(map.strides[1]) + w * int64_t(map.strides[2]);
  for (int i = 0; i < 64; ++i) {
    const int64_t x = load.at[0] + i;
    const uintptr_t plain = reinterpret_cast<uintptr_t>(load.to + row * 128 + i * 2);
    unsigned char* to = reinterpret_cast<unsigned char*>(plain ^ (plain >> 7 & 7) << 4);
    if (inside && x >= 0 && x < int64_t(map.sizes[0]))
      memcpy(to, from + 2 * x, 2);
    else
      memset(to, 0, 2);
  }
}

template <class Row>
void for_each_row(const Load& load, Row row) {
  int number = 0;
  for (uint32_t w = 0; w < load.map.box[3]; ++w)
    for (uint32_t z = 0; z < load.map.box[2]; ++z)
      for (uint32_t y = 0; y < load.map.box[1]; ++y) row(number++, load.at[1] + y, load.at[2] + z, load.at[3] + w);
}

bool tensor_copies_in_flight() { return load_count > 0; }

void deliver_tensor_copy() {
  const int pick = seed_in_use ? static_cast<int>(random_below(load_count)) : 0;
  const Load load = loads[pick];
  loads[pick] = loads[--load_count];
  int rows = 0;
  for_each_row(load, [&](int row, int64_t y, int64_t z, int64_t w) { copy_row(load, row, y, z, w), ++rows; });
  load.barrier->bytes -= rows * 128;
  end_phase_if_done(*load.barrier);
}

// --- products --------------------------------------------------------------------------------------------------------

// Where 16 bytes of an operand lie: of row `row` of 128 bytes the piece that begins at `byte`, from the operand's beginning.
const unsigned char* piece_of(uint64_t operand, int row, int byte) {
  const uint32_t begin = (operand & 0x3fff) << 4, next_8_rows = (operand >> 32 & 0x3fff) << 4;
  if (operand >> 62 != 1 || operand >> 49 & 7) fail("wgmma: only the 128-byte swizzle without a base offset is emulated");
  const uint32_t plain = begin + row % 8 * 128 + row / 8 * next_8_rows + byte;
  const uint32_t offset = plain ^ (plain >> 7 & 7) << 4;
  if (offset + 16 > sizeof shared) fail("wgmma: an operand reaches out of shared memory");
  return shared + offset;
}

struct Tiles {  // raw bits, as the product sees them: a of this warp's 16 rows
  uint16_t a[16][16], b[16][128];
  uint64_t hash;

  void read(uint16_t (&to)[8], uint64_t operand, int row, int byte) {
    const unsigned char* from = piece_of(operand, row, byte);
    touches(from, 16, false, "wgmma operand");
    memcpy(to, from, 16);
    uint64_t words[2];
    memcpy(words, from, 16);
    for (uint64_t word : words) hash = (hash ^ word) * 0x100000001b3ull, hash ^= hash >> 29;
  }
  void read(const Product& product, int warp) {
    uint16_t eight[8];
    hash = 0xcbf29ce484222325ull;
    if (!product.a)
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; k += 8) {
          read(eight, product.a_operand, warp * 16 + m, k * 2);
          memcpy(&a[m][k], eight, 16);
        }
    const int next_64_columns = static_cast<int>((product.b_operand >> 16 & 0x3fff) << 4);
    for (int n = 0; n < product.columns; n += product.b_by_rows ? 1 : 8)
      for (int k = 0; k < 16; k += product.b_by_rows ? 8 : 1) {
        if (product.b_by_rows) {
          read(eight, product.b_operand, n, k * 2);
          for (int i = 0; i < 8; ++i) b[k + i][n] = eight[i];
        } else {
          read(eight, product.b_operand + (n / 64 * next_64_columns >> 4), k, n % 64 * 2);
          memcpy(&b[k][n], eight, 16);
        }
      }
  }
};

Tiles warp_tiles[kMaxThreads / kWarp];

Products& mine() { return products[current->id]; }

void reset_hopper() {
  if (!products) products = new Products[kMaxThreads];
  load_count = 0;
  for (int i = 0; i < thread_count; ++i) {
    Products& p = products[i];
    p.begin = p.end = p.group = p.issued = p.fenced = 0;
    for (Accumulator& accumulator : p.accumulators) accumulator.products = 0;
  }
}

void thread_ends_hopper() {
  if (mine().begin < mine().end) fail("thread %d ends with a wgmma that it never waited for", current->id);
  if (finished_count + 1 < thread_count) return;
  if (load_count) fail("the block ends with %d tensor copies that nobody waited for", load_count);
  for (int i = 0; i + kWarp < thread_count; i += kWarp)
    if ((i + kWarp) % 128 && products[i].issued != products[i + kWarp].issued)
      fail("warps %d and %d of a warpgroup issued %d and %d wgmma", i / kWarp, i / kWarp + 1, products[i].issued,
           products[i + kWarp].issued);
}

}  // namespace

void barrier_init(uint64_t* address, int arrivals) {
  if (arrivals < 1 || arrivals > 4095) fail("mbarrier.init: %d arrivals", arrivals);
  touches(address, 8, true, "mbarrier.init");
  Barrier barrier{};
  barrier.mark = kBarrierMark;
  barrier.arrivals = barrier.missing = arrivals;
  memcpy(address, &barrier, 8);
}

void barrier_arrive(uint64_t* address, int bytes) {
  Barrier& barrier = barrier_at(address, "mbarrier.arrive");
  if (!barrier.missing) fail("mbarrier.arrive: more arrivals than the %d of a phase", int(barrier.arrivals));
  __tsan_release(sync_of(barrier, barrier.phase));
  barrier.bytes += bytes;
  --barrier.missing;
  end_phase_if_done(barrier);
}

void barrier_wait(uint64_t* address, uint32_t parity, Site at) {
  Barrier& barrier = barrier_at(address, "mbarrier.try_wait");
  if (parity > 1) fail("%s:%d: mbarrier.try_wait: the parity is %u", at.file, at.line, parity);
  while (load_count && barrier.phase == parity && seed_in_use && random_below(2)) deliver_tensor_copy();
  while (barrier.phase == parity) {
    current->wait = Wait::mbarrier;
    current->site = at;
    current->barrier = &barrier;
    leave(false);
  }
  __tsan_acquire(sync_of(barrier, parity));
}

void tensor_load(void* to, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  if (reinterpret_cast<uintptr_t>(to) % 128) fail("tensor copy: the target is not 128-byte aligned");
  if (load_count == kMaxLoads) fail("more than %d tensor copies in flight", kMaxLoads);
  Load& load = loads[load_count++] = {static_cast<unsigned char*>(to), *map, &barrier_at(barrier, "tensor copy"), {x, y, z, w}};
  __tsan_release(sync_of(*load.barrier, load.barrier->phase));  // who waits for the phase sees what is written below
  for_each_row(load, [&](int row, int64_t y, int64_t z, int64_t w) {
    touches(load.to + row * 128, 128, true, "tensor copy to");
    memset(load.to + row * 128, 0xff, 128);
    const int64_t begin = x < 0 ? 0 : x, end = x + 64 < int64_t(map->sizes[0]) ? x + 64 : map->sizes[0];
    if (y < 0 || z < 0 || w < 0 || y >= int64_t(map->sizes[1]) || z >= int64_t(map->sizes[2]) || w >= int64_t(map->sizes[3]) || begin >= end)
      return;
    const int64_t row_begin = y * map->strides[0] + z * map->strides[1] + w * map->strides[2];
    touches(map->data + row_begin + begin * 2, (end - begin) * 2, false, "tensor copy from");
  });
  __tsan_release(sync_of(*load.barrier, load.barrier->phase));
}

uint32_t shared_offset(const void* address) {
  const auto offset = static_cast<const unsigned char*>(address) - shared;
  if (offset < 0 || offset >= (1 << 18)) fail("shared memory: %p is not in its first 256 KiB", address);
  return static_cast<uint32_t>(offset);
}

void wgmma_fence(Site at) {
  mine().fenced = true;
  meet(kWgmma, at, nullptr, [](void**) {});
}

void wgmma_commit(Site at) {
  ++mine().group;
  mine().fenced = false;
  meet(kWgmma, at, nullptr, [](void**) {});
}

void wgmma(float* d, int columns, const uint32_t* a, uint64_t a_operand, uint64_t b_operand, bool b_by_rows, bool accumulate,
           Element type, Site at) {
  Products& p = mine();
  if (!p.fenced) fail("%s:%d: wgmma without a wgmma.fence since the last commit", at.file, at.line);
  if (p.begin == p.end) p.begin = p.end = 0;
  if (p.end == kMaxProducts) fail("%s:%d: more than %d wgmma in flight", at.file, at.line, kMaxProducts);
  ++p.issued;
  Accumulator *accumulator = nullptr, *free = nullptr;
  for (Accumulator& x : p.accumulators) {
    if (!x.products) free = &x;
    if (x.products && x.d == d) accumulator = &x;
  }
  if (!accumulator) {
    if (!free) fail("%s:%d: wgmma with more than %d accumulators in flight", at.file, at.line, kMaxAccumulators);
    accumulator = free;
    accumulator->d = d;
    accumulator->count = columns / 2;
    memcpy(accumulator->values, d, columns * 2);
    memset(d, 0xff, columns * 2);
  }
  if (accumulator->count != columns / 2) fail("%s:%d: wgmma of another shape on an accumulator in flight", at.file, at.line);
  if (!accumulate) memset(accumulator->values, 0, columns * 2);
  ++accumulator->products;
  Product& product = p.queue[p.end++] = {accumulator, a, {}, a_operand, b_operand, columns, p.group, b_by_rows, 0};
  if (a) memcpy(product.a_was, a, 16);
  Tiles& warps_tiles = warp_tiles[current->id / kWarp];
  // Lane 0 stands for its warp here and at the wait, as it does for its arrivals: the others are ordered by the instruction.
  if (current->id % kWarp == 0) {
    warps_tiles.read(product, current->id / kWarp % 4);
    product.tiles_were = warps_tiles.hash;
  }
  struct Slot {
    Product* product;
    Element type;
    Tiles* tiles;
  } slot{&product, type, &warps_tiles};
  meet(kWgmma, at, &slot, [](void** slots) {
    const auto lane_slot = [&](int lane) -> const Slot& { return *static_cast<Slot*>(slots[lane]); };
    const Slot& first = lane_slot(0);
    ++products_issued;
    Tiles& tiles = *first.tiles;
    static float A[16][16], B[16][128], C[16][128];
    const int columns = first.product->columns;
    for (int lane = 0; lane < kWarp; ++lane) {
      const Product& s = *lane_slot(lane).product;
      if (s.a_operand != first.product->a_operand || s.b_operand != first.product->b_operand)
        fail("wgmma: threads of a warp pass different operands");
      for (int part = 0; s.a && part < 4; ++part)
        for (int i = 0; i < 2; ++i)
          tiles.a[lane / 4 + part % 2 * 8][lane % 4 * 2 + i + part / 2 * 8] = static_cast<uint16_t>(s.a[part] >> 16 * i);
      for (int i = 0; i < columns / 2; ++i)
        C[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2] = s.accumulator->values[i];
    }
    for (int k = 0; k < 16; ++k) {
      for (int m = 0; m < 16; ++m) A[m][k] = element(tiles.a[m][k], 0, first.type);
      for (int n = 0; n < columns; ++n) B[k][n] = element(tiles.b[k][n], 0, first.type);
    }
    for (int k = 0; k < 16; ++k)
      for (int m = 0; m < 16; ++m)
        for (int n = 0; n < columns; ++n) C[m][n] += A[m][k] * B[k][n];
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < columns / 2; ++i)
        lane_slot(lane).product->accumulator->values[i] = C[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
  });
}

uint64_t wgmma_count() { return products_issued; }

void wgmma_wait(int groups_left, Site at) {
  Products& p = mine();
  while (p.begin < p.end && p.queue[p.begin].group < p.group - groups_left) {
    const Product& product = p.queue[p.begin++];
    if (product.a && memcmp(product.a, product.a_was, 16) != 0)
      fail("%s:%d: a wgmma's registers changed before the wait", at.file, at.line);
    if (current->id % kWarp == 0) {
      Tiles tiles;
      tiles.read(product, current->id / kWarp % 4);
      if (tiles.hash != product.tiles_were) fail("%s:%d: a wgmma's shared memory changed before the wait", at.file, at.line);
    }
    Accumulator& accumulator = *product.accumulator;
    if (--accumulator.products == 0) memcpy(accumulator.d, accumulator.values, accumulator.count * sizeof(float));
  }
  meet(kWgmma, at, nullptr, [](void**) {});
}

}  // namespace emulation
