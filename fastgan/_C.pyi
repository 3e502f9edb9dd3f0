"""The C++ kernels; tensors are passed as addresses (0: absent) and laid out as csrc/cpu/kernels.h says."""

from collections.abc import Sequence

class NormAct:
    def __init__(
        self, dtype: int, rows: bool, shape: Sequence[int], x: int, residual: int, weight: int, bias: int,
        groups: int, per_element: bool, batch_stats: bool, mean: int, var: int, eps: float, act: int,
        negative_slope: float, prelu_weight: int,
    ) -> None: ...  # fmt: skip

class Patches:
    def __init__(
        self, dtype: int, image: Sequence[int], positions: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int],
    ) -> None: ...  # fmt: skip

class BiasAct:
    def __init__(
        self, dtype: int, shape: Sequence[int], act: int, alpha: float, gain: float, clamp: float, bias: int
    ) -> None: ...

class PixelShuffleAct:
    def __init__(
        self, dtype: int, rows: bool, shape: Sequence[int], factor: int, act: int, negative_slope: float, positive: bool,
        weight: int, weights: int, side: int, fine_side: bool,
    ) -> None: ...  # fmt: skip

class Winograd:
    def __init__(
        self, kernel: int, image: Sequence[int], positions: Sequence[int], padding: Sequence[int],
        weight_strides: Sequence[int], flip: bool,
    ) -> None: ...  # fmt: skip

class Samples:
    def __init__(self, dtype: int, count: int, size: int) -> None: ...

class UpFirDn2d:
    def __init__(
        self, dtype: int, rows: bool, count: int, channels: int, y: Sequence[int], x: Sequence[int], separable: bool,
        flip: bool, gain: float,
    ) -> None: ...  # fmt: skip

class SpectralForward:
    def __init__(
        self, shape: Sequence[int], weight: int, u: int, v: int, normalised: int, new_u: int, new_v: int
    ) -> None: ...

class SpectralBackward:
    def __init__(self, shape: Sequence[int], weight: int, u: int, v: int, grad: int, grad_weight: int) -> None: ...

class SpectralDoubleBackward:
    def __init__(
        self, shape: Sequence[int], weight: int, u: int, v: int, gg: int, grad: int, g_grad: int, g_weight: int
    ) -> None: ...

class Convolution:
    def __init__(self, patches: Patches, channels: int, weight_strides: Sequence[int]) -> None: ...
    def fill(self, image: bool, weight: bool) -> float: ...

def transpose_matrices(dtype: int, shape: Sequence[int], x: int, y: int) -> None: ...
def has_matrix_unit() -> bool: ...
def image_to_positions(geometry: Convolution, image: int, weight: int, bias: int, positions: int) -> bool: ...
def positions_to_image(geometry: Convolution, positions: int, weight: int, bias: int, image: int) -> bool: ...
def weight_grad(geometry: Convolution, positions: int, image: int, grad_weight: int) -> bool: ...
def cpu_capability() -> str: ...
def max_threads() -> int: ...
def batch_norm_act_forward(arguments: NormAct, y: int) -> None: ...
def batch_norm_act_backward(
    arguments: NormAct, grad_y: int, grad_x: int, grad_residual: int, grad_weight: int, grad_bias: int,
    grad_prelu_weight: int,
) -> None: ...  # fmt: skip
def batch_norm_act_double_backward(
    arguments: NormAct, grad_y: int, ggx: int, ggr: int, ggw: int, ggb: int, g_grad_y: int, g_x: int, g_weight: int,
    g_prelu_weight: int,
) -> None: ...  # fmt: skip
def move_statistics(
    dtype: int,
    channels: int,
    running_mean: int,
    running_var: int,
    mean: int,
    var: int,
    momentum: float,
    unbiased: float,
) -> None: ...
def group_norm_act_forward(arguments: NormAct, y: int) -> None: ...
def group_norm_act_backward(
    arguments: NormAct, grad_y: int, grad_x: int, grad_residual: int, grad_weight: int, grad_bias: int,
    grad_prelu_weight: int,
) -> None: ...  # fmt: skip
def group_norm_act_double_backward(
    arguments: NormAct, grad_y: int, ggx: int, ggr: int, ggw: int, ggb: int, g_grad_y: int, g_x: int, g_weight: int,
    g_prelu_weight: int,
) -> None: ...  # fmt: skip
def plane_statistics(arguments: NormAct) -> None: ...
def plane_statistics_backward(arguments: NormAct, slope: int, offset: int, grad_x: int) -> None: ...
def bias_act_forward(arguments: BiasAct, x: int, y: int) -> None: ...
def bias_act_backward(arguments: BiasAct, grad_y: int, side: int, grad_x: int, grad_bias: int) -> None: ...
def bias_act_double_backward(
    arguments: BiasAct, ggx: int, ggb: int, grad_y: int, side: int, g_grad_y: int, g_x: int, g_bias: int
) -> None: ...
def pixel_shuffle_act_forward(arguments: PixelShuffleAct, x: int, y: int) -> None: ...
def pixel_shuffle_act_backward(
    arguments: PixelShuffleAct, grad_y: int, x: int, grad_x: int, grad_weight: int
) -> None: ...
def sample_dot(samples: Samples, x: int, y: int, sums: int) -> None: ...
def sample_scale(samples: Samples, x: int, factors: int, y: int) -> None: ...
def upfirdn2d(arguments: UpFirDn2d, x: int, filter: int, y: int) -> None: ...
def spectral_norm_forward(
    dtype: int, weights: Sequence[SpectralForward], iterations: int, eps: float, sigma: int
) -> None: ...
def spectral_norm_backward(dtype: int, weights: Sequence[SpectralBackward], sigma: int) -> None: ...
def spectral_norm_double_backward(dtype: int, weights: Sequence[SpectralDoubleBackward], sigma: int) -> None: ...
def image_to_patches(geometry: Patches, image: int, patches: int) -> None: ...
def image_to_few(geometry: Patches, image: int, weight: int, outputs: int, bias: int, positions: int) -> None: ...
def patches_to_image(geometry: Patches, patches: int, image: int) -> None: ...
def winograd_image_to_positions(geometry: Winograd, image: int, weight: int, bias: int, positions: int) -> bool: ...
def winograd_positions_to_image(geometry: Winograd, positions: int, weight: int, image: int) -> bool: ...
def winograd_weight_grad(geometry: Winograd, positions: int, image: int, grad_weight: int) -> bool: ...
