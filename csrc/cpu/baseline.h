// The instruction set that the compiler assumes anyway (SSE2 on x86-64, NEON on AArch64).
#include "kernels.h"

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC optimize("O2") // no x86-64 of the last ten years runs these kernels, which take a third less time to compile
#endif

#define FASTGAN_ISA baseline
#define FASTGAN_VECTOR_BYTES 16
