"""`pixel_shuffle_act` against pixel shuffle and PReLU in stock PyTorch."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Inputs, OpCase, Work
from fastgan.ops import pixel_shuffle_act
from fastgan.ops.pixel_shuffle_act import reference

# Of x, and r: SRGAN's up-sampling of 24² and 48² patches, a discriminator's features, and odd ones.
GOAL = (16, 256, 48, 48, 2)
SHAPES = (GOAL, (16, 256, 24, 24, 2), (8, 512, 8, 8, 2), (16, 576, 24, 24, 3), (7, 132, 13, 17, 2))

# How often a pass moves a tensor of x's size at least: y has the same. The second order has x's gradient, from ggx the
# gradients of grad_y, and of the weight with grad_y and x.
MOVES: dict[Work, float] = {"forward": 2, "forward+backward": 2 + 3, "second order": 2 + 3 + 4}


def inputs(shape: tuple[int, ...]) -> Inputs:
    return Inputs(torch.randn(shape[:4]), [torch.full((shape[1] // shape[4] ** 2,), 0.25)])


def apply(function, x, weight, factor):
    return function(x, factor, "prelu", weight)


def shuffled(x, weight, factor):
    """What the activation is given."""
    return reference(x, factor, "none")


def case(shape: tuple[int, ...], dtype: torch.dtype, layout: str, work: Work) -> Case:
    factor = shape[4]
    ours, stock = (partial(apply, f, factor=factor) for f in (pixel_shuffle_act, reference))
    contenders = {
        OURS: Contender(ours, layout),
        "NCHW": Contender(stock, "NCHW"),
        "channels_last": Contender(stock, "channels_last"),
    }
    if shape == GOAL and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(stock, layout, compiled=True)
    return OpCase(
        op="pixel_shuffle_act prelu",
        work=work,
        shape="×".join(map(str, shape[:4])) + f" r{factor}",
        dtype=dtype,
        layout=layout,
        headline=shape == GOAL,
        inputs=partial(inputs, shape),
        contenders=contenders,
        reference=stock,
        preactivation=partial(shuffled, factor=factor),
        tensors_moved=(0, MOVES[work]),
    )


def cases(device: torch.device) -> Iterator[Case]:
    for shape, dtype, layout, work in product(
        SHAPES, (torch.float32, torch.bfloat16), ("NCHW", "channels_last"), MOVES
    ):
        yield case(shape, dtype, layout, work)
