// Runs a CUDA kernel's source on the CPU, to see its numbers where there is no GPU: each thread is a context of its own,
// which gives way at a barrier. Blocks follow one another from one barrier of the grid to the next.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <ucontext.h>
#include <vector>

#undef __shared__
#define __shared__ static // one block runs at a time
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace cuda_on_cpu {

enum class Wait { block, grid, end };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  Wait waits;
};

inline ucontext_t scheduler;
inline Thread* running;
inline void (*kernel)();

inline void wait(Wait what) {
  running->waits = what;
  swapcontext(&running->context, &scheduler);
}

} // namespace cuda_on_cpu

inline dim3 gridDim, blockIdx, threadIdx;

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::Wait::block); }
template <class T> T __ldcg(const T* address) { return *address; }

namespace cooperative_groups {
struct Grid {
  void sync() const { cuda_on_cpu::wait(cuda_on_cpu::Wait::grid); }
};
inline Grid this_grid() { return {}; }
} // namespace cooperative_groups

namespace cuda_on_cpu {

inline void start() {
  kernel();
  wait(Wait::end);
}

// Every thread of a block must wait for the same, as on the GPU.
inline void run(void (*function)(), int blocks, int threads) {
  kernel = function;
  gridDim = dim3(blocks);
  std::vector<Thread> all(static_cast<size_t>(blocks) * threads);
  for (Thread& thread : all) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, start, 0);
  }
  for (Wait waits = Wait::grid; waits != Wait::end;) {
    for (int block = 0; block < blocks; block++) {
      Wait first;
      do {
        for (int thread = 0; thread < threads; thread++) {
          running = &all[static_cast<size_t>(block) * threads + thread];
          blockIdx = dim3(block, 0, 0);
          threadIdx = dim3(thread, 0, 0);
          swapcontext(&scheduler, &running->context);
          if (thread == 0) first = running->waits;
          if (running->waits != first) std::fprintf(stderr, "threads of a block wait for different things\n"), std::abort();
        }
      } while (first == Wait::block);
      if (block > 0 && first != waits) std::fprintf(stderr, "blocks wait for different things\n"), std::abort();
      waits = first;
    }
  }
}

} // namespace cuda_on_cpu
