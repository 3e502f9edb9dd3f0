"""(Transposed) convolution, batch normalisation and activation in one call: the unit that DCGAN is made of."""

import torch
from torch import Tensor

from fastgan import backend
from fastgan.ops import conv, norm_act
from fastgan.ops._tensors import accumulation_dtype, dense, is_channels_last
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
) -> Tensor:
    """Both functions below in plain torch."""
    y = conv.reference(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    return norm_act.reference(
        y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        act=act, negative_slope=negative_slope,
    )  # fmt: skip


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────
# Made of the registered operators `fastgan::convolution` and `fastgan::batch_norm_act`, whose gradients they have.


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
    keep_layout: bool = True,
) -> Tensor:
    """y = act(batch_norm(conv2d(x, weight) + bias)).

    In training the bias moves nothing but `running_mean` (the norm subtracts it again): it is not added to the tensor, and
    its gradient is zero. Outside training the norm is folded into the convolution, weight · s and (bias − running_mean) · s
    + bn_bias with s = bn_weight / √(running_var + eps), unless the weight is 16-bit or larger than the output.

    Args:
        x, weight, bias, stride, padding, dilation, groups, keep_layout: as in `fastgan.ops.conv2d`.
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, act, negative_slope: as `running_mean`,
            `running_var`, `weight`, `bias`, … in `fastgan.ops.batch_norm_act`.

    Under autocast the convolution runs in the autocast dtype; statistics, bn_weight, bn_bias and the running statistics
    stay float32. Twice differentiable by kernels, and further through the definition of the norm. Saved for backward: x,
    the weight, the convolution's output, and (C',) vectors.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or settings that do not fit; the message names the argument.
    """
    return _conv_norm_act(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        (stride, padding, dilation, False, 0, groups), act, negative_slope, keep_layout,
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
    keep_layout: bool = True,
) -> Tensor:
    """y = act(batch_norm(conv_transpose2d(x, weight) + bias)).

    The convolution is `fastgan.ops.conv_transpose2d`; all else is as in `conv2d_batch_norm_act`.
    """
    return _conv_norm_act(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        (stride, padding, dilation, True, output_padding, groups), act, negative_slope, keep_layout,
    )  # fmt: skip


def _conv_norm_act(
    x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
    settings, act: Act, negative_slope: float, keep_layout: bool,
) -> Tensor:  # fmt: skip
    stride, padding, dilation, transposed, output_padding, groups = settings
    cast_x, cast_weight, cast_bias = conv.cast_for_autocast(x, weight, bias)
    conv.check_convolution(cast_x, cast_weight, cast_bias, transposed, groups)
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    norm_act.check_parameters(
        x, channels, running_mean, running_var, bn_weight, bn_bias, training, eps, act, prefix="bn_"
    )
    if backend.serving(x.device.type) == "reference":
        return reference(
            x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
            transposed=transposed, stride=stride, padding=padding, output_padding=output_padding, groups=groups,
            dilation=dilation, act=act, negative_slope=negative_slope,
        )  # fmt: skip
    stock_is_channels_last = is_channels_last(x) or is_channels_last(weight)
    if training:
        y = conv.convolve(cast_x, cast_weight, None, settings, keep_layout=False)
        norm_act.check_batch_size(y)
        y = norm_act.normalise(
            y, running_mean, running_var, bn_weight, _with_zero_gradient(bn_bias, bias), True, momentum, eps, act,
            negative_slope, mean_offset=bias,
        )  # fmt: skip
    elif weight.dtype.itemsize == 2 or weight.numel() > conv.output_numel(x, weight, settings):
        # A folded 16-bit weight is rounded once more; a weight larger than the output costs more to fold than it saves.
        y = conv.convolve(cast_x, cast_weight, cast_bias, settings, keep_layout=False)
        y = norm_act.normalise(
            y, running_mean, running_var, bn_weight, bn_bias, False, momentum, eps, act, negative_slope
        )  # fmt: skip
    else:
        folded = _fold(weight, bias, running_mean, running_var, bn_weight, bn_bias, eps, transposed, groups)
        y = conv.convolve(cast_x, *folded, settings, keep_layout=False)
        y = norm_act.activate_(y, act, negative_slope)
    return dense(y, stock_is_channels_last) if keep_layout else y


def _with_zero_gradient(bn_bias: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """`bn_bias`, through which the convolution's bias gets the gradient that it has in training: zeros, not None."""
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return bn_bias
    zero = bias * 0
    return zero if bn_bias is None else bn_bias + zero.to(bn_bias.dtype)


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    transposed: bool,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that convolves and normalises."""
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
