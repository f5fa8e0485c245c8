// parallel.cpp: threads for the loops of the CPU backend.
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace sparse24::cpu {
namespace {

// Starting a thread costs about 20 us; this many elements cost a few times that in the cheapest op.
constexpr int64_t kElementsPerThread = 1 << 16;

std::atomic<int> max_threads{1};

}  // namespace

void set_threads(int threads) { max_threads.store(std::max(1, threads)); }

void parallel_for(int64_t items, int64_t item_cost,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (items <= 0) return;
  const int64_t worth = std::max<int64_t>(1, items * item_cost / kElementsPerThread);
  const int64_t parts = std::min<int64_t>({max_threads.load(), items, worth});
  const auto start_of = [&](int64_t part) { return items * part / parts; };

  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(parts));
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t begin = start_of(part), end = start_of(part + 1);
    try {
      threads.emplace_back([&body, begin, end] { body(begin, end); });
    } catch (const std::system_error&) {
      body(begin, end);  // no more threads to be had: slower, not wrong
    }
  }
  body(0, start_of(1));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace sparse24::cpu
