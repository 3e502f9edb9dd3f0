#include "spectral_norm.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastgan::cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------------- blocks

template <class T> struct Accumulation { using type = float; };
template <> struct Accumulation<double> { using type = double; };

template <class Acc, class T> __device__ Acc widen(T x) { return static_cast<Acc>(x); }

// The sum over the `width` neighbouring threads, a power of two, to which this one belongs, in a fixed order.
template <class Acc> __device__ Acc sum_of(Acc value, int width) {
  __shared__ Acc values[threads];
  const int thread = threadIdx.x;
  __syncthreads(); // until the sum before has been read
  values[thread] = value;
  for (int half = width / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread % width < half) values[thread] += values[thread + half];
  }
  __syncthreads();
  return values[thread / width * width];
}

// Likewise over the threads that are `stride` apart, of all the block's.
template <class Acc> __device__ Acc sum_across(Acc value, int stride) {
  __shared__ Acc values[threads];
  const int thread = threadIdx.x;
  __syncthreads();
  values[thread] = value;
  for (int half = threads / 2; half >= stride; half /= 2) {
    __syncthreads();
    if (thread < half) values[thread] += values[thread + half];
  }
  __syncthreads();
  return values[thread % stride];
}

// Other blocks have written what is read here, so it must not come from this multiprocessor's own cache.
template <class Acc> __device__ Acc written(const Acc* address) { return __ldcg(address); }

template <class Acc> __device__ Acc square_of(const Acc* vector, int64_t size) {
  Acc total = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < size; i += threads) total += written(vector + i) * written(vector + i);
  return sum_of(total, threads);
}

// A NaN passes.
template <class Acc> __device__ Acc at_least(Acc norm, double eps) {
  return norm < static_cast<Acc>(eps) ? static_cast<Acc>(eps) : norm;
}

// A weight has fewer than 2^31 elements, and 32 bits are divided several times as fast as 64.
__device__ unsigned element_at(const Layer& layer, unsigned row, unsigned col) {
  const unsigned inner = static_cast<unsigned>(layer.inner);
  return (col / inner * static_cast<unsigned>(layer.rows) + row) * inner + col % inner;
}

__device__ unsigned turned(const Layer& layer, unsigned col) {
  const unsigned turn = static_cast<unsigned>(layer.turn);
  return col % turn * (static_cast<unsigned>(layer.cols) / turn) + col / turn;
}

// The last layer that begins at the item or before it.
template <int64_t Layer::*first> __device__ int layer_of(const SpectralNorm& a, int64_t item) {
  int low = 0, high = static_cast<int>(a.layers) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (a.table[middle].*first <= item) low = middle;
    else high = middle - 1;
  }
  return low;
}

// ---------------------------------------------------------------------------------------------------------------- phases

// s = W v of some rows, where v is the argument or, from the second iteration on, Wᵀu over its norm.
template <class T, class Acc> __device__ void multiply_rows(const SpectralNorm& a, int64_t item, bool first) {
  const int index = layer_of<&Layer::first_row_item>(a, item);
  const Layer layer = a.table[index];
  const T* weight = static_cast<const T*>(a.weights[index]);
  const T* v = static_cast<const T*>(a.v[index]);
  Acc* s = static_cast<Acc*>(a.scratch) + layer.scratch;
  const Acc* t = s + layer.rows;
  const Acc norm = first ? Acc(1) : at_least(sqrt(square_of(t, layer.cols)), a.eps);

  const int lanes = static_cast<int>(layer.row_threads);
  const int64_t row = (item - layer.first_row_item) * (threads / lanes) + threadIdx.x / lanes;
  Acc total = 0;
  if (row < layer.rows) {
#pragma unroll 8
    for (int64_t col = threadIdx.x % lanes; col < layer.cols; col += lanes) {
      const Acc x = first ? widen<Acc>(v[turned(layer, col)]) : written(t + col) / norm;
      total += widen<Acc>(weight[element_at(layer, row, col)]) * x;
    }
  }
  total = sum_of(total, lanes);
  if (row < layer.rows && threadIdx.x % lanes == 0) s[row] = total;
}

// t = Wᵀu of some columns, where u is s over its norm.
template <class T, class Acc> __device__ void multiply_columns(const SpectralNorm& a, int64_t item) {
  const int index = layer_of<&Layer::first_col_item>(a, item);
  const Layer layer = a.table[index];
  const T* weight = static_cast<const T*>(a.weights[index]);
  const Acc* s = static_cast<const Acc*>(a.scratch) + layer.scratch;
  Acc* t = static_cast<Acc*>(a.scratch) + layer.scratch + layer.rows;
  const Acc norm = at_least(sqrt(square_of(s, layer.rows)), a.eps);

  const int across = static_cast<int>(layer.item_cols);
  const int64_t col = (item - layer.first_col_item) * across + threadIdx.x % across;
  Acc total = 0;
  if (col < layer.cols) {
#pragma unroll 8
    for (int64_t row = threadIdx.x / across; row < layer.rows; row += threads / across)
      total += widen<Acc>(weight[element_at(layer, row, col)]) * (written(s + row) / norm);
  }
  total = sum_across(total, across);
  if (col < layer.cols && threadIdx.x < across) t[col] = total;
}

// σ, and of some elements W/σ. The items share u and v out among them.
template <class T, class Acc> __device__ void divide(const SpectralNorm& a, int64_t item) {
  const int index = layer_of<&Layer::first_element_item>(a, item);
  const Layer layer = a.table[index];
  const T* weight = static_cast<const T*>(a.weights[index]);
  const T* u = static_cast<const T*>(a.u[index]);
  const T* v = static_cast<const T*>(a.v[index]);
  T* normalised = static_cast<T*>(a.normalised) + layer.normalised;
  T* new_u = static_cast<T*>(a.new_u) + layer.u;
  T* new_v = static_cast<T*>(a.new_v) + layer.v;
  const Acc* s = static_cast<const Acc*>(a.scratch) + layer.scratch;
  const Acc* t = s + layer.rows;
  const int64_t size = layer.rows * layer.cols;
  const int64_t part = item - layer.first_element_item, parts = (size + element_item - 1) / element_item;
  const int64_t begin = part * threads + threadIdx.x, step = parts * threads;

  Acc sigma = 0;
  if (a.n_power_iterations == 0) {
    for (int64_t i = threadIdx.x; i < layer.rows; i += threads) sigma += widen<Acc>(u[i]) * written(s + i);
    sigma = sum_of(sigma, threads);
    for (int64_t i = begin; i < layer.rows; i += step) new_u[i] = u[i];
    for (int64_t i = begin; i < layer.cols; i += step) new_v[i] = v[i];
  } else {
    const Acc s_norm = at_least(sqrt(square_of(s, layer.rows)), a.eps);
    const Acc square = square_of(t, layer.cols), t_norm = at_least(sqrt(square), a.eps);
    sigma = square / t_norm;
    for (int64_t i = begin; i < layer.rows; i += step) new_u[i] = static_cast<T>(written(s + i) / s_norm);
    for (int64_t i = begin; i < layer.cols; i += step)
      new_v[turned(layer, i)] = static_cast<T>(written(t + i) / t_norm);
  }
  if (part == 0 && threadIdx.x == 0) static_cast<Acc*>(a.sigma)[layer.sigma] = sigma;
  const int64_t last = part + 1 < parts ? (part + 1) * element_item : size;
#pragma unroll 8
  for (int64_t i = part * element_item + threadIdx.x; i < last; i += threads)
    normalised[i] = static_cast<T>(widen<Acc>(weight[i]) / sigma);
}

template <class T> __global__ void __launch_bounds__(threads, 2) forward_kernel(const __grid_constant__ SpectralNorm a) {
  using Acc = typename Accumulation<T>::type;
  const auto grid = cooperative_groups::this_grid();
  int64_t iteration = 0;
  do {
    for (int64_t item = blockIdx.x; item < a.row_items; item += gridDim.x)
      multiply_rows<T, Acc>(a, item, iteration == 0);
    grid.sync();
    if (a.n_power_iterations == 0) break;
    for (int64_t item = blockIdx.x; item < a.col_items; item += gridDim.x) multiply_columns<T, Acc>(a, item);
    grid.sync();
  } while (++iteration < a.n_power_iterations);
  for (int64_t item = blockIdx.x; item < a.element_items; item += gridDim.x) divide<T, Acc>(a, item);
}

// ---------------------------------------------------------------------------------------------------------------- launch

template <class T> const void* forward_entry() { return reinterpret_cast<const void*>(forward_kernel<T>); }

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class T> void launch(const SpectralNorm& a, uintptr_t stream) {
  int device, processors, blocks;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, forward_entry<T>(), threads, 0));
  // All blocks have to run at once to wait for each other, and one without an item would only be waited for.
  const int64_t items = std::max({a.row_items, a.col_items, a.element_items});
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(items, int64_t(processors) * blocks));
  void* arguments[] = {const_cast<SpectralNorm*>(&a)};
  check(cudaLaunchCooperativeKernel(forward_entry<T>(), dim3(grid), dim3(threads), arguments, 0,
                                    reinterpret_cast<cudaStream_t>(stream)));
}

} // namespace

void spectral_norm_forward(DType dtype, const SpectralNorm& a, uintptr_t stream) {
  switch (dtype) {
  case DType::float32: return launch<float>(a, stream);
  case DType::float64: return launch<double>(a, stream);
  case DType::bfloat16: return launch<__nv_bfloat16>(a, stream);
  case DType::float16: return launch<__half>(a, stream);
  }
}

const char* obstacle() {
  int device, cooperative = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  // Fails where none of the architectures that were compiled for is the device's.
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, forward_entry<float>());
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return cooperative ? "" : "the device has no cooperative launch";
}

} // namespace fastgan::cuda
