// Tells ThreadSanitizer what OpenMP promises: what comes before a parallel region happens before it, what is in it before
// what follows, and what comes before a barrier before what is behind it. Nothing else is promised, and nothing suppressed.
//
// GCC's libgomp is not built for the sanitizer and waits by futexes of its own, so every region would look like a race. The
// linker puts these in the place of the functions by which the kernels call it (--wrap); torch's calls stay as they are.
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __real_GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags);
void __real_GOMP_barrier();
void __real_GOMP_loop_end();
}

namespace {
struct Region {
  void (*work)(void*);
  void* data;
  char begin, end;
  // Two, used in turn: a thread that is at the next barrier already has told nothing to one that leaves the last.
  char barriers[2];
};
thread_local Region* region;
thread_local int passed;

void run(void* shared) {
  Region *const own = static_cast<Region*>(shared), *const outer = region;
  const int passed_outside = passed;
  region = own;
  passed = 0;
  __tsan_acquire(&own->begin);
  own->work(own->data);
  __tsan_release(&own->end);
  region = outer;
  passed = passed_outside;
}

void wait_for_all(void (*barrier)()) {
  char* const told = &region->barriers[passed++ % 2];
  __tsan_release(told);
  barrier();
  __tsan_acquire(told);
}
} // namespace

extern "C" {
void __wrap_GOMP_parallel(void (*work)(void*), void* data, unsigned threads, unsigned flags) {
  Region shared{work, data, 0, 0, {0, 0}};
  __tsan_release(&shared.begin);
  __real_GOMP_parallel(run, &shared, threads, flags);
  __tsan_acquire(&shared.end);
}

void __wrap_GOMP_barrier() { wait_for_all(__real_GOMP_barrier); }

// Of a loop with a dynamic schedule the barrier behind it is in here.
void __wrap_GOMP_loop_end() { wait_for_all(__real_GOMP_loop_end); }
}
