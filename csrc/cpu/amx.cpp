// The matrix unit of Intel's server CPUs since Sapphire Rapids.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <immintrin.h>
#include <omp.h>

#include <new>

#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FASTGAN_VECTOR_BYTES 64
namespace fastgan {
namespace amx {
#include "simd.h"
#include "tiles.h"
#include "conv_tiles.h"
} // namespace amx
} // namespace fastgan

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastgan {
namespace {
// CPUID leaf 7: EDX bits 22 and 24 are AMX-BF16 and AMX-TILE; subleaf 1, EAX bit 5 is AVX512-BF16.
bool cpu_has_matrix_unit() {
  unsigned eax, ebx, ecx, edx;
  __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
  const bool amx = (edx >> 22 & 1) && (edx >> 24 & 1);
  __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(1));
  return amx && (eax >> 5 & 1);
}
// Linux gives a process the tiles, 8 KiB of state for each thread, only when it asks.
bool system_grants_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
} // namespace

const MatrixKernels* amx_kernels() {
  static const MatrixKernels kernels = {amx::image_to_positions, amx::positions_to_image, amx::grad_of_weight, amx::fill};
  static const bool available = cpu_has_matrix_unit() && system_grants_tiles();
  return available ? &kernels : nullptr;
}
} // namespace fastgan
#else
namespace fastgan {
const MatrixKernels* amx_kernels() { return nullptr; }
} // namespace fastgan
#endif
