"""A training step of DCGAN, 64×64, as `fastgan train dcgan` does it, against the same step in stock PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import OURS, Case, Contest, first_line
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.op import gate
from fastgan.fuse import fuse
from fastgan.models.dcgan import Discriminator, Generator, init_weights
from fastgan.training.dcgan import DCGAN, DCGANSettings
from fastgan.training.run import make_accelerator

SIZE, BATCH, LATENT = 64, 64, 100
REALS = 4
"""Different batches of real images."""


@dataclass(frozen=True)
class Setup:
    """What all contenders are given."""

    reals: list[Tensor]
    device: torch.device
    autocast: bool
    dtype: torch.dtype = torch.float32
    lr: float = 2e-4

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def noise(self) -> Tensor:
        return torch.randn(BATCH, LATENT, 1, 1, device=self.device).to(self.dtype)


@dataclass(frozen=True)
class Stock:
    """How a step in stock PyTorch is set up. As it stands: PyTorch's DCGAN tutorial, with logits."""

    channels_last: bool = False
    compiled: bool = False
    tuned: bool = False
    """Fused Adam, and a discriminator that is frozen while the generator learns."""


PEERS = {
    "tutorial": Stock(),
    "channels_last": Stock(channels_last=True),
    "compile": Stock(compiled=True),
    "channels_last compile": Stock(channels_last=True, compiled=True),
    "tuned": Stock(channels_last=True, tuned=True),
    "tuned compile": Stock(channels_last=True, tuned=True, compiled=True),
}


class Trainer:
    """Two networks and their step."""

    generator: nn.Module
    discriminator: nn.Module
    step: Callable[[], object]


class StockTrainer(Trainer):
    def __init__(self, stock: Stock, setup: Setup):
        self.stock, self.setup, self.reals = stock, setup, cycle(setup.reals)
        torch.manual_seed(0)
        self.generator = Generator().apply(init_weights).to(setup.device, setup.dtype)
        self.discriminator = Discriminator().apply(init_weights).to(setup.device, setup.dtype)
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
    def __init__(self, setup: Setup):
        AcceleratorState._reset_state(reset_partial_state=True)  # its precision is one for the whole process
        accelerator = make_accelerator(str(setup.device), "bf16" if setup.autocast else "fp32")
        torch.manual_seed(0)
        settings = DCGANSettings(image_size=SIZE, batch_size=BATCH, latent_dim=LATENT, lr=setup.lr)
        system = DCGAN(settings, 3, accelerator)
        self.generator, self.discriminator = fuse(system.generator), fuse(system.discriminator)
        reals = cycle(setup.reals)
        self.step = lambda: system.step(reals)


@dataclass(frozen=True, kw_only=True)
class StepCase(Case):
    autocast: bool

    def prepare(self, device: torch.device) -> Contest:
        torch.compiler.reset()
        torch.manual_seed(1)
        reals = [torch.rand(BATCH, 3, SIZE, SIZE, device=device) * 2 - 1 for _ in range(REALS)]
        setup = Setup(reals, device, self.autocast)
        contest = Contest({}, gate=check(setup), captured=False)
        trainers: dict[str, Trainer] = {OURS: FusedTrainer(setup)}
        trainers |= {name: StockTrainer(stock, setup) for name, stock in PEERS.items()}
        for name, trainer in trainers.items():
            try:
                trainer.step()
            except Exception as error:
                if name == OURS:
                    raise
                contest.notes.append(f"{name}: {first_line(error)}")
                continue
            contest.contenders[name] = trainer.step
            if "compile" not in name:
                contest.saved[name] = saved_by_generator(trainer.generator, setup)
                contest.peak[name] = peak_bytes(trainer.step, device)
        with FlopCounterMode(display=False) as counter:
            trainers["tuned"].step()
        contest.flops = counter.get_total_flops()
        return contest


def saved_by_generator(generator: nn.Module, setup: Setup) -> int:
    def forward() -> Tensor:
        with setup.precision():
            return generator(setup.noise())

    return saved_bytes(forward, generator.parameters())


def check(setup: Setup) -> str:
    """The gate, for the generator's gradients: they have come through all layers of both networks.

    Of a step that moves nothing: Adam's first step is ±lr, also where rounding decides on the sign.
    """
    still = replace(setup, lr=0.0)
    wide = replace(still, reals=[image.double() for image in setup.reals], autocast=False, dtype=torch.float64)
    results = []
    for trainer in (FusedTrainer(still), StockTrainer(Stock(), still), StockTrainer(Stock(), wide)):
        torch.manual_seed(2)
        trainer.step()
        results.append([torch.cat([p.grad.flatten() for p in trainer.generator.parameters() if p.grad is not None])])
    ours, eager, expected = results
    return gate(ours, [eager], expected)


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield StepCase(
            op="DCGAN",
            work="training step",
            shape=f"{BATCH}×3×{SIZE}²",
            dtype=dtype,
            layout="as each likes",
            headline=True,
            autocast=dtype == torch.bfloat16,
        )
