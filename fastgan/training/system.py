"""What a kind of GAN brings to the training loop."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from fastgan.fuse import fuse
from fastgan.training.captured import CapturedStep
from fastgan.training.data import PictureSet, load_images
from fastgan.training.errors import InputError
from fastgan.training.images import Grid
from fastgan.training.processes import Processes

LARGEST_SIDE = 1 << 14
"""Pixels, of any system's images. Whether there is memory for the network's maps of them is another question."""


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run, whatever the system. A checkpoint keeps it, and a resumed run must agree.

    A system adds its own by inheriting. Field `image_size` is option `--image-size`, `fuse` is `--fuse` or `--no-fuse`.
    """

    sources: ClassVar[tuple[str, ...]]
    """The fields that say where files are: they may have moved when a run is resumed. Each names a data set that the system
    draws from, unless `load` says otherwise."""

    image_size: int = 32
    batch_size: int = 64
    lr: float = 2e-4
    seed: int = 0
    precision: str = "fp32"
    fuse: bool = True

    def load(self) -> Sequence[PictureSet]:
        """The data sets that a system draws from."""
        return [load_images(getattr(self, source), self.image_size, as_option(source)) for source in self.sources]

    def check(self) -> None:
        """Raises `InputError` for the first value that does not fit."""
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        require(0 < self.lr < math.inf, "--lr", self.lr, "a number above 0")
        require(0 <= self.seed < 2**63, "--seed", self.seed, "from 0 to 2**63 - 1")
        require(self.precision in {"fp32", "bf16"}, "--precision", self.precision, "fp32 or bf16")


def as_option(name: str) -> str:
    """Setting `name` as the command line has it."""
    return f"--{name.replace('_', '-')}"


def require(fits: bool, option: str, value: object, expected: str) -> None:
    """Raises the `InputError` that names `option` unless `fits`."""
    if not fits:
        raise InputError(f"{option}: {value} does not fit; expected {expected}")


def require_count(option: str, value: int, least: int = 1) -> None:
    """`require` that it is `least` or more, and no more than any number of things can be."""
    require(least <= value < 2**31, option, value, f"{least} or more" if value < least else "a number below 2**31")


class Score(NamedTuple):
    """What a run says of its networks in a number, and how that is written."""

    value: float
    form: str

    def __str__(self) -> str:
        return self.form.format(self.value)


S = TypeVar("S", bound=Settings)


class System(ABC, Generic[S]):
    """Networks, their optimisers, one training step, and how to draw samples.

    Networks stay unwrapped, whatever the number of processes: `update` averages gradients by hand. That allows what a
    GAN needs and `DistributedDataParallel` does not: several forwards before a backward, frozen parameters, gradients
    of gradients.
    """

    name: ClassVar[str]
    settings_type: ClassVar[type[Settings]]
    kept: ClassVar[dict[str, type]] = {"networks": dict, "optimizers": dict}
    """What `state_dict` puts into a checkpoint."""
    epochs: ClassVar[int] = 40
    """How long a run is that was told neither steps nor epochs."""
    draws: int = 1
    """Batches of real images that one step takes; where there are several data sets, from each in turn."""

    is_stock: bool = False
    """Whether a step is what stock PyTorch does: one side of a comparison."""

    networks: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]

    def __init__(self, settings: S, channels: int, accelerator: Processes):
        self.settings = settings
        self.channels = channels
        self.accelerator = accelerator
        self.take: Callable[..., dict[str, Tensor]] = self._take

    def prepare(self) -> None:
        """Reads what training takes besides real images. Raises `InputError`. Called once, and only to train."""

    def remarks(self) -> list[str]:
        """What a run says before its first step, a line each."""
        return []

    def begin_step(self, step: int, steps: int) -> None:
        """Called before each step of a run, the first being `step` 0 of `steps`: what follows a schedule follows it here."""

    def step(self, reals: Iterator[Any]) -> dict[str, Tensor]:
        """Takes `draws` batches from `reals`, updates every network, and returns scalars without waiting for them.

        A batch is a tensor, or `Labelled` where the set has labels.
        """
        return self.take(self.kind, *(next(reals) for _ in range(self.draws)))

    @property
    def kind(self) -> Hashable:
        """Of the next step, what of it Python decides: steps of one kind launch the same kernels."""
        return None

    @abstractmethod
    def launch(self, *reals: Any) -> dict[str, Tensor]:
        """What a step has the device do, and a CUDA graph may hold: whatever is not in `kind` comes from tensors, random
        numbers too, and nothing waits for the value of one."""

    def _take(self, kind: Hashable, *reals: Any) -> dict[str, Tensor]:
        return self.launch(*reals)

    def capture(self) -> None:
        """Has CUDA graphs take the steps, one for each kind."""
        self.take = CapturedStep(self._take, optimizers=list(self.optimizers.values()))

    @abstractmethod
    def sample_grid(self, sets: Sequence[Any]) -> Callable[[], Grid]:
        """Decides by the seed what all sample grids of a run show, given the data sets that `Settings.load` returned.

        The result draws them with the weights of the moment, and changes nothing in the system.
        """

    def scores(self, sets: Sequence[Any]) -> dict[str, Score]:
        """What a run says of its trained networks at the end, by name, given its data sets."""
        return {}

    def judge(self, network: nn.Module, images: Tensor) -> Tensor:
        """The network's scores, in float32. Each call has its own autocast: weights change in between."""
        with self.accelerator.autocast():
            scores = network(images)
        return scores.float()

    def fuse(self) -> None:
        """Has fused operators compute the networks."""
        for network in self.networks.values():
            fuse(network)

    def update(self, name: str) -> Tensor:
        """Steps the optimiser of network `name`; returns the norm of its gradient, averaged over processes."""
        gradients = [p.grad for p in self.networks[name].parameters() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        norm = nn.utils.get_total_norm(gradients)
        self.optimizers[name].step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimisers, in keys that do not depend on fusing."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "optimizers": {name: _plain_state(optimizer) for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`, in place."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The learning rate of all parameters, also where a graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _plain_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's state as it is before `make_capturable`, so that any device may continue from it."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        if group.get("capturable"):
            group |= {"capturable": False, "lr": float(group["lr"])}
    return state


def adam(network: nn.Module, lr: float, betas: tuple[float, float]) -> Adam:
    """Adam for all of `network`, in one kernel per step where torch has one."""
    parameters = list(network.parameters())
    return Adam(parameters, lr=lr, betas=betas, fused=all(p.device.type in {"cpu", "cuda"} for p in parameters))
