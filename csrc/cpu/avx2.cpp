#if defined(__x86_64__)
#include "avx2.h"
#include "kernels.inc"
#endif
