"""A training step of StyleGAN, 64×64, at its full resolution, with R1 at every step, against the same in stock PyTorch."""

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim import Adam

from fastgan.bench.case import Case
from fastgan.bench.training_step import Setup, StepCase, Stock, Trainer
from fastgan.models.stylegan import Discriminator, Generator
from fastgan.training.stylegan import StyleGAN, StyleGANSettings

SIZE, BATCH, LATENT, MAPPING_LAYERS, GAMMA = 64, 8, 512, 8, 10.0

PEERS = {
    "as written": Stock(),
    "channels_last": Stock(channels_last=True),
    "tuned": Stock(channels_last=True, tuned=True),
    "NCHW tuned": Stock(tuned=True),
    "tuned compile": Stock(channels_last=True, tuned=True, compiled=True),
    "NCHW tuned compile": Stock(tuned=True, compiled=True),
}


class StockTrainer(Trainer):
    def __init__(self, stock: Stock, setup: Setup):
        self.stock, self.setup, self.reals = stock, setup, cycle(setup.reals)
        torch.manual_seed(0)
        features = width(setup.device)
        generator = Generator(SIZE, 3, LATENT, LATENT, MAPPING_LAYERS, features)
        discriminator = Discriminator(SIZE, 3, features)
        self.generator = generator.to(setup.device, setup.dtype)
        self.discriminator = discriminator.to(setup.device, setup.dtype)
        if stock.channels_last:
            for network in (self.generator, self.discriminator):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.manual_seed(0)
        self.average = Generator(SIZE, 3, LATENT, LATENT, MAPPING_LAYERS, features).to(setup.device, setup.dtype)
        self.adam_g, self.adam_d = (
            Adam(network.parameters(), lr=setup.lr, betas=(0.0, 0.99), fused=stock.tuned or None)
            for network in (self.generator, self.discriminator)
        )
        self.generate: Callable[[Tensor], Tensor] = self.generator
        self.judge_fakes: Callable[[Tensor], Tensor] = self.discriminator
        if stock.compiled:  # not the discriminator of real images: compiled code has no double backward
            self.generate, self.judge_fakes = (
                torch.compile(n, dynamic=False) for n in (self.generate, self.judge_fakes)
            )

    def judge(self, discriminator: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if self.stock.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.setup.precision():
            return discriminator(images)

    def fakes(self) -> Tensor:
        noise = self.setup.noise()
        with self.setup.precision():
            return self.generate(noise)

    def step(self) -> None:
        real = next(self.reals).detach().requires_grad_()
        with torch.no_grad():
            fake = self.fakes().to(real.dtype)
        self.discriminator.zero_grad()
        scores = self.judge(self.discriminator, real)
        (grad,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        penalty = GAMMA / 2 * grad.square().sum((1, 2, 3)).mean()
        loss = softplus(-scores).mean() + softplus(self.judge(self.judge_fakes, fake)).mean() + penalty
        loss.backward()
        self.adam_d.step()
        self.generator.zero_grad()
        self.discriminator.requires_grad_(not self.stock.tuned)
        softplus(-self.judge(self.judge_fakes, self.fakes())).mean().backward()
        self.discriminator.requires_grad_(True)
        self.adam_g.step()
        with torch.no_grad():
            for mean, parameter in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(parameter, 1e-3)


class FusedTrainer(Trainer):
    def __init__(self, setup: Setup):
        torch.manual_seed(0)
        settings = StyleGANSettings(
            image_size=SIZE, batch_size=BATCH, lr=setup.lr, latent_dim=LATENT, w_dim=LATENT, gamma=GAMMA,
            mapping_layers=MAPPING_LAYERS, features=width(setup.device), mixing_probability=0.0, phase_images=0,
        )  # fmt: skip
        system = StyleGAN(settings, 3, setup.process())
        system.fuse()
        system.capture()
        self.generator = system.generator
        reals = cycle(setup.reals)
        self.step = lambda: system.step(reals)


def width(device: torch.device) -> int:
    """Channels: the paper's, or as many as leave a CPU time for several steps."""
    return 512 if device.type == "cuda" else 128


def cases(device: torch.device) -> Iterator[Case]:
    yield StepCase(
        op="StyleGAN",
        work="training step",
        shape=f"{BATCH}×3×{SIZE}², {width(device)} channels",
        dtype=torch.float32,
        layout="as each likes",
        headline=True,
        image=(BATCH, 3, SIZE, SIZE),
        latent_dim=LATENT,
        lr=1e-3,
        autocast=False,
        ours=FusedTrainer,
        stock=StockTrainer,
        peers=PEERS,
    )
