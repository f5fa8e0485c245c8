// parallel.h: loops over independent items, on as many threads as set_cpu_threads allows.
//
// Threads live for one loop only: a pool would not survive the fork of a data loader's workers.
// Every item writes its own memory (sums are of integers), so results do not depend on the count.
#pragma once

#include <cstdint>
#include <functional>

namespace sparse24::cpu {

void set_threads(int threads);

/// Calls body(begin, end) on ranges that cover [0, items) once. `item_cost` is the elements that an
/// item touches: a loop too small to pay for starting a thread runs in the caller.
void parallel_for(int64_t items, int64_t item_cost,
                  const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace sparse24::cpu
