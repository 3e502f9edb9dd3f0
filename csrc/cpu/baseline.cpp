// The instruction set that the compiler assumes anyway (SSE2 on x86-64, NEON on AArch64).
#include "kernels.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC optimize("O2") // no x86-64 of the last ten years runs these kernels, which take a third less time to compile
#endif

#define FASTGAN_ISA baseline
#define FASTGAN_VECTOR_BYTES 16
#include "kernels.inc"

namespace fastgan {
const Kernels baseline_kernels = {"baseline",
                                 baseline::batch_norm_act_forward,
                                 baseline::batch_norm_act_backward,
                                 baseline::batch_norm_act_double_backward,
                                 baseline::group_norm_act_forward,
                                 baseline::group_norm_act_backward,
                                 baseline::group_norm_act_double_backward,
                                 baseline::adain_forward,
                                 baseline::adain_backward,
                                 baseline::adain_double_backward,
                                 baseline::bias_act_forward,
                                 baseline::bias_act_backward,
                                 baseline::bias_act_double_backward,
                                 baseline::pixel_shuffle_act_forward,
                                 baseline::pixel_shuffle_act_backward,
                                 baseline::transpose_matrices,
                                 baseline::image_to_patches,
                                 baseline::patches_to_image,
                                 baseline::image_to_few,
                                 baseline::winograd_image_to_tiles,
                                 baseline::winograd_tiles_to_positions,
                                 baseline::sample_dot,
                                 baseline::sample_scale,
                                 baseline::upfirdn2d,
                                 baseline::spectral_norm_forward,
                                 baseline::spectral_norm_backward,
                                 baseline::spectral_norm_double_backward};
} // namespace fastgan
