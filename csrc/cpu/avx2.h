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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FASTGAN_ISA avx2
#define FASTGAN_VECTOR_BYTES 32
