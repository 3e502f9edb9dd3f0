"""A critic's gradient penalty and its backward against what can be written in stock PyTorch."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgan
from fastgan.bench.case import OURS, Case, Contest, first_line
from fastgan.bench.memory import peak_bytes
from fastgan.bench.op import error, excess
from fastgan.models.wgan_gp import ResidualCritic

BATCH = 32
DRAWS = 3
"""Critics and images of the gate. Rounding may set a ReLU on the other side of its kink, for us or for stock, and then one
element's derivative is another: so the middle error counts."""
WIDTHS = (64, 128, 256, 512)
Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain_critic(norm: Callable[[int, int], nn.Module] | None = None) -> nn.Module:
    """3 → 64 → 128 → 256 → 512 → 1 channels, k4 s2, for 64²: DCGAN's shape, with a `norm` of channels and size."""
    layers: list[nn.Module] = []
    size = 64
    for inputs, outputs in zip((3, *WIDTHS), WIDTHS, strict=False):
        size //= 2
        layers.append(nn.Conv2d(inputs, outputs, 4, 2, 1))
        if norm is not None and inputs > 3:
            layers.append(norm(outputs, size))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 1, 4))


def instance_norm(channels: int, size: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


def layer_norm(channels: int, size: int) -> nn.Module:
    return nn.LayerNorm([channels, size, size])


CRITICS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "critic 3→64→128→256→512→1, LeakyReLU": (64, plain_critic),
    "the same with InstanceNorm2d(affine)": (64, partial(plain_critic, instance_norm)),
    "the same with LayerNorm": (64, partial(plain_critic, layer_norm)),
    "residual critic, width 128": (32, ResidualCritic),
}
"""Each with the size of its images."""


def positions(device: torch.device) -> torch.Generator:
    """The same line positions for all."""
    return torch.Generator(device).manual_seed(0)


# ── Contenders ───────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    return fastgan.gradient_penalty(critic, real, fake, generator=positions(real.device))


def between(real: Tensor, fake: Tensor) -> Tensor:
    t = torch.rand(BATCH, 1, 1, 1, generator=positions(real.device), device=real.device, dtype=torch.float32)
    return torch.lerp(real, fake, t.to(real.dtype)).requires_grad_()


def penalise(gradient: Tensor) -> Tensor:
    return 10 * ((gradient.square().sum((1, 2, 3)) + 1e-12).sqrt() - 1).square().mean()


def penalty_at(x: Tensor, critic: nn.Module) -> Tensor:
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return penalise(gradient)


def stock(critic: nn.Module, real: Tensor, fake: Tensor, at: Callable[..., Tensor] = penalty_at) -> Tensor:
    return at(between(real, fake), critic)


def gradients(penalty: Penalty, critic: nn.Module, real: Tensor, fake: Tensor) -> list[Tensor]:
    """What a training step does. Where no path leads to a parameter its gradient is zero."""
    critic.zero_grad()
    penalty(critic, real, fake).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in critic.parameters()]


def gradients_of_func(critic: nn.Module, real: Tensor, fake: Tensor) -> list[Tensor]:
    x = between(real, fake).detach()

    def score(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(critic, parameters, x).sum()

    def penalty(parameters: dict[str, Tensor]) -> Tensor:
        return penalise(torch.func.grad(score)(x, parameters))

    parameters = {name: p.detach() for name, p in critic.named_parameters()}
    return list(torch.func.grad(penalty)(parameters).values())


def gradients_of_compiled(
    compiled: Callable[..., Tensor], critic: nn.Module, real: Tensor, fake: Tensor
) -> list[Tensor]:
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        return gradients(partial(stock, at=compiled), critic, real, fake)


# ── The case ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class PenaltyCase(Case):
    size: int
    make_critic: Callable[[], nn.Module]

    def prepare(self, device: torch.device) -> Contest:
        torch.compiler.reset()
        critic, real, fake = self._draw(0, device)
        contest = Contest({}, gate=self._check(device), captured=False)
        with FlopCounterMode(display=False) as counter:
            critic(real)
        contest.flops = 4 * counter.get_total_flops()  # forward, input gradient, its tangent, weight gradient
        for name in filter(self.admits, contenders()):
            run = self._run(name, critic, real, fake)
            try:
                run()
            except Exception as error:
                if name == OURS:
                    raise
                contest.notes.append(f"{name}: {first_line(error)}")
                continue
            contest.contenders[name] = run
            contest.peak[name] = peak_bytes(run, device)
        return contest

    def _draw(self, seed: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(seed)
        critic = self.make_critic().to(device)
        real, fake = (torch.randn(BATCH, 3, self.size, self.size, device=device) for _ in range(2))
        return critic, real, fake

    def _check(self, device: torch.device) -> str:
        """The gate, for the gradients of all parameters together."""
        names = (OURS, "NCHW", "channels_last")
        errors: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(DRAWS):
            critic, real, fake = self._draw(seed, device)
            exact = flat(gradients(stock, copy.deepcopy(critic).double(), real.double(), fake.double()))
            for name in names:
                errors[name].append(error(flat(self._run(name, critic, real, fake)()), exact))
        ours, *eager = (median(errors[name]) for name in names)
        why = excess(ours, max(eager), torch.float32)
        return why and f"the gradient is {why}"

    def _run(self, name: str, critic: nn.Module, real: Tensor, fake: Tensor) -> Callable[[], list[Tensor]]:
        compute, layout = contenders()[name]
        laid_out = copy.deepcopy(critic).to(memory_format=layout)  # type: ignore[call-overload]
        images = [t.contiguous(memory_format=layout) for t in (real, fake)]

        def run() -> list[Tensor]:
            with torch.autocast(real.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                return compute(laid_out, *images)

        return run


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def contenders() -> dict[str, tuple[Callable[..., list[Tensor]], torch.memory_format]]:
    compiled = partial(gradients_of_compiled, torch.compile(penalty_at, dynamic=False))
    nchw, nhwc = torch.contiguous_format, torch.channels_last
    return {
        OURS: (partial(gradients, ours), nchw),
        "NCHW": (partial(gradients, stock), nchw),
        "channels_last": (partial(gradients, stock), nhwc),
        "func": (gradients_of_func, nchw),
        "channels_last func": (gradients_of_func, nhwc),
        "compile": (compiled, nchw),
        "channels_last compile": (compiled, nhwc),
    }


def cases(device: torch.device) -> Iterator[Case]:
    for name, (size, make_critic) in CRITICS.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield PenaltyCase(
                op="gradient_penalty",
                work="penalty+backward",
                shape=f"{name}, {BATCH}×3×{size}²",
                dtype=dtype,
                layout="NCHW",
                headline=True,
                size=size,
                make_critic=make_critic,
            )
