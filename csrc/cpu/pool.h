// How a kernel asks for threads. The pool itself is torch's and is handed in, so torch.set_num_threads holds.
#pragma once

#include <cstdint>

namespace convkit::cpu {

struct Pool {
  int threads;
  // Runs body(arg, begin, end, thread) over [0, tasks) in contiguous pieces, at most one piece a thread.
  void (*run)(int64_t tasks, void (*body)(void* arg, int64_t begin, int64_t end, int thread), void* arg);
};

// Runs f(begin, end, thread) over [0, tasks). Which thread does which task never changes a result: a task writes
// only what is its own, and sums that cross tasks are added up afterwards in the order of the tasks.
template <class F>
__attribute__((always_inline)) inline void parallel(const Pool& pool, int64_t tasks, F&& f) {
  if (tasks <= 0) return;
  if (tasks == 1 || pool.threads == 1) return f(int64_t(0), tasks, 0);
  pool.run(tasks, [](void* arg, int64_t begin, int64_t end, int thread) { (*static_cast<F*>(arg))(begin, end, thread); }, &f);
}

}  // namespace convkit::cpu
