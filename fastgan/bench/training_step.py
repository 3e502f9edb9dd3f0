"""A training step of a reference system, fused, against the same step in stock PyTorch: what the systems share."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from fastgan.bench.case import OURS, Case, Contest, first_line
from fastgan.bench.memory import peak_bytes, saved_bytes
from fastgan.bench.op import error, excess
from fastgan.training.captured import WARMUP, CapturedStep
from fastgan.training.processes import OneProcess

REALS = 4
"""Different batches of real images."""

DRAWS = 3
"""Of noise, for which gradients are compared."""


@dataclass(frozen=True)
class Setup:
    """What all contenders are given."""

    reals: list[Tensor]
    latent_dim: int
    """0 where generators start from images."""
    lr: float
    autocast: bool
    dtype: torch.dtype = torch.float32
    scale: int = 1
    """How much smaller the images are that generators start from."""

    @property
    def device(self) -> torch.device:
        return self.reals[0].device

    def precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def noise(self) -> Tensor:
        return torch.randn(len(self.reals[0]), self.latent_dim, 1, 1, device=self.device).to(self.dtype)

    def generator_input(self) -> Tensor:
        return self.noise() if self.latent_dim else self.reals[0][..., :: self.scale, :: self.scale]

    def process(self) -> OneProcess:
        return OneProcess(self.device, self.autocast)


@dataclass(frozen=True)
class Stock:
    """How a step in stock PyTorch is set up. As it stands: the code as it is written in its paper's or tutorial's manner."""

    channels_last: bool = False
    compiled: bool = False
    tuned: bool = False
    """Fused Adam, and a discriminator that is frozen while the generator learns."""


class Trainer:
    """The networks and their step."""

    generator: nn.Module
    """The one that is looked at, where there are several."""
    step: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class StepCase(Case):
    """Ours against `peers`, each made from a `Setup`; the gate looks at the gradients of the generator."""

    image: tuple[int, int, int, int]
    latent_dim: int
    lr: float
    autocast: bool
    ours: Callable[[Setup], Trainer]
    stock: Callable[[Stock, Setup], Trainer]
    peers: dict[str, Stock]
    scale: int = 1

    def prepare(self, device: torch.device) -> Contest:
        torch.compiler.reset()
        torch.manual_seed(1)
        reals = [torch.rand(self.image, device=device) * 2 - 1 for _ in range(REALS)]
        setup = Setup(reals, self.latent_dim, self.lr, self.autocast, scale=self.scale)
        contest = Contest({}, gate=self._check(setup), captured=False)
        trainers = {OURS: self.ours(setup)}
        trainers |= {name: self.stock(stock, setup) for name, stock in self.peers.items() if self.admits(name)}
        if device.type == "cuda":  # as `fastgan train` takes its steps there
            alike = {name: stock for name, stock in self.peers.items() if stock.tuned and not stock.compiled}
            trainers |= {f"{name} captured": captured(self.stock(stock, setup)) for name, stock in alike.items()}
        for name, trainer in trainers.items():
            try:
                contest.notes += [f"{name}: {remark}" for remark in warm_up(trainer)]
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

    def _check(self, setup: Setup) -> str:
        """The gate, for the generator's gradients: they have come through all layers of both networks.

        Of steps that move nothing: Adam's first step is ±lr, also where rounding decides on the sign. Of several draws the
        median error counts: in one of them rounding may decide on which side of zero a ReLU's input is. Stock's is that of
        the layout that is further off, as for operators.
        """
        still = replace(setup, lr=0.0)
        wide = replace(still, reals=[image.double() for image in setup.reals], autocast=False, dtype=torch.float64)
        layouts = [self.stock(Stock(channels_last=rows), still) for rows in (False, True)]
        trainers = self.stock(Stock(), wide), self.ours(still), *layouts
        errors = []
        for draw in range(DRAWS):
            grads = []
            for trainer in trainers:
                torch.manual_seed(draw)
                trainer.step()
                found = [p.grad.flatten() for p in trainer.generator.parameters() if p.grad is not None]
                grads.append(torch.cat(found))
            errors.append([error(grad, grads[0]) for grad in grads[1:]])
        ours, *eager = (median(found) for found in zip(*errors, strict=True))
        why = excess(ours, max(eager), torch.float32)
        return why and f"the gradient is {why}"


def captured(trainer: Trainer) -> Trainer:
    """Has a CUDA graph take all of a trainer's step, as can be done by hand."""
    take = trainer.step
    optimizers = [value for value in vars(trainer).values() if isinstance(value, Optimizer)]
    step = CapturedStep(lambda _: take(), optimizers=optimizers)
    given = torch.zeros(1, device=next(trainer.generator.parameters()).device)
    trainer.step = lambda: step(given)
    return trainer


def warm_up(trainer: Trainer) -> list[str]:
    """Takes as many steps as a step to be captured needs to be. What it has warned of: that it runs uncaptured, say."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_on_cuda = next(trainer.generator.parameters()).is_cuda
        for _ in range(WARMUP + 1 if is_on_cuda else 1):
            trainer.step()
    return [text for warning in caught if "uncaptured" in (text := str(warning.message))]


def saved_by_generator(generator: nn.Module, setup: Setup) -> int:
    def forward() -> Tensor:
        with setup.precision():
            return generator(setup.generator_input())

    return saved_bytes(forward, generator.parameters())
