"""StyleGAN's losses, its growth and its training step: Karras et al. (2019)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

from fastgan.models.stylegan import Discriminator, Generator, mix, shrink
from fastgan.penalties import r1_penalty
from fastgan.training.latent import LatentSettings, LatentSystem
from fastgan.training.processes import Processes
from fastgan.training.system import adam, as_option, require, require_count

FIRST = 8
"""The resolution at which training starts."""


@dataclass(frozen=True)
class StyleGANSettings(LatentSettings):
    """`LatentSettings`, and StyleGAN's own."""

    batch_size: int = 32
    lr: float = 1e-3
    latent_dim: int = 64
    w_dim: int = 64
    mapping_layers: int = 8
    features: int = 32
    gamma: float = 1.0
    penalty_every: int = 1
    mixing_probability: float = 0.9
    phase_images: int = 6_000
    average_images: int = 2_000

    def check(self) -> None:
        super().check()
        for name in ("w_dim", "mapping_layers", "penalty_every", "average_images"):
            require_count(as_option(name), getattr(self, name))
        require(self.gamma >= 0, "--gamma", self.gamma, "0 or more")
        require(0 <= self.mixing_probability <= 1, "--mixing-probability", self.mixing_probability, "from 0 to 1")
        require_count("--phase-images", self.phase_images, least=0)


def growth(images: int, phase_images: int, image_size: int) -> tuple[int, float]:
    """The resolution, and how far it has faded in, once so many images were seen.

    Phases of `phase_images` take turns: one settles a resolution, the next fades in its double. The last settles for good.
    Without phases the full resolution is there from the start.
    """
    if phase_images == 0:
        return image_size, 1.0
    phase, within = divmod(images, phase_images)
    resolution = FIRST << (phase + 1) // 2
    if resolution > image_size:
        return image_size, 1.0
    return resolution, within / phase_images if phase % 2 else 1.0


class StyleGAN(LatentSystem[StyleGANSettings]):
    """The generator, its running average that samples come from, the discriminator, and their step."""

    name = "stylegan"
    settings_type = StyleGANSettings
    generator: Generator

    def __init__(self, settings: StyleGANSettings, channels: int, accelerator: Processes):
        super().__init__(settings, channels, accelerator)
        size, features = settings.image_size, settings.features
        latent = (settings.latent_dim, settings.w_dim, settings.mapping_layers)
        self.generator = Generator(size, channels, *latent, features).to(accelerator.device)
        self.discriminator = Discriminator(size, channels, features).to(accelerator.device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        trained: dict[str, nn.Module] = {"generator": self.generator, "discriminator": self.discriminator}
        self.networks = trained | {"average": self.average}
        self.optimizers = {name: adam(network, settings.lr, (0.0, 0.99)) for name, network in trained.items()}
        self.truncation = 1.0
        self.fade = torch.ones((), device=accelerator.device)
        self.grow(0)

    def fuse(self) -> None:
        super().fuse()
        # Forwards written by hand call the layers one by one, and each would bring its image into this layout and back.
        for network in self.networks.values():
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def grow(self, steps: int) -> None:
        """Brings the networks to where they are after `steps`."""
        self.steps = steps
        settings = self.settings
        self.resolution, self.alpha = growth(steps * settings.batch_size, settings.phase_images, settings.image_size)
        if self.alpha < 1:  # it changes from step to step: a graph reads it from a tensor
            self.fade.fill_(self.alpha)
        for network in (self.generator, self.average, self.discriminator):
            network.grow(self.resolution, self.faded)

    @property
    def faded(self) -> float | Tensor:
        """`alpha` as the networks have it."""
        return self.fade if self.alpha < 1 else 1.0

    @property
    def penalises(self) -> bool:
        """Whether the next step does."""
        return self.steps % self.settings.penalty_every == 0

    def step(self, reals: Iterator[Tensor]) -> dict[str, Tensor]:
        metrics = super().step(reals)
        self.grow(self.steps + 1)
        return metrics

    @property
    def kind(self) -> tuple[int, bool, bool]:
        return self.resolution, self.alpha < 1, self.penalises

    def launch(self, real: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator, one of the generator, and of its average."""
        real = shrink(real, self.resolution, self.faded)
        with torch.no_grad():
            fake = self.generate(len(real))
        metrics = self.discriminator_step(real, fake) | self.generator_step(len(real))
        self.update_average(len(real))
        return metrics

    def generate(self, count: int) -> Tensor:
        """Images of new latents. Of a batch, all or none have styles of two: `mixing_probability` decides."""
        latents, probability = self.noise(count), self.settings.mixing_probability
        mixed: tuple[Any, ...] = ()
        if probability:
            layers, device = self.generator.layers, latents.device
            stays = torch.rand((), device=device) >= probability
            mixed = self.noise(count), torch.randint(1, layers, (), device=device).masked_fill(stays, layers)
        with self.accelerator.autocast():
            return self.generator(latents, *mixed).float()

    def discriminator_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Descends E softplus(D(G(z))) + E softplus(−D(x)) + R1, which every `penalty_every` steps counts for as many."""
        self.optimizers["discriminator"].zero_grad()
        penalty = torch.zeros((), device=real.device)
        if self.penalises:
            scores, penalty = self.judge_with_penalty(real)
        else:
            scores = self.judge(self.discriminator, real)
        real_loss = softplus(-scores).mean()
        (real_loss + penalty * self.settings.penalty_every).backward()
        fake_loss = softplus(self.judge(self.discriminator, fake)).mean()
        fake_loss.backward()
        return {
            "loss_d": real_loss.detach() + fake_loss.detach(),
            "penalty": penalty.detach(),
            "grad_norm_d": self.update("discriminator"),
        }

    def judge_with_penalty(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's scores and their R1, for which it runs once."""
        scores: list[Tensor] = []

        def discriminator(images: Tensor) -> Tensor:
            scores.append(self.judge(self.discriminator, images))
            return scores[0]

        penalty = r1_penalty(discriminator, real, gamma=self.settings.gamma)
        return scores[0], penalty

    def generator_step(self, count: int) -> dict[str, Tensor]:
        """Descends E softplus(−D(G(z))). The discriminator is frozen meanwhile: its weight gradients would go unused."""
        self.optimizers["generator"].zero_grad()
        fake = self.generate(count)
        self.discriminator.requires_grad_(False)
        loss = softplus(-self.judge(self.discriminator, fake)).mean()
        loss.backward()
        self.discriminator.requires_grad_(True)
        return {"loss_g": loss.detach(), "grad_norm_g": self.update("generator")}

    @torch.no_grad()
    def update_average(self, images: int) -> None:
        """Moves the average to the generator: half of the way in `average_images` images. Buffers are copied."""
        kept = 0.5 ** (images / self.settings.average_images)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - kept)
        for mean, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            mean.copy_(buffer)

    def sample(self, noise: Tensor) -> Tensor:
        """The average's images for `noise`, at the full size from the start, and with `truncation`."""
        return self.draw(self.styles(noise))

    def walk(self, start: Tensor, end: Tensor, frames: int) -> Tensor:
        """Images on the straight line from the styles of `start` to those of `end`: w has no shape to keep to."""
        start, end = self.styles(torch.stack([start, end]))
        t = torch.linspace(0, 1, frames, device=start.device).view(-1, 1, 1)
        return self.draw(torch.lerp(start, end, t))

    def style_matrix(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Row by row, the images of `coarse`, each followed by those that have its styles at the lower half of the
        resolutions and the styles of `fine` above. The first row is that of `fine`, behind an empty image."""
        rows, columns = self.styles(coarse), self.styles(fine)
        crossover = self.generator.layers // 4 * 2
        mixed = (self.draw(mix(row.expand_as(columns), columns, crossover)) for row in rows)
        first = self.draw(columns)
        lines = [torch.full_like(first[:1], -1), first]
        for source, images in zip(self.draw(rows), mixed, strict=True):
            lines += [source[None], images]
        return torch.cat(lines)

    @torch.no_grad()
    def styles(self, noise: Tensor) -> Tensor:
        return self.average.styles(noise, self.truncation)

    @torch.no_grad()
    def draw(self, styles: Tensor) -> Tensor:
        images = self.average.synthesise(styles).clamp(-1, 1)
        return interpolate(images, size=self.settings.image_size)

    def state_dict(self) -> dict[str, Any]:
        """Of a run's checkpoint, `step` is that of the run: growth follows from it."""
        return super().state_dict() | {"step": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.grow(state["step"])
