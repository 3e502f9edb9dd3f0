"""Pixel norm: the features of each pixel divided by their root mean square."""

import torch
from torch import Tensor

from fastgan.ops._tensors import accumulation_dtype, check_eps, check_input


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """y = x / √(mean of x² over the channels + eps) (Karras et al. 2018, section 4.2).

    Args:
        x: (N, C, \\*), at least 2 dimensions; float32, float64, bfloat16 or float16, of any strides. The output keeps the
            layout of NCHW and of channels_last.

    Made of stock operations, on every device, and deterministic as these are. The mean is float32 (float64 for float64), so
    that bfloat16 and float16 do not overflow. Differentiable to every order, at x = 0 too as long as eps is positive.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has no axis of channels, or eps is negative.
    """
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (N, C, *), not {tuple(x.shape)}")
    check_eps(eps)
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)).to(x.dtype)
