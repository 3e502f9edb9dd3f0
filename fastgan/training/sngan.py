"""SN-GAN's losses and training step (Miyato et al., 2018): the hinge, and a discriminator of spectral norms."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.functional import relu

from fastgan.models.dcgan import init_weights
from fastgan.models.sngan import Discriminator, Generator, ResidualDiscriminator
from fastgan.models.wgan_gp import ResidualGenerator, init_residual
from fastgan.training.latent import AlternatingSettings, AlternatingSystem
from fastgan.training.processes import Processes
from fastgan.training.system import adam, require

Architecture = Literal["standard", "residual"]


@dataclass(frozen=True)
class SNGANSettings(AlternatingSettings):
    """`AlternatingSettings`, and SN-GAN's own."""

    latent_dim: int = 128
    architecture: Architecture = "standard"

    def check(self) -> None:
        super().check()
        architectures = get_args(Architecture)
        require(self.architecture in architectures, "--architecture", self.architecture, " or ".join(architectures))
        least = 16 if self.architecture == "residual" else 8
        require(self.image_size >= least, "--image-size", self.image_size, f"{least} or more for this architecture")


class SNGAN(AlternatingSystem[SNGANSettings]):
    """The generator, the discriminator, and their alternating step."""

    name = "sngan"
    settings_type = SNGANSettings

    def __init__(self, settings: SNGANSettings, channels: int, accelerator: Processes):
        super().__init__(settings, channels, accelerator)
        size, latent, features, device = settings.image_size, settings.latent_dim, settings.features, accelerator.device
        generator: nn.Module
        discriminator: nn.Module
        if settings.architecture == "residual":
            generator = ResidualGenerator(size, channels, latent, features).apply(init_residual)
            discriminator = ResidualDiscriminator(size, channels, features)
        else:
            generator = Generator(size, channels, latent, features).apply(init_weights)
            discriminator = Discriminator(size, channels, features)
        self.generator, self.discriminator = generator.to(device), discriminator.to(device)
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.optimizers = {name: adam(network, settings.lr, (0.5, 0.999)) for name, network in self.networks.items()}
        self.draws = settings.d_steps

    def discriminator_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Descends E max(0, 1 − D(x)) + E max(0, 1 + D(G(z))), with real and fake images in batches of their own."""
        self.optimizers["discriminator"].zero_grad()
        real_scores, fake_scores = (self.judge(self.discriminator, images) for images in (real, fake))
        loss = relu(1 - real_scores).mean() + relu(1 + fake_scores).mean()
        loss.backward()
        return {
            "loss_d": loss.detach(),
            "d_real": real_scores.detach().mean(),
            "d_fake": fake_scores.detach().mean(),
            "grad_norm_d": self.update("discriminator"),
        }

    def generator_step(self, fake: Tensor) -> dict[str, Tensor]:
        """Descends −E D(G(z)). The discriminator is frozen meanwhile: its weight gradients would go unused."""
        self.optimizers["generator"].zero_grad()
        self.discriminator.requires_grad_(False)
        loss = -self.judge(self.discriminator, fake).mean()
        loss.backward()
        self.discriminator.requires_grad_(True)
        return {"loss_g": loss.detach(), "grad_norm_g": self.update("generator")}
