// The CPU kernels' contract: plain structs of raw pointers, and one table of functions per instruction set.
// Nothing here knows torch: one build serves every release of it.
#pragma once
#include <cstdint>

namespace fastgan {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
enum class Act : int { none = 0, relu = 1, leaky_relu = 2, prelu = 3 };

// What the three orders of batch_norm_act and group_norm_act share. `acc` stands for float, or double when dtype is float64.
struct NormAct {
  DType dtype;
  bool rows;            // true: memory is (N·S, C), channels innermost; false: (N, C, S)
  int64_t N, C, S;      // batch, channels, elements of one plane
  const void* x;        // (N, C, S) dtype
  const void* residual; // (N, C, S) dtype, or null
  const void* weight;   // (C,) acc, or null for 1
  const void* bias;     // (C,) acc, or null for 0
  int64_t groups;       // 0: batch norm. Else of a sample, C / groups channels each
  bool per_element;     // weight, bias and their gradients are (S,): layer norm, where C and groups are 1
  bool batch_stats;     // true: the gradient (and, in the forward, the statistics) are x's own, as always in groups
  double* mean;         // (C,), or (N, groups); written by the forward when batch_stats
  double* var;          // likewise, biased
  double eps;
  Act act;
  double negative_slope;
  const void* prelu_weight; // (C,) acc: the slope of each channel; null unless act is prelu, of batch norms only
};

struct NormActForward : NormAct {
  void* y; // (N, C, S) dtype
};

struct NormActBackward : NormAct {
  const void* grad_y;  // (N, C, S) dtype
  void* grad_x;        // (N, C, S) dtype, or null when nobody needs it
  void* grad_residual; // (N, C, S) dtype, or null
  void* grad_weight;   // (C,) acc, or null
  void* grad_bias;     // (C,) acc, or null
  void* grad_prelu_weight; // (C,) acc, or null unless act is prelu
};

// Gradients of <ggx, grad_x> + <ggr, grad_residual> + <ggw, grad_weight> + <ggb, grad_bias>.
struct NormActDoubleBackward : NormAct {
  const void* grad_y; // (N, C, S) dtype
  const void* ggx;    // (N, C, S) dtype, or null
  const void* ggr;    // (N, C, S) dtype, or null
  const void* ggw;    // (C,) acc, or null
  const void* ggb;    // (C,) acc, or null
  void* g_grad_y;     // (N, C, S) dtype
  void* g_x;          // (N, C, S) dtype
  void* g_weight;     // (C,) acc
  void* g_prelu_weight; // (C,) acc, or null unless act is prelu
};

// act(x + noise_weight·noise + bias), normalised in every plane, with a scale and shift for it. `groups` is C, and `bias`, as
// said, added before the activation.
struct AdaIN : NormAct {
  const void* scale;        // (N, C) acc
  const void* shift;        // (N, C) acc
  const void* noise;        // (N, S) acc, or null
  const void* noise_weight; // (C,) acc, or null for 1
};

struct AdaINForward : AdaIN {
  void* out; // (N, C, S) dtype
};

struct AdaINBackward : AdaIN {
  const void* grad_out;    // (N, C, S) dtype
  void* grad_x;            // (N, C, S) dtype, or null when nobody needs it and the two last
  void* grad_scale;        // (N, C) acc, or null
  void* grad_shift;        // (N, C) acc, or null
  void* grad_noise_weight; // (C,) acc, or null
  void* grad_bias;         // (C,) acc, or null
};

// Gradients of the sum of all products of a gradient of the backward with what stands here for it.
struct AdaINDoubleBackward : AdaIN {
  const void* grad_out;        // (N, C, S) dtype
  const void* ggx;             // (N, C, S) dtype, or null
  const void* gg_scale;        // (N, C) acc, or null
  const void* gg_shift;        // (N, C) acc, or null
  const void* gg_noise_weight; // (C,) acc, or null
  const void* gg_bias;         // (C,) acc, or null
  void* g_grad_out;            // (N, C, S) dtype
  void* g_x;                   // (N, C, S) dtype
  void* g_scale;               // (N, C) acc
  void* g_noise_weight;        // (C,) acc, or null
  void* g_bias;                // (C,) acc, or null
};

// grad_x = slope·(x - mean) + offset in every plane. Its statistics themselves go to mean and var of a NormAct of C groups.
struct PlaneStatisticsBackward : NormAct {
  const void* slope;  // (N, C) acc
  const void* offset; // (N, C) acc
  void* grad_x;       // (N, C, S) dtype
};

// N matrices of A rows and B columns, one after the other in memory.
struct Matrices {
  DType dtype;
  int64_t N, A, B;
};

// A batch of N samples of S elements each, one after the other in memory.
struct Samples {
  DType dtype;
  int64_t N, S;
};

enum class BiasActivation : int { linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish };

// y = clamp(gain · act(x + bias)) on memory (N, C, S), of which bias has the middle axis.
struct BiasAct {
  DType dtype;
  int64_t N, C, S;
  BiasActivation act;
  double alpha, gain, clamp; // clamp: nan for none
  const void* bias;          // (C,) acc, or null
};

// y = act(pixel_shuffle(x)) of coarse x (N, C·r², H, W) and fine y (N, C, r·H, r·W).
struct PixelShuffleAct {
  DType dtype;
  bool rows;           // true: channels_last
  int64_t N, C, H, W, r;
  Act act;             // leaky_relu with a weight is prelu
  double negative_slope;
  bool positive;       // false: 0 stands for what is on the positive side
  const void* weight;  // (weights,) acc, or null for negative_slope
  int64_t weights;     // 1 or C
  const void* side;    // dtype, above 0 on the positive side; null: the values themselves tell
  bool fine_side;      // it lies as y, else as x
};

// Convolution as a matrix product: patches of a channels_last image are the rows of a matrix.
struct Patches {
  DType dtype;
  int64_t N, H, W, C;                          // the image
  int64_t OH, OW;                              // positions of the kernel
  int64_t kh, kw;                              // kernel size
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// A convolution on the matrix unit, between a channels_last image and a channels_last tensor (N, OH, OW, O) of the kernel's
// positions. float32 or bfloat16, without groups.
struct Convolution : Patches {
  int64_t O;
  int64_t weight_o, weight_c, weight_tap; // strides of the weight (O, C, kh·kw), in elements
};

// A convolution k3 s1 or k4 s2 by Winograd's algorithms, float32, between a channels_last image (N, H, W, C) and positions
// (N, OH, OW, O).
struct Winograd {
  int64_t kernel; // 3 or 4
  int64_t N, H, W, C;
  int64_t OH, OW, O;
  int64_t pad_h, pad_w;
  int64_t weight_o, weight_c, weight_tap; // strides of the weight (O, C, kernel·kernel), in elements
  bool flip;                  // the taps are turned around
};

// A weight of a spectral norm. `acc` as above.
struct SpectralWeight {
  int64_t A, D, B;    // memory is (A, D, B); of the matrix rows are D and columns (A, B)
  const void* weight; // (A, D, B) dtype
  const void* u;      // (D,) acc
  const void* v;      // (A, B) acc
};

struct SpectralForward : SpectralWeight {
  void* normalised; // (A, D, B) dtype
  void* new_u;      // (D,) acc, or null where there is no iteration
  void* new_v;      // (A, B) acc, likewise
};

struct SpectralBackward : SpectralWeight {
  const void* grad;  // (A, D, B) dtype
  void* grad_weight; // (A, D, B) dtype
};

// Gradients of <gg, grad_weight>.
struct SpectralDoubleBackward : SpectralWeight {
  const void* gg;   // (A, D, B) dtype
  const void* grad; // (A, D, B) dtype
  void* g_grad;     // (A, D, B) dtype
  void* g_weight;   // (A, D, B) dtype
};

// One axis of upfirdn2d: `up` places for each of `in` elements, `pad` zeros before them (or less than none), a filter of so
// many taps at every `down`-th place.
struct Resampling {
  int64_t in, out, taps, up, down, pad;
};

struct UpFirDn2d {
  DType dtype;
  bool rows;       // true: an image is (H, W, C), channels innermost; false: (C, H, W)
  int64_t N, C;
  Resampling y, x;
  bool separable;  // the filter is (taps,), for both axes; else (y.taps, x.taps)
  bool flip;       // correlate instead of convolve
  double gain;
};

struct MatrixKernels {
  // Each returns false, and leaves its result undefined, where float32 numbers are not sums of three bfloat16.
  bool (*image_to_positions)(const Convolution&, const void* image, const void* weight, const void* bias, void* positions);
  bool (*positions_to_image)(const Convolution&, const void* positions, const void* weight, const void* bias, void* image);
  bool (*weight_grad)(const Convolution&, const void* positions, const void* image, void* grad_weight);
  // The part of the matrix unit's work that is not on padding, when it computes the image, or the weight's gradient.
  double (*fill)(const Convolution&, bool image, bool weight);
};

struct Kernels {
  const char* name;
  void (*batch_norm_act_forward)(const NormActForward&);
  void (*batch_norm_act_backward)(const NormActBackward&);
  void (*batch_norm_act_double_backward)(const NormActDoubleBackward&);
  void (*group_norm_act_forward)(const NormActForward&);
  void (*group_norm_act_backward)(const NormActBackward&);
  void (*group_norm_act_double_backward)(const NormActDoubleBackward&);
  void (*adain_forward)(const AdaINForward&);
  void (*adain_backward)(const AdaINBackward&);
  void (*adain_double_backward)(const AdaINDoubleBackward&);
  void (*plane_statistics)(const NormAct&);
  void (*plane_statistics_backward)(const PlaneStatisticsBackward&);
  // `side` tells the derivative: it is y of linear, relu and lrelu, x of the other activations, and may be null where the
  // derivative is a constant. Any of grad_x, grad_bias, ggx, ggb, g_x and g_bias may be null; of those named for bias all
  // are (C,) acc. Of linear, relu and lrelu the double backward has no g_x and g_bias.
  void (*bias_act_forward)(const BiasAct&, const void* x, void* y);
  void (*bias_act_backward)(const BiasAct&, const void* grad_y, const void* side, void* grad_x, void* grad_bias);
  void (*bias_act_double_backward)(const BiasAct&, const void* ggx, const void* ggb, const void* grad_y,
                                   const void* side, void* g_grad_y, void* g_x, void* g_bias);
  // x and grad_x coarse, y and grad_y fine. Either of grad_x and grad_weight (weights,) acc may be null; x is read for
  // grad_weight only.
  void (*pixel_shuffle_act_forward)(const PixelShuffleAct&, const void* x, void* y);
  void (*pixel_shuffle_act_backward)(const PixelShuffleAct&, const void* grad_y, const void* x, void* grad_x,
                                     void* grad_weight);
  void (*transpose_matrices)(const Matrices&, const void* x, void* y); // y: N matrices of B rows and A columns
  void (*image_to_patches)(const Patches&, const void* image, void* patches);
  void (*patches_to_image)(const Patches&, const void* patches, void* image);
  // A convolution to 1 to 4 `outputs`, with a weight (outputs, kh, kw, C), and a bias or null. dilation_w is 1.
  void (*image_to_few)(const Patches&, const float* image, const float* weight, int64_t outputs, const float* bias,
                       float* positions);
  // Whether all of the result, less the bias (O,) or null, is finite: else infinities and nan have spread over their tiles.
  bool (*winograd_image_to_positions)(const Winograd&, const float* image, const float* weight, const float* bias,
                                      float* positions);
  bool (*winograd_positions_to_image)(const Winograd&, const float* positions, const float* weight, float* image); // of k4 s2
  // grad_weight (O, C, kernel, kernel), contiguous.
  bool (*winograd_weight_grad)(const Winograd&, const float* positions, const float* image, float* grad_weight);
  // Of samples x, y (N, S) dtype, and numbers for each (N,) acc: sums = Σ x·y, and y = factors·x.
  void (*sample_dot)(const Samples&, const void* x, const void* y, void* sums);
  void (*sample_scale)(const Samples&, const void* x, const void* factors, void* y);
  // x and y (N, C, in, in) and (N, C, out, out) dtype, filter acc.
  void (*upfirdn2d)(const UpFirDn2d&, const void* x, const void* filter, void* y);
  // Each of `count` weights at once; sigma (count,) acc.
  void (*spectral_norm_forward)(DType, const SpectralForward* weights, int64_t count, int64_t iterations, double eps, void* sigma);
  void (*spectral_norm_backward)(DType, const SpectralBackward* weights, int64_t count, const void* sigma);
  void (*spectral_norm_double_backward)(DType, const SpectralDoubleBackward* weights, int64_t count, const void* sigma);
};

extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;

// The matrix kernels, or null where the compiler, the CPU or the system has no matrix unit.
const MatrixKernels* amx_kernels();

} // namespace fastgan
