"""Piecewise linear activations whose second derivative costs nothing: it is zero, and nobody computes it.

The derivative of relu(x) is a constant on each side, so the gradient g ↦ g · relu'(x) is linear in g and does not depend on
x. Stock autograd says so by a tensor of zeros, which it then pushes back through all that x was made from. These operators
give no gradient to x there; `_autograd.with_zeros` gives the parameters their zeros.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.ops._autograd import is_transformed, operators, register_gradient, with_zeros
from fastgan.ops._tensors import remember_edges, will_use

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Activation(NamedTuple):
    """An activation in stock torch. `side` is its input, or its output, which tells as well where an element was."""

    forward: torch._ops.OpOverload
    forward_: torch._ops.OpOverload
    backward: torch._ops.OpOverload  # of (grad_y, side, *settings, *rest)
    rest: tuple = ()


_aten = torch.ops.aten
_ACTIVATIONS = {
    "relu": _Activation(_aten.relu.default, _aten.relu_.default, _aten.threshold_backward.default, (0,)),
    "leaky_relu": _Activation(
        _aten.leaky_relu.default, _aten.leaky_relu_.default, _aten.leaky_relu_backward.default, (False,)
    ),
    "hardtanh": _Activation(_aten.hardtanh.default, _aten.hardtanh_.default, _aten.hardtanh_backward.default),
}


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────

torch.library.define(
    "fastgan::activation", "(Tensor x, str act, float[] settings) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "fastgan::activation_backward",
    "(Tensor grad_y, Tensor side, str act, float[] settings) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# x · positive where side > 0, x · weight elsewhere: prelu is that of (x, x, weight, 1).
torch.library.define(
    "fastgan::prelu",
    "(Tensor x, Tensor side, Tensor weight, float positive) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::prelu_weight_grad",
    "(Tensor grad_y, Tensor x, Tensor side, SymInt weights) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Stock torch's, for every device.


def _forward(x, act, settings):
    return _ACTIVATIONS[act].forward(x, *settings)


def _gradient(grad_y, side, act, settings):
    activation = _ACTIVATIONS[act]
    return activation.backward(grad_y, side, *settings, *activation.rest)


def _prelu(x, side, weight, positive):
    on_this_side = x if positive == 1 else x * positive
    return torch.where(side > 0, on_this_side, x * _per_channel(weight, x))


def _prelu_weight_grad(grad_y, x, side, weights):
    products = torch.where(side > 0, 0, grad_y * x)
    return products.sum().view(1) if weights == 1 else products.sum([i for i in range(x.dim()) if i != 1])


def _per_channel(weight: Tensor, x: Tensor) -> Tensor:
    return weight if weight.numel() == 1 else weight.view(-1, *[1] * (x.dim() - 2))


for _name, _kernel in (
    ("activation", _forward),
    ("activation_backward", _gradient),
    ("prelu", _prelu),
    ("prelu_weight_grad", _prelu_weight_grad),
):
    torch.library.impl(f"fastgan::{_name}", "CompositeExplicitAutograd", _kernel)
    torch.library.register_fake(f"fastgan::{_name}", _kernel)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save(ctx, inputs, output) -> None:
    x, ctx.act, ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output if ctx.act == "relu" else x)  # as stock torch: the other may be written to


def _backward(ctx, grad_y):
    if grad_y is None:
        return None, None, None
    (side,) = ctx.saved_tensors
    grad_x = operators.activation_backward(grad_y, side.detach(), ctx.act, ctx.settings)
    return with_zeros(ctx, grad_x), None, None


register_gradient("activation", _backward, _save)


def _save_backward(ctx, inputs, output) -> None:
    _, side, ctx.act, ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(side)


def _double_backward(ctx, ggx):
    if ggx is None:
        return None, None, None, None
    (side,) = ctx.saved_tensors
    return operators.activation_backward(ggx, side, ctx.act, ctx.settings), None, None, None


register_gradient("activation_backward", _double_backward, _save_backward)


class _InPlace(torch.autograd.Function):
    """An operator of torch.library with a gradient must not write to its arguments."""

    @staticmethod
    def forward(ctx, x, act, settings):
        _ACTIVATIONS[act].forward_(x, *settings)
        ctx.mark_dirty(x)
        _save(ctx, (x, act, settings), x)
        return x

    backward = staticmethod(_backward)


# prelu is bilinear in x and weight where it depends on weight at all: its gradients are itself and prelu_weight_grad, whose
# gradients are prelu again, with zero for the side that weight has no part in.


def _save_prelu(ctx, inputs, output) -> None:
    x, side, weight, ctx.positive = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, side, weight)
    remember_edges(ctx, inputs)


def _prelu_backward(ctx, grad_y):
    grad_x = grad_weight = None
    if grad_y is not None:
        x, side, weight = ctx.saved_tensors
        if will_use(ctx, 0):
            grad_x = with_zeros(ctx, operators.prelu(grad_y, side.detach(), weight, ctx.positive))
        if will_use(ctx, 2):
            grad_weight = operators.prelu_weight_grad(grad_y, x, side.detach(), weight.numel())
    return grad_x, None, grad_weight, None


register_gradient("prelu", _prelu_backward, _save_prelu)


def _save_prelu_weight_grad(ctx, inputs, output) -> None:
    grad_y, x, side, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_y, x, side)
    remember_edges(ctx, inputs)


def _prelu_weight_grad_backward(ctx, ggw):
    g_grad_y = grad_x = None
    if ggw is not None:
        grad_y, x, side = ctx.saved_tensors
        if will_use(ctx, 0):
            g_grad_y = operators.prelu(x, side, ggw, 0.0)
        if will_use(ctx, 1):
            grad_x = operators.prelu(grad_y, side, ggw, 0.0)
    return g_grad_y, grad_x, None, None


register_gradient("prelu_weight_grad", _prelu_weight_grad_backward, _save_prelu_weight_grad)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.relu`: max(x, 0), of any shape, dtype, layout and device that stock torch takes.

    Differentiable to every order, where the second and all further derivatives in x are zeros that are not computed: only
    the parameters before x get them, as from stock torch. Deterministic, for any number of threads. Saved for backward: y.
    Errors are stock torch's.

    In place, x is written to and returned; a view runs as stock.
    """
    return _apply(x, "relu", [], inplace)


def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.leaky_relu`: max(x, 0) + negative_slope · min(x, 0).

    All else is as in `relu`, but that x is saved unless it is overwritten.
    """
    if inplace and negative_slope < 0:  # y does not tell the sides, which stock torch says in backward
        return F.leaky_relu_(x, negative_slope)
    return _apply(x, "leaky_relu", [negative_slope], inplace)


def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.hardtanh`: min(max(x, min_val), max_val). All else is as in `leaky_relu`."""
    return _apply(x, "hardtanh", [min_val, max_val], inplace)


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.prelu`: max(x, 0) + weight · min(x, 0), weight of one number or one for each channel (axis 1).

    All else is as in `relu`, but that x is saved, and that the mixed derivatives in x and weight are there. The gradient of
    weight is torch's own sum, whose order may depend on the number of threads.
    """
    fits = x.dtype == weight.dtype and weight.dim() == 1 and (weight.numel() == 1 or x.dim() > 1)
    if is_transformed() or not fits or weight.numel() not in (1, x.shape[1] if x.dim() > 1 else 1):
        return F.prelu(x, weight)
    return operators.prelu(x, x.detach(), weight, 1.0)


def _apply(x: Tensor, act: str, settings: list[float], inplace: bool) -> Tensor:
    if (inplace and x._base is not None) or is_transformed():  # views: autograd has to replay them
        activation = _ACTIVATIONS[act]
        return (activation.forward_ if inplace else activation.forward)(x, *settings)
    return _InPlace.apply(x, act, settings) if inplace else operators.activation(x, act, settings)
