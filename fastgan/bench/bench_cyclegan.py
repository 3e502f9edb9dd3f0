"""A training step of CycleGAN, 128×128, as `fastgan train cyclegan` does it, against the same step in stock PyTorch."""

from collections.abc import Iterator
from itertools import chain, cycle

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim import Adam

from fastgan.bench.case import Case
from fastgan.bench.training_step import Setup, StepCase, Stock, Trainer
from fastgan.models.cyclegan import PatchDiscriminator, ResNetGenerator, init_weights
from fastgan.training.cyclegan import POOL, CycleGAN, CycleGANSettings, ImagePool

SIZE, FEATURES, BLOCKS, CYCLE, IDENTITY = 128, 64, 6, 10.0, 5.0

PEERS = {
    "tutorial": Stock(),
    "channels_last": Stock(channels_last=True),
    "tuned NCHW": Stock(tuned=True),
    "tuned": Stock(channels_last=True, tuned=True),
}


class StockTrainer(Trainer):
    def __init__(self, stock: Stock, setup: Setup):
        self.stock, self.setup, self.reals = stock, setup, cycle(setup.reals)
        torch.manual_seed(0)
        self.a2b, self.b2a = (ResNetGenerator(3, FEATURES, BLOCKS) for _ in range(2))
        self.judge_a, self.judge_b = (PatchDiscriminator(3, FEATURES) for _ in range(2))
        for network in (self.a2b, self.b2a, self.judge_a, self.judge_b):
            network.apply(init_weights).to(setup.device, setup.dtype)
            if stock.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.generator = self.a2b
        self.pool_a, self.pool_b = ImagePool(POOL), ImagePool(POOL)
        self.adam_g, self.adam_a, self.adam_b = (
            Adam(list(parameters), lr=setup.lr, betas=(0.5, 0.999), fused=stock.tuned or None)
            for parameters in (
                chain(self.a2b.parameters(), self.b2a.parameters()),
                self.judge_a.parameters(),
                self.judge_b.parameters(),
            )
        )

    def run(self, network: nn.Module, *batches: Tensor) -> tuple[Tensor, ...]:
        """The outputs for each batch: as written one call each, tuned one call for all, which instance norm allows."""
        together = [torch.cat(batches)] if self.stock.tuned else batches
        if self.stock.channels_last:
            together = [batch.contiguous(memory_format=torch.channels_last) for batch in together]
        with self.setup.precision():
            outputs = torch.cat([network(batch) for batch in together])
        return (outputs.float() if self.setup.autocast else outputs).chunk(len(batches))

    def loss(self, scores: Tensor, target: float) -> Tensor:
        return mse_loss(scores, torch.full_like(scores, target))

    def step(self) -> None:
        real_a, real_b = next(self.reals), next(self.reals)
        self.adam_g.zero_grad()
        fake_b, same_b = self.run(self.a2b, real_a, real_b)
        fake_a, same_a = self.run(self.b2a, real_b, real_a)
        (cycled_a,), (cycled_b,) = self.run(self.b2a, fake_b), self.run(self.a2b, fake_a)
        for judge in (self.judge_a, self.judge_b):
            judge.requires_grad_(not self.stock.tuned)
        (scores_a,), (scores_b,) = self.run(self.judge_a, fake_a), self.run(self.judge_b, fake_b)
        adversarial = self.loss(scores_a, 1) + self.loss(scores_b, 1)
        cycle_loss = l1_loss(cycled_a, real_a) + l1_loss(cycled_b, real_b)
        identity = l1_loss(same_a, real_a) + l1_loss(same_b, real_b)
        (adversarial + CYCLE * cycle_loss + IDENTITY * identity).backward()
        for judge in (self.judge_a, self.judge_b):
            judge.requires_grad_(True)
        self.adam_g.step()
        self.discriminate(self.judge_a, self.adam_a, real_a, self.pool_a.exchange(fake_a.detach()))
        self.discriminate(self.judge_b, self.adam_b, real_b, self.pool_b.exchange(fake_b.detach()))
        if not self.stock.tuned:  # what is printed as written, which waits for the device
            for value in (adversarial, cycle_loss, identity):
                value.item()

    def discriminate(self, judge: nn.Module, adam: Adam, real: Tensor, fake: Tensor) -> None:
        adam.zero_grad()
        real_scores, fake_scores = self.run(judge, real, fake)
        ((self.loss(real_scores, 1) + self.loss(fake_scores, 0)) / 2).backward()
        adam.step()


class FusedTrainer(Trainer):
    def __init__(self, setup: Setup):
        torch.manual_seed(0)
        settings = CycleGANSettings(image_size=SIZE, features=FEATURES, blocks=BLOCKS, lr=setup.lr)
        system = CycleGAN(settings, 3, setup.process())
        system.fuse()
        system.capture()
        self.generator = system.generators["a2b"]
        reals = cycle(setup.reals)
        self.step = lambda: system.step(reals)


def cases(device: torch.device) -> Iterator[Case]:
    yield StepCase(
        op="CycleGAN",
        work="training step",
        shape=f"1×3×{SIZE}²",
        dtype=torch.float32,
        layout="as each likes",
        headline=True,
        image=(1, 3, SIZE, SIZE),
        latent_dim=0,
        lr=2e-4,
        autocast=False,
        ours=FusedTrainer,
        stock=StockTrainer,
        peers=PEERS,
    )
