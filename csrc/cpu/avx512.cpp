#include "kernels.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FASTGAN_ISA avx512
#define FASTGAN_VECTOR_BYTES 64
#include "kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastgan {
const Kernels avx512_kernels = {"avx512",
                                 avx512::batch_norm_act_forward,
                                 avx512::batch_norm_act_backward,
                                 avx512::batch_norm_act_double_backward,
                                 avx512::group_norm_act_forward,
                                 avx512::group_norm_act_backward,
                                 avx512::group_norm_act_double_backward,
                                 avx512::adain_forward,
                                 avx512::adain_backward,
                                 avx512::adain_double_backward,
                                 avx512::bias_act_forward,
                                 avx512::bias_act_backward,
                                 avx512::bias_act_double_backward,
                                 avx512::pixel_shuffle_act_forward,
                                 avx512::pixel_shuffle_act_backward,
                                 avx512::transpose_matrices,
                                 avx512::image_to_patches,
                                 avx512::patches_to_image,
                                 avx512::image_to_few,
                                 avx512::winograd_image_to_tiles,
                                 avx512::winograd_tiles_to_positions,
                                 avx512::sample_dot,
                                 avx512::sample_scale,
                                 avx512::upfirdn2d,
                                 avx512::spectral_norm_forward,
                                 avx512::spectral_norm_backward,
                                 avx512::spectral_norm_double_backward};
} // namespace fastgan
#endif
