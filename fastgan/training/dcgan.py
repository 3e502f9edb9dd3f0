"""DCGAN's losses and training step: Algorithm 1 of Goodfellow et al. (2014) with the non-saturating generator loss."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fastgan.models.dcgan import Discriminator, Generator, doublings, init_weights
from fastgan.training.errors import InputError
from fastgan.training.system import Settings, System, adam, require

LARGEST = 1024
"""Pixels. Each doubling makes the widest layer twice as wide: 8192 channels here, and 23 GB of networks with Adam."""


@dataclass(frozen=True)
class DCGANSettings(Settings):
    """`Settings`, and DCGAN's own."""

    d_steps: int = 1
    label_smoothing: float = 0.0
    latent_dim: int = 100
    features: int = 64

    def check(self) -> None:
        super().check()
        require(self.d_steps >= 1, "--d-steps", self.d_steps, "1 or more")
        require(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "0 or more, below 1")
        try:
            doublings(self.image_size)
        except ValueError as error:
            raise InputError(f"--image-size: {error}") from error
        require(self.image_size <= LARGEST, "--image-size", self.image_size, f"{LARGEST} or less")


class DCGAN(System[DCGANSettings]):
    """The generator, the discriminator, and their alternating step."""

    name = "dcgan"
    settings_type = DCGANSettings

    def __init__(self, settings: DCGANSettings, channels: int, accelerator: Accelerator):
        super().__init__(settings, channels, accelerator)
        size, features, device = settings.image_size, settings.features, accelerator.device
        self.generator = Generator(size, channels, settings.latent_dim, features).apply(init_weights).to(device)
        self.discriminator = Discriminator(size, channels, features).apply(init_weights).to(device)
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.optimizers = {name: adam(network, settings.lr, (0.5, 0.999)) for name, network in self.networks.items()}
        self.draws = settings.d_steps

    def step(self, reals: Iterator[Tensor]) -> dict[str, Tensor]:
        """`d_steps` updates of the discriminator, each on new real and new fake images, then one of the generator.

        The generator learns from the last fakes that the discriminator has seen, so it runs once for both.
        """
        metrics: dict[str, Tensor] = {}
        for remaining in reversed(range(self.settings.d_steps)):
            real = next(reals)
            with torch.set_grad_enabled(remaining == 0), self.accelerator.autocast():
                fake = self.generator(self.noise(len(real)))
            metrics = self.discriminator_step(real, fake.detach())
        return metrics | self.generator_step(fake)

    def discriminator_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Ascends log D(x) + log(1 - D(G(z))), with real and fake images in batches of their own."""
        self.optimizers["discriminator"].zero_grad()
        real_logits = self.judge(real)
        real_loss = cross_entropy(real_logits, 1 - self.settings.label_smoothing)
        real_loss.backward()
        fake_logits = self.judge(fake)
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
        loss = cross_entropy(self.judge(fake), 1)
        loss.backward()
        self.discriminator.requires_grad_(True)
        return {"loss_g": loss.detach(), "grad_norm_g": self.update("generator")}

    def judge(self, images: Tensor) -> Tensor:
        """The discriminator's logits, in float32. Each call has its own autocast: weights change in between."""
        with self.accelerator.autocast():
            logits = self.discriminator(images)
        return logits.float()

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.accelerator.device
        shape = (count, self.settings.latent_dim, 1, 1)
        return torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)

    def sample(self, noise: Tensor) -> Tensor:
        self.generator.eval()
        with torch.no_grad():
            images = self.generator(noise)
        self.generator.train()
        return images


def cross_entropy(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy against one target for all: 1 is "real", 0 is "fake"."""
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))
