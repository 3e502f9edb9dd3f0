"""Average pooling whose gradient knows that it is linear: stock torch's asks for the input, and gives it zeros in return."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.ops._autograd import is_transformed, register_gradient, with_zeros
from fastgan.ops._tensors import is_channels_last

# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_SETTINGS = (
    "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override"
)
for _schema in (
    f"avg_pool2d(Tensor x, {_SETTINGS}) -> Tensor",
    f"avg_pool2d_backward(Tensor grad_y, SymInt[] size, {_SETTINGS}) -> Tensor",
    "adaptive_avg_pool2d(Tensor x, SymInt[2] output_size) -> Tensor",
    "adaptive_avg_pool2d_backward(Tensor grad_y, SymInt[] size, SymInt[2] output_size) -> Tensor",
):
    torch.library.define(
        f"fastgan::{_schema.partition('(')[0]}", _schema[_schema.index("(") :], tags=torch.Tag.pt2_compliant_tag
    )


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# Stock torch's, for every device.


def _pool(x, *settings):
    return torch.ops.aten.avg_pool2d(x, *settings)


def _pool_backward(grad_y, size, *settings):
    return torch.ops.aten.avg_pool2d_backward(grad_y, _input_like(grad_y, size), *settings)


def _adaptive(x, output_size):
    return torch.ops.aten._adaptive_avg_pool2d(x, output_size)


def _adaptive_backward(grad_y, size, output_size):
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad_y, _input_like(grad_y, size))


def _input_like(grad_y: Tensor, size) -> Tensor:
    """What stock torch's backward reads the shape and the layout from."""
    layout = torch.channels_last if is_channels_last(grad_y) else torch.contiguous_format
    return torch.empty(size, dtype=grad_y.dtype, device=grad_y.device, memory_format=layout)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _define(name: str, forward, backward) -> None:
    """An operator of (x, *settings), and its gradient of (grad_y, size of x, *settings): each is the other's gradient."""
    call, call_backward = (getattr(torch.ops.fastgan, n) for n in (name, f"{name}_backward"))
    for operator, kernel in ((name, forward), (f"{name}_backward", backward)):
        torch.library.impl(f"fastgan::{operator}", "CompositeExplicitAutograd", kernel)
        torch.library.register_fake(f"fastgan::{operator}", kernel)

    def save(ctx, inputs, output) -> None:
        x, *ctx.settings = inputs
        ctx.size = x.shape
        ctx.set_materialize_grads(False)

    def gradient(ctx, grad_y):
        grad_x = None if grad_y is None else with_zeros(ctx, call_backward(grad_y, ctx.size, *ctx.settings))
        return grad_x, *[None] * len(ctx.settings)

    def save_backward(ctx, inputs, output) -> None:
        _, _, *ctx.settings = inputs
        ctx.set_materialize_grads(False)

    def double_backward(ctx, ggx):
        return None if ggx is None else call(ggx, *ctx.settings), None, *[None] * len(ctx.settings)

    register_gradient(name, gradient, save)
    register_gradient(f"{name}_backward", double_backward, save_backward)


_define("avg_pool2d", _pool, _pool_backward)
_define("adaptive_avg_pool2d", _adaptive, _adaptive_backward)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────

Size2 = int | tuple[int, ...] | list[int]


def avg_pool2d(
    x: Tensor,
    kernel_size: Size2,
    stride: Size2 | None = None,
    padding: Size2 = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """`torch.nn.functional.avg_pool2d` of x (N, C, H, W), with every dtype, layout, device and error of stock torch.

    Differentiable to every order. The second derivative is zero, and is not computed: only the parameters before x get
    zeros, as from stock torch. Deterministic, for any number of threads. Saved for backward: nothing.
    """
    if x.dim() != 4 or is_transformed():
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    kernel_size, stride, padding = (
        _pair(size) for size in (kernel_size, kernel_size if stride is None else stride, padding)
    )
    return torch.ops.fastgan.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def adaptive_avg_pool2d(x: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`. All else is as in `avg_pool2d`."""
    height, width = _pair(output_size)
    if x.dim() != 4 or is_transformed() or (height, width) == (1, 1):  # a mean, which is lean in stock torch
        return F.adaptive_avg_pool2d(x, output_size)
    size = [x.shape[2] if height is None else height, x.shape[3] if width is None else width]
    return torch.ops.fastgan.adaptive_avg_pool2d(x, size)


def _pair(size) -> list:
    sizes = list(size) if isinstance(size, (tuple, list)) else [size]
    return sizes * 2 if len(sizes) == 1 else sizes
