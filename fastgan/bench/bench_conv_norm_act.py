"""`conv_transpose2d_batch_norm_act` and `conv2d_batch_norm_act` against the three layers in stock PyTorch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.bench.case import OURS, Case, Contest
from fastgan.bench.op import Contender, Inputs, OpCase, Work
from fastgan.ops import _autotune, conv2d_batch_norm_act, conv_transpose2d_batch_norm_act


class Layer(NamedTuple):
    batch: int
    channels: tuple[int, int]
    size: int
    kernel: int = 4
    stride: int = 2
    padding: int = 1
    output_padding: int = 0
    transposed: bool = True
    bias: bool = False

    def __str__(self) -> str:
        kind = "ConvT" if self.transposed else "Conv"
        settings = f"k{self.kernel} s{self.stride} p{self.padding}" + (" op1" if self.output_padding else "")
        return f"{kind} {self.channels[0]}→{self.channels[1]} {settings}, {self.batch}×{self.size}²"


GOAL = Layer(64, (128, 64), 16)
LAYERS = (
    GOAL,
    # the other layers of DCGAN's generator
    Layer(64, (256, 128), 8),
    Layer(64, (512, 256), 4),
    Layer(64, (100, 512), 1, stride=1, padding=0),
    # its discriminator's
    Layer(64, (64, 128), 32, transposed=False),
    Layer(64, (128, 256), 16, transposed=False),
    Layer(64, (256, 512), 8, transposed=False),
    # small batches
    GOAL._replace(batch=16),
    GOAL._replace(batch=1),
    # CycleGAN's up-sampling, with a batch norm
    Layer(1, (256, 128), 64, kernel=3, output_padding=1, bias=True),
)

HEADLINES = (LAYERS[0], LAYERS[4], LAYERS[7], LAYERS[9])

# How often a pass moves (x, y) at least: the convolution and the two passes of the norm, in either direction.
MOVES: dict[Work, tuple[float, float]] = {"forward+backward": (3, 10), "eval forward": (1, 1)}


def split(x: Tensor, rest: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor, Tensor]:
    """The bias of the convolution, which must have x's dtype, if there is one, and the running statistics."""
    *bias, mean, var = rest
    return bias[0].to(x.dtype) if bias else None, mean, var


def ours(
    x, weight, bn_weight, bn_bias, *rest, layer: Layer, training: bool, act: str, keep_layout: bool = False
) -> Tensor:
    bias, mean, var = split(x, rest)
    settings: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "act": act, "negative_slope": 0.2}
    if layer.transposed:
        settings["output_padding"] = layer.output_padding
    op = conv_transpose2d_batch_norm_act if layer.transposed else conv2d_batch_norm_act
    return op(
        x, weight, bias, mean, var, bn_weight, bn_bias, training,
        keep_layout=keep_layout, **settings,
    )  # fmt: skip


def conv_norm(x, weight, bn_weight, bn_bias, *rest, layer: Layer, training: bool) -> Tensor:
    bias, mean, var = split(x, rest)
    if layer.transposed:
        y = F.conv_transpose2d(x, weight, bias, layer.stride, layer.padding, layer.output_padding)
    else:
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding)
    return F.batch_norm(y, mean, var, bn_weight, bn_bias, training)


def stock(*tensors, layer: Layer, training: bool, act: str) -> Tensor:
    y = conv_norm(*tensors, layer=layer, training=training)
    return F.relu(y, inplace=True) if act == "relu" else F.leaky_relu(y, 0.2, inplace=True)


def inputs(layer: Layer) -> Inputs:
    c_in, c_out = layer.channels
    x = torch.randn(layer.batch, c_in, layer.size, layer.size)
    kernel = (layer.kernel, layer.kernel)
    weight = torch.randn(*((c_in, c_out) if layer.transposed else (c_out, c_in)), *kernel) * 0.02
    parameters = [weight, torch.randn(c_out) * 0.02 + 1, torch.randn(c_out) / 4]
    if layer.bias:
        parameters.append(torch.randn(c_out) / 4)
    return Inputs(x, parameters, [torch.zeros(c_out), torch.ones(c_out)])


@dataclass(frozen=True, kw_only=True)
class ChosenCase(OpCase):
    """Notes which forms of a convolution have been chosen, and the milliseconds of all: there are several on CUDA."""

    def prepare(self, device: torch.device) -> Contest:
        _autotune.reset()
        contest = super().prepare(device)
        for operator, times in _autotune.chosen():
            contest.notes.append(
                f"{operator} by " + ", not ".join(f"{form} ({ms:.4g} ms)" for form, ms in times.items())
            )
        return contest


def case(layer: Layer, dtype: torch.dtype, layout: str, work: Work) -> Case:
    act = "relu" if layer.transposed else "leaky_relu"
    fixed: dict[str, Any] = {"layer": layer, "training": work != "eval forward"}
    peer = partial(stock, act=act, **fixed)
    # With channels_last ours is the layer inside of a fused chain: the weight stays as the model has it.
    contenders = {
        OURS: Contender(partial(ours, act=act, keep_layout=layout == "NCHW", **fixed), layout),
        "NCHW": Contender(peer, "NCHW"),
        "channels_last": Contender(peer, "channels_last", "channels_last"),
    }
    if layer == GOAL:
        contenders["compile"] = Contender(peer, "channels_last", "channels_last", compiled=True)
    return ChosenCase(
        op="conv_norm_act",
        work=work,
        shape=str(layer),
        dtype=dtype,
        layout=layout,
        headline=layer in HEADLINES and layout == "channels_last" and work == "forward+backward",
        inputs=partial(inputs, layer),
        contenders=contenders,
        reference=peer,
        preactivation=partial(conv_norm, **fixed),
        tensors_moved=MOVES[work],
    )


def cases(device: torch.device) -> Iterator[Case]:
    for layer, dtype, work in product(LAYERS, (torch.float32, torch.bfloat16), MOVES):
        yield case(layer, dtype, "channels_last", work)
    for dtype, work in product((torch.float32, torch.bfloat16), MOVES):
        yield case(GOAL, dtype, "NCHW", work)
