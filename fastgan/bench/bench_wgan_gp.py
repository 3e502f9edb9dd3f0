"""A training step of WGAN-GP, 64×64: five updates of the critic and one of the generator, against stock PyTorch."""

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor
from torch.optim import Adam

from fastgan.bench.case import Case
from fastgan.bench.training_step import Setup, StepCase, Stock, Trainer
from fastgan.fuse import fuse
from fastgan.models.dcgan import Generator, init_weights
from fastgan.models.wgan_gp import Critic
from fastgan.training.wgan_gp import WGANGP, WGANGPSettings

SIZE, BATCH, LATENT, CRITIC_STEPS, WEIGHT = 64, 32, 128, 5, 10.0

# A compiled critic has no double backward.
PEERS = {
    "as written": Stock(),
    "channels_last": Stock(channels_last=True),
    "tuned": Stock(channels_last=True, tuned=True),
}


class StockTrainer(Trainer):
    def __init__(self, stock: Stock, setup: Setup):
        self.stock, self.setup, self.reals = stock, setup, cycle(setup.reals)
        torch.manual_seed(0)
        self.generator = Generator(latent_dim=LATENT).apply(init_weights).to(setup.device, setup.dtype)
        self.critic = Critic().apply(init_weights).to(setup.device, setup.dtype)
        if stock.channels_last:
            for network in (self.generator, self.critic):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.adam_g, self.adam_c = (
            Adam(network.parameters(), lr=setup.lr, betas=(0.0, 0.9), fused=stock.tuned or None)
            for network in (self.generator, self.critic)
        )

    def generate(self) -> Tensor:
        with self.setup.precision():
            return self.generator(self.setup.noise())

    def judge(self, images: Tensor) -> Tensor:
        if self.stock.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.setup.precision():
            return self.critic(images)

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        position = torch.rand(len(real), 1, 1, 1, device=real.device).to(real.dtype)
        between = torch.lerp(real, fake, position).requires_grad_()
        (grad,) = torch.autograd.grad(self.judge(between).sum(), between, create_graph=True)
        return WEIGHT * (grad.flatten(1).norm(dim=1) - 1).square().mean()

    def step(self) -> None:
        for _ in range(CRITIC_STEPS):
            real = next(self.reals)
            with torch.no_grad():
                fake = self.generate().to(real.dtype)
            self.critic.zero_grad()
            loss = self.judge(fake).mean() - self.judge(real).mean() + self.penalty(real, fake)
            loss.backward()
            self.adam_c.step()
        self.generator.zero_grad()
        self.critic.requires_grad_(not self.stock.tuned)
        (-self.judge(self.generate()).mean()).backward()
        self.critic.requires_grad_(True)
        self.adam_g.step()


class FusedTrainer(Trainer):
    def __init__(self, setup: Setup):
        torch.manual_seed(0)
        settings = WGANGPSettings(image_size=SIZE, batch_size=BATCH, lr=setup.lr)
        system = WGANGP(settings, 3, setup.process())
        self.generator = fuse(system.generator)
        fuse(system.critic)
        system.capture()
        reals = cycle(setup.reals)
        self.step = lambda: system.step(reals)


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield StepCase(
            op="WGAN-GP",
            work="training step",
            shape=f"{BATCH}×3×{SIZE}²",
            dtype=dtype,
            layout="as each likes",
            headline=True,
            image=(BATCH, 3, SIZE, SIZE),
            latent_dim=LATENT,
            lr=1e-4,
            autocast=dtype == torch.bfloat16,
            ours=FusedTrainer,
            stock=StockTrainer,
            peers=PEERS,
        )
