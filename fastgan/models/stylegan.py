"""StyleGAN (Karras et al., 2019): a mapping network, a generator driven by styles, and the discriminator it grows with.

Figures and names are those of the paper and of the code it was published with: equalised learning rates, ×2 by nearest
neighbours, a [1, 2, 1] blur after every up-sampling and before every down-sampling, a style scale that is offset by one.

Both networks grow: `grow(resolution, alpha)` says how far they have come. At `alpha` below 1 the newest resolution is
blended with the one before it. A network that was not told otherwise has its full resolution, and nothing is blended.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan.models.dcgan import doublings

SLOPE = 0.2
GAIN = math.sqrt(2)
"""He's gain: what a leaky ReLU stands behind keeps its variance."""

W_AVG_DECAY = 0.995
"""What the running mean of w keeps of itself at a batch."""


def width(resolution: int, features: int) -> int:
    """Channels at a resolution: `features` up to 32×32, then half as many for each doubling."""
    return max(1, min(features, features * 32 // resolution))


# ── Layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class EqualLinear(nn.Linear):
    """A linear layer whose weights are normal, and scaled by He's constant whenever they are used.

    So each weight learns at the same speed under Adam. `lr_multiplier` divides that speed: the parameters are stored
    larger by as much.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = GAIN, lr_multiplier: float = 1.0):
        super().__init__(in_features, out_features)
        self.scale = gain / math.sqrt(in_features) * lr_multiplier
        self.lr_multiplier = lr_multiplier
        nn.init.normal_(self.weight, std=1 / lr_multiplier)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.scale, self.bias * self.lr_multiplier)


class EqualConv2d(nn.Conv2d):
    """A convolution whose output is as large as its input, with weights as in `EqualLinear`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, gain: float = GAIN, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.scale = gain / math.sqrt(in_channels * kernel_size**2)
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * self.scale, self.bias, padding=self.padding)


class PixelNorm(nn.Module):
    """x / √(mean of x² over the channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class Blur(nn.Module):
    """Each channel filtered by [1, 2, 1] in both directions, with zeros outside."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", taps.outer(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)


class MinibatchStddev(nn.Module):
    """Adds a channel that tells how much the images of a group differ: the mean of their features' deviations.

    Groups have four images, or fewer where four do not divide the batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        size = next(size for size in (4, 3, 2, 1) if count % size == 0)
        groups = x.view(size, -1, *x.shape[1:])
        deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        return torch.cat([x, deviation.repeat(size).view(-1, 1, 1, 1).expand(count, 1, height, width)], 1)


class LayerEpilogue(nn.Module):
    """What follows every convolution of the generator.

    y = leaky_relu(x + noise_weight · noise + bias), then AdaIN: (scale + 1) · (y − μ(y)) / σ(y) + shift, with μ and σ of
    each plane, and scale and shift an affine function of w `(N, w_dim)`.

    `noise` is `(N, 1, H, W)`. None takes the layer's own, which stays the same: so images depend on w alone.
    """

    noise: Tensor

    def __init__(self, channels: int, resolution: int, w_dim: int):
        super().__init__()
        self.noise_weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.style = EqualLinear(w_dim, 2 * channels, gain=1)
        self.eps = 1e-8
        self.register_buffer("noise", torch.randn(1, 1, resolution, resolution))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            noise = self.noise
        y = x + self.noise_weight.view(-1, 1, 1) * noise + self.bias.view(-1, 1, 1)
        y = F.leaky_relu(y, SLOPE)
        scale, shift = self.style(w)[..., None, None].chunk(2, 1)
        return (scale + 1) * F.instance_norm(y, eps=self.eps) + shift


class Growing(nn.Module):
    """A network with a block for each resolution from 4×4."""

    blocks: nn.ModuleList

    def grow(self, resolution: int, alpha: float | Tensor = 1.0) -> None:
        """Works at `resolution` from now on: `alpha` of its images are of that, and the rest of half of it.

        A 0-d tensor is used as it is, whatever it comes to hold.
        """
        known = [4 << level for level in range(len(self.blocks))]
        if resolution not in known[1:]:
            raise ValueError(f"resolution must be one of {', '.join(map(str, known[1:]))}, not {resolution}")
        if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, not {alpha}")
        self.level, self.alpha = known.index(resolution), alpha

    @property
    def is_fading(self) -> bool:
        return isinstance(self.alpha, Tensor) or self.alpha < 1

    def fade(self, before: Tensor, now: Tensor) -> Tensor:
        """What half of the resolution gave, and what it gives now, blended."""
        return blend(before, now, self.alpha)


# ── Generator ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Mapping(nn.Sequential):
    """z `(N, latent_dim)` to w `(N, w_dim)`."""

    def __init__(self, latent_dim: int, w_dim: int, layers: int):
        dims = [latent_dim, *[w_dim] * layers]
        linear = [EqualLinear(dims[i], dims[i + 1], lr_multiplier=0.01) for i in range(layers)]
        super().__init__(PixelNorm(), *(part for layer in linear for part in (layer, nn.LeakyReLU(SLOPE))))


class SynthesisBlock(nn.Module):
    """One resolution: two convolutions, each with its epilogue. `inside` is None at 4×4, where a constant takes the place
    of the first convolution."""

    def __init__(self, inside: int | None, channels: int, resolution: int, w_dim: int):
        super().__init__()
        if inside is None:
            self.constant = nn.Parameter(torch.randn(1, channels, resolution, resolution))
        else:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2), EqualConv2d(inside, channels, 3, bias=False), Blur())
        self.epilogue1 = LayerEpilogue(channels, resolution, w_dim)
        self.conv = EqualConv2d(channels, channels, 3, bias=False)
        self.epilogue2 = LayerEpilogue(channels, resolution, w_dim)
        self.resolution = resolution

    def forward(self, x: Tensor | None, w1: Tensor, w2: Tensor) -> Tensor:
        x = self.constant.repeat(len(w1), 1, 1, 1) if x is None else self.up(x)
        x = self.epilogue1(x, w1, self.draw(x))
        x = self.conv(x)
        return self.epilogue2(x, w2, self.draw(x))

    def draw(self, x: Tensor) -> Tensor | None:
        """New noise in training. It is drawn in float32, so that all precisions see the same."""
        shape = (len(x), 1, self.resolution, self.resolution)
        return torch.randn(shape, device=x.device).to(x.dtype) if self.training else None


class Generator(Growing):
    """Maps latents z to images `(N, channels, resolution, resolution)`; real images are in [-1, 1].

    z is `(N, latent_dim)`; further axes of one element, which DCGAN's noise has, do not matter. w has a style for each of
    the `layers` that are in use, two at each resolution.
    """

    w_avg: Tensor
    """The running mean of w in training, `(w_dim,)`: what truncation draws towards."""

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        latent_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        features: int = 512,
    ):
        super().__init__()
        resolutions = [4 << level for level in range(doublings(image_size) + 1)]
        widths = [width(resolution, features) for resolution in resolutions]
        self.mapping = Mapping(latent_dim, w_dim, mapping_layers)
        self.blocks = nn.ModuleList(
            SynthesisBlock(inside, outside, resolution, w_dim)
            for inside, outside, resolution in zip([None, *widths], widths, resolutions, strict=False)
        )
        self.to_rgb = nn.ModuleList(EqualConv2d(outside, channels, 1, gain=1) for outside in widths)
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.grow(image_size)

    @property
    def layers(self) -> int:
        return 2 * (self.level + 1)

    def forward(self, z: Tensor, other: Tensor | None = None, crossover: int | Tensor = 0) -> Tensor:
        """Images of z. With `other` latents, the styles of layers from `crossover` on are theirs: style mixing."""
        w = self.styles(z)
        if other is not None:
            w = mix(w, self.styles(other), crossover)
        return self.synthesise(w)

    def styles(self, z: Tensor, truncation: float = 1.0) -> Tensor:
        """w `(N, layers, w_dim)` of z, brought nearer to the mean: w_avg + truncation · (w − w_avg)."""
        w = self.mapping(z.flatten(1))
        if self.training:
            self.w_avg.lerp_(w.detach().mean(0).to(self.w_avg.dtype), 1 - W_AVG_DECAY)
        if truncation != 1:
            w = self.w_avg + truncation * (w - self.w_avg)
        return w[:, None].expand(-1, self.layers, -1)

    def synthesise(self, w: Tensor) -> Tensor:
        """Images of w `(N, layers, w_dim)`."""
        x = before = None
        for level in range(self.level + 1):
            before, x = x, self.blocks[level](x, w[:, 2 * level], w[:, 2 * level + 1])
        images = self.to_rgb[self.level](x)
        if self.is_fading:
            images = self.fade(double(self.to_rgb[self.level - 1](before)), images)
        return images


def mix(coarse: Tensor, fine: Tensor, crossover: int | Tensor) -> Tensor:
    """w with the styles of `coarse` in the first `crossover` layers and those of `fine` in the others."""
    layers = torch.arange(coarse.shape[1], device=coarse.device)[:, None]
    return torch.where(layers < crossover, coarse, fine)


# ── Discriminator ────────────────────────────────────────────────────────────────────────────────────────────────────


class DiscriminatorBlock(nn.Sequential):
    """One resolution, mirrored: two convolutions, the second of which halves it."""

    def __init__(self, channels: int, outside: int):
        super().__init__(
            EqualConv2d(channels, channels, 3),
            nn.LeakyReLU(SLOPE),
            Blur(),
            EqualConv2d(channels, outside, 3),
            nn.AvgPool2d(2),
            nn.LeakyReLU(SLOPE),
        )


class Discriminator(Growing):
    """Maps images `(N, channels, resolution, resolution)` to logits `(N, 1)`: positive means "real"."""

    def __init__(self, image_size: int = 64, channels: int = 3, features: int = 512):
        super().__init__()
        widths = [width(4 << level, features) for level in range(doublings(image_size) + 1)]
        self.from_rgb = nn.ModuleList(
            nn.Sequential(EqualConv2d(channels, outside, 1), nn.LeakyReLU(SLOPE)) for outside in widths
        )
        end = nn.Sequential(
            MinibatchStddev(),
            EqualConv2d(widths[0] + 1, widths[0], 3),
            nn.LeakyReLU(SLOPE),
            nn.Flatten(),
            EqualLinear(16 * widths[0], widths[0]),
            nn.LeakyReLU(SLOPE),
            EqualLinear(widths[0], 1, gain=1),
        )
        halving = (DiscriminatorBlock(widths[level], widths[level - 1]) for level in range(1, len(widths)))
        self.blocks = nn.ModuleList([end, *halving])
        self.grow(image_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks[self.level](self.from_rgb[self.level](images))
        if self.is_fading:
            x = self.fade(self.from_rgb[self.level - 1](halve(images)), x)
        for level in reversed(range(self.level)):
            x = self.blocks[level](x)
        return x


# ── Resolutions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def double(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2)


def halve(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 2)


def shrink(images: Tensor, resolution: int, alpha: float | Tensor = 1.0) -> Tensor:
    """Images as networks that have grown so far know them: averaged, and blended with half of the resolution."""
    images = F.avg_pool2d(images, images.shape[-1] // resolution)
    is_whole = not isinstance(alpha, Tensor) and alpha == 1
    return images if is_whole else blend(double(halve(images)), images, alpha)


def blend(before: Tensor, now: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 − alpha) · before + alpha · now."""
    return torch.lerp(before, now, alpha.to(now.dtype) if isinstance(alpha, Tensor) else alpha)
