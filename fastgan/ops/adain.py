"""Adaptive instance normalisation, with the noise, bias and activation that StyleGAN has before it, in one operator, exact
to the second derivative."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, operators, register_gradient
from fastgan.ops._kernels import register_kernels
from fastgan.ops._norm import (
    NormCall,
    activate,
    check_parameter,
    check_settings,
    empty_sample_statistics,
    stock_is_faster,
    third_derivative,
)
from fastgan.ops._plane_statistics import plane_statistics
from fastgan.ops._tensors import (
    address,
    check_eps,
    check_input,
    check_is_tensor,
    check_like,
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
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    *,
    noise: Tensor | None = None,
    noise_weight: Tensor | None = None,
    bias: Tensor | None = None,
    act: FixedAct = "none",
    negative_slope: float = 0.2,
) -> Tensor:
    """`adain` in plain torch."""
    y = activate(_before(x, noise, noise_weight, bias), act, negative_slope)
    if x.numel():  # torch 2.15 refuses planes without pixels
        y = torch.group_norm(y, x.shape[1], eps=eps)  # instance norm, also of planes of one element
    return (_over_planes(scale, x) * y + _over_planes(shift, x)).to(x.dtype)


def _before(x: Tensor, noise: Tensor | None, noise_weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x + noise_weight · noise + bias."""
    y = x
    if noise is not None:
        y = y + (noise if noise_weight is None else _over_planes(noise_weight, x) * noise)
    if bias is not None:
        y = y + _over_planes(bias, x)
    return y.to(x.dtype)


def _over_planes(parameter: Tensor, x: Tensor) -> Tensor:
    """(C,) or (N, C) beside x."""
    return parameter.view(*parameter.shape, *[1] * (x.dim() - 2))


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# What an operator need not compute it returns as an empty tensor.

_SETTINGS = "float eps, str act, float negative_slope"
_INPUTS = "Tensor x, Tensor scale, Tensor shift, Tensor? noise_weight, Tensor? bias, Tensor? noise"
torch.library.define(
    "fastgan::adain",
    f"({_INPUTS}, {_SETTINGS}) -> (Tensor out, Tensor mean, Tensor var)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::adain_backward",
    f"(Tensor grad_out, {_INPUTS}, Tensor mean, Tensor var, {_SETTINGS}, bool needs_x, bool needs_style, "
    "bool needs_parameters) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_noise_weight, "
    "Tensor grad_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::adain_double_backward",
    "(Tensor? ggx, Tensor? gg_scale, Tensor? gg_shift, Tensor? gg_noise_weight, Tensor? gg_bias, Tensor grad_out, "
    f"{_INPUTS}, Tensor mean, Tensor var, {_SETTINGS}) "
    "-> (Tensor g_grad_out, Tensor g_x, Tensor g_scale, Tensor g_noise_weight, Tensor g_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _empty_like_x(x: Tensor) -> Tensor:
    return torch.empty_like(dense(x, is_channels_last(x)))


@torch.library.register_fake("fastgan::adain")
def _(x, *_):
    return _empty_like_x(x), *empty_sample_statistics(x, x.shape[1])


@torch.library.register_fake("fastgan::adain_backward")
def _(grad_out, x, scale, shift, noise_weight, bias, noise, mean, var, *settings):
    *_, needs_x, needs_style, needs_parameters = settings

    def like(tensor, needed):
        return tensor.new_empty(tensor.shape) if needed and tensor is not None else x.new_empty(0)

    return (
        _empty_like_x(x) if needs_x else x.new_empty(0),
        like(scale, needs_style),
        like(shift, needs_style),
        like(noise_weight, needs_parameters),
        like(bias, needs_parameters),
    )


@torch.library.register_fake("fastgan::adain_double_backward")
def _(ggx, gg_scale, gg_shift, gg_noise_weight, gg_bias, grad_out, x, scale, shift, noise_weight, bias, *_):
    g_parameters = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (noise_weight, bias))
    return _empty_like_x(x), _empty_like_x(x), scale.new_empty(scale.shape), *g_parameters


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save_forward(ctx, inputs, output) -> None:
    *tensors, eps, act, negative_slope = inputs
    _, mean, var = output
    ctx.settings = (eps, act, negative_slope)
    remember_edges(ctx, inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(*tensors, mean, var)


def _backward(ctx, grad_out, _mean, _var):
    grads: list[Tensor | None] = [None] * 9
    needs = [will_use(ctx, i) for i in range(5)]
    if grad_out is None or not any(needs):
        return tuple(grads)
    needs_x, needs_scale, needs_shift, needs_noise_weight, needs_bias = needs
    found = operators.adain_backward(
        grad_out, *ctx.saved_tensors, *ctx.settings,
        needs_x, needs_scale or needs_shift, needs_noise_weight or needs_bias,
    )  # fmt: skip
    for i in range(5):
        if needs[i]:
            grads[i] = found[i]
    return tuple(grads)


register_gradient("adain", _backward, _save_forward)


def _save_backward(ctx, inputs, output) -> None:
    *tensors, eps, act, negative_slope, _, _, _ = inputs
    ctx.settings = (eps, act, negative_slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, *ggs):
    grads: list[Tensor | None] = [None] * 15
    if all(gg is None for gg in ggs):
        return tuple(grads)
    found = operators.adain_double_backward(*ggs, *ctx.saved_tensors, *ctx.settings)
    # shift, argument 3, has no part in any gradient; stock autograd gives it none.
    for argument, grad in zip((0, 1, 2, 4, 5), found, strict=True):
        if ctx.needs_input_grad[argument]:
            grads[argument] = grad
    return tuple(grads)


register_gradient("adain_backward", _double_backward, _save_backward)


def _save_double_backward(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.act, ctx.negative_slope = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _triple_backward(ctx, *cotangents):
    noise = ctx.saved_tensors[11]

    def composed(tensors):
        """`reference` in elementary operations."""
        x, scale, shift, noise_weight, bias = tensors
        noise_here = None if noise is None else noise.to(x.dtype)
        y = activate(_before(x, noise_here, noise_weight, bias), ctx.act, ctx.negative_slope).flatten(2)
        centred = y - y.mean(-1, keepdim=True)
        normal = (centred * (centred.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()).view(x.shape)
        return _over_planes(scale, x) * normal + _over_planes(shift, x)

    return third_derivative(ctx, composed, cotangents, inputs=5, outputs=(0, 1, 2, 4, 5))


register_gradient("adain_double_backward", _triple_backward, _save_double_backward)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Call(NormCall):
    """What the three orders pass to C++ alike, as csrc/cpu/kernels.h declares it."""

    def __init__(self, x, scale, shift, noise_weight, bias, noise, mean, var, *settings):
        super().__init__(x, None, bias, None, mean, var, True, *settings, groups=x.shape[1])
        self.operator = "adain"
        self.scale: Tensor = self.parameter(scale)  # type: ignore[assignment]
        self.shift, self.noise_weight = self.parameter(shift), self.parameter(noise_weight)
        self.noise = None
        if noise is not None:
            self.noise = noise.to(self.acc).expand(x.shape[0], 1, *x.shape[2:]).contiguous()
        self.arguments = self.C.AdaIN(
            self.arguments, *map(address, (self.scale, self.shift, self.noise, self.noise_weight))
        )


def _in_type_of(originals: Sequence[Tensor | None], found: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """What an operator returns of gradients that are in the type of accumulation, or None."""
    return [
        x.new_empty(0) if original is None or grad is None else grad.to(original.dtype)
        for original, grad in zip(originals, found, strict=True)
    ]


def _cpp_forward(x, scale, shift, noise_weight, bias, noise, *settings):
    mean, var = empty_sample_statistics(x, x.shape[1])
    return _Call(x, scale, shift, noise_weight, bias, noise, mean, var, *settings).forward(), mean, var


def _cpp_backward(grad_out, x, scale, shift, noise_weight, bias, *arguments):
    *rest, needs_x, needs_style, needs_parameters = arguments
    call = _Call(x, scale, shift, noise_weight, bias, *rest)
    grad_out = call.like_x(grad_out)
    grad_x = torch.empty_like(call.x) if needs_x or needs_parameters else None
    style = [torch.empty_like(call.scale) if needs_style else None for _ in range(2)]
    parameters = [
        torch.empty_like(t) if needs_parameters and t is not None else None for t in (call.noise_weight, call.bias)
    ]
    call.C.adain_backward(call.arguments, *map(address, (grad_out, grad_x, *style, *parameters)))
    returned = _in_type_of((scale, shift, noise_weight, bias), (*style, *parameters), x)
    return grad_x if needs_x else x.new_empty(0), *returned


def _cpp_double_backward(
    ggx, gg_scale, gg_shift, gg_noise_weight, gg_bias, grad_out, x, scale, shift, noise_weight, bias, *rest
):
    call = _Call(x, scale, shift, noise_weight, bias, *rest)
    ggx, grad_out = call.like_x(ggx), call.like_x(grad_out)
    ggs = [call.parameter(gg) for gg in (gg_scale, gg_shift, gg_noise_weight, gg_bias)]
    g_grad_out, g_x, g_scale = torch.empty_like(call.x), torch.empty_like(call.x), torch.empty_like(call.scale)
    g_parameters = [t if t is None else torch.empty_like(t) for t in (call.noise_weight, call.bias)]
    call.C.adain_double_backward(
        call.arguments, *map(address, (grad_out, ggx, *ggs, g_grad_out, g_x, g_scale, *g_parameters))
    )
    return g_grad_out, g_x, *_in_type_of((scale, noise_weight, bias), (g_scale, *g_parameters), x)


register_kernels("adain", "adain", "adain_forward", _cpp_forward)
register_kernels("adain_backward", "adain", "adain_backward", _cpp_backward)
register_kernels("adain_double_backward", "adain", "adain_double_backward", _cpp_double_backward)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────


_SMALL = 1 << 15  # elements; in channels_last stock is slow at any size


def adain(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    *,
    noise: Tensor | None = None,
    noise_weight: Tensor | None = None,
    bias: Tensor | None = None,
    act: FixedAct = "none",
    negative_slope: float = 0.2,
) -> Tensor:
    """scale · (y − μ) / √(σ² + eps) + shift, y = act(x + noise_weight · noise + bias), with μ and σ² of each plane of y: the
    layer epilogue of StyleGAN (Karras et al. 2019), and without the rest AdaIN (Huang & Belongie 2017, equation 8).

    σ² is biased. A plane of one element has σ² = 0: what it gives is shift, and the gradients of x and scale are 0.

    Args:
        x: (N, C, \\*), at least 2 dimensions; float32, float64, bfloat16 or float16. NCHW and channels_last are both fast,
            and the output keeps the layout; any other strides are copied first.
        scale, shift: (N, C), in x's dtype or float32. StyleGAN's style is 1 + scale: add the 1 before.
        noise: (N, 1, \\*) or (1, 1, \\*) with x's pixels, in x's dtype or float32.
        noise_weight, bias: (C,), in x's dtype or float32; None stands for 1 and 0.
        act: "none", "relu" or "leaky_relu" (max(y, 0) + negative_slope · min(y, 0)).

    Statistics and sums are float32 (float64 for float64), and deterministic, for any number of threads where no gradient of
    noise is asked. Twice differentiable by its own kernels in x, scale, shift, noise_weight and bias; higher orders, and
    gradients of noise, go through the definition. Saved for backward: x, the noise, and (N, C) statistics.

    Raises:
        TypeError: x is not floating point, or another tensor has a dtype that does not fit it.
        ValueError: shapes, devices or settings that do not fit, or a noise_weight without noise. The message names the
            argument.
    """
    _check(x, scale, shift, eps, noise, noise_weight, bias, act, negative_slope)
    differentiates_noise = noise is not None and noise.requires_grad and torch.is_grad_enabled()
    stock = x.numel() == 0 or differentiates_noise or is_transformed() or backend.serving(x.device.type) == "reference"
    if stock or stock_is_faster(x, _SMALL, small_channels_last=0):
        return reference(
            x, scale, shift, eps,
            noise=noise, noise_weight=noise_weight, bias=bias, act=act, negative_slope=negative_slope,
        )  # fmt: skip
    out, _, _ = operators.adain(x, scale, shift, noise_weight, bias, noise, eps, act, negative_slope)
    return out


def adain_from_features(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """σ(style) · (content − μ(content)) / σ(content) + μ(style), with μ and σ = √(σ² + eps) of each plane (Huang & Belongie
    2017, equation 8).

    content is (N, C, \\*), style (N, C, \\*) with pixels of its own; both σ² are biased. The rest is as in `adain`.

    Raises:
        TypeError, ValueError: as `adain`, and where style does not fit content.
    """
    _check_features(content, style)
    check_eps(eps)
    mean, deviation = plane_statistics(style, eps)
    return adain(content, deviation, mean, eps)


def _check(x, scale, shift, eps, noise, noise_weight, bias, act, negative_slope) -> None:
    """Raise what `adain` says it raises."""
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions (N, C, *), not shape {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"x must have channels, not shape {tuple(x.shape)}")
    check_settings(eps, act)
    check_number("negative_slope", negative_slope)
    for name, style in (("scale", scale), ("shift", shift)):
        check_is_tensor(name, style)
        check_parameter(name, style, x, tuple(x.shape[:2]), "one for each plane")
    for name, parameter in (("noise_weight", noise_weight), ("bias", bias)):
        check_parameter(name, parameter, x, (x.shape[1],), "one for each channel")
    if noise is not None:
        check_is_tensor("noise", noise)
        batch = 1 if noise.dim() and noise.shape[0] == 1 else x.shape[0]
        check_parameter("noise", noise, x, (batch, 1, *x.shape[2:]), "one for each pixel of x")
    elif noise_weight is not None:
        raise ValueError("noise_weight needs noise")


def _check_features(content, style) -> None:
    """Raise what `adain_from_features` says it raises, where `adain` would name arguments that its caller has not given."""
    check_input(content, "content")
    check_is_tensor("style", style)
    if content.dim() < 3:
        raise ValueError(f"content must have at least 3 dimensions (N, C, *), not shape {tuple(content.shape)}")
    if style.dim() < 3 or style.shape[:2] != content.shape[:2] or 0 in style.shape[2:]:
        raise ValueError(
            f"style must have content's batch and channels {tuple(content.shape[:2])} and pixels, "
            f"not shape {tuple(style.shape)}"
        )
    check_like("style", style, content, "content")
