"""What systems share whose generator turns noise into images, and whose other network scores images."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastgan.models.dcgan import doublings
from fastgan.training.data import ImageSet
from fastgan.training.errors import InputError
from fastgan.training.images import Grid
from fastgan.training.system import Settings, System, require, require_count

LARGEST = 1024
"""Pixels. Each doubling makes DCGAN's widest layer twice as wide: 8192 channels here, and 23 GB of networks with Adam."""

GRID = 64
"""Images in a sample grid."""


@dataclass(frozen=True)
class LatentSettings(Settings):
    """`Settings`, and the sizes of such networks."""

    sources: ClassVar[tuple[str, ...]] = ("data",)

    data: str = "digits"
    latent_dim: int = 100
    features: int = 64

    def check(self) -> None:
        super().check()
        require(self.batch_size >= 2, "--batch-size", self.batch_size, "2 or more, as batch norm needs")
        try:
            doublings(self.image_size)
        except ValueError as error:
            raise InputError(f"--image-size: {error}") from error
        require_count("--latent-dim", self.latent_dim)
        require_count("--features", self.features)
        require(self.image_size <= LARGEST, "--image-size", self.image_size, f"{LARGEST} or less")


L = TypeVar("L", bound=LatentSettings)


class LatentSystem(System[L]):
    """A system with a `generator` of noise `(N, latent_dim, 1, 1)`."""

    generator: nn.Module

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` latents on the system's device; from a CPU `generator`, if given, so that devices agree."""
        device = self.accelerator.device
        shape = (count, self.settings.latent_dim, 1, 1)
        return torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)

    def sample(self, noise: Tensor) -> Tensor:
        """Images in [-1, 1] for `noise`, changing nothing in the system."""
        self.generator.eval()
        with torch.no_grad():
            images = self.generator(noise)
        self.generator.train()
        return images

    def walk(self, start: Tensor, end: Tensor, frames: int) -> Tensor:
        """Images of `frames` latents from `start` to `end`."""
        return self.sample(slerp(start, end, frames))

    def sample_grid(self, sets: Sequence[ImageSet]) -> Callable[[], Grid]:
        """Images of the same latents."""
        noise = self.noise(GRID, torch.Generator().manual_seed(self.settings.seed))
        return lambda: Grid(self.sample(noise))


@dataclass(frozen=True)
class AlternatingSettings(LatentSettings):
    """`LatentSettings`, and how often the discriminator learns."""

    d_steps: int = 1

    def check(self) -> None:
        super().check()
        require_count("--d-steps", self.d_steps)


A = TypeVar("A", bound=AlternatingSettings)


class AlternatingSystem(LatentSystem[A]):
    """A system whose generator and discriminator learn by turns."""

    @abstractmethod
    def discriminator_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def generator_step(self, fake: Tensor) -> dict[str, Tensor]: ...

    def launch(self, *reals: Tensor) -> dict[str, Tensor]:
        """`d_steps` updates of the discriminator, each on new real and new fake images, then one of the generator.

        The generator learns from the last fakes that the discriminator has seen, so it runs once for both.
        """
        metrics: dict[str, Tensor] = {}
        for turn, real in enumerate(reals, 1):
            with torch.set_grad_enabled(turn == len(reals)), self.accelerator.autocast():
                fake = self.generator(self.noise(len(real)))
            metrics = self.discriminator_step(real, fake.detach())
        return metrics | self.generator_step(fake)


def slerp(start: Tensor, end: Tensor, frames: int) -> Tensor:
    """`frames` points on the great circle from `start` to `end`: normal latents stay as long as normal latents are.

    A straight line would pass closer to the origin than the generator has ever seen.
    """
    angle = torch.acos(torch.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1))
    t = torch.linspace(0, 1, frames, device=start.device).view(-1, *[1] * start.dim())
    return (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
