"""2-d convolution and transposed convolution whose derivatives are convolutions again, to every order.

The arithmetic is the vendor's, cuDNN's on CUDA and oneDNN's on the CPU, or that of kernels, whichever is fastest for the
shape: `_conv_cuda` and `_conv_cpu` have the forms and the choice.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgan import backend
from fastgan.ops import _conv_cpu, _conv_cuda
from fastgan.ops._autograd import is_transformed, operators, register_gradient, register_without_gradient
from fastgan.ops._kernels import register_kernel
from fastgan.ops._tensors import (
    INTEGERS,
    accumulation_dtype,
    check_addressable,
    check_count,
    check_dtype,
    check_is_tensor,
    check_like,
    dense,
    in_layout,
    remember_edges,
    shown,
    suggests_channels_last,
    will_use,
    with_contiguous_gradient,
)

Size2 = int | Sequence[int]

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size2,
    padding: Size2,
    dilation: Size2,
    transposed: bool,
    output_padding: Size2,
    groups: int,
) -> Tensor:
    """Both convolutions in plain torch."""
    if transposed:
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────

SETTINGS = "int[2] stride, int[2] padding, int[2] dilation, bool transposed, int[2] output_padding, int groups"
torch.library.define(
    "fastgan::convolution",
    f"(Tensor x, Tensor weight, Tensor? bias, {SETTINGS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# Without a bias, with y's mean and biased variance over all axes but 1. `tile`: of the kernel that finds both at once.
torch.library.define(
    "fastgan::convolution_moments",
    f"(Tensor x, Tensor weight, {SETTINGS}, str tile) -> (Tensor y, Tensor mean, Tensor var)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::convolution_weight_grad",
    f"(Tensor grad_y, Tensor x, SymInt[] weight_shape, {SETTINGS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
# Both at once, of a pass that nobody differentiates.
torch.library.define(
    "fastgan::convolution_backward",
    f"(Tensor grad_y, Tensor x, Tensor weight, {SETTINGS}) -> (Tensor grad_x, Tensor grad_weight)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastgan::convolution")
def _(x, weight, bias, *settings):
    y = torch.ops.aten.convolution(x, weight, bias, *settings)
    return dense(y, channels_last=True) if x.device.type == "cpu" else y


@torch.library.register_fake("fastgan::convolution_moments")
def _(x, weight, *settings_and_tile):
    return moments_by_definition(x, weight, *settings_and_tile)


@torch.library.register_fake("fastgan::convolution_weight_grad")
def _(grad_y, x, weight_shape, *settings):
    return x.new_empty(weight_shape)


@torch.library.register_fake("fastgan::convolution_backward")
def _(grad_y, x, weight, *settings):
    grad_x, grad_weight = _vendor_backward(grad_y, x, weight, *settings)
    if x.device.type == "cpu":
        return dense(grad_x, channels_last=True), grad_weight.contiguous()
    return grad_x, grad_weight


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# y = convolution(x, w) is bilinear. Its gradient in x is the other kind of convolution of grad_y with w, its gradient in w
# is convolution_weight_grad(grad_y, x), which is bilinear too: <ggw, weight_grad(g, x)> = <g, convolution(x, ggw)>.


def input_grad(grad_y: Tensor, weight: Tensor, input_size, settings) -> Tensor:
    turned = _conv_cpu.settings_of_input_grad(grad_y.shape, weight.shape, input_size, settings)
    return operators.convolution(grad_y, weight, None, *turned)


def _save_convolution(ctx, inputs, output) -> None:
    x, weight, _, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)
    remember_edges(ctx, inputs)


def _backward(ctx, grad_y):
    grad_x, grad_weight = _gradients(ctx, grad_y)
    grad_bias = grad_y.sum((0, 2, 3)) if grad_y is not None and will_use(ctx, 2) else None
    return grad_x, grad_weight, grad_bias, *[None] * len(ctx.settings)


def _gradients(ctx, grad_y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Those in x and weight."""
    grad_x = grad_weight = None
    if grad_y is None:
        return grad_x, grad_weight
    x, weight = ctx.saved_tensors
    uses_x, uses_weight = will_use(ctx, 0), will_use(ctx, 1)
    if uses_x and uses_weight and not torch.is_grad_enabled():
        grad_x, grad_weight = operators.convolution_backward(grad_y, x, weight, *ctx.settings)
    elif uses_x:
        grad_x = input_grad(grad_y, weight, x.shape[2:], ctx.settings)
    if uses_weight and grad_weight is None:
        grad_weight = operators.convolution_weight_grad(grad_y, x, weight.shape, *ctx.settings)
    return grad_x, grad_weight


register_gradient("convolution", _backward, _save_convolution)


def _save_moments(ctx, inputs, output) -> None:
    x, weight, *ctx.settings, _ = inputs
    _, mean, var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, var)  # whoever uses them has the gradient of what they are of y
    ctx.save_for_backward(x, weight)
    remember_edges(ctx, inputs)


def _moments_backward(ctx, grad_y, _mean, _var):
    return *_gradients(ctx, grad_y), *[None] * (len(ctx.settings) + 1)


register_gradient("convolution_moments", _moments_backward, _save_moments)


def _save_weight_grad(ctx, inputs, output) -> None:
    grad_y, x, _, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_y, x)
    remember_edges(ctx, inputs)


def _weight_grad_backward(ctx, ggw):
    if ggw is None:
        return None, None, None, *[None] * len(ctx.settings)
    grad_y, x = ctx.saved_tensors
    g_grad_y = grad_x = None
    if will_use(ctx, 0):
        g_grad_y = operators.convolution(x, ggw, None, *ctx.settings)
    if will_use(ctx, 1):
        grad_x = input_grad(grad_y, ggw, x.shape[2:], ctx.settings)
    return g_grad_y, grad_x, None, *[None] * len(ctx.settings)


register_gradient("convolution_weight_grad", _weight_grad_backward, _save_weight_grad)
register_without_gradient("convolution_backward")


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _vendor_convolution(x, weight, bias, *settings):
    return torch.ops.aten.convolution(x, weight, bias, *settings)


def moments_by_definition(x, weight, *settings_and_tile):
    y = dense(_vendor_convolution(x, weight, None, *settings_and_tile[:-1]), channels_last=True)
    var, mean = torch.var_mean(y.to(accumulation_dtype(y.dtype)), (0, 2, 3), correction=0)
    return y, mean, var


def _vendor_weight_grad(grad_y, x, weight_shape, *settings):
    weight = x.new_empty(weight_shape)  # only its shape is read
    mask = [False, True, False]
    return torch.ops.aten.convolution_backward(grad_y, x, weight, None, *settings, mask)[1]


def _vendor_backward(grad_y, x, weight, *settings):
    return torch.ops.aten.convolution_backward(grad_y, x, weight, None, *settings, [True, True, False])[:2]


def _cpu_convolution(x, weight, bias, *settings):
    return _conv_cpu.convolution(x, weight, bias, settings)


def _cpu_weight_grad(grad_y, x, weight_shape, *settings):
    return _conv_cpu.weight_grad(grad_y, x, weight_shape, settings)


def _cpu_backward(grad_y, x, weight, *settings):
    return _conv_cpu.backward(grad_y, x, weight, settings)


def _cuda_convolution(x, weight, bias, *settings):
    return _conv_cuda.convolution(x, weight, bias, settings)


def _cuda_moments(x, weight, *settings_and_tile):
    return _conv_cuda.convolution_moments(x, weight, settings_and_tile[:-1], settings_and_tile[-1])


def _cuda_weight_grad(grad_y, x, weight_shape, *settings):
    return _conv_cuda.weight_grad(grad_y, x, weight_shape, settings)


def _cuda_backward(grad_y, x, weight, *settings):
    return _conv_cuda.backward(grad_y, x, weight, settings)


torch.library.impl("fastgan::convolution", "CompositeExplicitAutograd", _vendor_convolution)
register_kernel("convolution", "cpu", _cpu_convolution)
register_kernel("convolution", "cuda", _cuda_convolution)
torch.library.impl("fastgan::convolution_moments", "CompositeExplicitAutograd", moments_by_definition)
register_kernel("convolution_moments", "cuda", _cuda_moments)
torch.library.impl("fastgan::convolution_weight_grad", "CompositeExplicitAutograd", _vendor_weight_grad)
register_kernel("convolution_weight_grad", "cpu", _cpu_weight_grad)
register_kernel("convolution_weight_grad", "cuda", _cuda_weight_grad)
torch.library.impl("fastgan::convolution_backward", "CompositeExplicitAutograd", _vendor_backward)
register_kernel("convolution_backward", "cpu", _cpu_backward)
register_kernel("convolution_backward", "cuda", _cuda_backward)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    keep_layout: bool = True,
) -> Tensor:
    """`torch.nn.functional.conv2d` (the cross-correlation of x with weight, plus bias) in the fast layout.

    Args:
        x: (N, C, H, W), of any strides; float32, float64, bfloat16 or float16. Under autocast x, weight and bias are cast.
        weight: (C', C / groups, kh, kw).
        bias: (C',).
        keep_layout: return the layout that stock torch returns: channels_last if x or weight is, else NCHW. Otherwise the
            layout comes as it is fast, for the next convolution.

    Twice differentiable and more: every derivative is one of two operators, so no order computes what nobody asks for.
    Deterministic; among the sums are the vendor's, whose order may depend on the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or settings that do not fit; the message names the argument.
    """
    return convolve(prepare(x, weight, bias, (stride, padding, dilation, False, 0, groups)), keep_layout)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
    *,
    keep_layout: bool = True,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` in the fast layout: the gradient of `conv2d` in its input.

    weight is (C, C' / groups, kh, kw); the output has (H − 1)·stride − 2·padding + dilation·(kh − 1) + output_padding + 1
    rows. All else is as in `conv2d`.
    """
    return convolve(prepare(x, weight, bias, (stride, padding, dilation, True, output_padding, groups)), keep_layout)


class Prepared(NamedTuple):
    """A convolution that is checked and cast for autocast."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: tuple  # of the operator, two numbers for each size
    size: tuple[int, int, int, int]  # of the output
    runs_as_stock: bool


def prepare(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple, lean: bool = False) -> Prepared:
    """`settings` are those of the operator, each size one number or two.

    With `lean` the operator serves wherever its derivatives are right, be stock torch faster in the forward or not.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None or name != "bias":
            check_is_tensor(name, tensor)
    x, weight, bias = cast_for_autocast(x, weight, bias)
    is_plain = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()  # else sizes may be symbols
    check = _check_once if is_plain and all(type(size) in _HASHABLE for size in settings) else _check
    settings, size = check(_facts(x), _facts(weight), None if bias is None else _facts(bias), settings)
    stride, _, _, transposed, output_padding, _ = settings
    runs_as_stock = (
        x.numel() == 0
        or is_transformed()
        # Legal below the dilation, but the gradient is then no plain convolution.
        or (transposed and (output_padding[0] >= stride[0] or output_padding[1] >= stride[1]))
        or (not lean and _stock_is_faster(x, weight, size, settings))
    )
    return Prepared(x, weight, bias, settings, size, runs_as_stock)


class _Facts(NamedTuple):
    """What of a tensor is checked."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _facts(tensor: Tensor) -> _Facts:
    return _Facts(tensor.shape, tensor.dtype, tensor.device)


def _check(x: _Facts, weight: _Facts, bias: _Facts | None, settings: tuple) -> tuple[tuple, tuple[int, int, int, int]]:
    """(settings in pairs, the size of the output), or what the functions say they raise."""
    settings = _in_pairs(settings)
    _check_tensors(x, weight, bias, settings[3], settings[5])
    size = _conv_cpu.output_shape(x.shape, weight.shape, *settings)
    if min(size[2:]) < 1:
        raise ValueError(
            f"x of shape {tuple(x.shape)} is too small for weight {tuple(weight.shape)}: no output is left"
        )
    check_addressable("stride, padding and dilation", size, x.dtype)
    return settings, size


_HASHABLE = (int, bool, tuple)

# Checking takes longer than a small layer does.
_check_once = functools.lru_cache(maxsize=4096)(_check)


def _stock_is_faster(x: Tensor, weight: Tensor, size: Sequence[int], settings: tuple) -> bool:
    device = x.device.type
    if backend.serving(device) == "reference":
        return True
    return device == "cpu" and _conv_cpu.stock_is_faster(x, weight, size, settings)


def convolve(prepared: Prepared, keep_layout: bool) -> Tensor:
    """Both functions. Without `keep_layout` the output is in the layout that is fast."""
    x, weight, bias, settings, _, runs_as_stock = prepared
    if runs_as_stock:
        return reference(x, weight, bias, *settings)
    given = x
    if prefers_rows(x):
        x = in_rows(x)
    y = operators.convolution(x, weight, bias, *settings)
    return in_stock_s_layout(y, given, weight) if keep_layout else y


def convolve_with_moments(prepared: Prepared, tile: str) -> tuple[Tensor, Tensor, Tensor]:
    """y without the bias, in channels_last, and its mean and biased variance, by the kernel that finds both at once."""
    return operators.convolution_moments(in_rows(prepared.x), prepared.weight, *prepared.settings, tile)


def in_rows(x: Tensor) -> Tensor:
    return dense(with_contiguous_gradient(x), channels_last=True)


def in_stock_s_layout(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y, that a convolution of x gave, as stock torch would give it."""
    return in_layout(y, suggests_channels_last(x) or suggests_channels_last(weight))


def prefers_rows(x: Tensor) -> bool:
    """Whether convolutions of such tensors are faster in channels_last: on CUDA, tensor cores read 16-bit NHWC."""
    return x.device.type == "cpu" or x.dtype in (torch.float16, torch.bfloat16)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device: there is none for meta tensors, say."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # for meta tensors there is none to ask for


def cast_for_autocast(*tensors: Tensor | None) -> tuple:
    """The tensors as autocast has them, where it is on for the first one's device."""
    x = tensors[0]
    if x is None or not is_autocast(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in eligible else t for t in tensors)


def _in_pairs(settings: tuple) -> tuple:
    """The operator's settings, checked, with two numbers for each size."""
    stride, padding, dilation, transposed, output_padding, groups = settings
    stride, dilation = check_pair("stride", stride, 1), check_pair("dilation", dilation, 1)
    padding, output_padding = check_pair("padding", padding, 0), check_pair("output_padding", output_padding, 0)
    if any(o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise ValueError(
            f"output_padding must be below stride {stride} or dilation {dilation}, not {tuple(output_padding)}"
        )
    return stride, padding, dilation, transposed, output_padding, check_count("groups", groups)


def check_pair(name: str, value: Size2, least: int) -> tuple[int, int]:
    if isinstance(value, INTEGERS):
        pair = (value, value)
    else:
        pair = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()  # type: ignore[assignment]
        if len(pair) == 1:
            pair *= 2
        if len(pair) != 2 or not all(isinstance(size, INTEGERS) for size in pair):
            raise TypeError(f"{name} must be one integer or two, not {shown(value)}")
    return check_count(name, pair[0], least), check_count(name, pair[1], least)


def check_weight(shape: torch.Size, groups: int) -> None:
    """Raise what the functions say they raise of a weight's shape, whatever x is."""
    if len(shape) != 4:
        raise ValueError(f"weight must have 4 dimensions, not shape {tuple(shape)}")
    if 0 in shape[2:]:
        raise ValueError(f"weight must have taps, not shape {tuple(shape)}")
    if shape[0] % groups:
        raise ValueError(f"groups must divide weight's {shape[0]} channels, not be {groups}")


def _check_tensors(x: _Facts, weight: _Facts, bias: _Facts | None, transposed: bool, groups: int) -> None:
    """Raise what the functions say they raise of their tensors."""
    check_dtype(x.dtype)
    if len(x.shape) != 4:
        raise ValueError(f"x must have shape (N, C, H, W), not {tuple(x.shape)}")
    check_weight(weight.shape, groups)
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels to fit weight {tuple(weight.shape)}, not {x.shape[1]}")
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must have shape ({outputs},) to fit weight, not {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_like(name, tensor, x)
