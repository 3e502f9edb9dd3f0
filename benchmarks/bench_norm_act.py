"""`batch_norm_act` against batch norm and ReLU in stock PyTorch."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import OURS, Case
from benchmarks.op import Contender, Inputs, OpCase, Work
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

# How often a pass moves a tensor of x's size at least. The statistics need all of x before the first output: x is read
# twice. Each order of gradient sums over the channel first, too, and reads twice what it is made of.
MOVES: dict[Work, float] = {"eval forward": 2, "forward": 3, "forward+backward": 3 + 5, "second order": 3 + 5 + 8}


def ours(x, weight, bias, mean, var, training) -> Tensor:
    return batch_norm_act(x, mean, var, weight, bias, training)


def batch_norm(x, weight, bias, mean, var, training) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, training)


def stock(x, weight, bias, mean, var, training) -> Tensor:
    return F.relu(batch_norm(x, weight, bias, mean, var, training), inplace=True)


def inputs(shape: tuple[int, ...]) -> Inputs:
    channels = shape[1]
    x = torch.randn(shape) * 2 + 0.5
    parameters = [torch.rand(channels) + 0.5, torch.randn(channels) / 4]
    return Inputs(x, parameters, [torch.zeros(channels), torch.ones(channels)])


def case(shape: tuple[int, ...], dtype: torch.dtype, layout: str, work: Work, cache: str = "warm") -> Case:
    training = work != "eval forward"
    contenders = {
        OURS: Contender(partial(ours, training=training), layout),
        "NCHW": Contender(partial(stock, training=training), "NCHW"),
        "channels_last": Contender(partial(stock, training=training), "channels_last"),
    }
    if shape == GOAL and cache == "warm" and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(partial(stock, training=training), layout, compiled=True)
    return OpCase(
        op="batch_norm_act",
        work=work,
        shape="×".join(map(str, shape)),
        dtype=dtype,
        layout=layout,
        cache=cache,
        headline=shape == GOAL and cache == "warm" and work != "eval forward",
        inputs=partial(inputs, shape),
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
