#include "cuda_on_cpu.h"

#include "../../csrc/cuda/spectral_norm.cu"

using namespace fastgan::cuda;

static SpectralNorm given;

template <class T> void forward() { forward_kernel<T>(given); }

extern "C" void spectral_norm_forward_on_cpu(int dtype, const SpectralNorm* a, int blocks) {
  void (*const kernels[])() = {forward<float>, forward<double>, forward<__nv_bfloat16>, forward<__half>};
  given = *a;
  cuda_on_cpu::run(kernels[dtype], blocks, threads);
}
