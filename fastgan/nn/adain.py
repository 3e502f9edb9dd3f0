"""Adaptive instance normalisation as modules: the layers of StyleGAN's generator (Karras et al. 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import ops
from fastgan.nn.equalized import EqualConv2d, EqualLinear
from fastgan.nn.upfirdn2d import Blur
from fastgan.ops._tensors import accumulation_dtype, check_is_tensor

SLOPE = 0.2
"""Of the paper's leaky ReLU."""


class AdaIN(nn.Module):
    """(scale + 1) · (x − μ) / √(σ² + eps) + shift, with μ and σ² of each plane of x, by `fastgan.ops.adain`.

    scale and shift are the halves of an affine function of w, `style`: an `EqualLinear` of gain 1.

    Args:
        channels: of x.
        w_dim: elements of one w.

    Called with x (N, channels, \\*) and w (N, w_dim), or (1, w_dim) for all of x.

    Raises:
        ValueError: w has another shape, or what `fastgan.ops.adain` raises.
    """

    eps = 1e-8

    def __init__(self, channels: int, w_dim: int):
        super().__init__()
        self.style = EqualLinear(w_dim, 2 * channels, gain=1)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return ops.adain(x, *self._style(x, w), self.eps)

    def _style(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Of w the operator's scale and shift. Under autocast they come narrow, where x may be wide."""
        check_is_tensor("x", x)
        check_is_tensor("w", w)
        w_dim = self.style.in_features
        if w.dim() != 2 or w.shape[0] not in (1, x.shape[0]) or w.shape[1] != w_dim:
            raise ValueError(f"w must have shape ({x.shape[0]}, {w_dim}), one for each of x, not {tuple(w.shape)}")
        style = self.style(w).to(accumulation_dtype(x.dtype)).expand(x.shape[0], -1)
        scale, shift = style.chunk(2, 1)
        return scale + 1, shift


class LayerEpilogue(AdaIN):
    """What follows every convolution of the generator, in one operator: y = leaky_relu(x + noise_weight · noise + bias), and
    AdaIN of y.

    Args:
        channels: of x, with a weight of the noise and a bias for each; both begin at 0.
        resolution: of x, and of the layer's own noise.
        w_dim: elements of one w.

    Called with x (N, channels, resolution, resolution), w (N, w_dim) and perhaps noise, (N, 1, resolution, resolution) or of
    batch 1. Without, new noise is drawn in training; in evaluation it is the layer's own, the buffer `noise`, so that images
    depend on w alone. State_dict: `noise_weight`, `bias`, `noise`, `style.weight`, `style.bias`.

    Raises:
        ValueError: as in `AdaIN`; also where x has not the resolution of the layer's own noise, when that is used.
    """

    noise: Tensor

    def __init__(self, channels: int, resolution: int, w_dim: int):
        super().__init__(channels, w_dim)
        self.noise_weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("noise", torch.randn(1, 1, resolution, resolution))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        style = self._style(x, w)
        if noise is None:
            noise = draw_noise(x) if self.training else self.noise
        return ops.adain(
            x, *style, self.eps,
            noise=noise, noise_weight=self.noise_weight, bias=self.bias, act="leaky_relu", negative_slope=SLOPE,
        )  # fmt: skip


class NoiseInjection(nn.Module):
    """x + noise_weight · noise, where no epilogue does it: a weight for each channel, which begins at 0.

    Called with x (N, channels, \\*) and perhaps noise, (N, 1, \\*) or of batch 1; without, it is drawn.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.noise_weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        check_is_tensor("x", x)
        if noise is None:
            noise = draw_noise(x)
        return (x + self.noise_weight.view(-1, *[1] * (x.dim() - 2)) * noise).to(x.dtype)


def draw_noise(x: Tensor) -> Tensor:
    """(N, 1, \\*) for x; in float32 at least, so that all precisions see the same."""
    return torch.randn(x.shape[0], 1, *x.shape[2:], dtype=accumulation_dtype(x.dtype), device=x.device)


class StyledConv(nn.Module):
    """A convolution without bias and its epilogue: `EqualConv2d`, then `LayerEpilogue`.

    With `upsample`, x is doubled before the convolution, by nearest neighbours, and blurred after it by [1, 2, 1].

    Args:
        in_channels, out_channels: of x, and of the result.
        resolution: of the result.
        w_dim: elements of one w.
        kernel_size: of the convolution, odd.
        upsample: whether x has half the resolution.

    Called like `LayerEpilogue`, and raises what that raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: int,
        w_dim: int,
        kernel_size: int = 3,
        upsample: bool = False,
    ):
        super().__init__()
        self.conv = EqualConv2d(in_channels, out_channels, kernel_size, bias=False)
        self.blur = Blur() if upsample else None
        self.epilogue = LayerEpilogue(out_channels, resolution, w_dim)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        check_is_tensor("x", x)
        if self.blur is not None:
            x = F.interpolate(x, scale_factor=2)
        x = self.conv(x)
        return self.epilogue(x if self.blur is None else self.blur(x), w, noise)
