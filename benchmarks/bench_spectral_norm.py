"""The spectral norms of a whole model against torch's parametrisation of each layer."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.case import OURS, Case, Contest
from benchmarks.op import gate
from fastgan import spectral_norm_all
from fastgan.models.sngan import Discriminator, ResidualDiscriminator

Work = Literal["forward", "forward+backward"]


class Weights(nn.Module):
    """Layers of which nothing but the weights is computed: what the norms alone cost."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(map(spectral_norm, layers))

    def forward(self, _: Tensor) -> Tensor:
        return torch.stack([cast(Tensor, layer.weight).flatten()[0] for layer in self.layers])


def ten_layers() -> nn.Module:
    return Weights([nn.Linear(2304, 256, bias=False) for _ in range(10)])


def copy_twice_read_once(model: nn.Module) -> Callable[[], None]:
    """What the norms must move at least: each weight is read twice, and written once."""
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    outputs = [torch.empty_like(weight) for weight in weights]

    def move() -> None:
        for weight, output in zip(weights, outputs, strict=True):
            weight.sum()
            output.copy_(weight)

    return move


@dataclass(frozen=True, kw_only=True)
class NormCase(Case):
    """A model with torch's norms, and its copy with `spectral_norm_all`."""

    work: Work
    model: Callable[[], nn.Module]
    image: tuple[int, ...]

    def prepare(self, device: torch.device) -> Contest:
        torch.manual_seed(0)
        stock = self.model().to(device)
        x = torch.randn(self.image, device=device)
        exact = copy.deepcopy(stock).double()
        models = {OURS: spectral_norm_all(copy.deepcopy(stock)), "parametrisations": stock}
        contest = Contest({}, captured=False)
        results = {name: self._run(model, x)() for name, model in models.items()}
        expected = self._run(exact, x.double())()
        contest.gate = gate(results[OURS], [results["parametrisations"]], expected)
        contest.contenders = {name: self._run(model, x) for name, model in models.items()}
        if isinstance(stock, Weights):
            contest.floor = copy_twice_read_once(stock)
            contest.floor_bytes = 3 * sum(p.nbytes for p in stock.parameters())
        return contest

    def _run(self, model: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        parameters = list(model.parameters())

        def forward() -> tuple[Tensor, ...]:
            return (model(x),)

        def forward_backward() -> tuple[Tensor, ...]:
            y = model(x)
            return y, *torch.autograd.grad(y.sum(), parameters)

        return forward if self.work == "forward" else forward_backward


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "10 weights 256×2304": (ten_layers, (1,)),
    "standard discriminator, 64×3×32²": (Discriminator, (64, 3, 32, 32)),
    "standard discriminator, 1×3×32²": (Discriminator, (1, 3, 32, 32)),
    "residual discriminator, 64×3×32²": (ResidualDiscriminator, (64, 3, 32, 32)),
}


def cases(device: torch.device) -> Iterator[Case]:
    works: tuple[Work, ...] = ("forward", "forward+backward")
    for shape, (model, image) in MODELS.items():
        for work in works:
            yield NormCase(
                op="spectral_norm",
                work=work,
                shape=shape,
                dtype=torch.float32,
                layout="as each likes",
                headline=True,
                model=model,
                image=image,
            )
