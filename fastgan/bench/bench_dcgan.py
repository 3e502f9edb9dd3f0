"""A training step of DCGAN as `fastgan train dcgan` does it, against the same step in stock PyTorch: 64×64, and little ones,
where calls are what takes time."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

from fastgan.bench.case import Case
from fastgan.bench.training_step import Setup, StepCase, Stock, Trainer
from fastgan.fuse import fuse
from fastgan.models.dcgan import Discriminator, Generator, init_weights
from fastgan.training.dcgan import DCGAN, DCGANSettings

SIZE, BATCH, FEATURES, LATENT = 64, 64, 64, 100
LITTLE = ((32, 1, 64), (32, 8, 16), (32, 8, 64))  # images' side, batch, features

PEERS = {
    "tutorial": Stock(),
    "channels_last": Stock(channels_last=True),
    "compile": Stock(compiled=True),
    "channels_last compile": Stock(channels_last=True, compiled=True),
    "tuned": Stock(channels_last=True, tuned=True),
    "tuned compile": Stock(channels_last=True, tuned=True, compiled=True),
}


class StockTrainer(Trainer):
    def __init__(self, stock: Stock, setup: Setup, features: int = FEATURES):
        self.stock, self.setup, self.reals = stock, setup, cycle(setup.reals)
        _, channels, size, _ = setup.reals[0].shape
        torch.manual_seed(0)
        generator = Generator(size, channels, setup.latent_dim, features)
        self.generator = generator.apply(init_weights).to(setup.device, setup.dtype)
        self.discriminator = Discriminator(size, channels, features).apply(init_weights).to(setup.device, setup.dtype)
        if stock.channels_last:
            for network in (self.generator, self.discriminator):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.adam_g, self.adam_d = (
            Adam(network.parameters(), lr=setup.lr, betas=(0.5, 0.999), fused=stock.tuned or None)
            for network in (self.generator, self.discriminator)
        )
        self.generate: Callable[[Tensor], Tensor] = self.generator
        self.judge: Callable[[Tensor], Tensor] = self.discriminator
        if stock.compiled:
            self.generate, self.judge = (torch.compile(n, dynamic=False) for n in (self.generate, self.judge))

    def loss(self, images: Tensor, target: float) -> tuple[Tensor, Tensor]:
        if self.stock.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.setup.precision():
            logits = self.judge(images).view(-1)
        logits = logits.float() if self.setup.autocast else logits
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target)), logits

    def step(self) -> None:
        self.discriminator.zero_grad()
        loss_real, real = self.loss(next(self.reals), 1)
        loss_real.backward()
        with self.setup.precision():
            fakes = self.generate(self.setup.noise())
        loss_fake, fake = self.loss(fakes.detach(), 0)
        loss_fake.backward()
        self.adam_d.step()

        self.generator.zero_grad()
        self.discriminator.requires_grad_(not self.stock.tuned)
        loss_g, fooled = self.loss(fakes, 1)
        loss_g.backward()
        self.discriminator.requires_grad_(True)
        self.adam_g.step()
        if not self.stock.tuned:  # what the tutorial prints, which waits for the device
            for value in (loss_real + loss_fake, loss_g, *(t.sigmoid().mean() for t in (real, fake, fooled))):
                value.item()


class FusedTrainer(Trainer):
    def __init__(self, setup: Setup, features: int = FEATURES):
        torch.manual_seed(0)
        batch, channels, size, _ = setup.reals[0].shape
        settings = DCGANSettings(
            image_size=size, batch_size=batch, latent_dim=setup.latent_dim, features=features, lr=setup.lr
        )
        system = DCGAN(settings, channels, setup.process())
        self.generator = fuse(system.generator)
        fuse(system.discriminator)
        system.capture()
        reals = cycle(setup.reals)
        self.step = lambda: system.step(reals)


def case(size: int, batch: int, features: int, dtype: torch.dtype, headline: bool = False) -> Case:
    return StepCase(
        op="DCGAN",
        work="training step",
        shape=f"{batch}×3×{size}²" + ("" if features == FEATURES else f", {features} features"),
        dtype=dtype,
        layout="as each likes",
        headline=headline,
        image=(batch, 3, size, size),
        latent_dim=LATENT,
        lr=2e-4,
        autocast=dtype == torch.bfloat16,
        ours=partial(FusedTrainer, features=features),
        stock=partial(StockTrainer, features=features),
        peers=PEERS,
    )


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield case(SIZE, BATCH, FEATURES, dtype, headline=True)
    for size, batch, features in LITTLE:
        yield case(size, batch, features, torch.float32)
