"""The C++ kernels; tensors are passed as addresses (0: absent) and laid out as csrc/cpu/kernels.h says."""

from collections.abc import Sequence

class NormAct:
    def __init__(
        self, dtype: int, rows: bool, shape: Sequence[int], x: int, residual: int, weight: int, bias: int,
        batch_stats: bool, mean: int, var: int, eps: float, act: int, negative_slope: float,
    ) -> None: ...  # fmt: skip

class Patches:
    def __init__(
        self, dtype: int, image: Sequence[int], positions: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int],
    ) -> None: ...  # fmt: skip

def cpu_capability() -> str: ...
def max_threads() -> int: ...
def batch_norm_act_forward(arguments: NormAct, y: int) -> None: ...
def batch_norm_act_backward(
    arguments: NormAct, grad_y: int, grad_x: int, grad_residual: int, grad_weight: int, grad_bias: int
) -> None: ...
def batch_norm_act_double_backward(
    arguments: NormAct, grad_y: int, ggx: int, ggr: int, ggw: int, ggb: int, g_grad_y: int, g_x: int, g_weight: int
) -> None: ...
def image_to_patches(geometry: Patches, image: int, patches: int) -> None: ...
def patches_to_image(geometry: Patches, patches: int, image: int) -> None: ...
