"""The blur of StyleGAN as a module."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgan import ops


class Blur(nn.Module):
    """Every channel filtered to its own size, by `fastgan.ops.filter2d`.

    Args:
        kernel: the taps along each axis, or (h, w) of them. The default is the binomial filter of StyleGAN (Karras et al.
            2019), which follows upsampling and precedes downsampling there.
        normalize: make the taps add up to one.
        flip_filter: correlate instead of convolving.
        gain: multiplies the result.

    The filter is a buffer, `kernel`, (h, w) or from 8 taps on (taps,); the module has no parameter.

    Raises:
        ValueError: kernel has more than two axes or no tap, or what `fastgan.ops.filter2d` raises.
    """

    kernel: Tensor

    def __init__(
        self,
        kernel: Tensor | Sequence = (1, 2, 1),
        normalize: bool = True,
        flip_filter: bool = False,
        gain: float = 1,
    ):
        super().__init__()
        self.register_buffer("kernel", ops.setup_filter(kernel, torch.get_default_device(), normalize))
        self.flip_filter = flip_filter
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return ops.filter2d(x, self.kernel, flip_filter=self.flip_filter, gain=self.gain)

    def extra_repr(self) -> str:
        return f"{tuple(self.kernel.shape)}, flip_filter={self.flip_filter}, gain={self.gain}"
