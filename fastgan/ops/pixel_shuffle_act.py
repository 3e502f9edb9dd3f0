"""Pixel shuffle and the activation after it in one pass, differentiable to every order by the same two kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, operators, register_gradient, with_zeros
from fastgan.ops._kernels import register_kernels
from fastgan.ops._norm import check_act, check_prelu_weight
from fastgan.ops._tensors import (
    DTYPES,
    accumulation_dtype,
    address,
    check_count,
    check_input,
    check_number,
    dense,
    is_channels_last,
    remember_edges,
    will_use,
)
from fastgan.ops._types import Act
from fastgan.ops.conv import cast_for_autocast

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(
    x: Tensor,
    upscale_factor: int,
    act: Act = "prelu",
    prelu_weight: Tensor | None = None,
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """`pixel_shuffle_act` in plain torch."""
    y = F.pixel_shuffle(x, upscale_factor)
    if x.numel() == 0:
        y = x.reshape(y.shape)  # of nothing stock torch's gradient has the wrong shape
    if prelu_weight is not None:
        return F.prelu(y, prelu_weight.to(y.dtype))
    if act == "relu":
        return F.relu(y)
    return F.leaky_relu(y, negative_slope) if act == "leaky_relu" else y


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# `side` tells by its sign on which side of the activation an element is; it lies as x does, or as y. Without one x tells
# itself. The other gradients have part in one side only: `positive` False has 0 on the positive one. Gradients of weight
# have the type of accumulation, and what is not needed is empty.

torch.library.define(
    "fastgan::pixel_shuffle_act",
    "(Tensor x, Tensor? side, Tensor? weight, int upscale_factor, str act, float negative_slope, bool positive, "
    "bool channels_last) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::pixel_shuffle_act_backward",
    "(Tensor grad_y, Tensor? x, Tensor? side, Tensor? weight, int upscale_factor, str act, float negative_slope, "
    "bool positive, bool channels_last, bool needs_x, bool needs_weight) -> (Tensor grad_x, Tensor grad_weight)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _empty_y(x: Tensor, factor: int, channels_last: bool) -> Tensor:
    n, channels, height, width = x.shape
    return _empty(x, (n, channels // factor**2, height * factor, width * factor), channels_last)


def _empty_x(y: Tensor, factor: int, channels_last: bool) -> Tensor:
    n, channels, height, width = y.shape
    return _empty(y, (n, channels * factor**2, height // factor, width // factor), channels_last)


def _empty(like: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _empty_weight(like: Tensor, weight: Tensor | None, needed: bool) -> Tensor:
    size = weight.numel() if needed and weight is not None else 0
    return like.new_empty(size, dtype=accumulation_dtype(like.dtype))


@torch.library.register_fake("fastgan::pixel_shuffle_act")
def _(x, side, weight, upscale_factor, act, negative_slope, positive, channels_last):
    return _empty_y(x, upscale_factor, channels_last)


@torch.library.register_fake("fastgan::pixel_shuffle_act_backward")
def _(
    grad_y, x, side, weight, upscale_factor, act, negative_slope, positive, channels_last, needs_x, needs_weight
):  # fmt: skip
    grad_x = _empty_x(grad_y, upscale_factor, channels_last) if needs_x else grad_y.new_empty(0)
    return grad_x, _empty_weight(grad_y, weight, needs_weight)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# The operator is linear in x, and with "prelu" in weight where weight has part in it at all. Its gradients are those of the
# backward operator, whose gradients are again these two, with 0 for the side that weight has no part in.


def _save_forward(ctx, inputs, output) -> None:
    x, side, weight, *ctx.settings = inputs
    ctx.is_own_side = side is None
    _, act, negative_slope, _, _ = ctx.settings
    y_tells = act == "relu" or (act == "leaky_relu" and negative_slope >= 0)
    if side is None and y_tells:
        side = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if weight is not None or (act == "leaky_relu" and side is None) else None, side, weight)
    remember_edges(ctx, inputs)


def _backward(ctx, grad_y):
    grads: list[Tensor | None] = [None] * 8
    needs_x, needs_weight = will_use(ctx, 0), will_use(ctx, 2)
    if grad_y is None or not (needs_x or needs_weight):
        return tuple(grads)
    x, side, weight = ctx.saved_tensors
    switches = ctx.is_own_side and ctx.settings[1] != "none"
    if switches:
        side = (x if side is None else side).detach()  # the second derivative is zero: `with_zeros`
    grad_x, grad_weight = operators.pixel_shuffle_act_backward(
        grad_y, x if needs_weight else None, side, weight, *ctx.settings, needs_x, needs_weight
    )
    if needs_x:
        grads[0] = with_zeros(ctx, grad_x) if switches else grad_x
    if needs_weight:
        grads[2] = grad_weight.to(weight.dtype)
    return tuple(grads)


register_gradient("pixel_shuffle_act", _backward, _save_forward)


def _save_backward(ctx, inputs, output) -> None:
    *tensors, factor, act, negative_slope, positive, channels_last, needs_x, needs_weight = inputs
    ctx.settings = factor, act, negative_slope, positive, channels_last
    ctx.are_results = needs_x, needs_weight
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    remember_edges(ctx, inputs)


def _double_backward(ctx, ggx, ggw):
    grads: list[Tensor | None] = [None] * 11
    ggx, ggw = (gg if is_result else None for gg, is_result in zip((ggx, ggw), ctx.are_results, strict=True))
    grad_y, x, side, weight = ctx.saved_tensors
    factor, act, negative_slope, _, channels_last = ctx.settings
    one_sided = factor, act, negative_slope, False, channels_last
    if will_use(ctx, 0):
        if ggx is not None:
            grads[0] = operators.pixel_shuffle_act(ggx, side, weight, *ctx.settings)
        if ggw is not None:
            through_weight = operators.pixel_shuffle_act(x, side, ggw, *one_sided)
            grads[0] = through_weight if grads[0] is None else grads[0] + through_weight
    needs_x, needs_weight = ggw is not None and will_use(ctx, 1), ggx is not None and will_use(ctx, 3)
    if needs_x or needs_weight:
        g_x, g_weight = operators.pixel_shuffle_act_backward(
            grad_y,
            ggx if needs_weight else None,
            side,
            weight if ggw is None else ggw,
            *one_sided,
            needs_x,
            needs_weight,
        )
        if needs_x:
            grads[1] = g_x
        if needs_weight:
            grads[3] = g_weight.to(weight.dtype)
    return tuple(grads)


register_gradient("pixel_shuffle_act_backward", _double_backward, _save_backward)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_ACT_CODES = {"none": 0, "relu": 1, "leaky_relu": 2, "prelu": 2}  # of csrc/cpu/kernels.h


class _CppCall:
    """What both operators pass to C++ alike, as csrc/cpu/kernels.h declares it; holds the tensors that it gives addresses
    of. `shape` is that of x."""

    def __init__(self, dtype, shape, side, weight, factor, act, negative_slope, positive, channels_last):
        from fastgan import _C

        self.C = _C
        self.side = None if side is None else dense(side, channels_last)
        self.weight = None if weight is None else weight.to(accumulation_dtype(dtype)).contiguous()
        n, channels, height, width = shape
        self.arguments = _C.PixelShuffleAct(
            DTYPES[dtype], channels_last, (n, channels // factor**2, height, width), factor, _ACT_CODES[act],
            negative_slope, positive, address(self.weight), 0 if weight is None else weight.numel(), address(self.side),
            side is not None and side.shape != shape,
        )  # fmt: skip


def _cpp_forward(x, side, weight, *settings):
    call = _CppCall(x.dtype, x.shape, side, weight, *settings)
    factor, *_, channels_last = settings
    x, y = dense(x, channels_last), _empty_y(x, factor, channels_last)
    call.C.pixel_shuffle_act_forward(call.arguments, x.data_ptr(), y.data_ptr())
    return y


def _cpp_backward(grad_y, x, side, weight, *arguments):
    *settings, needs_x, needs_weight = arguments
    factor, *_, channels_last = settings
    n, channels, height, width = grad_y.shape
    shape = torch.Size((n, channels * factor**2, height // factor, width // factor))
    call = _CppCall(grad_y.dtype, shape, side, weight, *settings)
    grad_y, x = dense(grad_y, channels_last), None if x is None else dense(x, channels_last)
    grad_x = _empty_x(grad_y, factor, channels_last) if needs_x else grad_y.new_empty(0)
    grad_weight = _empty_weight(grad_y, weight, needs_weight)
    # An empty tensor has the address 0, which stands for an absent one.
    call.C.pixel_shuffle_act_backward(call.arguments, *map(address, (grad_y, x, grad_x, grad_weight)))
    return grad_x, grad_weight


register_kernels("pixel_shuffle_act", "pixel_shuffle_act", "pixel_shuffle_act_forward", _cpp_forward)
register_kernels("pixel_shuffle_act_backward", "pixel_shuffle_act", "pixel_shuffle_act_backward", _cpp_backward)


# ── The function ─────────────────────────────────────────────────────────────────────────────────────────────────────


def pixel_shuffle_act(
    x: Tensor,
    upscale_factor: int,
    act: Act = "prelu",
    prelu_weight: Tensor | None = None,
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """y = act(pixel_shuffle(x, r)), the sub-pixel up-sampling of Shi et al. 2016 (ESPCN) and what follows it:

        y[n, c, r·h + i, r·w + j] = act(x[n, c·r² + i·r + j, h, w])

    Args:
        x: (N, C·r², H, W), or (C·r², H, W); float32, float64, bfloat16 or float16. NCHW and channels_last are both fast, and
            y (N, C, r·H, r·W) keeps the layout, as from stock torch; any other strides are copied first.
        upscale_factor: r.
        act: "none", "relu", "leaky_relu" or "prelu".
        prelu_weight: with "prelu", and only there: (1,), or (C,) for the channels of y, in x's dtype or float32.
        negative_slope: of "leaky_relu".

    Sums are float32 (float64 for float64), and deterministic, for any number of threads. Differentiable to every order by
    its own kernels, in x and prelu_weight; the second derivatives in x alone are zeros that are not computed, as in
    `prelu`. At 0 and NaN everything is as in stock torch. Saved for backward: y of "relu" and "leaky_relu", which the next
    layer saves as well; x and prelu_weight of "prelu"; nothing of "none"; x where negative_slope is negative. Under
    autocast "prelu" runs in its dtype, as stock does, and the others in x's.

    Raises:
        TypeError: x is not floating point, upscale_factor no integer, or prelu_weight of a dtype that does not fit.
        ValueError: shapes, devices or settings that do not fit. The message names the argument.
    """
    check_input(x)
    upscale_factor = check_count("upscale_factor", upscale_factor)
    if act == "prelu" and isinstance(prelu_weight, Tensor):
        x, prelu_weight = cast_for_autocast(x, prelu_weight)
    _check(x, upscale_factor, act, prelu_weight)
    check_number("negative_slope", negative_slope)
    if x.dim() == 3:
        return pixel_shuffle_act(x[None], upscale_factor, act, prelu_weight, negative_slope=negative_slope)[0]
    if (
        x.numel() == 0
        or x.shape[2] * x.shape[3] == 1  # whose layout only stock torch tells
        or is_transformed()
        or backend.serving(x.device.type) == "reference"
        or _stock_is_faster(x)
    ):
        return reference(x, upscale_factor, act, prelu_weight, negative_slope=negative_slope)
    return operators.pixel_shuffle_act(
        x, None, prelu_weight, upscale_factor, act, float(negative_slope), True, is_channels_last(x)
    )


# On the CPU stock torch is faster up to so many elements a thread: an operator in Python takes longer to call than a small
# tensor to read. In NCHW stock is slow enough to be beaten sooner.
_SMALL, _SMALL_CHANNELS_LAST = 1 << 14, 1 << 15


def _stock_is_faster(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    small = _SMALL_CHANNELS_LAST if is_channels_last(x) else _SMALL
    return x.numel() <= small * torch.get_num_threads()


def _check(x: Tensor, upscale_factor: int, act: str, prelu_weight: Any) -> None:
    if x.dim() not in (3, 4):
        raise ValueError(f"x must have shape (N, C·r², H, W) or (C·r², H, W), not {tuple(x.shape)}")
    squares = upscale_factor**2
    if x.shape[-3] % squares:
        raise ValueError(f"x must have a multiple of {squares} channels, upscale_factor², not {x.shape[-3]}")
    check_act(act, Act)
    check_prelu_weight(prelu_weight, act, x, x.shape[-3] // squares)
