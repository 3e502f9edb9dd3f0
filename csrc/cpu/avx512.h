// Chooses the instruction set of what follows; the headers of the system, which are for all of them, come before.
#include "kernels.h"

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#if defined(__clang__)
#define FASTGAN_TARGETED
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FASTGAN_ISA avx512
#define FASTGAN_VECTOR_BYTES 64
