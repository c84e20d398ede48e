// How work is shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace pygpt {

// run(worker, item) for items 0 .. items - 1, the next one by whichever of `workers` threads is free first: shares fixed in
// advance end with the slowest thread, and cores differ, or are shared with other programs. worker, less than `workers`, is
// the thread's own while it runs: for its workspace. No result may depend on who ran what.
template <class Run>
void in_turn(int64_t items, int64_t workers, const Run& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(worker, item);
  });
}

}  // namespace pygpt
