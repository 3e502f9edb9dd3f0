"""Norms with the statistics of one sample (group, instance, layer), residual addition and activation in one operator,
exact to the second derivative."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, operators, register_gradient
from fastgan.ops._kernels import register_kernels
from fastgan.ops._norm import (
    NormCall,
    activate,
    activate_,
    check_parameter,
    check_residual,
    check_settings,
    empty_sample_statistics,
    in_one_dtype,
    stock_is_faster,
    third_derivative,
)
from fastgan.ops._tensors import (
    accumulation_dtype,
    check_count,
    check_input,
    check_number,
    dense,
    is_channels_last,
    remember_edges,
    will_use,
)
from fastgan.ops._types import FixedAct

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: FixedAct = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """`group_norm_act` in plain torch, and with a weight and bias of `x.shape[1:]` and one group `layer_norm_act`.

    Instance norm is `num_groups` = C. `torch.group_norm` also takes groups of a single element, which its functional form
    refuses.
    """
    if weight is None and bias is not None:  # torch's own cannot be differentiated, or not twice, with a bias alone
        weight = torch.ones_like(bias)
    weight, bias = in_one_dtype(x, weight, bias)
    if _is_per_element(weight, bias):
        y = F.layer_norm(x, x.shape[1:], weight, bias, eps)
    elif x.numel() == 0:  # torch 2.15 refuses planes without pixels; the gradients of weight and bias are 0
        y = x.clone()
        for parameter in (weight, bias):
            if parameter is not None:
                y = y + parameter.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)
    else:
        # Of a channels_last x torch 2.13 crashes in a backward pass to the parameters alone.
        y = torch.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    if is_channels_last(x):  # by torch's own operation: function transforms have no other
        y = y.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if residual is not None:
        y = y + residual
    return activate_(y, act, negative_slope)


def _is_per_element(*parameters: Tensor | None) -> bool:
    return any(p is not None and p.dim() > 1 for p in parameters)


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# weight and bias are (C,), or of one sample's shape where there is one group. What an operator need not compute it
# returns as an empty tensor.

torch.library.define(
    "fastgan::group_norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int num_groups, float eps, str act, "
    "float negative_slope) -> (Tensor y, Tensor mean, Tensor var)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::group_norm_act_backward",
    "(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var, float eps, "
    "str act, float negative_slope, bool needs_x, bool needs_params, bool needs_residual) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::group_norm_act_double_backward",
    "(Tensor? ggx, Tensor? ggw, Tensor? ggb, Tensor? ggr, Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor mean, Tensor var, float eps, str act, float negative_slope) "
    "-> (Tensor g_grad_y, Tensor g_x, Tensor g_weight)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _empty_like_parameter(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = x.shape[1:] if _is_per_element(weight, bias) else x.shape[1:2]
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype) if weight is None else weight.dtype)


@torch.library.register_fake("fastgan::group_norm_act")
def _(x, weight, bias, residual, num_groups, eps, act, negative_slope):
    mean, var = empty_sample_statistics(x, num_groups)
    return torch.empty_like(dense(x, is_channels_last(x))), mean, var


@torch.library.register_fake("fastgan::group_norm_act_backward")
def _(grad_y, x, weight, bias, residual, mean, var, eps, act, negative_slope, needs_x, needs_params, needs_residual):
    def like_x(needed):
        return torch.empty_like(dense(x, is_channels_last(x))) if needed else x.new_empty(0)

    def parameter():
        return _empty_like_parameter(x, weight, bias) if needs_params else x.new_empty(0)

    return like_x(needs_x), parameter(), parameter(), like_x(needs_residual)


@torch.library.register_fake("fastgan::group_norm_act_double_backward")
def _(ggx, ggw, ggb, ggr, grad_y, x, weight, bias, residual, mean, var, eps, act, negative_slope):
    like_x = torch.empty_like(dense(x, is_channels_last(x)))
    return like_x, torch.empty_like(like_x), _empty_like_parameter(x, weight, bias)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save_forward(ctx, inputs, output) -> None:
    x, weight, bias, residual, _, *ctx.settings = inputs
    _, mean, var = output
    remember_edges(ctx, inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    ctx.passes_residual = ctx.settings[1] == "none"  # whose gradient then is grad_y itself, and its value of no account
    ctx.save_for_backward(x, weight, bias, None if ctx.passes_residual else residual, mean, var)


def _backward(ctx, grad_y, _mean, _var):
    grads: list[Tensor | None] = [None] * 8
    if grad_y is None:
        return tuple(grads)
    needs = [will_use(ctx, i) for i in range(4)]
    if needs[3] and ctx.passes_residual:
        grads[3], needs[3] = grad_y, False
    if any(needs):
        needs_x, needs_weight, needs_bias, needs_residual = needs
        found = operators.group_norm_act_backward(
            grad_y, *ctx.saved_tensors, *ctx.settings, needs_x, needs_weight or needs_bias, needs_residual
        )
        for i in range(4):
            if needs[i]:
                grads[i] = found[i]
    return tuple(grads)


register_gradient("group_norm_act", _backward, _save_forward)


def _save_backward(ctx, inputs, output) -> None:
    *tensors, eps, act, negative_slope, _, _, _ = inputs
    ctx.settings = (eps, act, negative_slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, ggx, ggw, ggb, ggr):
    grads: list[Tensor | None] = [None] * 13
    if ggx is ggw is ggb is ggr is None:
        return tuple(grads)
    bias = ctx.saved_tensors[3]
    found = operators.group_norm_act_double_backward(ggx, ggw, ggb, ggr, *ctx.saved_tensors, *ctx.settings)
    for i in range(3):
        if ctx.needs_input_grad[i]:
            grads[i] = found[i]
    if ctx.needs_input_grad[3] and ctx.settings[1] != "none":
        grads[3] = torch.zeros_like(bias)  # bias moves only the switching points of the activation
    return tuple(grads)


register_gradient("group_norm_act_backward", _double_backward, _save_backward)


def _save_double_backward(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.act, ctx.negative_slope = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _composed(tensors: list, num_groups: int, eps: float, act: FixedAct, negative_slope: float) -> Tensor:
    """`reference` in elementary operations."""
    x, weight, bias, residual = tensors

    def over_x(parameter: Tensor) -> Tensor:
        return parameter if parameter.dim() > 1 else parameter.view(-1, *[1] * (x.dim() - 2))

    grouped = x.reshape(x.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    y = (centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()).view(x.shape)
    if weight is not None:
        y = y * over_x(weight)
    if bias is not None:
        y = y + over_x(bias)
    return activate(y if residual is None else y + residual, act, negative_slope)


def _triple_backward(ctx, *cotangents):
    num_groups = ctx.saved_tensors[-1].shape[1]
    return third_derivative(ctx, lambda t: _composed(t, num_groups, ctx.eps, ctx.act, ctx.negative_slope), cotangents)


register_gradient("group_norm_act_double_backward", _triple_backward, _save_double_backward)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _call(x, weight, bias, residual, mean, var, *settings) -> NormCall:
    groups = mean.shape[1]
    # A sample whose parameters have a value for each element lies in one piece: so does one of single-element channels.
    per_element = _is_per_element(weight, bias) or (groups == 1 and math.prod(x.shape[2:]) == 1)
    return NormCall(x, weight, bias, residual, mean, var, True, *settings, groups=groups, per_element=per_element)


def _cpp_forward(x, weight, bias, residual, num_groups, *settings):
    mean, var = empty_sample_statistics(x, num_groups)
    return _call(x, weight, bias, residual, mean, var, *settings).forward(), mean, var


def _cpp_backward(grad_y, *arguments):
    return _call(*arguments[:-3]).backward(grad_y, *arguments[-3:])[:4]


def _cpp_double_backward(ggx, ggw, ggb, ggr, grad_y, *arguments):
    return _call(*arguments).double_backward(ggx, ggw, ggb, ggr, grad_y)[:3]


register_kernels("group_norm_act", "group_norm_act", "group_norm_act_forward", _cpp_forward)
register_kernels("group_norm_act_backward", "group_norm_act", "group_norm_act_backward", _cpp_backward)
register_kernels(
    "group_norm_act_double_backward", "group_norm_act", "group_norm_act_double_backward", _cpp_double_backward
)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: FixedAct = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """y = act((x − μ) / √(σ² + eps) · weight + bias + residual), with μ and σ² of each group (Wu & He 2018).

    μ and the biased σ² are taken over C / num_groups consecutive channels and all pixels of one sample. A group of one
    element has σ² = 0: its y is act(bias + residual), and x gets a gradient of 0.

    Args:
        x: (N, C, \\*), at least 2 dimensions; float32, float64, bfloat16 or float16. NCHW and channels_last are both fast,
            and the output keeps the layout; any other strides are copied first.
        num_groups: divides C.
        weight, bias: (C,), in x's dtype or float32; None stands for 1 and 0.
        act: "none", "relu" or "leaky_relu" (max(y, 0) + negative_slope · min(y, 0)).
        residual: of x's shape, dtype and device, added before the activation.

    Statistics and sums are float32 (float64 for float64), and deterministic, for any number of threads. Twice
    differentiable by its own kernels in x, weight, bias and residual; higher orders go through the definition. Saved for
    backward: x, (N, num_groups) statistics, and the residual where an activation follows.

    Raises:
        TypeError: x is not floating point, or another tensor has a dtype that does not fit it.
        ValueError: shapes, devices or settings that do not fit. The message names the argument.
    """
    num_groups = check_group_norm(x, num_groups, weight, bias, eps, act, residual)
    check_number("negative_slope", negative_slope)
    return normalise(x, num_groups, weight, bias, eps, act, negative_slope, residual)


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: FixedAct = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """y = act((x − μ) / √(σ² + eps) · weight + bias + residual), with μ and σ² of each plane (Ulyanov et al. 2016).

    `group_norm_act` with as many groups as channels. Unlike stock instance norm it takes planes of a single element, whose
    y is act(bias + residual).
    """
    _check_input(x)
    if x.shape[1] == 0:
        raise ValueError(f"x must have a channel, not shape {tuple(x.shape)}")
    return group_norm_act(x, x.shape[1], weight, bias, eps, act=act, negative_slope=negative_slope, residual=residual)


def layer_norm_act(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: FixedAct = "none",
    negative_slope: float = 0.01,
) -> Tensor:
    """y = act((x − μ) / √(σ² + eps) · weight + bias), with μ and σ² over the last axes of x (Ba, Kiros & Hinton 2016).

    Args:
        x: (\\*, \\*normalized_shape). Where only the batch is left out, a channels_last x is fast and keeps its layout;
            over fewer axes it is copied first.
        normalized_shape: the last sizes of x, or the last one.
        weight, bias: of normalized_shape, in x's dtype or float32; None stands for 1 and 0.

    The rest is as in `group_norm_act`.
    """
    samples = check_layer_norm(x, normalized_shape, weight, bias, eps, act)
    check_number("negative_slope", negative_slope)
    return normalise(samples, 1, weight, bias, eps, act, negative_slope).view(x.shape)


def normalise(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: FixedAct,
    negative_slope: float,
    residual: Tensor | None = None,
    lean: bool = False,
) -> Tensor:
    """`group_norm_act` on checked arguments. With `lean` the operator serves be stock torch faster in the forward or not."""
    if _is_stock_s(x, _is_per_element(weight, bias), lean):
        return reference(x, num_groups, weight, bias, eps, act=act, negative_slope=negative_slope, residual=residual)
    y, _, _ = operators.group_norm_act(x, weight, bias, residual, num_groups, eps, act, negative_slope)
    return y


def normalise_planes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: FixedAct,
    negative_slope: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`instance_norm_act` on checked arguments, and each plane's mean and biased variance, (N, C), which are constants."""
    channels = x.shape[1]
    if _is_stock_s(x):
        y = reference(x, channels, weight, bias, eps, act=act, negative_slope=negative_slope, residual=residual)
        var, mean = torch.var_mean(x.detach().to(accumulation_dtype(x.dtype)).flatten(2), 2, correction=0)
        return y, mean, var
    y, mean, var = operators.group_norm_act(x, weight, bias, residual, channels, eps, act, negative_slope)
    return y, mean.detach(), var.detach()


# Of the last where the parameters have a value for each element: these are laid out anew at every call.
_SMALL, _SMALL_CHANNELS_LAST, _SMALL_PER_ELEMENT = 1 << 18, 1 << 12, 1 << 15
# In channels_last, of float32 and the rest, against torch's group norm without the definition's copies.
_SMALL_AS_IT_LIES = 1 << 17, 1 << 14


def _is_stock_s(x: Tensor, per_element: bool = False, lean: bool = False) -> bool:
    """Whether the definition computes x: no operator serves, or, unless `lean`, stock torch is faster."""
    no_operator = x.numel() == 0 or is_transformed() or backend.serving(x.device.type) == "reference"
    return no_operator or (not lean and is_small(x, per_element))


def is_small(x: Tensor, per_element: bool, as_it_lies: bool = False) -> bool:
    """Whether stock torch is faster at x. `per_element`: with parameters that have a value for each element. `as_it_lies`:
    not the definition, but torch's own layer."""
    small = _SMALL_CHANNELS_LAST
    if per_element:
        small = _SMALL_PER_ELEMENT
    elif as_it_lies:
        small = _SMALL_AS_IT_LIES[x.dtype != torch.float32]
    return stock_is_faster(x, _SMALL, small)


def _check_input(x: Tensor) -> None:
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions (N, C, *), not shape {tuple(x.shape)}")


def check_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    residual: Tensor | None = None,
) -> int:
    """Raise what `group_norm_act` says it raises; else num_groups as Python's integer."""
    _check_input(x)
    check_settings(eps, act)
    channels = x.shape[1]
    num_groups = check_count("num_groups", num_groups)
    if channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels of x, not be {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_parameter(name, parameter, x, (channels,), "one for each channel")
    check_residual(residual, x)
    return num_groups


def check_layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """Raise what `layer_norm_act` says it raises; else x with one axis before normalized_shape."""
    check_input(x)
    check_settings(eps, act)
    given = normalized_shape if isinstance(normalized_shape, Sequence) else [normalized_shape]
    shape = tuple(check_count("normalized_shape", size, least=0) for size in given)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"normalized_shape must be the last sizes of x, of shape {tuple(x.shape)}, not {shape}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_parameter(name, parameter, x, shape, "one for each element of normalized_shape")
    return x if x.dim() == len(shape) + 1 else x.reshape(math.prod(x.shape[: -len(shape)]), *shape)
