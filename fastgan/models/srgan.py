"""SRGAN (Ledig et al., 2016): figure 4's generator and discriminator, and the VGG19 features of its content loss.

Images are floats from -1 to 1, small ones and large ones. As in the paper the generator ends without an activation, so what
it returns may leave that range a little; whoever makes pixels of it clips.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)
"""Channels of VGG19's convolutions up to the fourth of its fifth block (Simonyan & Zisserman, 2015); 0 is a max pool."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of images from 0 to 1: what torchvision's weights were trained on."""


class ResidualBlock(nn.Module):
    """y = x + bn(conv(prelu(bn(conv(x))))), of 3×3 convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.prelu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        return x + out


class UpsampleBlock(nn.Module):
    """Doubles the height and width: a convolution to four times the channels, whose values become squares of 2×2 pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * 4, 3, 1, 1)
        self.pixel_shuffle = nn.PixelShuffle(2)
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.pixel_shuffle(self.conv(x)))


class Generator(nn.Module):
    """SRResNet: maps images `(N, channels, H, W)` to `(N, channels, scale·H, scale·W)`, of any H and W.

    In the paper's notation k9n64, `blocks` residual blocks of k3n64, k3n64, a sum over all of them, k3n256 with a pixel
    shuffle for each doubling, k9n3.
    """

    def __init__(self, scale: int = 4, channels: int = 3, features: int = 64, blocks: int = 16):
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two, 2 or more; got {scale}")
        doublings = scale.bit_length() - 1
        self.scale = scale
        self.reach = math.ceil(4 + 2 * blocks + 1 + sum(0.5**i for i in range(doublings)) + 4 / scale)
        """How far from a pixel of the input, in pixels of the input, the output may still depend on it."""
        self.conv1 = nn.Conv2d(channels, features, 9, 1, 4)
        self.prelu = nn.PReLU()
        self.blocks = nn.Sequential(*(ResidualBlock(features) for _ in range(blocks)))
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(features)
        self.upsample = nn.Sequential(*(UpsampleBlock(features) for _ in range(doublings)))
        self.conv3 = nn.Conv2d(features, channels, 9, 1, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.conv1(images))
        out = self.blocks(x)
        out = self.bn(self.conv2(out))
        return self.conv3(self.upsample(x + out))


class Discriminator(nn.Module):
    """Maps images `(N, channels, image_size, image_size)`, a multiple of 16, to logits `(N, 1)`: positive means "real".

    The paper's sigmoid at the end is left to a loss that takes logits.
    """

    def __init__(self, image_size: int = 96, channels: int = 3, features: int = 64):
        super().__init__()
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16; got {image_size}")
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 3, 1, 1), nn.LeakyReLU(0.2, inplace=True)]
        widths = [features * factor for factor in (1, 1, 2, 2, 4, 4, 8, 8)]
        for place, (width, wider) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv2d(width, wider, 3, 1 if place % 2 else 2, 1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.convs = nn.Sequential(*layers)
        self.dense1 = nn.Linear(widths[-1] * (image_size // 16) ** 2, features * 16)
        self.leaky_relu = nn.LeakyReLU(0.2, inplace=True)
        self.dense2 = nn.Linear(features * 16, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convs(images).flatten(1)
        return self.dense2(self.leaky_relu(self.dense1(x)))


class VGGFeatures(nn.Module):
    """The paper's φ5,4: VGG19's fourth convolution before its fifth max pool, after the activation.

    Maps images `(N, 3, H, W)` in [-1, 1] to `(N, 512, ⌊H/16⌋, ⌊W/16⌋)`. Its keys are those of torchvision's `vgg19`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG19:
            if width:
                layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers += [nn.MaxPool2d(2, 2)]
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(((images + 1) / 2 - self.mean) / self.std)


def init_weights(module: nn.Module) -> None:
    """For `generator.apply(init_weights)`: residual blocks start as the identity, which a short training gains from."""
    if isinstance(module, ResidualBlock):
        nn.init.zeros_(module.bn2.weight)
