"""`bias_act` against bias, activation and gain in stock PyTorch."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Function, Inputs, OpCase, Work
from fastgan.ops import bias_act
from fastgan.ops.bias_act import reference

GOAL = (16, 64, 64, 64)
SHAPES = (GOAL, (16, 512, 8, 8), (8, 64, 128, 128), (16, 512), (7, 33, 13, 17))
ACTS = ("lrelu", "swish")

# How often a pass moves a tensor of x's size at least. The double backward of a piecewise linear activation reads ggx and y
# and writes g_grad_y; that of another reads grad_y, and writes g_x, besides.
MOVES: dict[str, dict[Work, float]] = {
    "lrelu": {"forward": 2, "forward+backward": 2 + 3, "second order": 2 + 3 + 3},
    "swish": {"forward": 2, "forward+backward": 2 + 3, "second order": 2 + 3 + 5},
}


def inputs(shape: tuple[int, ...]) -> Inputs:
    return Inputs(torch.randn(shape), [torch.randn(shape[1])])


def linear(x, b):
    return reference(x, b)


def case(act, shape: tuple[int, ...], dtype: torch.dtype, layout: str, work: Work) -> Case:
    stock: Function = partial(reference, act=act)
    contenders = {
        OURS: Contender(partial(bias_act, act=act), layout),
        "NCHW": Contender(stock, "NCHW"),
        "channels_last": Contender(stock, "channels_last"),
    }
    if shape == GOAL and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(stock, layout, compiled=True)
    return OpCase(
        op=f"bias_act {act}",
        work=work,
        shape="×".join(map(str, shape)),
        dtype=dtype,
        layout=layout,
        headline=shape == GOAL and dtype == torch.float32,
        inputs=partial(inputs, shape),
        contenders=contenders,
        reference=stock,
        preactivation=linear if act == "lrelu" else None,
        tensors_moved=(0, MOVES[act][work]),
    )


def cases(device: torch.device) -> Iterator[Case]:
    for shape, act, dtype, layout in product(SHAPES, ACTS, (torch.float32, torch.bfloat16), ("NCHW", "channels_last")):
        if layout == "NCHW" or len(shape) == 4:
            for work in MOVES[act]:
                yield case(act, shape, dtype, layout, work)
