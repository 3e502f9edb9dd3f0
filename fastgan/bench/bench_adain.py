"""AdaIN with all of StyleGAN's layer epilogue, and of a style's features, against stock PyTorch in its best formulation."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.bench.case import OURS, Case
from fastgan.bench.op import Contender, Function, Inputs, OpCase, Work, kink
from fastgan.ops import adain, adain_from_features

GOAL = (16, 256, 32, 32)
LARGE = (8, 64, 128, 128)
SHAPES = (GOAL, LARGE, (16, 512, 4, 4), (1, 512, 64, 64), (7, 33, 13, 17))
SLOPE = 0.2

# How often a pass moves a tensor of x's size at least, where a plane stays in the cache between its two readings. Of a
# style's features every order reads the style too, and derivatives write as much of it.
MOVES: dict[str, dict[Work, float]] = {
    "adain": {"forward": 2, "forward+backward": 2 + 3, "second order": 2 + 3 + 5},
    "adain_from_features": {"forward": 3, "forward+backward": 3 + 5, "second order": 3 + 5 + 7},
}


def epilogue(x, scale, shift, noise_weight, bias, noise) -> Tensor:
    return adain(
        x, scale, shift, noise=noise, noise_weight=noise_weight, bias=bias, act="leaky_relu", negative_slope=SLOPE
    )


def stock_epilogue(x, scale, shift, noise_weight, bias, noise, norm) -> Tensor:
    """All in x's dtype, which is fast: what autocast does it does not do so well."""
    scale, shift = (t.to(x.dtype)[..., None, None] for t in (scale, shift))
    noise_weight, bias = (t.to(x.dtype).view(-1, 1, 1) for t in (noise_weight, bias))
    y = F.leaky_relu(x + noise_weight * noise + bias, SLOPE, inplace=True)
    return scale * norm(y) + shift


def stock_features(content, style, norm) -> Tensor:
    mean = style.mean((2, 3), keepdim=True)
    deviation = ((style - mean).square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    return deviation * norm(content) + mean


def by_group_norm(x: Tensor) -> Tensor:
    """Instance norm as a group norm, which is several times as fast as `F.instance_norm`."""
    return F.group_norm(x, x.shape[1])


def inputs(shape: tuple[int, ...], op: str) -> Inputs:
    """Nothing comes so near to the leaky ReLU's kink that rounding decides on which side it falls."""
    n, c, *pixels = shape
    x = torch.randn(shape) * 2 + 0.5
    if op == "adain_from_features":
        return Inputs(x, [torch.randn(shape)])
    noise = torch.randn(n, 1, *pixels)
    noise_weight, bias = torch.randn(2, c) / 4
    before = x + noise_weight.view(-1, 1, 1) * noise + bias.view(-1, 1, 1)
    near = kink(torch.float32)
    x = torch.where(before.abs() < near, x + 2 * near, x)
    return Inputs(x, [torch.rand(n, c) + 0.5, torch.randn(n, c) / 4, noise_weight, bias], [noise])


def case(op: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, work: Work) -> Case:
    own, plain = (epilogue, stock_epilogue) if op == "adain" else (adain_from_features, stock_features)
    stock: Function = partial(plain, norm=by_group_norm)
    contenders = {
        OURS: Contender(own, layout, layout),
        "NCHW": Contender(stock, "NCHW"),
        "channels_last": Contender(stock, "channels_last", "channels_last"),
        "F.instance_norm": Contender(partial(plain, norm=F.instance_norm), layout, layout),
    }
    if shape in (GOAL, LARGE) and work != "second order":  # which torch.compile does not have
        contenders["compile"] = Contender(stock, layout, layout, compiled=True)
    return OpCase(
        op=op,
        work=work,
        shape="×".join(map(str, shape)),
        dtype=dtype,
        layout=layout,
        headline=shape == GOAL and dtype == torch.float32,
        inputs=partial(inputs, shape, op),
        contenders=contenders,
        reference=stock,
        tensors_moved=(0, MOVES[op][work]),
    )


def cases(device: torch.device) -> Iterator[Case]:
    settings = list(product(MOVES, (torch.float32, torch.bfloat16), ("NCHW", "channels_last")))
    for shape, (op, dtype, layout) in product(SHAPES, settings):
        if op == "adain" or shape in (GOAL, LARGE):
            for work in MOVES[op]:
                yield case(op, shape, dtype, layout, work)
