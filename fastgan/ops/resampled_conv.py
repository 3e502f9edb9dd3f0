"""A convolution before averaging, or after doubling, as one convolution with fewer products."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.ops._tensors import check_count, check_input
from fastgan.ops.conv import Size2, check_pair, check_weight, conv2d, conv_transpose2d, in_stock_s_layout, is_autocast

# ── Definitions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def reference_down(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Size2 = 0, groups: int = 1
) -> Tensor:
    """`conv2d_avg_pool2d` in plain torch."""
    return F.avg_pool2d(F.conv2d(x, weight, bias, 1, padding, 1, groups), 2)


def reference_up(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Size2 = 0, groups: int = 1
) -> Tensor:
    """`upsample_conv2d` in plain torch."""
    return F.conv2d(F.interpolate(x, scale_factor=2), weight, bias, 1, padding, 1, groups)


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _spread(weight: Tensor) -> Tensor:
    """(A, B, kh, kw) to (A, B, kh + 1, kw + 1): each tap, and those beside, above and diagonal to it, added up."""
    height, width = (_beside(weight, size) for size in weight.shape[2:])
    rows = weight.reshape(-1, weight.shape[2] * weight.shape[3])
    with torch.autocast(weight.device.type, enabled=False) if is_autocast(weight) else nullcontext():
        taps = rows @ torch.kron(height, width)
    return taps.view(*weight.shape[:2], weight.shape[2] + 1, weight.shape[3] + 1)


def _beside(weight: Tensor, size: int) -> Tensor:
    """(size, size + 1), with which a row of taps becomes the sum of itself and itself moved by one."""
    same = torch.eye(size, size + 1, dtype=weight.dtype, device=weight.device)
    return same + same.roll(1, 1)


def down_weight(weight: Tensor) -> Tensor:
    """(C', C / groups, kh, kw) to what a convolution of stride 2 takes in place of weight and the mean of 2×2."""
    return _spread(weight) / 4


def up_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """(C', C / groups, kh, kw) to what a transposed convolution of stride 2 takes in place of doubling and weight."""
    taps = _spread(weight).flip(2, 3)
    return taps.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def up_padding(weight: Tensor, padding: tuple[int, int]) -> tuple[int, int]:
    """The padding of that transposed convolution; negative where there is none."""
    return weight.shape[2] - 1 - padding[0], weight.shape[3] - 1 - padding[1]


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def conv2d_avg_pool2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Size2 = 0,
    groups: int = 1,
    keep_layout: bool = True,
) -> Tensor:
    """avg_pool2d(conv2d(x, weight) + bias, 2) by one convolution of stride 2 (Karras et al. 2018, `fused_scale` of ProGAN).

    Its kernel is one larger, the mean of weight and of weight moved by a pixel along each axis: of 3×3 taps at every pixel
    16 at every fourth are left, 2.25 times fewer products, forward and backward. Else as `conv2d`, to every order.
    """
    groups = _check(weight, groups)
    y = conv2d(x, down_weight(weight), bias, 2, padding, 1, groups, keep_layout=False)
    return in_stock_s_layout(y, x, weight) if keep_layout else y


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Size2 = 0,
    groups: int = 1,
    keep_layout: bool = True,
) -> Tensor:
    """conv2d(interpolate(x, scale_factor=2), weight) + bias by one transposed convolution of stride 2, as `fused_scale`.

    The doubled image is never there; the products are as few as in `conv2d_avg_pool2d`. The padding, in pixels of the
    doubled image, may be up to one less than the kernel. Else as `conv2d`, to every order.

    Raises:
        ValueError: besides what `conv2d` raises, a padding as large as the kernel.
    """
    groups = _check(weight, groups)
    height, width = up_padding(weight, check_pair("padding", padding, 0))
    if min(height, width) < 0:
        raise ValueError(f"padding must be below weight's {weight.shape[2]}×{weight.shape[3]} taps, not {padding}")
    y = conv_transpose2d(x, up_weight(weight, groups), bias, 2, (height, width), 0, groups, keep_layout=False)
    return in_stock_s_layout(y, x, weight) if keep_layout else y


def _check(weight: Tensor, groups: int) -> int:
    """Raise what `conv2d` would of what is no weight, before it is spread; else groups as Python's integer."""
    check_input(weight, "weight")
    groups = check_count("groups", groups)
    check_weight(weight.shape, groups)
    if weight.numel() == 0:
        raise ValueError(f"weight must have elements, not shape {tuple(weight.shape)}")
    return groups
