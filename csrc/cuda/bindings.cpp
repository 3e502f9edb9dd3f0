// fastgan._cuda: the CUDA C++ kernels as Python functions on addresses, sizes and a stream. The caller allocates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "spectral_norm.h"

namespace py = pybind11;
using namespace fastgan::cuda;

namespace {

using Address = std::uintptr_t; // 0 stands for an absent tensor

template <class T = void> T* at(Address address) { return reinterpret_cast<T*>(address); }

void fill(const void* (&pointers)[max_layers], const std::vector<Address>& addresses, size_t layers) {
  if (addresses.size() != layers || layers > max_layers) throw std::invalid_argument("one address for each of at most 64 layers");
  for (size_t i = 0; i < layers; i++) pointers[i] = at(addresses[i]);
}

} // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of fastgan";
  m.attr("threads") = threads;
  m.attr("element_item") = element_item;
  m.attr("max_layers") = max_layers;
  m.def("obstacle", &obstacle, "Why the kernels cannot run on the current device; empty when they can.");
  m.def("spectral_norm_forward",
        [](int dtype, Address table, std::array<int64_t, 3> items, const std::vector<Address>& weights,
           const std::vector<Address>& u, const std::vector<Address>& v, int64_t n_power_iterations, double eps,
           Address normalised, Address new_u, Address new_v, Address sigma, Address scratch, Address stream) {
          SpectralNorm a{static_cast<int64_t>(weights.size()), n_power_iterations, eps, items[0], items[1], items[2],
                         at<const Layer>(table), {}, {}, {}, at(normalised), at(new_u), at(new_v), at(sigma), at(scratch)};
          fill(a.weights, weights, weights.size());
          fill(a.u, u, weights.size());
          fill(a.v, v, weights.size());
          spectral_norm_forward(static_cast<DType>(dtype), a, stream);
        });
}
