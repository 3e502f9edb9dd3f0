"""Layers with an equalised learning rate (Karras et al. 2018)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.ops._tensors import check_count, check_number

GAIN = math.sqrt(2)
"""He's gain: what a leaky ReLU stands behind keeps its variance."""


class EqualLinear(nn.Linear):
    """y = x · (scale · weight)ᵀ + lr_multiplier · bias, scale = lr_multiplier · gain / √in_features: He's constant, applied
    whenever the weights are used. So every weight learns at the same speed under Adam.

    Args:
        gain: the deviation of y for an x of deviation 1, before training.
        lr_multiplier: of that speed. The weights begin normal with deviation 1 / lr_multiplier, the bias at 0.

    Parameters and state_dict are `nn.Linear`'s.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = GAIN, lr_multiplier: float = 1.0):
        check_number("gain", gain)
        check_number("lr_multiplier", lr_multiplier)
        if not lr_multiplier > 0:
            raise ValueError(f"lr_multiplier must be positive, not {lr_multiplier}")
        super().__init__(in_features, out_features)
        self.scale = gain / math.sqrt(in_features) * lr_multiplier
        self.lr_multiplier = lr_multiplier
        nn.init.normal_(self.weight, std=1 / lr_multiplier)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.scale, self.bias * self.lr_multiplier)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.3g}, lr_multiplier={self.lr_multiplier}"


class EqualConv2d(nn.Conv2d):
    """y = conv2d(x, scale · weight) + bias, scale = gain / √(in_channels · kernel_size²), by `fastgan.ops.conv2d`; y is as
    large as x. The weights begin normal with deviation 1, the bias at 0.

    Args:
        kernel_size: odd.
        gain: the deviation of y for an x of deviation 1, before training.

    Parameters and state_dict are `nn.Conv2d`'s.

    Raises:
        ValueError: kernel_size is even, or what `fastgan.ops.conv2d` raises.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, gain: float = GAIN, bias: bool = True):
        check_number("gain", gain)
        kernel_size = check_count("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, for y to be as large as x, not {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.scale = gain / math.sqrt(in_channels * kernel_size**2)
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return ops.conv2d(input, self.weight * self.scale, self.bias, padding=self.kernel_size[0] // 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.3g}"
