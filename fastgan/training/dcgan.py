"""DCGAN's losses and training step: Algorithm 1 of Goodfellow et al. (2014) with the non-saturating generator loss."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fastgan.models.dcgan import Discriminator, Generator, init_weights
from fastgan.training.latent import AlternatingSettings, AlternatingSystem
from fastgan.training.processes import Processes
from fastgan.training.system import adam, require


@dataclass(frozen=True)
class DCGANSettings(AlternatingSettings):
    """`AlternatingSettings`, and DCGAN's own."""

    label_smoothing: float = 0.0

    def check(self) -> None:
        super().check()
        require(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "0 or more, below 1")


class DCGAN(AlternatingSystem[DCGANSettings]):
    """The generator, the discriminator, and their alternating step."""

    name = "dcgan"
    settings_type = DCGANSettings
    epochs = 12  # digits can be told apart, after two minutes on two cores

    def __init__(self, settings: DCGANSettings, channels: int, accelerator: Processes):
        super().__init__(settings, channels, accelerator)
        size, features, device = settings.image_size, settings.features, accelerator.device
        self.generator = Generator(size, channels, settings.latent_dim, features).apply(init_weights).to(device)
        self.discriminator = Discriminator(size, channels, features).apply(init_weights).to(device)
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.optimizers = {name: adam(network, settings.lr, (0.5, 0.999)) for name, network in self.networks.items()}
        self.draws = settings.d_steps

    def discriminator_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Ascends log D(x) + log(1 - D(G(z))), with real and fake images in batches of their own."""
        self.optimizers["discriminator"].zero_grad()
        real_logits = self.judge(self.discriminator, real)
        real_loss = cross_entropy(real_logits, 1 - self.settings.label_smoothing)
        real_loss.backward()
        fake_logits = self.judge(self.discriminator, fake)
        fake_loss = cross_entropy(fake_logits, 0)
        fake_loss.backward()
        return {
            "loss_d": real_loss.detach() + fake_loss.detach(),
            "d_real": real_logits.detach().sigmoid().mean(),
            "d_fake": fake_logits.detach().sigmoid().mean(),
            "grad_norm_d": self.update("discriminator"),
        }

    def generator_step(self, fake: Tensor) -> dict[str, Tensor]:
        """Ascends log D(G(z)). The discriminator is frozen meanwhile: its weight gradients would go unused."""
        self.optimizers["generator"].zero_grad()
        self.discriminator.requires_grad_(False)
        loss = cross_entropy(self.judge(self.discriminator, fake), 1)
        loss.backward()
        self.discriminator.requires_grad_(True)
        return {"loss_g": loss.detach(), "grad_norm_g": self.update("generator")}


def cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy against one target for all: 1 is "real", 0 is "fake"."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
