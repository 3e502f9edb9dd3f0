"""upfirdn2d against what stock PyTorch has for it: convolutions of each channel, transposed for upsampling."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Function, Inputs, OpCase, Work
from fastgan.ops import downsample2d, filter2d, setup_filter, upsample2d

GOAL = (8, 128, 64, 64)
SHAPES = (GOAL, (8, 512, 16, 16), (8, 512, 8, 8), (8, 3, 128, 128), (1, 64, 256, 256), (7, 33, 13, 17))
OPS: dict[str, Function] = {"upsample2d": upsample2d, "downsample2d": downsample2d, "filter2d": filter2d}
TAPS = {"upsample2d": (1, 3, 3, 1), "downsample2d": (1, 3, 3, 1), "filter2d": (1, 2, 1)}
WORKS: tuple[Work, ...] = ("forward", "forward+backward", "second order")


def ours(x: Tensor, f: Tensor, op: str) -> Tensor:
    return OPS[op](x, f)


def depthwise(x: Tensor, f: Tensor, op: str) -> Tensor:
    """One convolution, with a stride or transposed. The filters are symmetric."""
    channels = x.shape[1]
    weight = f.to(x.dtype).expand(channels, 1, *f.shape)
    if op == "upsample2d":
        return F.conv_transpose2d(x, 4 * weight, stride=2, padding=1, groups=channels)
    return F.conv2d(x, weight, stride=2 if op == "downsample2d" else 1, padding=1, groups=channels)


def planes(x: Tensor, f: Tensor, op: str) -> Tensor:
    """The channels as images of their own."""
    y = depthwise(x.reshape(-1, 1, *x.shape[2:]), f, op)
    return y.view(*x.shape[:2], *y.shape[2:])


def zeros_inserted(x: Tensor, f: Tensor, op: str) -> Tensor:
    """The formulation of the papers' reference code: a convolution of an image with zeros between its pixels."""
    n, channels, height, width = x.shape
    z = F.pad(x.reshape(n, channels, height, 1, width, 1), [0, 1, 0, 0, 0, 1]).reshape(
        n, channels, 2 * height, 2 * width
    )
    return F.conv2d(F.pad(z, [2, 1, 2, 1]), 4 * f.to(x.dtype).expand(channels, 1, *f.shape), groups=channels)


def inputs(shape: tuple[int, ...], op: str) -> Inputs:
    return Inputs(torch.randn(shape), [], [setup_filter(TAPS[op])])


def case(op: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, work: Work) -> Case:
    contenders = {
        OURS: Contender(partial(ours, op=op), layout),
        "depthwise NCHW": Contender(partial(depthwise, op=op), "NCHW"),
        "depthwise channels_last": Contender(partial(depthwise, op=op), "channels_last"),
        "planes": Contender(partial(planes, op=op), "NCHW"),
    }
    if op == "upsample2d":
        contenders["zeros inserted"] = Contender(partial(zeros_inserted, op=op), layout)
    if shape == GOAL and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(partial(depthwise, op=op), layout, compiled=True)
    return OpCase(
        op=op,
        work=work,
        shape="×".join(map(str, shape)),
        dtype=dtype,
        layout=layout,
        headline=shape == GOAL and dtype == torch.float32,
        inputs=partial(inputs, shape, op),
        contenders=contenders,
        reference=partial(depthwise, op=op),
        tensors_moved=(1 + WORKS.index(work),) * 2,
    )


def cases(device: torch.device) -> Iterator[Case]:
    settings = list(product(OPS, (torch.float32, torch.bfloat16), ("NCHW", "channels_last"), WORKS))
    for shape, (op, dtype, layout, work) in product(SHAPES, settings):
        yield case(op, shape, dtype, layout, work)
