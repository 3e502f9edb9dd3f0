"""Bias, activation, gain and clamp in one operator, exact to the second derivative."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, operators, register_gradient, with_zeros
from fastgan.ops._kernels import register_kernels
from fastgan.ops._norm import check_parameter, third_derivative
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
    shown,
    will_use,
)
from fastgan.ops._types import BiasActivation

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Activation(NamedTuple):
    """An activation in stock torch, of (x, alpha), the gain that keeps the variance of what passes it, and its alpha."""

    func: Callable[[Tensor, float], Tensor]
    def_gain: float = 1.0
    def_alpha: float = 0.0


# NVIDIA's networks look up default gains here, by these names.
activation_funcs: dict[str, Activation] = {
    "linear": Activation(lambda x, alpha: x),
    "relu": Activation(lambda x, alpha: F.relu(x), math.sqrt(2)),
    "lrelu": Activation(F.leaky_relu, math.sqrt(2), 0.2),
    "tanh": Activation(lambda x, alpha: x.tanh()),
    "sigmoid": Activation(lambda x, alpha: x.sigmoid()),
    "elu": Activation(lambda x, alpha: F.elu(x)),
    "selu": Activation(lambda x, alpha: F.selu(x)),
    "softplus": Activation(lambda x, alpha: F.softplus(x)),
    "swish": Activation(lambda x, alpha: F.silu(x), math.sqrt(2)),
}
_PIECEWISE_LINEAR = ("linear", "relu", "lrelu")


def reference(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: BiasActivation = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """`bias_act` in plain torch."""
    func, def_gain, def_alpha = activation_funcs[act]
    if b is not None:
        x = x + b.to(x.dtype).view([-1 if i == dim else 1 for i in range(x.dim())])
    y = func(x, def_alpha if alpha is None else alpha)
    gain = def_gain if gain is None else gain
    y = y if gain == 1 else y * gain
    return y if clamp is None else F.hardtanh(y, -clamp, clamp)


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# `side` tells the derivative: y of the piecewise linear activations, so that x need not live on; x of the others, to which
# b then belongs; None where the derivative is a constant. Gradients of b have the type of accumulation, and what is not
# needed is empty.

torch.library.define(
    "fastgan::bias_act",
    "(Tensor x, Tensor? b, int dim, str act, float alpha, float gain, float? clamp) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::bias_act_backward",
    "(Tensor grad_y, Tensor? side, Tensor? b, int dim, str act, float alpha, float gain, float? clamp, bool needs_x, "
    "bool needs_b) -> (Tensor grad_x, Tensor grad_b)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::bias_act_double_backward",
    "(Tensor? ggx, Tensor? ggb, Tensor grad_y, Tensor? side, Tensor? b, int dim, str act, float alpha, float gain, "
    "float? clamp, bool needs_x, bool needs_b) -> (Tensor g_grad_y, Tensor g_x, Tensor g_b)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastgan::bias_act")
def _(x, b, dim, act, alpha, gain, clamp):
    return torch.empty_like(dense(x, is_channels_last(x)))


@torch.library.register_fake("fastgan::bias_act_backward")
def _(grad_y, side, b, dim, act, alpha, gain, clamp, needs_x, needs_b):
    like = grad_y if side is None else side
    grad_x = torch.empty_like(dense(like, is_channels_last(like))) if needs_x else like.new_empty(0)
    return grad_x, like.new_empty(like.shape[dim] if needs_b else 0, dtype=accumulation_dtype(like.dtype))


@torch.library.register_fake("fastgan::bias_act_double_backward")
def _(ggx, ggb, grad_y, side, b, dim, act, alpha, gain, clamp, needs_x, needs_b):
    like = grad_y if side is None else side
    g_grad_y = torch.empty_like(dense(like, is_channels_last(like)))
    g_x = torch.empty_like(g_grad_y) if needs_x else like.new_empty(0)
    return g_grad_y, g_x, like.new_empty(like.shape[dim] if needs_b else 0, dtype=accumulation_dtype(like.dtype))


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_constant(act: str, clamp: float | None) -> bool:
    """Whether the derivative is a number."""
    return act == "linear" and clamp is None


def _save_forward(ctx, inputs, output) -> None:
    x, b, *ctx.settings = inputs
    _, act, _, _, clamp = ctx.settings
    ctx.b_dtype = None if b is None else b.dtype
    ctx.set_materialize_grads(False)
    if act not in _PIECEWISE_LINEAR:
        ctx.save_for_backward(x, b)
    else:
        ctx.save_for_backward(None if _is_constant(act, clamp) else output, None)
    remember_edges(ctx, inputs)


def _backward(ctx, grad_y):
    grads: list[Any] = [None] * 7
    if grad_y is None:
        return tuple(grads)
    side, b = ctx.saved_tensors
    _, act, _, gain, clamp = ctx.settings
    switches = act in _PIECEWISE_LINEAR and side is not None
    if switches:
        side = side.detach()  # the second derivative is zero: `with_zeros`
    used = [i for i in range(2) if will_use(ctx, i)]
    passes = _is_constant(act, clamp) and gain == 1  # then the gradient of x is grad_y itself
    if passes and 0 in used:
        grads[0] = grad_y
    if used and not (passes and used == [0]):
        found = operators.bias_act_backward(
            grad_y, side, b, *ctx.settings, 0 in used and not passes, 1 in used
        )  # fmt: skip
        if 0 in used and not passes:
            grads[0] = found[0]
        if 1 in used:
            grads[1] = found[1].to(ctx.b_dtype)
    if switches and used:
        grads[used[0]] = with_zeros(ctx, grads[used[0]], arguments=2)
    return tuple(grads)


register_gradient("bias_act", _backward, _save_forward)


def _save_backward(ctx, inputs, output) -> None:
    grad_y, side, b, *ctx.settings, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_y, side, b)
    remember_edges(ctx, inputs)


def _double_backward(ctx, ggx, ggb):
    grads: list[Tensor | None] = [None] * 10
    if ggx is ggb is None:
        return tuple(grads)
    grad_y, side, b = ctx.saved_tensors
    curves = ctx.settings[1] not in _PIECEWISE_LINEAR
    needs_x, needs_b = (curves and will_use(ctx, i) for i in (1, 2))
    g_grad_y, g_x, g_b = operators.bias_act_double_backward(ggx, ggb, grad_y, side, b, *ctx.settings, needs_x, needs_b)
    grads[0] = g_grad_y
    if needs_x:
        grads[1] = g_x
    if needs_b:
        grads[2] = g_b.to(b.dtype)
    return tuple(grads)


register_gradient("bias_act_backward", _double_backward, _save_backward)


def _save_double_backward(ctx, inputs, output) -> None:
    *tensors, dim, act, alpha, gain, clamp, _, _ = inputs
    ctx.settings = (dim, act, alpha, gain, clamp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _triple_backward(ctx, *cotangents):
    grads: list[Tensor | None] = [None] * 12
    if all(c is None for c in cotangents):
        return tuple(grads)
    act = ctx.settings[1]
    if act not in _PIECEWISE_LINEAR:
        return third_derivative(ctx, lambda inputs: reference(*inputs, *ctx.settings), cotangents, inputs=2)
    # g_grad_y is to ggx and ggb what y is to x and b, were the activation linear on each side.
    side = ctx.saved_tensors[3]
    needs = ctx.needs_input_grad[:2]
    found = operators.bias_act_backward(cotangents[0], side, None, *ctx.settings, *needs)
    for i in range(2):
        if needs[i]:
            grads[i] = found[i]
    return tuple(grads)


register_gradient("bias_act_double_backward", _triple_backward, _save_double_backward)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_ACT_CODES = {act: code for code, act in enumerate(get_args(BiasActivation))}


class _CppCall:
    """What the three orders pass to C++ alike, as csrc/cpu/kernels.h declares it; holds the tensors that it gives addresses
    of. `like` is laid out as the results will be."""

    def __init__(self, like, b, has_channels, dim, act, alpha, gain, clamp):
        from fastgan import _C

        self.C = _C
        self.acc = accumulation_dtype(like.dtype)
        self.channels_last = is_channels_last(like)
        self.like = dense(like, self.channels_last)
        self.b = self.vector(b)
        channels = self.like.shape[dim] if has_channels else 1
        inner = self.like.stride(dim) if channels > 1 else self.like.numel()
        self.arguments = _C.BiasAct(
            DTYPES[like.dtype], (self.like.numel() // (channels * inner), channels, inner), _ACT_CODES[act],
            alpha, gain, math.nan if clamp is None else clamp, address(self.b),
        )  # fmt: skip

    def laid_out(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else dense(tensor, self.channels_last)

    def vector(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.acc).contiguous()

    def empty_vector(self, dim: int, needed: bool) -> Tensor:
        return self.like.new_empty(self.like.shape[dim] if needed else 0, dtype=self.acc)


def _cpp_forward(x, b, *settings):
    call = _CppCall(x, b, b is not None, *settings)
    y = torch.empty_like(call.like)
    call.C.bias_act_forward(call.arguments, call.like.data_ptr(), y.data_ptr())
    return y


def _cpp_backward(grad_y, side, b, dim, *arguments):
    *settings, needs_x, needs_b = arguments
    call = _CppCall(grad_y if side is None else side, b, b is not None or needs_b, dim, *settings)
    grad_y, side = call.laid_out(grad_y), None if side is None else call.like
    grad_x = torch.empty_like(call.like) if needs_x else call.like.new_empty(0)
    grad_b = call.empty_vector(dim, needs_b)
    # An empty tensor has the address 0, which stands for an absent one.
    call.C.bias_act_backward(call.arguments, *map(address, (grad_y, side, grad_x, grad_b)))
    return grad_x, grad_b


def _cpp_double_backward(ggx, ggb, grad_y, side, b, dim, *arguments):
    *settings, needs_x, needs_b = arguments
    has_channels = b is not None or ggb is not None
    call = _CppCall(grad_y if side is None else side, b, has_channels, dim, *settings)
    ggx, grad_y, side = call.laid_out(ggx), call.laid_out(grad_y), None if side is None else call.like
    ggb, g_grad_y, g_b = call.vector(ggb), torch.empty_like(call.like), call.empty_vector(dim, needs_b)
    g_x = torch.empty_like(call.like) if needs_x else call.like.new_empty(0)
    call.C.bias_act_double_backward(call.arguments, *map(address, (ggx, ggb, grad_y, side, g_grad_y, g_x, g_b)))
    return g_grad_y, g_x, g_b


register_kernels("bias_act", "bias_act", "bias_act_forward", _cpp_forward)
register_kernels("bias_act_backward", "bias_act", "bias_act_backward", _cpp_backward)
register_kernels("bias_act_double_backward", "bias_act", "bias_act_double_backward", _cpp_double_backward)


# ── The function ─────────────────────────────────────────────────────────────────────────────────────────────────────


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: BiasActivation = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """y = clamp(gain · act(x + b)): arguments, defaults and results of StyleGAN2's and 3's `bias_act` (Karras et al. 2020).

    Args:
        x: of any shape; float32, float64, bfloat16 or float16. Contiguous tensors and channels_last are both fast, and the
            output keeps the layout; any other strides are copied first.
        b: (x.shape[dim],), in x's dtype or float32; None stands for 0.
        dim: the axis of x that b lies along, from 0; without b it has no meaning.
        act: "linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus" or "swish" (x · sigmoid(x)).
        alpha: the slope of lrelu's negative side, 0.2 by default; the other activations have none.
        gain: √2 by default for relu, lrelu and swish, 1 for the others.
        clamp: y is limited to [-clamp, clamp], and where it lies on the limit its gradient is 0; None for no limits.

    Sums are float32 (float64 for float64), and deterministic, for any number of threads. Twice differentiable by its own
    kernels in x and b; higher orders are exact too, those of the activations with a curvature through the definition. Saved
    for backward: y of relu and lrelu, nothing of linear (y with a clamp), else x and b. Gains that are not positive and
    negative slopes run as the definition does.

    Raises:
        TypeError: x is not floating point, or b has a dtype that does not fit it.
        ValueError: shapes, devices or settings that do not fit. The message names the argument.
    """
    dim = _check(x, b, dim, act, alpha, gain, clamp)
    alpha = activation_funcs[act].def_alpha if alpha is None else float(alpha)
    gain = activation_funcs[act].def_gain if gain is None else float(gain)
    if clamp is not None and clamp > torch.finfo(x.dtype).max:  # which no y reaches
        clamp = None
    tells_side = gain > 0 and (act != "lrelu" or alpha >= 0)  # whether y has the sign of x + b
    if (
        x.numel() == 0
        or is_transformed()
        or backend.serving(x.device.type) == "reference"
        or not tells_side
        or _stock_is_faster(x)
    ):
        return reference(x, b, dim, act, alpha, gain, clamp)
    return operators.bias_act(x, b, dim, act, alpha, gain, _limit(clamp, x.dtype))


def _limit(clamp: float | None, dtype: torch.dtype) -> float | None:
    """The clamp as y has it where it reaches it, rounded to its dtype: backward tells by y what was clamped."""
    if clamp is None:
        return None
    eps = torch.finfo(dtype).eps
    step = max(math.ldexp(eps, math.frexp(clamp)[1] - 1), torch.finfo(dtype).tiny * eps)
    return round(clamp / step) * step


# On the CPU stock torch is faster up to so many elements a thread: an operator in Python takes longer to call than a small
# tensor to read.
_SMALL = 1 << 16


def _stock_is_faster(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    return x.numel() <= _SMALL * torch.get_num_threads()


def _check(x: Any, b: Any, dim: int, act: str, alpha: Any, gain: Any, clamp: Any) -> int:
    """Raise what `bias_act` says it raises; else dim as Python's integer."""
    check_input(x)
    if not isinstance(act, str) or act not in activation_funcs:
        raise ValueError(f"act must be one of {', '.join(activation_funcs)}, not {shown(act)}")
    for name, value in (("alpha", alpha), ("gain", gain), ("clamp", clamp)):
        if value is not None:
            check_number(name, value)
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp must not be negative, not {clamp}")
    if b is None:
        return dim
    dim = check_count("dim", dim, least=0)
    if not dim < x.dim():
        raise ValueError(f"dim must be an axis of x from 0 to {x.dim() - 1}, not {dim}")
    check_parameter("b", b, x, (x.shape[dim],), f"one for each index of axis {dim}")
    return dim
