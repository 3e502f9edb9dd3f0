// Spectral normalisation of all of a model's weights by one cooperative launch. No torch header, and none of CUDA's.
#pragma once

#include <cstdint>

namespace fastgan::cuda {

// The order of DTYPES in fastgan/ops/_tensors.py.
enum class DType { float32, float64, bfloat16, float16 };

// Addresses are arguments of the launch, which a captured graph keeps; three of each layer have to fit 4 KiB.
constexpr int max_layers = 64;

// A layer's row of the table on the GPU. Its memory is (cols / inner, rows, inner), and column c in the order of memory is
// element c % turn * (cols / turn) + c / turn of v. `row_threads` threads of a block sum over a row; a block sums over
// `item_cols` columns. Both are powers of two, and at most `threads`.
struct Layer {
  int64_t rows, cols, inner, turn, row_threads, item_cols;
  int64_t first_row_item, first_col_item, first_element_item; // what the blocks deal out among themselves
  int64_t scratch, normalised, u, v, sigma;                   // where in each buffer the layer's part begins
};

struct SpectralNorm {
  int64_t layers, n_power_iterations;
  double eps;
  int64_t row_items, col_items, element_items;
  const Layer* table; // on the GPU
  const void* weights[max_layers];
  const void* u[max_layers];
  const void* v[max_layers];
  void* normalised;
  void* new_u;
  void* new_v;
  void* sigma;   // of float, or of double for double
  void* scratch; // likewise: W v and Wᵀu of each layer
};

// What the blocks' items are, for whoever writes the table: a block has so many threads, and an element item is so large.
constexpr int threads = 256, element_item = 8192;

// On the current device; throws std::runtime_error with CUDA's own words.
void spectral_norm_forward(DType dtype, const SpectralNorm& arguments, uintptr_t stream);

// Why the kernels cannot run on the current device, also where there is none or no driver; empty when they can.
const char* obstacle();

} // namespace fastgan::cuda
