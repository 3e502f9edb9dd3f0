"""Upsampling, FIR filtering and downsampling of images in one operator, which is its own gradient at every order."""

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, operators, register_gradient
from fastgan.ops._tensors import (
    DTYPES,
    MOST,
    accumulation_dtype,
    check_addressable,
    check_count,
    check_flag,
    check_input,
    check_is_tensor,
    check_number,
    dense,
    is_channels_last,
    shown,
)

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(
    x: Tensor,
    f: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """`upfirdn2d` in plain torch; up and down are [x, y], the padding [x_before, x_after, y_before, y_after]."""
    n, channels, height, width = x.shape
    z = F.pad(x.reshape(n * channels, 1, height, 1, width, 1), [0, up[0] - 1, 0, 0, 0, up[1] - 1])
    z = z.reshape(n * channels, 1, height * up[1], width * up[0])
    z = F.pad(z, [max(p, 0) for p in padding])
    left, right, top, bottom = (max(-p, 0) for p in padding)
    z = z[:, :, top : z.shape[2] - bottom, left : z.shape[3] - right]
    f = (f.to(accumulation_dtype(x.dtype)) * gain ** (f.dim() / 2)).to(x.dtype)
    f = f if flip_filter else f.flip(list(range(f.dim())))
    for taps in (f[None], f[:, None]) if f.dim() == 1 else (f,):
        z = F.conv2d(z, taps[None, None])
    z = z[:, :, :: down[1], :: down[0]]
    return dense(z.reshape(n, channels, *z.shape[2:]), is_channels_last(x))


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────

torch.library.define(
    "fastgan::upfirdn2d",
    "(Tensor x, Tensor f, int[2] up, int[2] down, SymInt[4] padding, bool flip_filter, float gain) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _output_size(x: Tensor, f: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int]) -> list[int]:
    """[width, height]"""
    sizes = zip((x.shape[3], x.shape[2]), _get_filter_size(f), up, down, padding[::2], padding[1::2], strict=True)
    return [(size * u + before + after - taps) // d + 1 for size, taps, u, d, before, after in sizes]


def _empty_output(x: Tensor, *geometry) -> Tensor:
    width, height = _output_size(x, *geometry)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(*x.shape[:2], height, width, dtype=x.dtype, device=x.device, memory_format=layout)


@torch.library.register_fake("fastgan::upfirdn2d")
def _(x, f, up, down, padding, flip_filter, gain):
    return _empty_output(x, f, up, down, padding)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# The operator is linear in x, and its transpose is itself: upsampling by `down`, the filter flipped, downsampling by `up`.


def _save(ctx, inputs, output) -> None:
    x, f, *ctx.settings = inputs
    ctx.sizes = (x.shape[3], x.shape[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(f)


def _backward(ctx, grad_y):
    if grad_y is None:
        return (None,) * 7
    (f,) = ctx.saved_tensors
    up, down, padding, flip_filter, gain = ctx.settings
    transposed = []
    for i, taps in enumerate(_get_filter_size(f)):
        before = taps - 1 - padding[2 * i]
        after = ctx.sizes[i] * up[i] - grad_y.shape[3 - i] * down[i] + padding[2 * i] - up[i] + 1
        transposed += [before, after]
    return operators.upfirdn2d(grad_y, f, down, up, transposed, not flip_filter, gain), *[None] * 6


register_gradient("upfirdn2d", _backward, _save)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cpp(x, f, up, down, padding, flip_filter, gain):
    from fastgan import _C

    channels_last = is_channels_last(x)
    x, f = dense(x, channels_last), f.to(accumulation_dtype(x.dtype)).contiguous()
    y = _empty_output(x, f, up, down, padding)
    horizontal, vertical = (
        (x.shape[3 - i], y.shape[3 - i], taps, up[i], down[i], padding[2 * i])
        for i, taps in enumerate(_get_filter_size(f))
    )
    n, channels = x.shape[:2]
    call = _C.UpFirDn2d(
        DTYPES[x.dtype], channels_last, n, channels, vertical, horizontal, f.dim() == 1, flip_filter, gain
    )
    _C.upfirdn2d(call, x.data_ptr(), f.data_ptr(), y.data_ptr())
    return y


def _triton(*arguments):
    return importlib.import_module("fastgan_kernels.upfirdn2d").upfirdn2d(*arguments)


def _serve(x, *arguments):
    kernels = {"cpp": _cpp, "triton": _triton, "reference": reference}
    return kernels[backend.serving(x.device.type)](x, *arguments)


torch.library.impl("fastgan::upfirdn2d", "CompositeExplicitAutograd", _serve)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """Upsample, pad, filter and downsample each channel of x (Karras et al. 2020, StyleGAN2).

    In this order: `up` − 1 zeros behind every pixel of both axes; zeros around the image, or less of it where the padding is
    negative; convolution with f at every place where f fits; every `down`-th pixel. Along an axis of `size` pixels that
    leaves (size · up + before + after − taps) // down + 1.

    Args:
        x: (N, C, H, W); float32, float64, bfloat16 or float16. NCHW and channels_last are both fast, and the output keeps
            the layout; any other strides are copied first.
        f: the taps, floating point of any dtype: (h, w), or (taps,) for both axes one after the other; None filters
            nothing. A constant: no gradient flows to it. `setup_filter` makes one.
        up, down: of both axes, or [x, y].
        padding: of all sides, or [x, y], or [x_before, x_after, y_before, y_after], in upsampled pixels.
        flip_filter: correlate with f instead of convolving.
        gain: multiplies the result; not negative where f has one axis, each pass over which takes its root.

    No multiplication by an inserted zero takes place. An f that is an outer product to rounding costs what two passes along
    the axes cost. Sums are float32 (float64 for float64), and deterministic, for any number of threads. Differentiable in x
    to every order by the same kernel; saved for backward: f. Under autocast it runs in x's dtype.

    Raises:
        TypeError: x or f is no floating-point tensor.
        ValueError: x has not 4 dimensions, f has not 1 or 2, no tap, another device than x, or requires a gradient; factors,
            padding or gain that do not fit; or an f that is larger than the padded image. The message names the argument.
    """
    check_input(x)
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions (N, C, H, W), not shape {tuple(x.shape)}")
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have pixels, not shape {tuple(x.shape)}")
    up, down, padding = _parse_factor("up", up), _parse_factor("down", down), _parse_padding(padding)
    if f is None:
        f = torch.ones(1, 1, dtype=accumulation_dtype(x.dtype), device=x.device)
    _check_filter(f, x, flip_filter, gain)
    for axis, size, taps, factor, (before, after) in zip(
        "xy", (x.shape[3], x.shape[2]), _get_filter_size(f), up, (padding[:2], padding[2:]), strict=True
    ):
        padded = size * factor + before + after
        if padded < taps:
            raise ValueError(f"f has {taps} taps along {axis}, where the padded x has {padded} pixels")
    width, height = _output_size(x, f, up, down, padding)
    check_addressable("up, down and padding", (*x.shape[:2], height, width), x.dtype)
    arguments = (x, f, up, down, padding, flip_filter, gain)
    if is_transformed():
        return reference(*arguments)
    return operators.upfirdn2d(*arguments)


def setup_filter(
    f: Tensor | Sequence | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """The float32 filter of `upfirdn2d` on `device`, from taps (taps,) or (h, w), one tap, or None for the one tap 1.

    Args:
        normalize: make the taps add up to one.
        flip_filter: turn the filter around.
        gain: of the whole filter.
        separable: keep taps (taps,) as they are, for two passes, instead of their outer product; None does from 8 taps on.

    Raises:
        TypeError: f is not made of numbers, gain is none, or a flag is neither True nor False.
        ValueError: f has more than 2 axes or no tap, is to be normalised and adds up to 0, or is to be separable and has 2
            axes or a negative gain.
    """
    check_flag("normalize", normalize)
    check_flag("flip_filter", flip_filter)
    check_number("gain", gain)
    if separable is not None:
        check_flag("separable", separable)
    try:
        f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # of what is no number, of uneven rows, of any object
        raise TypeError(f"f must be numbers, one tap, (taps,) or (h, w), not {type(f).__name__}") from error
    if f.dim() > 2 or f.numel() == 0:
        raise ValueError(f"f must be one tap, (taps,) or (h, w), not of shape {tuple(f.shape)}")
    f = f.reshape(1) if f.dim() == 0 else f
    if separable and f.dim() == 2:
        raise ValueError("f must be (taps,) to be separable, not (h, w)")
    if f.dim() == 1 and not (f.numel() >= 8 if separable is None else separable):
        f = f.outer(f)
    _check_gain(gain, f)
    if normalize:
        total = f.sum()
        if not f.is_meta and total == 0:
            raise ValueError("f must not add up to 0 to be normalised; normalize=False takes it as it is")
        f = f / total
    if flip_filter:
        f = f.flip(list(range(f.dim())))
    return (f * gain ** (f.dim() / 2)).to(device)


def filter2d(
    x: Tensor,
    f: Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """x filtered by f to the size of x: `upfirdn2d` with the padding that this takes, and `padding` beyond it."""
    return upfirdn2d(x, f, 1, 1, _around(f, padding, lambda taps: (taps // 2, (taps - 1) // 2)), flip_filter, gain)


def upsample2d(
    x: Tensor,
    f: Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """x enlarged by `up`: `upfirdn2d` with the padding that this takes, and `padding` beyond it.

    The gain makes up for the inserted zeros: an f whose taps add up to one keeps the mean.
    """
    up = _parse_factor("up", up)
    check_number("gain", gain)
    padding = _around(f, padding, lambda taps, up: ((taps + up - 1) // 2, (taps - up) // 2), up)
    return upfirdn2d(x, f, up, 1, padding, flip_filter, gain * up[0] * up[1])


def downsample2d(
    x: Tensor,
    f: Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> Tensor:
    """x reduced by `down`: `upfirdn2d` with the padding that this takes, and `padding` beyond it."""
    down = _parse_factor("down", down)
    padding = _around(f, padding, lambda taps, down: ((taps - down + 1) // 2, (taps - down) // 2), down)
    return upfirdn2d(x, f, 1, down, padding, flip_filter, gain)


# ── Arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _get_filter_size(f: Tensor | None) -> tuple[int, int]:
    """(width, height)"""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _parse_factor(name: str, factor: int | Sequence[int]) -> list[int]:
    """[x, y]"""
    factors = list(factor) if isinstance(factor, Sequence) else [factor] * 2
    if len(factors) != 2:
        raise ValueError(f"{name} must be a positive integer, or two [x, y], not {shown(factor)}")
    return [check_count(name, part) for part in factors]


def _parse_padding(padding: int | Sequence[int]) -> list[int]:
    """[x_before, x_after, y_before, y_after]"""
    parts = list(padding) if isinstance(padding, Sequence) else [padding] * 4
    if len(parts) == 2:
        parts = [parts[0], parts[0], parts[1], parts[1]]
    if len(parts) != 4:
        raise ValueError(
            f"padding must be one integer, [x, y] or [x_before, x_after, y_before, y_after], not {shown(padding)}"
        )
    return [check_count("padding", part, least=-MOST) for part in parts]


def _around(f: Tensor | None, padding: int | Sequence[int], own: Callable[..., tuple[int, int]], *factors) -> list[int]:
    """`padding` and, of each axis, own(taps, factor of the axis)."""
    _check_taps(f)
    more = [part for sizes in zip(_get_filter_size(f), *factors, strict=True) for part in own(*sizes)]
    return [a + b for a, b in zip(_parse_padding(padding), more, strict=True)]


def _check_taps(f: Tensor | None) -> None:
    if f is None:
        return
    check_is_tensor("f", f)
    if f.dim() not in (1, 2) or f.numel() == 0:
        raise ValueError(f"f must be (taps,) or (h, w), not of shape {tuple(f.shape)}")


def _check_gain(gain: float, f: Tensor) -> None:
    if f.dim() == 1 and gain < 0:
        raise ValueError(f"gain must not be negative where f is (taps,), not {gain}")


def _check_filter(f: Tensor, x: Tensor, flip_filter: bool, gain: float) -> None:
    _check_taps(f)
    check_number("gain", gain)
    check_flag("flip_filter", flip_filter)
    if f.dtype not in DTYPES:
        raise TypeError(f"f must be float32, float64, bfloat16 or float16, not {f.dtype}")
    if f.device != x.device:
        raise ValueError(f"f is on {f.device}, x on {x.device}")
    if f.requires_grad:
        raise ValueError("f must not require a gradient: it is a constant of upfirdn2d")
    _check_gain(gain, f)
