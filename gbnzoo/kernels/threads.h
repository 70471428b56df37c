// Work shared by the threads of the process's own OpenMP runtime.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// GOMP_parallel of the OpenMP runtime that torch itself uses: its threads are awake, and there is no second pool.
typedef void (*ParallelRegion)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
// Hidden, or all libraries with it that a process loads would share one.
__attribute__((visibility("hidden"))) inline ParallelRegion parallel_region = nullptr;

template <class F>
void parallel(int64_t items, int64_t threads, const F& f) {
  struct Work {
    const F& f;
    int64_t items;
    std::atomic<int64_t> next;
  } work{f, items, {0}};
  auto body = [](void* data) {
    Work& work = *(Work*)data;
    for (int64_t i; (i = work.next++) < work.items;) work.f(i);
  };
  threads = std::min(threads, items);
  if (threads > 1 && parallel_region) parallel_region(body, &work, threads, 0);
  else body(&work);
}
