#include "kernels.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FASTGAN_ISA avx2
#define FASTGAN_VECTOR_BYTES 32
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastgan {
const Kernels avx2_kernels = {"avx2",
                                 avx2::batch_norm_act_forward,
                                 avx2::batch_norm_act_backward,
                                 avx2::batch_norm_act_double_backward,
                                 avx2::group_norm_act_forward,
                                 avx2::group_norm_act_backward,
                                 avx2::group_norm_act_double_backward,
                                 avx2::adain_forward,
                                 avx2::adain_backward,
                                 avx2::adain_double_backward,
                                 avx2::bias_act_forward,
                                 avx2::bias_act_backward,
                                 avx2::bias_act_double_backward,
                                 avx2::pixel_shuffle_act_forward,
                                 avx2::pixel_shuffle_act_backward,
                                 avx2::transpose_matrices,
                                 avx2::image_to_patches,
                                 avx2::patches_to_image,
                                 avx2::image_to_few,
                                 avx2::winograd_image_to_tiles,
                                 avx2::winograd_tiles_to_positions,
                                 avx2::sample_dot,
                                 avx2::sample_scale,
                                 avx2::upfirdn2d,
                                 avx2::spectral_norm_forward,
                                 avx2::spectral_norm_backward,
                                 avx2::spectral_norm_double_backward};
} // namespace fastgan
#endif
