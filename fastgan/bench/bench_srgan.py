"""Training steps of SRResNet and SRGAN from 24×24 to 96×96, as `fastgan train srgan` does them, and SRResNet in evaluation,
against the same in stock PyTorch."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.optim import Adam

from fastgan.bench.case import OURS, Case, Contest, first_line
from fastgan.bench.memory import peak_bytes
from fastgan.bench.op import gate
from fastgan.bench.training_step import Setup, StepCase, Stock, Trainer
from fastgan.fuse import fuse
from fastgan.models.srgan import Discriminator, Generator
from fastgan.training.srgan import SRGAN, SRGANSettings, shrink

SIZE, SCALE, BATCH, FEATURES, BLOCKS, ADVERSARIAL = 96, 4, 4, 64, 16, 1e-3

Phase = Literal["SRResNet", "SRGAN"]

PEERS = {
    "as written": Stock(),
    "channels_last": Stock(channels_last=True),
    "compile": Stock(compiled=True),
    "tuned": Stock(channels_last=True, tuned=True),
    "tuned NCHW": Stock(tuned=True),
    "tuned compile": Stock(channels_last=True, tuned=True, compiled=True),
}


def networks(setup: Setup) -> tuple[Generator, Discriminator]:
    """With PyTorch's initial weights. What training starts from would leave most layers without a gradient to compare."""
    torch.manual_seed(0)
    generator, discriminator = Generator(SCALE, 3, FEATURES, BLOCKS), Discriminator(SIZE, 3, FEATURES)
    return generator.to(setup.device, setup.dtype), discriminator.to(setup.device, setup.dtype)


class StockTrainer(Trainer):
    phase: Phase

    def __init__(self, stock: Stock, setup: Setup):
        self.stock, self.setup, self.reals = stock, setup, cycle(setup.reals)
        self.generator, self.discriminator = networks(setup)
        if stock.channels_last:
            for network in (self.generator, self.discriminator):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.adam_g, self.adam_d = (
            Adam(network.parameters(), lr=setup.lr, fused=stock.tuned or None)
            for network in (self.generator, self.discriminator)
        )
        self.generate: Callable[[Tensor], Tensor] = self.generator
        self.judge: Callable[[Tensor], Tensor] = self.discriminator
        if stock.compiled:
            self.generate, self.judge = (torch.compile(n, dynamic=False) for n in (self.generate, self.judge))

    def loss(self, images: Tensor, target: float) -> Tensor:
        logits = self.judge(self.laid_out(images))
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    def laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.stock.channels_last else images

    def step(self) -> None:
        real = next(self.reals)
        fake = self.generate(self.laid_out(shrink(real.float(), SCALE).to(real.dtype)))
        self.adam_g.zero_grad()
        loss = mse_loss(fake, real)
        if self.phase == "SRGAN":
            self.adam_d.zero_grad()
            (self.loss(real, 1) + self.loss(fake.detach(), 0)).backward()
            self.adam_d.step()
            self.discriminator.requires_grad_(not self.stock.tuned)
            loss = loss + ADVERSARIAL * self.loss(fake, 1)
        loss.backward()
        self.discriminator.requires_grad_(True)
        self.adam_g.step()
        if not self.stock.tuned:  # what is printed as written, which waits for the device
            loss.item()


class StockSRResNet(StockTrainer):
    phase = "SRResNet"


class StockSRGAN(StockTrainer):
    phase = "SRGAN"


class FusedTrainer(Trainer):
    phase: Phase

    def __init__(self, setup: Setup):
        settings = SRGANSettings(
            image_size=SIZE, scale=SCALE, batch_size=BATCH, features=FEATURES, blocks=BLOCKS, lr=setup.lr,
            adversarial_weight=ADVERSARIAL, pretrain_steps=0 if self.phase == "SRGAN" else 1 << 62,
        )  # fmt: skip
        system = SRGAN(settings, 3, setup.process())
        generator, discriminator = networks(setup)
        system.generator.load_state_dict(generator.state_dict())
        system.discriminator.load_state_dict(discriminator.state_dict())
        system.fuse()
        system.capture()
        self.generator = system.generator
        reals = cycle(setup.reals)
        self.step = lambda: system.step(reals)


class FusedSRResNet(FusedTrainer):
    phase = "SRResNet"


class FusedSRGAN(FusedTrainer):
    phase = "SRGAN"


@dataclass(frozen=True, kw_only=True)
class EvalCase(Case):
    """SRResNet on images `(N, 3, side, side)` in evaluation, its norms with statistics of their own."""

    batch: int
    side: int

    def prepare(self, device: torch.device) -> Contest:
        torch.compiler.reset()
        torch.manual_seed(0)
        network = Generator(SCALE, 3, FEATURES, BLOCKS).to(device)
        network(torch.randn(4, 3, 24, 24, device=device))
        network.eval()
        images = torch.rand(self.batch, 3, self.side, self.side, device=device) * 2 - 1
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        in_last = images.contiguous(memory_format=torch.channels_last)
        ours = fuse(copy.deepcopy(last))
        contenders: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
            OURS: (ours, images),
            "as written": (network, images),
            "channels_last": (last, in_last),
            "compile": (torch.compile(network, dynamic=False), images),
            "channels_last compile": (torch.compile(last, dynamic=False), in_last),
        }
        contest, results = Contest({}), {}
        for name in filter(self.admits, contenders):
            function, given = contenders[name]
            try:
                results[name] = [perform(function, given)]
            except Exception as error:
                if name == OURS:
                    raise
                contest.notes.append(f"{name}: {first_line(error)}")
                continue
            contest.contenders[name] = partial(perform, function, given)
            contest.peak[name] = peak_bytes(contest.contenders[name], device)
        wide: nn.Module = copy.deepcopy(network).double()
        eager = [results["as written"], results["channels_last"]]
        contest.gate = gate(results[OURS], eager, [perform(wide, images.double())])
        return contest


def perform(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return function(images)


def cases(device: torch.device) -> Iterator[Case]:
    trainers: list[tuple[str, type[FusedTrainer], type[StockTrainer]]] = [
        ("SRResNet", FusedSRResNet, StockSRResNet),
        ("SRGAN", FusedSRGAN, StockSRGAN),
    ]
    for op, ours, stock in trainers:
        yield StepCase(
            op=op,
            work="training step",
            shape=f"{BATCH}×3×{SIZE // SCALE}² to {SIZE}²",
            dtype=torch.float32,
            layout="as each likes",
            headline=True,
            image=(BATCH, 3, SIZE, SIZE),
            latent_dim=0,
            lr=1e-4,
            autocast=False,
            ours=ours,
            stock=stock,
            peers=PEERS,
            scale=SCALE,
        )
    for batch, side in ((BATCH, SIZE // SCALE), (1, 128)):
        yield EvalCase(
            op="SRResNet",
            work="eval forward",
            shape=f"{batch}×3×{side}² to {side * SCALE}²",
            dtype=torch.float32,
            layout="as each likes",
            batch=batch,
            side=side,
        )
