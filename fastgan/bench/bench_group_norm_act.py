"""Group, instance and layer norm against stock PyTorch's, each in its best formulation."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Function, Inputs, OpCase, Work
from fastgan.ops import group_norm_act, instance_norm_act, layer_norm_act

GOAL = (32, 64, 32, 32)
SHAPES = (GOAL, (64, 64, 32, 32), (32, 256, 8, 8), (1, 256, 64, 64), (8, 64, 128, 128), (7, 33, 13, 17))
OPS = ("group_norm_act", "instance_norm_act", "layer_norm_act")

# How often a pass moves a tensor of x's size at least, where a sample stays in the cache between its two readings.
MOVES: dict[Work, float] = {"forward": 2, "forward+backward": 2 + 3, "second order": 2 + 3 + 5}


def ours(x, weight, bias, op) -> Tensor:
    if op == "layer_norm_act":
        return layer_norm_act(x, x.shape[1:], weight, bias, act="relu")
    if op == "instance_norm_act":
        return instance_norm_act(x, weight, bias, act="relu")
    return group_norm_act(x, groups(x), weight, bias, act="relu")


def groups(x: Tensor) -> int:
    """8, or where these do not divide the channels one."""
    return 8 if x.shape[1] % 8 == 0 else 1


def stock_norm(x, weight, bias, op) -> Tensor:
    """Instance norm as a group norm, which is several times as fast as `F.instance_norm`."""
    if op == "layer_norm_act":
        return F.layer_norm(x, x.shape[1:], weight, bias)
    return F.group_norm(x, x.shape[1] if op == "instance_norm_act" else groups(x), weight, bias)


def stock(x, weight, bias, op) -> Tensor:
    return F.relu(stock_norm(x, weight, bias, op), inplace=True)


def as_written(x, weight, bias) -> Tensor:
    return F.relu(F.instance_norm(x, weight=weight, bias=bias), inplace=True)


def inputs(shape: tuple[int, ...], op: str) -> Inputs:
    size = shape[1:] if op == "layer_norm_act" else shape[1:2]
    return Inputs(torch.randn(shape) * 2 + 0.5, [torch.rand(size) + 0.5, torch.randn(size) / 4])


def case(op: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, work: Work) -> Case:
    function: Function = partial(stock, op=op)
    contenders = {
        OURS: Contender(partial(ours, op=op), layout),
        "NCHW": Contender(function, "NCHW"),
        "channels_last": Contender(function, "channels_last"),
    }
    if op == "instance_norm_act":
        contenders["F.instance_norm"] = Contender(as_written, layout)
    if shape == GOAL and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(function, layout, compiled=True)
    return OpCase(
        op=op,
        work=work,
        shape="×".join(map(str, shape)),
        dtype=dtype,
        layout=layout,
        headline=shape == GOAL and dtype == torch.float32,
        inputs=partial(inputs, shape, op),
        contenders=contenders,
        reference=function,
        preactivation=partial(stock_norm, op=op),
        tensors_moved=(0, MOVES[work]),
    )


def cases(device: torch.device) -> Iterator[Case]:
    settings = list(product(OPS, (torch.float32, torch.bfloat16), ("NCHW", "channels_last"), MOVES))
    for shape, (op, dtype, layout, work) in product(SHAPES, settings):
        yield case(op, shape, dtype, layout, work)
