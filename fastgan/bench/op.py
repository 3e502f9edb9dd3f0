"""Cases of one operator: passes, data, peers and the accuracy gate."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgan.bench.case import OURS, Case, Contest, Run, first_line
from fastgan.bench.memory import peak_bytes, saved_bytes

Outputs = Sequence[Tensor]
Function = Callable[..., Tensor]
"""y of (x, *parameters, *buffers)."""
Work = Literal["eval forward", "forward", "forward+backward", "second order"]

COLD_BYTES = 512 << 20
"""What the tensors of a cold case fill together: more than any cache of today's servers gives two cores."""


class Inputs(NamedTuple):
    """The arguments of an operator's function, drawn in float32 on the CPU."""

    x: Tensor
    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Contender:
    """A way to compute an operator: the function, and the layouts that its user gives it."""

    function: Function
    layout: str = "NCHW"
    weight_layout: str = "NCHW"
    compiled: bool = False


@dataclass(frozen=True)
class Data:
    """Arguments and cotangents of one call; x, the parameters and grad_y are leaves that require gradients."""

    x: Tensor
    parameters: tuple[Tensor, ...]
    buffers: tuple[Tensor, ...]
    grad_y: Tensor
    ggx: Tensor

    def double(self) -> "Data":
        return Data(
            _leaf(self.x.double()),
            tuple(_leaf(p.double()) for p in self.parameters),
            tuple(b.double() for b in self.buffers),
            _leaf(self.grad_y.double()),
            self.ggx.double(),
        )

    def laid_out(self, contender: Contender) -> "Data":
        def like_x(tensor: Tensor) -> Tensor:
            return _lay_out(tensor, contender.layout)

        parameters = tuple(_leaf(_lay_out(p, contender.weight_layout)) for p in self.parameters)
        return Data(_leaf(like_x(self.x)), parameters, self.buffers, _leaf(like_x(self.grad_y)), like_x(self.ggx))

    def copies(self) -> Iterator["Data"]:
        """As many as fill `COLD_BYTES`, over and over; the parameters and ggx are the same in all."""
        count = max(2, min(64, COLD_BYTES // (self.x.nbytes + self.grad_y.nbytes)))
        return cycle([replace(self, x=_leaf(self.x.clone()), grad_y=_leaf(self.grad_y.clone())) for _ in range(count)])

    def apply(self, function: Function) -> Tensor:
        return function(self.x, *self.parameters, *self.buffers)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    return tensor.contiguous(memory_format=formats[layout]) if tensor.dim() == 4 else tensor


def perform(work: Work, function: Function, data: Data) -> tuple[Tensor, ...]:
    """The timed call. Returns all that it has computed."""
    if work == "eval forward":
        with torch.no_grad():
            return (data.apply(function),)
    y = data.apply(function)
    if work == "forward":
        return (y,)
    if work == "forward+backward":
        return y, *torch.autograd.grad(y, (data.x, *data.parameters), data.grad_y)
    (grad_x,) = torch.autograd.grad(y, data.x, data.grad_y, create_graph=True)
    targets = (data.grad_y, data.x, *data.parameters)
    return y, grad_x, *torch.autograd.grad(grad_x, targets, data.ggx, materialize_grads=True)


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """An operator on given data: `contenders` by name, `OURS` among them, against `reference` in float64."""

    work: Work
    inputs: Callable[[], Inputs]
    contenders: dict[str, Contender]
    reference: Function
    preactivation: Function | None = None
    """The reference before an activation that has a kink at zero."""
    tensors_moved: tuple[float, float]
    """How often at least the call moves all of x, and all of y, from or to memory."""

    def prepare(self, device: torch.device) -> Contest:
        torch.compiler.reset()  # the compiled functions of earlier cases count towards a limit
        data = self._draw(device)
        with FlopCounterMode(display=False) as counter:
            expected = perform(self.work, self.reference, data.double())
        contest = Contest({}, flops=counter.get_total_flops())
        results: dict[str, Outputs] = {}
        for name in filter(self.admits, self.contenders):
            contender = self.contenders[name]
            laid_out = data.laid_out(contender)
            function = torch.compile(contender.function, dynamic=False) if contender.compiled else contender.function
            try:
                results[name] = perform(self.work, function, laid_out)
            except Exception as error:
                if name == OURS:
                    raise
                contest.notes.append(f"{name}: {first_line(error)}")
                continue
            contest.contenders[name] = self._run(function, laid_out)
            self._weigh(contest, name, function, laid_out, device)
        results = {name: self._away_from_kinks(outputs, data.grad_y) for name, outputs in results.items()}
        eager = [results[name] for name in results if name != OURS and not self.contenders[name].compiled]
        contest.gate = gate(results[OURS], eager, self._away_from_kinks(expected, data.grad_y))
        self._add_floor(contest, data)
        return contest

    def least_work(self) -> tuple[int, int]:
        """The bytes that have to move at least, and the operations: of tensors without values."""
        x, parameters, buffers = self.inputs()

        def sizes_of(tensor: Tensor) -> Tensor:
            return self._cast(tensor.to("meta"))

        x, ggx = sizes_of(x), sizes_of(x)
        data = Data(x, tuple(map(sizes_of, parameters)), tuple(map(sizes_of, buffers)), x, ggx)
        grad_y = _leaf(data.apply(self.reference))
        data = replace(data, x=_leaf(x), parameters=tuple(map(_leaf, data.parameters)), grad_y=grad_y)
        with FlopCounterMode(display=False) as counter:
            perform(self.work, self.reference, data)
        return self._bytes_moved(data), counter.get_total_flops()

    def _cast(self, tensor: Tensor) -> Tensor:
        """In `self.dtype`. The parameters of a norm stay float32, as under autocast."""
        return tensor.to(self.dtype if tensor.dim() == 4 else torch.float32)

    def _bytes_moved(self, data: Data) -> int:
        moved_x, moved_y = self.tensors_moved
        return round(moved_x * data.x.nbytes + moved_y * data.grad_y.nbytes)

    def _draw(self, device: torch.device) -> Data:
        """The data, NCHW."""

        def cast(tensor: Tensor) -> Tensor:
            return self._cast(tensor).to(device)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x, parameters, buffers = self.inputs()
            x, ggx = cast(x), cast(torch.randn_like(x))
            data = Data(x, tuple(map(cast, parameters)), tuple(map(cast, buffers)), x, ggx)
            with torch.no_grad():
                z = data.double().apply(self.preactivation or self.reference)
            grad_y = cast(torch.randn(z.shape))
        if self.preactivation:
            grad_y = grad_y.masked_fill(z.abs() < kink(self.dtype), 0)
        return replace(data, grad_y=grad_y)

    def _run(self, function: Function, data: Data) -> Run:
        copies = data.copies() if self.cache == "cold" else repeat(data)
        return lambda: perform(self.work, function, next(copies))

    def _weigh(self, contest: Contest, name: str, function: Function, data: Data, device: torch.device) -> None:
        if self.work != "eval forward":
            contest.saved[name] = saved_bytes(lambda: data.apply(function), data.parameters)
        contest.peak[name] = peak_bytes(lambda: perform(self.work, function, data), device)

    def _away_from_kinks(self, outputs: Outputs, grad_y: Tensor) -> Outputs:
        """The outputs without what rounding decides: the zeros in grad_y leave it in grad_y's own gradient."""
        if self.work != "second order":
            return outputs
        y, grad_x, g_grad_y, *rest = outputs
        return y, grad_x, g_grad_y * (grad_y != 0), *rest

    def _add_floor(self, contest: Contest, data: Data) -> None:
        """A copy of a tensor like y: in DCGAN's layers the one that is normalised."""
        contest.floor_bytes = 2 * data.grad_y.nbytes
        contest.bytes_moved = self._bytes_moved(data)
        target, copies = torch.empty_like(data.grad_y), data.copies() if self.cache == "cold" else repeat(data)
        contest.floor = lambda: target.copy_(next(copies).grad_y.detach())


def kink(dtype: torch.dtype) -> float:
    """How near to its kink an activation's input may be for rounding to decide on which side it falls."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


def gate(ours: Outputs, eager: Sequence[Outputs], expected: Outputs) -> str:
    """Why `ours` is not right; empty where its error is at most twice that of eager torch plus one rounding step.

    Eager torch has an error for each layout, as it has other algorithms for each. The largest counts.
    """
    for i, (tensor, wide) in enumerate(zip(ours, expected, strict=True)):
        why = excess(error(tensor, wide), max(error(peer[i], wide) for peer in eager), tensor.dtype)
        if why:
            return f"result {i} is {why}"
    return ""


def excess(found: float, eager: float, dtype: torch.dtype) -> str:
    """Why an error is too large beside that of eager torch; empty where it is not."""
    allowed = 2 * eager + torch.finfo(dtype).eps
    return "" if found <= allowed else f"off by {found:.1e} of its size, {allowed:.1e} allowed"


def error(tensor: Tensor, expected: Tensor) -> float:
    """The size of the error over that of the result, both as root mean squares."""
    size = expected.norm().item()
    return (tensor.double() - expected).norm().item() / (size or 1.0)
