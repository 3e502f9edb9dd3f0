"""(Transposed) convolution, batch normalisation and activation in one call: the unit that DCGAN is made of."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastgan.ops import _conv_cuda, conv, norm_act
from fastgan.ops._autograd import operators, register_gradient, register_without_gradient
from fastgan.ops._kernels import register_kernel
from fastgan.ops._norm import with_zero_gradient
from fastgan.ops._tensors import (
    accumulation_dtype,
    in_layout,
    lies_in_both,
    remember_edges,
    suggests_channels_last,
    will_use,
)
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


# ── A convolution behind a norm ──────────────────────────────────────────────────────────────────────────────────────
# What a layer hands to the next one's convolution: its own, which is still to be normalised and activated. On CUDA a kernel
# may do so as it loads it. Nobody then writes the normalised tensor, nor keeps it for backward.


class Norm(NamedTuple):
    """A batch norm of training, with the moments of the tensor that it is for, and the activation behind it."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    prelu_weight: Tensor | None
    eps: float
    act: Act
    negative_slope: float

    def of(self, x: Tensor) -> Tensor:
        """x behind it."""
        mean, var, weight, bias, prelu_weight, *settings = self
        return operators.batch_norm_act(x, weight, bias, None, prelu_weight, mean, var, True, *settings)[0]


_NORM = (
    "Tensor mean, Tensor var, Tensor? norm_weight, Tensor? norm_bias, Tensor? prelu_weight, float eps, str act, "
    "float negative_slope"
)
# Without a bias, with y's mean and biased variance.
torch.library.define(
    "fastgan::convolution_behind_norm",
    f"(Tensor x, {_NORM}, Tensor weight, {conv.SETTINGS}, str tile) -> (Tensor y, Tensor y_mean, Tensor y_var)",
    tags=torch.Tag.pt2_compliant_tag,
)
# Of a pass that nobody differentiates.
torch.library.define(
    "fastgan::convolution_weight_grad_behind_norm",
    f"(Tensor grad_y, Tensor x, {_NORM}, SymInt[] weight_shape, {conv.SETTINGS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_WEIGHT = 1 + len(Norm._fields)  # where the arguments behind x and the norm begin


@torch.library.register_fake("fastgan::convolution_behind_norm")
def _(x, *rest):
    return conv.moments_by_definition(x, *rest[_WEIGHT - 1 :])


@torch.library.register_fake("fastgan::convolution_weight_grad_behind_norm")
def _(grad_y, x, *rest):
    return x.new_empty(rest[_WEIGHT - 1])


def _save_behind_norm(ctx, inputs, output) -> None:
    x, *norm = inputs[:_WEIGHT]
    weight, *ctx.settings, _ = inputs[_WEIGHT:]
    _, mean, var = output
    ctx.norm_settings = norm[5:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, *norm[:5], weight)
    remember_edges(ctx, inputs)


def _backward_behind_norm(ctx, grad_y, _mean, _var):
    """The chain rule, for which the norm is taken of x once more."""
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_y is None:
        return tuple(grads)
    x, *vectors, weight = ctx.saved_tensors
    norm = Norm(*vectors, *ctx.norm_settings)
    if will_use(ctx, _WEIGHT):
        if torch.is_grad_enabled():
            found = operators.convolution_weight_grad(grad_y, norm.of(x), weight.shape, *ctx.settings)
        else:
            found = operators.convolution_weight_grad_behind_norm(grad_y, x, *norm, weight.shape, *ctx.settings)
        grads[_WEIGHT] = found
    places = (0, 3, 4, 5)  # of x, and of the norm's weight, bias and PReLU's weight
    needs_x, *needs = (ctx.needs_input_grad[place] for place in places)
    if needs_x or any(needs):
        mean, var, norm_weight, norm_bias, prelu_weight, *settings = norm
        grad_x, grad_weight, grad_bias, _, grad_prelu_weight = operators.batch_norm_act_backward(
            conv.input_grad(grad_y, weight, x.shape[2:], ctx.settings),
            x, norm_weight, norm_bias, None, prelu_weight, mean, var, True, *settings, needs_x, any(needs), False,
        )  # fmt: skip
        found = (grad_x, grad_weight, grad_bias, grad_prelu_weight)
        for place, needed, grad in zip(places, (needs_x, *needs), found, strict=True):
            if needed:
                grads[place] = grad
    return tuple(grads)


register_gradient("convolution_behind_norm", _backward_behind_norm, _save_behind_norm)
register_without_gradient("convolution_weight_grad_behind_norm")


def _behind_norm_by_definition(x, *rest):
    return operators.convolution_moments(Norm(*rest[: _WEIGHT - 1]).of(x), *rest[_WEIGHT - 1 :])


def _weight_grad_behind_norm_by_definition(grad_y, x, *rest):
    return operators.convolution_weight_grad(grad_y, Norm(*rest[: _WEIGHT - 1]).of(x), *rest[_WEIGHT - 1 :])


def _cuda_behind_norm(x, *rest):
    norm, (weight, *settings, tile) = Norm(*rest[: _WEIGHT - 1]), rest[_WEIGHT - 1 :]
    return _conv_cuda.convolution_behind_norm(x, norm, weight, tuple(settings), tile)


def _cuda_weight_grad_behind_norm(grad_y, x, *rest):
    norm, (weight_shape, *settings) = Norm(*rest[: _WEIGHT - 1]), rest[_WEIGHT - 1 :]
    return _conv_cuda.weight_grad_behind_norm(grad_y, x, norm, weight_shape, tuple(settings), partial(norm.of, x))


for _operator, _definition, _kernel in (
    ("convolution_behind_norm", _behind_norm_by_definition, _cuda_behind_norm),
    ("convolution_weight_grad_behind_norm", _weight_grad_behind_norm_by_definition, _cuda_weight_grad_behind_norm),
):
    torch.library.impl(f"fastgan::{_operator}", "CompositeExplicitAutograd", _definition)
    register_kernel(_operator, "cuda", _kernel)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────
# Made of the registered operators `fastgan::convolution`, or one of those that find moments, and `fastgan::batch_norm_act`,
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
    y, _ = conv_norm_act(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        (stride, padding, dilation, False, 0, groups), act, negative_slope, prelu_weight, keep_layout,
    )  # fmt: skip
    return y


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
    y, _ = conv_norm_act(
        x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        (stride, padding, dilation, True, output_padding, groups), act, negative_slope, prelu_weight, keep_layout,
    )  # fmt: skip
    return y


def conv_norm_act(
    x, weight, bias, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
    settings, act: Act, negative_slope: float, prelu_weight: Tensor | None, keep_layout: bool,
    before: Norm | None = None, hands_on: bool = False,
) -> tuple[Tensor, Norm | None]:  # fmt: skip
    """Both functions, of x behind the norm `before`. With `hands_on` their own norm and activation may be left to whoever
    takes the result, and come back beside it."""
    convolution = conv.prepare(x, weight, bias, settings)
    norm_act.check_parameters(
        x, convolution.size[1], running_mean, running_var, bn_weight, bn_bias, training, eps, act, prelu_weight,
        prefix="bn_",
    )  # fmt: skip
    norm_act.check_other_settings(momentum, negative_slope)
    if training:
        norm_act.check_batch_size(convolution.size)
    form = _Form()
    if training and not convolution.runs_as_stock:
        convolution = convolution._replace(bias=None)
        form = _fastest_form(convolution, before, bn_weight, bn_bias, eps, act, negative_slope, prelu_weight)
    if before and not form.is_behind_norm:
        convolution, before = convolution._replace(x=before.of(convolution.x)), None
    if convolution.runs_as_stock:
        y = conv.convolve(convolution, keep_layout)
        y = norm_act.normalise(
            y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, act, negative_slope, prelu_weight
        )
        return y, None
    if training:
        y, moments = _convolve(convolution, before, form)
        bn_bias = with_zero_gradient(bn_bias, bias)
        if moments and hands_on:
            norm_act.move_statistics(running_mean, running_var, *moments, momentum, y.numel() // y.shape[1], bias)
            return y, Norm(*moments, bn_weight, bn_bias, prelu_weight, eps, act, negative_slope)
        y = norm_act.normalise(
            y, running_mean, running_var, bn_weight, bn_bias, True, momentum, eps, act,
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
        return y, None
    # What lies in both layouts a norm gives as contiguous.
    return in_layout(y, False) if lies_in_both(y) else conv.in_stock_s_layout(y, x, weight), None


class _Form(NamedTuple):
    """How a layer convolves: by the kernel that finds the moments of its result, with a `tile`, or by none of our own. The
    kernel may take in the norm that x is behind."""

    tile: str | None = None
    is_behind_norm: bool = False


def _convolve(
    convolution: conv.Prepared, before: Norm | None, form: _Form
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The convolution in the layout that is fast, and its moments where they are found on the way."""
    if form.tile is None:
        return conv.convolve(convolution, keep_layout=False), None
    if before is None:
        y, mean, var = conv.convolve_with_moments(convolution, form.tile)
    else:
        x, weight, _, settings, *_ = convolution
        y, mean, var = operators.convolution_behind_norm(conv.in_rows(x), *before, weight, *settings, form.tile)
    return y, (mean, var)


def _fastest_form(
    convolution: conv.Prepared, before: Norm | None, bn_weight, bn_bias, eps: float, act: Act, negative_slope: float,
    prelu_weight,
) -> _Form:  # fmt: skip
    """The form in which the layer, with the norm before it and its own, is fastest."""
    x, weight, _, settings, *_ = convolution
    is_in_rows = conv.prefers_rows(x) or suggests_channels_last(x) or suggests_channels_last(weight)
    if torch.compiler.is_compiling() or not (_conv_cuda.takes(x, weight.shape, settings) and is_in_rows):
        return _Form()
    forms = {_conv_cuda.VENDOR: _Form()} | {tile: _Form(tile) for tile in _conv_cuda.tiles_with_moments(x.dtype)}
    if before:
        forms |= {f"{tile} behind the norm": _Form(tile, True) for tile in _conv_cuda.tiles_behind_norm(x.dtype)}

    def run(form: _Form) -> Tensor:
        given, norm = convolution, before
        if norm and not form.is_behind_norm:
            given, norm = given._replace(x=norm.of(x)), None
        y, moments = _convolve(given, norm, form)
        mean, var = moments or (None, None)
        return operators.batch_norm_act(
            y, bn_weight, bn_bias, None, prelu_weight, mean, var, True, eps, act, negative_slope
        )[0]

    key = (*settings, before and before.act)
    return forms[
        _conv_cuda.choose(
            "conv_norm_act", (x, weight), key, lambda: {name: partial(run, form) for name, form in forms.items()}
        )
    ]


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
