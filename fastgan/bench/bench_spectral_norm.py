"""Spectral norms of a model's layers by one operator, against torch's parametrisation and its older hook."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

import fastgan
from fastgan.bench.case import OURS, Case, Contest, first_line
from fastgan.bench.op import gate
from fastgan.bench.timing import interleave
from fastgan.nn.spectral_norm import norms

SHARE_SECONDS = 1.0
"""For how long the model without spectral norms is timed."""


class Weights(nn.Module):
    """Layers of which the weights alone are asked for."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self) -> list[Tensor]:
        for layer in self.layers:
            for norm in layer._forward_pre_hooks.values():  # the older hook computes the weight before a forward
                norm(layer, ())
        return [layer.weight for layer in self.layers]  # type: ignore[misc]


def critic() -> nn.Module:
    """The standard critic of Miyato et al. 2018 for 32²."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in (
        (3, 64, 3), (64, 64, 4), (64, 128, 3), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3),
    ):  # fmt: skip
        layers += [nn.Conv2d(inputs, outputs, kernel, kernel - 2, 1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 4 * 4, 1))


def several(count: int, make: Callable[[], nn.Module]) -> Weights:
    return Weights([make() for _ in range(count)])


def normalise(model: nn.Module, norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    for layer in list(model.modules()):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            norm(layer)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ten weights 256×2304": (partial(several, 10, partial(nn.Linear, 2304, 256, bias=False)), ()),
    "SN-GAN critic, 64×3×32²": (critic, (64, 3, 32, 32)),
    "four weights 64×64": (partial(several, 4, partial(nn.Linear, 64, 64, bias=False)), ()),
    "one weight 16×16": (partial(several, 1, partial(nn.Linear, 16, 16, bias=False)), ()),
    "four ConvTranspose2d 256→128 k4": (partial(several, 4, partial(nn.ConvTranspose2d, 256, 128, 4, bias=False)), ()),
}
"""Each with the shape of what it is called with, where that is something."""


# How often a weight is read or written at least. σ is known when all has been read, and so is <grad, W>.
MOVES = {"eval forward": 3, "forward": 3, "forward+backward": 3 + 4}

HEADLINES = tuple(MODELS)[:2]


def perform(
    work: str, run: Callable[..., list[Tensor] | Tensor], model: nn.Module, inputs: list[Tensor]
) -> list[Tensor]:
    """What is timed, and what it has computed."""
    if work == "eval forward":
        with torch.no_grad():
            outputs = run(*inputs)
    else:
        outputs = run(*inputs)
    found = outputs if isinstance(outputs, list) else [outputs]
    if work == "forward+backward":
        found += torch.autograd.grad(sum(y.square().sum() for y in found), list(model.parameters()))  # type: ignore[arg-type]
    return found


@dataclass(frozen=True, kw_only=True)
class SpectralCase(Case):
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def prepare(self, device: torch.device) -> Contest:
        torch.compiler.reset()
        torch.manual_seed(0)
        plain = self.make().to(device, self.dtype)
        inputs = [torch.randn(self.input_shape, device=device, dtype=self.dtype)] if self.input_shape else []
        stock = normalise(deepcopy(plain), parametrizations.spectral_norm).train(self.work != "eval forward")
        models = {
            OURS: fastgan.spectral_norm_all(deepcopy(stock)),
            "parametrisation": stock,
            "hook": normalise(deepcopy(plain), hook).train(stock.training),
            "compile": deepcopy(stock),
        }
        wide = deepcopy(stock).double()
        exact = perform(self.work, wide, wide, [x.double() for x in inputs])
        contest, results = Contest({}, captured=False), {}
        for name in filter(self.admits, models):
            model = models[name]
            run = torch.compile(model, dynamic=False) if name == "compile" else model
            call = partial(perform, self.work, run, model, inputs)
            try:
                results[name] = call()
            except Exception as error:
                if name == OURS:
                    raise
                contest.notes.append(f"{name}: {first_line(error)}")
                continue
            contest.contenders[name] = call
        contest.gate = gate(results[OURS], [results["parametrisation"]], exact)
        if inputs:
            self._note_shares(contest, plain, inputs, device)
        else:
            self._add_floor(contest, [norm.holder.original.detach() for norm in norms(stock)])
        return contest

    def _add_floor(self, contest: Contest, weights: list[Tensor]) -> None:
        """Copies of the weights."""
        targets = [torch.empty_like(weight) for weight in weights]
        contest.floor = lambda: [target.copy_(weight) for target, weight in zip(targets, weights, strict=True)]
        contest.floor_bytes = 2 * sum(weight.nbytes for weight in weights)
        contest.bytes_moved = MOVES[self.work] * sum(weight.nbytes for weight in weights)

    def _note_shares(self, contest: Contest, plain: nn.Module, inputs: list[Tensor], device: torch.device) -> None:
        runs = {name: contest.contenders[name] for name in (OURS, "parametrisation")}
        runs["without"] = partial(perform, self.work, plain, plain, inputs)
        times = interleave(runs, SHARE_SECONDS, device, captured=False)
        for name in (OURS, "parametrisation"):
            contest.notes.append(f"{name}: spectral norm is {1 - times['without'] / times[name]:.1%} of the time")


def cases(device: torch.device) -> Iterator[Case]:
    for shape, (make, input_shape) in MODELS.items():
        for work in ("forward", "forward+backward", "eval forward"):
            yield SpectralCase(
                op="spectral_norm",
                work=work,
                shape=shape,
                dtype=torch.float32,
                layout="NCHW",
                headline=shape in HEADLINES and work != "eval forward",
                make=make,
                input_shape=input_shape,
            )
