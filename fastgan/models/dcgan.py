"""DCGAN (Radford et al., 2016), laid out as in PyTorch's DCGAN tutorial.

At `image_size=64` both networks have the tutorial's `nn.Sequential` under `self.main`, index for index, so its
state_dicts load. Other powers of two add or remove doublings and keep the rule: the widest stage is 4x4, and each
doubling of the resolution halves the channels.

The one departure is at the discriminator's end: no `nn.Sigmoid`. It returns logits, for a loss that takes logits
(`binary_cross_entropy_with_logits`), which stays finite where log(sigmoid(x)) does not. `Sigmoid` has no parameters and
stood last, so no index moves.
"""

from torch import Tensor, nn


def doublings(image_size: int) -> int:
    """How many times 4x4 doubles on the way to `image_size`."""
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(f"image_size must be a power of two, 8 or more; got {image_size}")
    return image_size.bit_length() - 3


class Generator(nn.Module):
    """Maps noise `(N, latent_dim, 1, 1)` to images `(N, channels, image_size, image_size)` in [-1, 1]."""

    def __init__(self, image_size: int = 64, channels: int = 3, latent_dim: int = 100, features: int = 64):
        super().__init__()
        stages = doublings(image_size)
        width = features << (stages - 1)
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent_dim, width, 4, 1, 0, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
        for _ in range(stages - 1):
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(True),
            ]
            width //= 2
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        return self.main(noise)


class Discriminator(nn.Module):
    """Maps images `(N, channels, image_size, image_size)` to logits `(N, 1, 1, 1)`: positive means "real"."""

    def __init__(self, image_size: int = 64, channels: int = 3, features: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        width = features
        for _ in range(doublings(image_size) - 1):
            layers += [
                nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width * 2),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width *= 2
        layers += [nn.Conv2d(width, 1, 4, 1, 0, bias=False)]
        self.main = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def init_weights(module: nn.Module) -> None:
    """The paper's weights, for `network.apply(init_weights)`: N(0, 0.02), and N(1, 0.02) for batch norm's scale."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
