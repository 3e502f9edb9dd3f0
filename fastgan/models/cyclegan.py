"""CycleGAN (Zhu et al., 2017), laid out as in the authors' PyTorch code: layer for layer, so that its state_dicts load.

Every normalisation is an instance norm without parameters, so an image comes out the same whatever else is in its batch.
"""

import torch
from torch import Tensor, nn


def halvings(image_size: int) -> int:
    """How many times `image_size` halves without a remainder, 8 at most: the levels of a U-Net for it."""
    return min(8, (image_size & -image_size).bit_length() - 1)


class ResidualBlock(nn.Module):
    """y = x + norm(conv(act(norm(conv(x))))), of 3×3 convolutions on reflected borders."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ResNetGenerator(nn.Module):
    """Maps images `(N, channels, H, W)` to images of the same shape in [-1, 1]; H and W are multiples of 4, 8 or more.

    In the paper's notation c7s1-64, d128, d256, R256 for each of `blocks`, u128, u64, c7s1-3. The paper takes 6 blocks at
    128×128 and 9 from 256×256 on.
    """

    multiple = 4

    def __init__(self, channels: int = 3, features: int = 64, blocks: int = 9):
        super().__init__()
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(channels, features, 7),
            nn.InstanceNorm2d(features),
            nn.ReLU(True),
        ]
        for width in (features, features * 2):
            layers += [nn.Conv2d(width, width * 2, 3, 2, 1), nn.InstanceNorm2d(width * 2), nn.ReLU(True)]
        layers += [ResidualBlock(features * 4) for _ in range(blocks)]
        for width in (features * 2, features):
            layers += [
                nn.ConvTranspose2d(width * 2, width, 3, 2, 1, output_padding=1),
                nn.InstanceNorm2d(width),
                nn.ReLU(True),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(features, channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class SkipBlock(nn.Module):
    """One level of the U-Net: y = (x, up(inside(down(x)))) along the channels; of the outermost, the second alone.

    The first layer works in place, so what the skip carries has gone through the leaky ReLU, as it has in the authors' code.
    """

    def __init__(self, outside: int, width: int, inside: nn.Module | None = None, outermost: bool = False):
        super().__init__()
        self.outermost = outermost
        down = nn.Conv2d(outside, width, 4, 2, 1)
        up = nn.ConvTranspose2d(width * 2 if inside else width, outside, 4, 2, 1)
        layers: list[nn.Module] = [down] if outermost else [nn.LeakyReLU(0.2, True), down]
        if inside:
            layers += [inside] if outermost else [nn.InstanceNorm2d(width), inside]
        layers += [nn.ReLU(True), up, nn.Tanh() if outermost else nn.InstanceNorm2d(outside)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class UNetGenerator(nn.Module):
    """Maps images `(N, channels, H, W)` to images of the same shape in [-1, 1]; H and W are multiples of 2^`levels`.

    pix2pix's generator (Isola et al., 2017) without its dropout. Level i has features·min(2^i, 8) channels. The authors
    take 7 levels at 128×128 and 8 at 256×256: the innermost map is of one pixel.
    """

    def __init__(self, channels: int = 3, features: int = 64, levels: int = 8):
        super().__init__()
        self.multiple = 1 << levels
        widths = [features * min(1 << level, 8) for level in range(levels)]
        block: nn.Module | None = None
        for level in range(levels - 1, 0, -1):
            block = SkipBlock(widths[level - 1], widths[level], block)
        self.model = SkipBlock(channels, features, block, outermost=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class PatchDiscriminator(nn.Module):
    """Maps images `(N, channels, H, W)` to scores `(N, 1, h, w)`, each of a patch of 70×70 pixels: C64-C128-C256-C512.

    h = ⌊H/8⌋ − 2, and w likewise: H and W are 24 or more. Scores are unbounded, for the least-squares loss or for one
    that takes logits.
    """

    def __init__(self, channels: int = 3, features: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for width, stride in ((features, 2), (features * 2, 2), (features * 4, 1)):
            layers += [
                nn.Conv2d(width, width * 2, 4, stride, 1),
                nn.InstanceNorm2d(width * 2),
                nn.LeakyReLU(0.2, True),
            ]
        layers += [nn.Conv2d(features * 8, 1, 4, 1, 1)]
        self.model = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def init_weights(module: nn.Module) -> None:
    """The paper's weights, for `network.apply(init_weights)`: N(0, 0.02), and biases of zero."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
