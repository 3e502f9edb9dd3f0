"""WGAN-GP's losses and training step: Algorithm 1 of Gulrajani et al. (2017)."""

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastgan.models.dcgan import Generator, init_weights
from fastgan.models.wgan_gp import Critic, Norm, ResidualCritic, ResidualGenerator, init_residual
from fastgan.penalties import gradient_penalty
from fastgan.training.latent import LatentSettings, LatentSystem
from fastgan.training.processes import Processes
from fastgan.training.system import adam, require, require_count

Architecture = Literal["dcgan", "residual"]


@dataclass(frozen=True)
class WGANGPSettings(LatentSettings):
    """`LatentSettings`, and WGAN-GP's own."""

    lr: float = 1e-4
    latent_dim: int = 128
    architecture: Architecture = "dcgan"
    critic_norm: Norm = "none"
    critic_steps: int = 5
    penalty_weight: float = 10.0

    def check(self) -> None:
        super().check()
        architectures, norms = get_args(Architecture), get_args(Norm)
        require(self.architecture in architectures, "--architecture", self.architecture, " or ".join(architectures))
        require(self.critic_norm in norms, "--critic-norm", self.critic_norm, f"one of {', '.join(norms)}")
        require_count("--critic-steps", self.critic_steps)
        require(self.penalty_weight >= 0, "--penalty-weight", self.penalty_weight, "0 or more")
        least = 16 if self.architecture == "residual" else 8
        require(self.image_size >= least, "--image-size", self.image_size, f"{least} or more for this architecture")
        if self.critic_norm == "batch":
            warnings.warn(
                "--critic-norm batch: a penalty on the gradient of each score in its own image means little where batch "
                "norm makes every score depend on every image; layer and instance do not",
                stacklevel=2,
            )


def stock_gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, *, weight: float) -> Tensor:
    """`gradient_penalty` as it is written in stock PyTorch."""
    position = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    between = torch.lerp(real, fake, position).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    norms = (gradient.square().sum((1, 2, 3)) + 1e-12).sqrt()
    return weight * (norms - 1).square().mean()


class WGANGP(LatentSystem[WGANGPSettings]):
    """The generator, the critic, and their step: several updates of the critic, then one of the generator."""

    name = "wgan-gp"
    settings_type = WGANGPSettings

    def __init__(self, settings: WGANGPSettings, channels: int, accelerator: Processes):
        super().__init__(settings, channels, accelerator)
        size, latent, features = settings.image_size, settings.latent_dim, settings.features
        if settings.architecture == "residual":
            generator: nn.Module = ResidualGenerator(size, channels, latent, features).apply(init_residual)
            critic: nn.Module = ResidualCritic(size, channels, features, settings.critic_norm).apply(init_residual)
        else:
            generator = Generator(size, channels, latent, features).apply(init_weights)
            critic = Critic(size, channels, features, settings.critic_norm).apply(init_weights)
        self.generator, self.critic = generator.to(accelerator.device), critic.to(accelerator.device)
        self.networks = {"generator": self.generator, "critic": self.critic}
        self.optimizers = {name: adam(network, settings.lr, (0.0, 0.9)) for name, network in self.networks.items()}
        self.draws = settings.critic_steps

    def launch(self, *reals: Tensor) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for real in reals:
            with torch.no_grad(), self.accelerator.autocast():
                fake = self.generator(self.noise(len(real)))
            metrics = self.critic_step(real, fake.float())
        return metrics | self.generator_step(len(reals[0]))

    def critic_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Descends E D(G(z)) − E D(x) + weight · E(‖∇D(x̂)‖ − 1)², with x̂ between real and fake images."""
        self.optimizers["critic"].zero_grad()
        distance = self.judge(self.critic, real).mean() - self.judge(self.critic, fake).mean()
        with self.accelerator.autocast():
            penalise = stock_gradient_penalty if self.is_stock else gradient_penalty
            penalty = penalise(self.critic, real, fake, weight=self.settings.penalty_weight)
        loss = penalty - distance
        loss.backward()
        return {
            "loss_critic": loss.detach(),
            "penalty": penalty.detach(),
            "wasserstein": distance.detach(),
            "grad_norm_critic": self.update("critic"),
        }

    def generator_step(self, count: int) -> dict[str, Tensor]:
        """Descends −E D(G(z)). The critic is frozen meanwhile: its weight gradients would go unused."""
        self.optimizers["generator"].zero_grad()
        with self.accelerator.autocast():
            fake = self.generator(self.noise(count))
        self.critic.requires_grad_(False)
        loss = -self.judge(self.critic, fake).mean()
        loss.backward()
        self.critic.requires_grad_(True)
        return {"loss_generator": loss.detach(), "grad_norm_generator": self.update("generator")}
