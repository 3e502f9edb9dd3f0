"""(Transposed) convolution, batch normalisation and activation in one call: the unit that DCGAN is made of."""

import math
from functools import partial

import torch
from torch import Tensor

from fastgan.ops import _conv_cuda, conv, norm_act
from fastgan.ops._autograd import operators
from fastgan.ops._norm import with_zero_gradient
from fastgan.ops._tensors import accumulation_dtype, in_layout, lies_in_both, suggests_channels_last
from fastgan.ops._types import Act
from fastgan.ops.conv import Size2

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    transposed: bool,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    act: Act = "relu",
    negative_slope: float = 0.01,
    prelu_weight: Tensor | None = None,
) -> Tensor:
    """Both functions below in plain torch."""
    y = conv.reference(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    return norm_act.reference(
        y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        act=act, negative_slope=negative_slope, prelu_weight=prelu_weight,
    )  # fmt: skip


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────
# Made of the registered operators `fastgan::convolution`, or `fastgan::convolution_moments`, and `fastgan::batch_norm_act`,
# whose gradients they have.


def conv2d_batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    act: Act = "relu",
    negative_slope: float = 0.01,
    prelu_weight: Tensor | None = None,
    keep_layout: bool = True,
) -> Tensor:
    """y = act(batch_norm(conv2d(x, weight) + bias)).

    In training the bias moves nothing but `running_mean` (the norm subtracts it again): it is not added to the tensor, and
    its gradient is zero. Outside training the norm is folded into the convolution, weight · s and (bias − running_mean) · s
    + bn_bias with s = bn_weight / √(running_var + eps), unless the weight is 16-bit or larger than the output.

    Args:
        x, weight, bias, stride, padding, dilation, groups, keep_layout: as in `fastgan.ops.conv2d`.
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, act, negative_slope, prelu_weight: as
            `running_mean`, `running_var`, `weight`, `bias`, … in `fastgan.ops.batch_norm_act`.

    On CUDA one kernel may convolve and find the statistics, where that has been measured to be faster for the shape:
    `_autotune` says when and how.

    Under autocast the convolution runs in the autocast dtype; statistics, bn_weight, bn_bias and the running statistics
    stay float32. Deterministic as `conv2d` is. Twice differentiable by kernels, and further through the definition of the
    norm. Saved for backward: x, the weight, the convolution's output, and (C',) vectors.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or settings that do not fit; the message names the argument.
    """
    return _conv_norm_act(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        (stride, padding, dilation, False, 0, groups), act, negative_slope, prelu_weight, keep_layout,
    )  # fmt: skip


def conv_transpose2d_batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    act: Act = "relu",
    negative_slope: float = 0.01,
    prelu_weight: Tensor | None = None,
    keep_layout: bool = True,
) -> Tensor:
    """y = act(batch_norm(conv_transpose2d(x, weight) + bias)).

    The convolution is `fastgan.ops.conv_transpose2d`; all else is as in `conv2d_batch_norm_act`.
    """
    return _conv_norm_act(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        (stride, padding, dilation, True, output_padding, groups), act, negative_slope, prelu_weight, keep_layout,
    )  # fmt: skip


def _conv_norm_act(
    x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
    settings, act: Act, negative_slope: float, prelu_weight: Tensor | None, keep_layout: bool,
) -> Tensor:  # fmt: skip
    convolution = conv.prepare(x, weight, bias, settings)
    norm_act.check_parameters(
        x, convolution.size[1], running_mean, running_var, bn_weight, bn_bias, training, eps, act, prelu_weight,
        prefix="bn_",
    )  # fmt: skip
    norm_act.check_other_settings(momentum, negative_slope)
    if training:
        norm_act.check_batch_size(convolution.size)
    if convolution.runs_as_stock:
        y = conv.convolve(convolution, keep_layout)
        return norm_act.normalise(
            y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, act, negative_slope, prelu_weight
        )
    if training:
        convolution = convolution._replace(bias=None)
        tile = _fastest_tile(convolution, bn_weight, bn_bias, eps, act, negative_slope, prelu_weight)
        moments = None
        if tile is None:
            y = conv.convolve(convolution, keep_layout=False)
        else:
            y, mean, var = conv.convolve_with_moments(convolution, tile)
            moments = mean, var
        y = norm_act.normalise(
            y, running_mean, running_var, bn_weight, with_zero_gradient(bn_bias, bias), True, momentum, eps, act,
            negative_slope, prelu_weight, mean_offset=bias, moments=moments,
        )  # fmt: skip
    elif weight.dtype.itemsize == 2 or _costs_more_to_fold(convolution):
        # A folded 16-bit weight would be rounded once more.
        y = conv.convolve(convolution, keep_layout=False)
        y = norm_act.normalise(
            y, running_mean, running_var, bn_weight, bn_bias, False, momentum, eps, act, negative_slope, prelu_weight
        )
    else:
        folded = _fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, convolution.settings)
        y = conv.convolve(conv.prepare(convolution.x, *folded, convolution.settings), keep_layout=False)
        y = norm_act.activate_(y, act, negative_slope, prelu_weight)
    if not keep_layout:
        return y
    # What lies in both layouts a norm gives as contiguous.
    return in_layout(y, False) if lies_in_both(y) else conv.in_stock_s_layout(y, x, weight)


def _fastest_tile(
    convolution: conv.Prepared, bn_weight, bn_bias, eps: float, act: Act, negative_slope: float, prelu_weight
) -> str | None:
    """The tile with which a convolution that finds its moments on its way is faster than one and a pass that finds them;
    None where none is."""
    x, weight, _, settings, *_ = convolution
    is_in_rows = conv.prefers_rows(x) or suggests_channels_last(x) or suggests_channels_last(weight)
    if torch.compiler.is_compiling() or not (_conv_cuda.takes(x, weight.shape, settings) and is_in_rows):
        return None

    def run(tile: str | None) -> Tensor:
        if tile is None:
            y, mean, var = conv.convolve(convolution, keep_layout=False), None, None
        else:
            y, mean, var = conv.convolve_with_moments(convolution, tile)
        return operators.batch_norm_act(
            y, bn_weight, bn_bias, None, prelu_weight, mean, var, True, eps, act, negative_slope
        )

    def candidates():
        return {_conv_cuda.VENDOR: partial(run, None)} | {
            tile: partial(run, tile) for tile in _conv_cuda.tiles_with_moments(x.dtype)
        }

    form = _conv_cuda.choose("conv_norm_act", (x, weight), settings, candidates)
    return None if form == _conv_cuda.VENDOR else form


def _costs_more_to_fold(convolution: conv.Prepared) -> bool:
    """Whether the weight is larger than the output. Unless compiled: for whatever size of batch is to come."""
    return not torch.compiler.is_compiling() and convolution.weight.numel() > math.prod(convolution.size)


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    settings: tuple,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that convolves and normalises."""
    _, _, _, transposed, _, groups = settings
    acc = accumulation_dtype(weight.dtype)
    scale = (running_var.to(acc) + eps).rsqrt()
    if bn_weight is not None:
        scale = scale * bn_weight
    shift = -running_mean.to(acc) if bias is None else bias - running_mean.to(acc)
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias
    if transposed:  # (C, C' / groups, kh, kw): the input channels of group g serve its own output channels
        per_group = scale.view(groups, 1, -1, 1, 1)
        folded = (weight.view(groups, -1, *weight.shape[1:]) * per_group).view(weight.shape)
    else:
        folded = weight * scale.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), shift.to(weight.dtype)
