"""Networks of WGAN-GP (Gulrajani et al., 2017): a critic shaped like DCGAN's, and the paper's residual pair.

A critic under a gradient penalty must not normalise over the batch: the penalty asks for the gradient of each output in its
own input, and batch norm makes every output depend on every input. So the norm is none, of layers or of instances.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from fastgan.models.dcgan import doublings

Norm = Literal["none", "layer", "instance", "batch"]


def norm_layer(norm: Norm, channels: int, size: int) -> nn.Module | None:
    """A norm for `(N, channels, size, size)`; "layer" is over all of a sample, with a weight for each element."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, not {norm!r}")
    if norm == "layer":
        return nn.LayerNorm((channels, size, size))
    if norm == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.BatchNorm2d(channels) if norm == "batch" else None


class Critic(nn.Module):
    """DCGAN's discriminator with another norm.

    Maps images `(N, channels, image_size, image_size)` to scores `(N, 1, 1, 1)`.
    """

    def __init__(self, image_size: int = 64, channels: int = 3, features: int = 64, norm: Norm = "none"):
        super().__init__()
        width, size = features, image_size // 2
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for _ in range(doublings(image_size) - 1):
            width, size = width * 2, size // 2
            normalise = norm_layer(norm, width, size)
            layers += [nn.Conv2d(width // 2, width, 4, 2, 1), *([normalise] if normalise else [])]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(width, 1, 4, 1, 0)]
        self.main = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


class ResidualBlock(nn.Module):
    """y = shortcut(x) + conv(act(norm(conv(act(norm(x)))))), where the resolution may change on the way.

    Up-sampling is of nearest neighbours and comes before its convolution; down-sampling is a mean of 2×2 and comes after.
    `first`: of a critic, on raw images, which are neither normalised nor rectified.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        size: int,
        resample: Literal["up", "down"] | None = None,
        norm: Norm = "none",
        first: bool = False,
    ):
        super().__init__()
        inside, outside = channels
        up = [nn.Upsample(scale_factor=2)] if resample == "up" else []
        down = [nn.AvgPool2d(2)] if resample == "down" else []
        larger = size * 2 if up else size
        before = [] if first else [norm_layer(norm, inside, size), nn.ReLU()]
        between = [norm_layer(norm, outside, larger), nn.ReLU()]
        main = [
            *before,
            *up,
            nn.Conv2d(inside, outside, 3, 1, 1),
            *between,
            nn.Conv2d(outside, outside, 3, 1, 1),
            *down,
        ]
        self.main = nn.Sequential(*(layer for layer in main if layer is not None))
        match = [nn.Conv2d(inside, outside, 1)] if resample or inside != outside else []
        # On images the mean comes first: three channels are less to average than the features.
        self.shortcut = nn.Sequential(*([*down, *match] if first else [*up, *match, *down]))

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.main(x)


class ResidualGenerator(nn.Module):
    """Maps noise `(N, latent_dim, 1, 1)` to images `(N, channels, image_size, image_size)` in [-1, 1]."""

    def __init__(self, image_size: int = 32, channels: int = 3, latent_dim: int = 128, features: int = 128):
        super().__init__()
        self.start = nn.ConvTranspose2d(latent_dim, features, 4)
        blocks = [ResidualBlock((features, features), 4 << i, "up", norm="batch") for i in range(doublings(image_size))]
        end = [nn.BatchNorm2d(features), nn.ReLU(), nn.Conv2d(features, channels, 3, 1, 1), nn.Tanh()]
        self.main = nn.Sequential(*blocks, *end)

    def forward(self, noise: Tensor) -> Tensor:
        return self.main(self.start(noise))


class ResidualCritic(nn.Module):
    """Maps images `(N, channels, image_size, image_size)` to scores `(N, 1)`."""

    def __init__(self, image_size: int = 32, channels: int = 3, features: int = 128, norm: Norm = "none"):
        super().__init__()
        size = image_size
        blocks = [ResidualBlock((channels, features), size, "down", norm, first=True)]
        for _ in range(doublings(image_size) - 2):
            size //= 2
            blocks.append(ResidualBlock((features, features), size, "down", norm))
        blocks += [ResidualBlock((features, features), size // 2, None, norm) for _ in range(2)]
        self.main = nn.Sequential(*blocks, nn.ReLU())
        self.end = nn.Linear(features, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.end(self.main(images).mean((2, 3)))


def init_residual(module: nn.Module) -> None:
    """The paper's weights, for `network.apply(init_residual)`: He's for what a ReLU stands before, else Glorot's."""
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        return
    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    else:
        nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
