// fastgan._C: the kernels as Python functions on addresses and sizes. No torch header: the caller allocates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <omp.h>

#include <array>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace fastgan;

namespace {

using Address = std::uintptr_t; // 0 stands for an absent tensor

template <class T = void> T* at(Address address) { return reinterpret_cast<T*>(address); }

const Kernels& choose_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // torch's own variable for its own kernels: one setting holds for both.
  if (const char* limit = std::getenv("ATEN_CPU_CAPABILITY")) {
    avx512 = avx512 && std::string(limit) == "avx512";
    avx2 = avx2 && std::string(limit) != "default";
  }
  if (avx512) return avx512_kernels;
  if (avx2) return avx2_kernels;
#endif
  return baseline_kernels;
}
const Kernels& kernels = choose_kernels();
// Below AVX-512 torch's variable rules out the matrix unit as well.
const MatrixKernels* const matrix_kernels = std::string(kernels.name) == "avx512" ? amx_kernels() : nullptr;

NormAct norm_act(int dtype, bool rows, std::array<int64_t, 3> shape, Address x, Address residual, Address weight,
                 Address bias, int64_t groups, bool per_element, bool batch_stats, Address mean, Address var, double eps,
                 int act, double negative_slope, Address prelu_weight) {
  return {static_cast<DType>(dtype), rows, shape[0], shape[1], shape[2], at(x), at(residual), at(weight), at(bias),
          groups, per_element, batch_stats, at<double>(mean), at<double>(var), eps, static_cast<Act>(act), negative_slope,
          at(prelu_weight)};
}

using release = py::call_guard<py::gil_scoped_release>;

// The three orders of a norm as name_forward, name_backward and name_double_backward.
void define_norm(py::module_& m, const std::string& name, void (*forward)(const NormActForward&),
                 void (*backward)(const NormActBackward&), void (*double_backward)(const NormActDoubleBackward&)) {
  m.def((name + "_forward").c_str(), [=](const NormAct& a, Address y) { forward({a, at(y)}); }, release());
  m.def(
      (name + "_backward").c_str(),
      [=](const NormAct& a, Address grad_y, Address grad_x, Address grad_residual, Address grad_weight,
          Address grad_bias, Address grad_prelu_weight) {
        backward({a, at(grad_y), at(grad_x), at(grad_residual), at(grad_weight), at(grad_bias), at(grad_prelu_weight)});
      },
      release());
  m.def(
      (name + "_double_backward").c_str(),
      [=](const NormAct& a, Address grad_y, Address ggx, Address ggr, Address ggw, Address ggb, Address g_grad_y,
          Address g_x, Address g_weight, Address g_prelu_weight) {
        double_backward({a, at(grad_y), at(ggx), at(ggr), at(ggw), at(ggb), at(g_grad_y), at(g_x), at(g_weight),
                         at(g_prelu_weight)});
      },
      release());
}

// running += momentum · (batch - running), of which the variance is made unbiased; mean and var are of the batch.
template <class T>
void move_statistics(int64_t channels, Address running_mean, Address running_var, Address mean, Address var, double momentum,
                     double unbiased) {
  for (int64_t c = 0; c < channels; ++c) {
    T &running = at<T>(running_mean)[c], &spread = at<T>(running_var)[c];
    running = static_cast<T>(running + momentum * (at<double>(mean)[c] - running));
    spread = static_cast<T>(spread + momentum * (unbiased * at<double>(var)[c] - spread));
  }
}

Patches patches_of(int dtype, std::array<int64_t, 4> image, std::array<int64_t, 2> positions,
                   std::array<int64_t, 2> kernel, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                   std::array<int64_t, 2> dilation) {
  return {static_cast<DType>(dtype), image[0],  image[1],   image[2],   image[3],    positions[0], positions[1], kernel[0],
          kernel[1],                 stride[0], stride[1],  padding[0], padding[1],  dilation[0],  dilation[1]};
}

Convolution convolution_of(const Patches& patches, int64_t channels, std::array<int64_t, 3> weight_strides) {
  return {patches, channels, weight_strides[0], weight_strides[1], weight_strides[2]};
}

BiasAct bias_act_of(int dtype, std::array<int64_t, 3> shape, int act, double alpha, double gain, double clamp,
                    Address bias) {
  return {static_cast<DType>(dtype), shape[0], shape[1], shape[2], static_cast<BiasActivation>(act),
          alpha, gain, clamp, at(bias)};
}

PixelShuffleAct pixel_shuffle_act_of(int dtype, bool rows, std::array<int64_t, 4> shape, int64_t factor, int act,
                                     double negative_slope, bool positive, Address weight, int64_t weights, Address side,
                                     bool fine_side) {
  return {static_cast<DType>(dtype), rows, shape[0], shape[1], shape[2], shape[3], factor, static_cast<Act>(act),
          negative_slope, positive, at(weight), weights, at(side), fine_side};
}

Samples samples_of(int dtype, int64_t count, int64_t size) { return {static_cast<DType>(dtype), count, size}; }

UpFirDn2d upfirdn2d_of(int dtype, bool rows, int64_t count, int64_t channels, std::array<int64_t, 6> y,
                       std::array<int64_t, 6> x, bool separable, bool flip, double gain) {
  const auto axis = [](const std::array<int64_t, 6>& a) { return Resampling{a[0], a[1], a[2], a[3], a[4], a[5]}; };
  return {static_cast<DType>(dtype), rows, count, channels, axis(y), axis(x), separable, flip, gain};
}

SpectralWeight spectral_weight(std::array<int64_t, 3> shape, Address weight, Address u, Address v) {
  return {shape[0], shape[1], shape[2], at(weight), at(u), at(v)};
}

SpectralForward spectral_forward(std::array<int64_t, 3> shape, Address weight, Address u, Address v, Address normalised,
                                 Address new_u, Address new_v) {
  return {spectral_weight(shape, weight, u, v), at(normalised), at(new_u), at(new_v)};
}

SpectralBackward spectral_backward(std::array<int64_t, 3> shape, Address weight, Address u, Address v, Address grad,
                                   Address grad_weight) {
  return {spectral_weight(shape, weight, u, v), at(grad), at(grad_weight)};
}

SpectralDoubleBackward spectral_double_backward(std::array<int64_t, 3> shape, Address weight, Address u, Address v,
                                                Address gg, Address grad, Address g_grad, Address g_weight) {
  return {spectral_weight(shape, weight, u, v), at(gg), at(grad), at(g_grad), at(g_weight)};
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of fastgan";
  py::class_<NormAct>(m, "NormAct").def(py::init(&norm_act));
  py::class_<Patches>(m, "Patches").def(py::init(&patches_of));

  m.def("cpu_capability", [] { return kernels.name; }, "The instruction set whose kernels run on this CPU.");
  m.def("max_threads", &omp_get_max_threads, "How many threads the kernels use: torch.get_num_threads().");

  define_norm(m, "batch_norm_act", kernels.batch_norm_act_forward, kernels.batch_norm_act_backward,
              kernels.batch_norm_act_double_backward);
  m.def("move_statistics", [](int dtype, int64_t channels, Address running_mean, Address running_var, Address mean,
                              Address var, double momentum, double unbiased) {
    (static_cast<DType>(dtype) == DType::float64 ? move_statistics<double> : move_statistics<float>)(
        channels, running_mean, running_var, mean, var, momentum, unbiased);
  });
  define_norm(m, "group_norm_act", kernels.group_norm_act_forward, kernels.group_norm_act_backward,
              kernels.group_norm_act_double_backward);
  py::class_<AdaIN>(m, "AdaIN").def(py::init([](const NormAct& a, Address scale, Address shift, Address noise, Address noise_weight) {
    return AdaIN{a, at(scale), at(shift), at(noise), at(noise_weight)};
  }));
  m.def("adain_forward", [](const AdaIN& a, Address out) { kernels.adain_forward({a, at(out)}); }, release());
  m.def("adain_backward", [](const AdaIN& a, Address grad_out, Address grad_x, Address grad_scale, Address grad_shift,
                             Address grad_noise_weight, Address grad_bias) {
    kernels.adain_backward({a, at(grad_out), at(grad_x), at(grad_scale), at(grad_shift), at(grad_noise_weight), at(grad_bias)});
  }, release());
  m.def("adain_double_backward", [](const AdaIN& a, Address grad_out, Address ggx, Address gg_scale, Address gg_shift,
                                    Address gg_noise_weight, Address gg_bias, Address g_grad_out, Address g_x,
                                    Address g_scale, Address g_noise_weight, Address g_bias) {
    kernels.adain_double_backward({a, at(grad_out), at(ggx), at(gg_scale), at(gg_shift), at(gg_noise_weight), at(gg_bias),
                                   at(g_grad_out), at(g_x), at(g_scale), at(g_noise_weight), at(g_bias)});
  }, release());
  m.def("plane_statistics", [](const NormAct& a) { kernels.plane_statistics(a); }, release());
  m.def("plane_statistics_backward", [](const NormAct& a, Address slope, Address offset, Address grad_x) {
    kernels.plane_statistics_backward({a, at(slope), at(offset), at(grad_x)});
  }, release());
  py::class_<BiasAct>(m, "BiasAct").def(py::init(&bias_act_of));
  m.def("bias_act_forward", [](const BiasAct& a, Address x, Address y) {
    kernels.bias_act_forward(a, at(x), at(y));
  }, release());
  m.def("bias_act_backward", [](const BiasAct& a, Address grad_y, Address side, Address grad_x, Address grad_bias) {
    kernels.bias_act_backward(a, at(grad_y), at(side), at(grad_x), at(grad_bias));
  }, release());
  m.def("bias_act_double_backward", [](const BiasAct& a, Address ggx, Address ggb, Address grad_y, Address side,
                                       Address g_grad_y, Address g_x, Address g_bias) {
    kernels.bias_act_double_backward(a, at(ggx), at(ggb), at(grad_y), at(side), at(g_grad_y), at(g_x), at(g_bias));
  }, release());
  py::class_<PixelShuffleAct>(m, "PixelShuffleAct").def(py::init(&pixel_shuffle_act_of));
  m.def("pixel_shuffle_act_forward", [](const PixelShuffleAct& a, Address x, Address y) {
    kernels.pixel_shuffle_act_forward(a, at(x), at(y));
  }, release());
  m.def("pixel_shuffle_act_backward", [](const PixelShuffleAct& a, Address grad_y, Address x, Address grad_x,
                                         Address grad_weight) {
    kernels.pixel_shuffle_act_backward(a, at(grad_y), at(x), at(grad_x), at(grad_weight));
  }, release());
  m.def("transpose_matrices", [](int dtype, std::array<int64_t, 3> shape, Address x, Address y) {
    kernels.transpose_matrices({static_cast<DType>(dtype), shape[0], shape[1], shape[2]}, at(x), at(y));
  }, release());
  m.def("image_to_patches", [](const Patches& p, Address image, Address patches) {
    kernels.image_to_patches(p, at(image), at(patches));
  }, release());
  m.def("image_to_few", [](const Patches& p, Address image, Address weight, int64_t outputs, Address bias, Address positions) {
    kernels.image_to_few(p, at<float>(image), at<float>(weight), outputs, at<float>(bias), at<float>(positions));
  }, release());
  m.def("patches_to_image", [](const Patches& p, Address patches, Address image) {
    kernels.patches_to_image(p, at(patches), at(image));
  }, release());
  py::class_<Winograd>(m, "Winograd").def(py::init([](int64_t kernel, std::array<int64_t, 4> image, std::array<int64_t, 3> positions,
                                                      std::array<int64_t, 2> padding, std::array<int64_t, 3> weight, bool flip) {
    return Winograd{kernel,       image[0],   image[1],   image[2],  image[3],  positions[0], positions[1],
                    positions[2], padding[0], padding[1], weight[0], weight[1], weight[2],    flip};
  }));
  m.def("winograd_image_to_positions", [](const Winograd& a, Address image, Address weight, Address bias, Address positions) {
    return kernels.winograd_image_to_positions(a, at<float>(image), at<float>(weight), at<float>(bias), at<float>(positions));
  }, release());
  m.def("winograd_positions_to_image", [](const Winograd& a, Address positions, Address weight, Address image) {
    return kernels.winograd_positions_to_image(a, at<float>(positions), at<float>(weight), at<float>(image));
  }, release());
  m.def("winograd_weight_grad", [](const Winograd& a, Address positions, Address image, Address grad_weight) {
    return kernels.winograd_weight_grad(a, at<float>(positions), at<float>(image), at<float>(grad_weight));
  }, release());

  py::class_<Samples>(m, "Samples").def(py::init(&samples_of));
  m.def("sample_dot", [](const Samples& s, Address x, Address y, Address sums) {
    kernels.sample_dot(s, at(x), at(y), at(sums));
  }, release());
  m.def("sample_scale", [](const Samples& s, Address x, Address factors, Address y) {
    kernels.sample_scale(s, at(x), at(factors), at(y));
  }, release());

  py::class_<UpFirDn2d>(m, "UpFirDn2d").def(py::init(&upfirdn2d_of));
  m.def("upfirdn2d", [](const UpFirDn2d& a, Address x, Address filter, Address y) {
    kernels.upfirdn2d(a, at(x), at(filter), at(y));
  }, release());

  py::class_<SpectralForward>(m, "SpectralForward").def(py::init(&spectral_forward));
  py::class_<SpectralBackward>(m, "SpectralBackward").def(py::init(&spectral_backward));
  py::class_<SpectralDoubleBackward>(m, "SpectralDoubleBackward").def(py::init(&spectral_double_backward));
  m.def("spectral_norm_forward", [](int dtype, const std::vector<SpectralForward>& weights, int64_t iterations, double eps, Address sigma) {
    kernels.spectral_norm_forward(static_cast<DType>(dtype), weights.data(), weights.size(), iterations, eps, at(sigma));
  }, release());
  m.def("spectral_norm_backward", [](int dtype, const std::vector<SpectralBackward>& weights, Address sigma) {
    kernels.spectral_norm_backward(static_cast<DType>(dtype), weights.data(), weights.size(), at(sigma));
  }, release());
  m.def("spectral_norm_double_backward", [](int dtype, const std::vector<SpectralDoubleBackward>& weights, Address sigma) {
    kernels.spectral_norm_double_backward(static_cast<DType>(dtype), weights.data(), weights.size(), at(sigma));
  }, release());

  m.def("has_matrix_unit", [] { return matrix_kernels != nullptr; }, "Whether the functions of a Convolution can be called.");
  py::class_<Convolution>(m, "Convolution")
      .def(py::init(&convolution_of))
      .def("fill", [](const Convolution& g, bool image, bool weight) { return matrix_kernels->fill(g, image, weight); });
  m.def("image_to_positions", [](const Convolution& g, Address image, Address weight, Address bias, Address positions) {
    return matrix_kernels->image_to_positions(g, at(image), at(weight), at(bias), at(positions));
  }, release());
  m.def("positions_to_image", [](const Convolution& g, Address positions, Address weight, Address bias, Address image) {
    return matrix_kernels->positions_to_image(g, at(positions), at(weight), at(bias), at(image));
  }, release());
  m.def("weight_grad", [](const Convolution& g, Address positions, Address image, Address grad_weight) {
    return matrix_kernels->weight_grad(g, at(positions), at(image), at(grad_weight));
  }, release());
}
