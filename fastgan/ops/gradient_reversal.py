"""Gradient reversal: the identity, whose gradient is that of −coeff · x; and a linear layer that has it before it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed
from fastgan.ops._tensors import check_input, check_is_tensor, check_like, check_number, remember_edges, will_use
from fastgan.ops.conv import cast_for_autocast

Coeff = float | Tensor


def reference(x: Tensor, coeff: Coeff = 1.0) -> Tensor:
    """The definition, in which sg stops the gradient: sg(x) − coeff · (x − sg(x))."""
    stopped = x.detach()
    return stopped - coeff * (x - stopped)


# torch.library has no operator that returns a view of its input and has a gradient of its own, so these are functions of
# autograd. An in-place operation on such a view raises; a hook on a view of torch's own would get lost by one.


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, coeff):
        _save(ctx, coeff)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * -_saved_coeff(ctx), None


class _ReversedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, coeff):
        _save(ctx, coeff, x, weight)
        remember_edges(ctx, (x, weight, bias))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors[:2]
        samples = x.shape[:-1].numel()
        grad_y = grad_y.reshape(samples, weight.shape[0])
        grad_x = grad_weight = grad_bias = None
        if will_use(ctx, 0):
            grad_x = _product(grad_y, weight, -_saved_coeff(ctx)).view(x.shape)
        if will_use(ctx, 1):  # a second derivative comes to x through the reversal, too
            x = _GradientReversal.apply(x, _saved_coeff(ctx))
            grad_weight = grad_y.t() @ x.reshape(samples, weight.shape[1])
        if will_use(ctx, 2):
            grad_bias = grad_y.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _product(a: Tensor, b: Tensor, scale: Coeff) -> Tensor:
    """scale · a @ b. A matrix product takes a number along for nothing; a tensor the smaller factor does."""
    if isinstance(scale, Tensor):
        return (a * scale) @ b if a.numel() < b.numel() else a @ (b * scale)
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _save(ctx, coeff: Coeff, *tensors: Tensor) -> None:
    if isinstance(coeff, Tensor):
        ctx.coeff = None
        ctx.save_for_backward(*tensors, coeff.detach())
    else:
        ctx.coeff = coeff
        ctx.save_for_backward(*tensors)


def _saved_coeff(ctx) -> Coeff:
    return ctx.saved_tensors[-1] if ctx.coeff is None else ctx.coeff


def check_coeff(coeff: Coeff) -> None:
    """Raise what everything that takes a coeff raises of it."""
    if isinstance(coeff, Tensor):
        if coeff.dim() != 0:
            raise ValueError(f"coeff must be a number or a 0-d tensor, not a tensor of shape {tuple(coeff.shape)}")
        if coeff.dtype == torch.bool or coeff.is_complex():
            raise TypeError(f"coeff must be real, not {coeff.dtype}")
        return
    check_number("coeff", coeff, "a number or a 0-d tensor")
    if not math.isfinite(coeff):
        raise ValueError(f"coeff must be finite, not {coeff}")


def _check_place(coeff: Coeff, x: Tensor) -> None:
    if isinstance(coeff, Tensor) and coeff.device not in (x.device, torch.device("cpu")):
        raise ValueError(f"coeff is on {coeff.device}, x on {x.device}")


def gradient_reversal(x: Tensor, coeff: Coeff = 1.0) -> Tensor:
    """y = x, ∂y/∂x = −coeff · I (Ganin & Lempitsky 2015, section 3.2): what follows learns to tell, what comes before learns
    to conceal.

    Args:
        x: any tensor. y shares its memory, so the forward takes the same few microseconds whatever the size, and an in-place
            operation on y raises, as it would overwrite x.
        coeff: a finite number, or a 0-d tensor, which no gradient reaches. A tensor on x's device is never waited for: the
            schedule that fills it may be captured in a CUDA graph.

    Differentiable to every order; backward is one multiplication. Deterministic, for any number of threads. Under autocast
    y keeps x's dtype.

    Raises:
        TypeError: x is no tensor, or coeff neither a number nor a tensor.
        ValueError: coeff is a number that is not finite, or a tensor that has axes. The value of a tensor is not looked at.
    """
    check_is_tensor("x", x)
    check_coeff(coeff)
    _check_place(coeff, x)
    return reference(x, coeff) if is_transformed() else _GradientReversal.apply(x, coeff)


def reversed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, coeff: Coeff = 1.0) -> Tensor:
    """linear(gradient_reversal(x, coeff), weight, bias): y = x · weightᵀ + bias, ∂L/∂x = −coeff · ∂L/∂y · weight.

    The gradients of weight and bias are not reversed. The factor is the matrix product's own, so that no pass over x's
    gradient is made for it; where coeff is a tensor it multiplies the smaller of the product's two matrices. Small x on the
    CPU are left to the two functions, and so is compiled code.

    Args:
        x: (\\*, in); float32, float64, bfloat16 or float16. Under autocast x, weight and bias are cast.
        weight: (out, in).
        bias: (out,).
        coeff: as in `gradient_reversal`.

    Differentiable to every order, each computing only what is asked. Deterministic as torch's matrix product is.

    Raises:
        TypeError, ValueError: as `gradient_reversal`, and dtypes, shapes or devices that do not fit; the message names the
            argument.
    """
    check_input(x)
    check_coeff(coeff)
    _check_place(coeff, x)
    _check_linear(*cast_for_autocast(x, weight, bias))
    if torch.compiler.is_compiling() or is_transformed() or _is_small(x):
        return F.linear(gradient_reversal(x, coeff), weight, bias)
    return _ReversedLinear.apply(*cast_for_autocast(x, weight, bias), coeff)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_is_tensor("weight", weight)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight must have shape (out, in) for x of shape {tuple(x.shape)}, not {tuple(weight.shape)}")
    if bias is not None:
        check_is_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},) to fit weight, not {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_like(name, tensor, x)


_SMALL = 1 << 18
"""Elements of x below which a pass over its gradient takes less time than backward's calls in Python."""


def _is_small(x: Tensor) -> bool:
    return x.device.type == "cpu" and backend.is_automatic() and x.numel() < _SMALL
