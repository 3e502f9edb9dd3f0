"""Networks of SN-GAN (Miyato et al., 2018): the paper's standard CNN and its residual pair.

Every layer of a discriminator is divided by its largest singular value, σ(W), which a step of power iteration follows
through training: so the discriminator is 1-Lipschitz, up to its activations, whatever its weights become.
"""

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from fastgan.models.dcgan import doublings
from fastgan.models.wgan_gp import ResidualCritic

SLOPE = 0.1


def normalise_spectra(network: nn.Module) -> None:
    """Spectral norm for every convolution and linear layer."""
    for layer in list(network.modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            spectral_norm(layer)


class Generator(nn.Module):
    """Table 3: maps noise `(N, latent_dim, 1, 1)` to images `(N, channels, image_size, image_size)` in [-1, 1].

    The widest maps, at 4×4, have 512 channels where images are 32×32 and `features` is 64.
    """

    def __init__(self, image_size: int = 32, channels: int = 3, latent_dim: int = 128, features: int = 64):
        super().__init__()
        width = features << doublings(image_size)
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(latent_dim, width, 4, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
        while width > features:
            width //= 2
            layers += [nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, 1, 1), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        return self.main(noise)


class Discriminator(nn.Module):
    """Table 3: maps images `(N, channels, image_size, image_size)` to scores `(N, 1)`."""

    def __init__(self, image_size: int = 32, channels: int = 3, features: int = 64):
        super().__init__()
        inside, width = channels, features
        layers: list[nn.Module] = []
        for _ in range(doublings(image_size)):
            layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.LeakyReLU(SLOPE, True)]
            layers += [nn.Conv2d(width, width, 4, 2, 1), nn.LeakyReLU(SLOPE, True)]
            inside, width = width, 2 * width
        layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.LeakyReLU(SLOPE, True), nn.Flatten(), nn.Linear(16 * width, 1)]
        self.main = nn.Sequential(*layers)
        normalise_spectra(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


class ResidualDiscriminator(ResidualCritic):
    """Table 4: maps images `(N, channels, image_size, image_size)` to scores `(N, 1)`, by a sum over the last maps."""

    def __init__(self, image_size: int = 32, channels: int = 3, features: int = 128):
        super().__init__(image_size, channels, features)
        normalise_spectra(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.end(self.main(images).sum((2, 3)))
