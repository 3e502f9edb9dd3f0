"""`batch_norm_act` against batch norm and ReLU or PReLU in stock PyTorch."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Inputs, OpCase, Work
from fastgan.ops import batch_norm_act

GOAL = (64, 64, 32, 32)
SHAPES = (
    GOAL,
    (64, 128, 16, 16),
    (64, 256, 8, 8),
    (64, 512, 4, 4),
    (16, 128, 64, 64),
    (1, 256, 64, 64),
    (7, 33, 13, 17),
)

# SRGAN's.
PRELU_SHAPES = ((4, 64, 24, 24), (16, 64, 24, 24), (16, 64, 96, 96))

# How often a pass moves a tensor of x's size at least. The statistics need all of x before the first output: x is read
# twice. Each order of gradient sums over the channel first, too, and reads twice what it is made of.
MOVES: dict[Work, float] = {"eval forward": 2, "forward": 3, "forward+backward": 3 + 5, "second order": 3 + 5 + 8}


# Of (weight, bias), with PReLU its weight, and (running_mean, running_var).


def ours(x, weight, bias, *rest, training) -> Tensor:
    *prelu_weight, mean, var = rest
    act = dict(act="prelu", prelu_weight=prelu_weight[0]) if prelu_weight else {}
    return batch_norm_act(x, mean, var, weight, bias, training, **act)


def batch_norm(x, weight, bias, *rest, training) -> Tensor:
    return F.batch_norm(x, rest[-2], rest[-1], weight, bias, training)


def stock(x, weight, bias, *rest, training) -> Tensor:
    y = batch_norm(x, weight, bias, *rest, training=training)
    return F.prelu(y, rest[0].to(y.dtype)) if len(rest) == 3 else F.relu(y, inplace=True)


def inputs(shape: tuple[int, ...], prelu: bool) -> Inputs:
    channels = shape[1]
    x = torch.randn(shape) * 2 + 0.5
    parameters = [torch.rand(channels) + 0.5, torch.randn(channels) / 4, *[torch.full((1,), 0.25)] * prelu]
    return Inputs(x, parameters, [torch.zeros(channels), torch.ones(channels)])


def case(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, work: Work, cache: str = "warm", prelu: bool = False
) -> Case:
    training = work != "eval forward"
    contenders = {
        OURS: Contender(partial(ours, training=training), layout),
        "NCHW": Contender(partial(stock, training=training), "NCHW"),
        "channels_last": Contender(partial(stock, training=training), "channels_last"),
    }
    if shape == GOAL and cache == "warm" and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(partial(stock, training=training), layout, compiled=True)
    return OpCase(
        op="batch_norm_act prelu" if prelu else "batch_norm_act",
        work=work,
        shape="×".join(map(str, shape)),
        dtype=dtype,
        layout=layout,
        cache=cache,
        headline=shape == GOAL and cache == "warm" and work != "eval forward",
        inputs=partial(inputs, shape, prelu),
        contenders=contenders,
        reference=partial(stock, training=training),
        preactivation=partial(batch_norm, training=training),
        tensors_moved=(0, MOVES[work]),
    )


def cases(device: torch.device) -> Iterator[Case]:
    settings = list(product((torch.float32, torch.bfloat16), ("NCHW", "channels_last"), MOVES))
    for dtype, layout, work in settings:
        yield case(GOAL, dtype, layout, work)
        yield case(GOAL, dtype, layout, work, cache="cold")
    for shape, (dtype, layout, work) in product(SHAPES[1:], settings):
        yield case(shape, dtype, layout, work)
    for shape, (dtype, layout, work) in product(PRELU_SHAPES, settings):
        yield case(shape, dtype, layout, work, prelu=True)
