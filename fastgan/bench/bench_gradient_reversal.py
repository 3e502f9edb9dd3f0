"""`gradient_reversal` and `reversed_linear` against the autograd functions that people write for them."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Function, Inputs, OpCase, Work
from fastgan.ops import gradient_reversal, reversed_linear
from fastgan.ops.gradient_reversal import reference

COEFF = 0.3
SIZES = ((4096, 4096), (128, 100))
# Samples, features and outputs: domain heads on wide and on narrow features, their last layers, and a square product.
LINEAR = ((16384, 256, 1), (4096, 256, 64), (4096, 768, 100), (128, 768, 100), (64, 2048, 1024), (128, 100, 1))
WORKS: tuple[Work, ...] = ("forward", "forward+backward")


class _Viewing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_y):
        return -COEFF * grad_y


class _Copying(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y.neg() * COEFF


PEERS: dict[str, Callable[[Tensor], Tensor]] = {"view": _Viewing.apply, "copy": _Copying.apply}


def then_linear(reversal: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(reversal(x), weight, bias)


def linear_inputs(samples: int, features: int, outputs: int) -> Inputs:
    return Inputs(torch.randn(samples, features), [torch.randn(outputs, features), torch.randn(outputs)])


def case(op: str, shape: str, work: Work, headline: bool, inputs: Callable[[], Inputs], functions: dict) -> Case:
    return OpCase(
        op=op,
        work=work,
        shape=shape,
        dtype=torch.float32,
        layout="NCHW",
        headline=headline,
        inputs=inputs,
        contenders={name: Contender(function) for name, function in functions.items() if name != "reference"},
        reference=functions["reference"],
        tensors_moved=(0, 0),
    )


def cases(device: torch.device) -> Iterator[Case]:
    definition: Function = partial(reference, coeff=COEFF)
    for size, work in product(SIZES, WORKS):
        functions = {OURS: partial(gradient_reversal, coeff=COEFF), **PEERS, "reference": definition}

        def inputs(size=size) -> Inputs:
            return Inputs(torch.randn(size), [])

        yield case("gradient_reversal", "×".join(map(str, size)), work, size == SIZES[0], inputs, functions)
    for sizes in LINEAR:
        samples, features, outputs = sizes
        functions = {OURS: partial(reversed_linear, coeff=COEFF), "reference": partial(then_linear, definition)}
        functions |= {name: partial(then_linear, peer) for name, peer in PEERS.items()}
        shape = f"{samples}×{features} → {outputs}"
        yield case(
            "reversed_linear", shape, "forward+backward", sizes == LINEAR[0], partial(linear_inputs, *sizes), functions
        )
