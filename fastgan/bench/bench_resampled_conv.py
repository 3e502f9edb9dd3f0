"""`conv2d_avg_pool2d` and `upsample_conv2d` against the two steps in stock PyTorch."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Function, Inputs, OpCase, Work
from fastgan.ops import conv2d_avg_pool2d, upsample_conv2d
from fastgan.ops.resampled_conv import reference_down, reference_up

OPS: dict[str, tuple[Function, Function]] = {
    "conv2d_avg_pool2d": (conv2d_avg_pool2d, reference_down),
    "upsample_conv2d": (upsample_conv2d, reference_up),
}
WORKS: tuple[Work, ...] = ("forward", "forward+backward", "second order")


class Layer(NamedTuple):
    """A convolution k3 p1; `size` is that of the larger image."""

    batch: int
    channels: tuple[int, int]
    size: int

    def __str__(self) -> str:
        return f"{self.channels[0]}→{self.channels[1]} k3 p1, {self.batch}×{self.size}²"


GOAL = Layer(8, (64, 128), 64)
LAYERS = (GOAL, Layer(8, (128, 128), 32), Layer(8, (128, 128), 16), Layer(8, (512, 512), 16), Layer(64, (128, 64), 32))


def padded(x: Tensor, weight: Tensor, bias: Tensor, function: Function) -> Tensor:
    return function(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)


def inputs(layer: Layer, op: str) -> Inputs:
    size = layer.size // 2 if op == "upsample_conv2d" else layer.size
    inside, outside = layer.channels
    weight = torch.randn(outside, inside, 3, 3) / (3 * inside**0.5)
    return Inputs(torch.randn(layer.batch, inside, size, size), [weight, torch.randn(outside)])


def case(op: str, layer: Layer, dtype: torch.dtype, layout: str, work: Work) -> Case:
    ours, stock = (partial(padded, function=function) for function in OPS[op])
    contenders = {
        OURS: Contender(ours, layout),
        "NCHW": Contender(stock, "NCHW"),
        "channels_last": Contender(stock, "channels_last", "channels_last"),
    }
    if layer == GOAL and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(stock, layout, compiled=True)
    return OpCase(
        op=op,
        work=work,
        shape=str(layer),
        dtype=dtype,
        layout=layout,
        headline=layer == GOAL and layout == "channels_last",
        inputs=partial(inputs, layer, op),
        contenders=contenders,
        reference=stock,
        tensors_moved=(1 + WORKS.index(work),) * 2,
    )


def cases(device: torch.device) -> Iterator[Case]:
    settings = list(product(OPS, (torch.float32, torch.bfloat16), ("channels_last", "NCHW"), WORKS))
    for layer, (op, dtype, layout, work) in product(LAYERS, settings):
        yield case(op, layer, dtype, layout, work)
