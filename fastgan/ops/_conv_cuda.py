"""The forms that a convolution takes on CUDA: the vendor's, or an implicit matrix product in Triton, with one of some tiles.

Which is fast is measured, for each shape, and the vendor's until it is.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import backend
from fastgan.ops import _autotune
from fastgan.ops._conv_cpu import settings_of_input_grad
from fastgan.ops._tensors import dense, suggests_channels_last

VENDOR = "vendor"
# Fewer channels leave most of a tile of the matrix product empty. Other numbers than multiples of 8 do not begin every pixel
# at 16 bytes, and addresses take the registers of the sums.
_LEAST_CHANNELS, _CHANNELS_TOGETHER = 16, 8


def takes(x: Tensor, weight_shape: Sequence[int], settings: tuple) -> bool:
    """Whether there may be another form than the vendor's: of what tensor cores multiply."""
    _, _, dilation, _, _, groups = settings
    return (
        x.device.type == "cuda"
        and _autotune.is_on()
        and backend.serving("cuda") == "triton"
        and (x.dtype in (torch.bfloat16, torch.float16) or (x.dtype == torch.float32 and allows_tf32()))
        and type(x) in (Tensor, nn.Parameter)
        and groups == 1
        and tuple(dilation) == (1, 1)
        and all(channels >= _LEAST_CHANNELS and channels % _CHANNELS_TOGETHER == 0 for channels in weight_shape[:2])
    )


def tiles_with_moments(dtype: torch.dtype) -> list[str]:
    return _kernels().tiles(dtype, moments=True)


def tiles_behind_norm(dtype: torch.dtype) -> list[str]:
    return _kernels().tiles(dtype, moments=True, behind_norm=True)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
    """`fastgan::convolution`."""
    form = _form_of_convolution(x, weight, bias, settings)
    if form == VENDOR:
        return torch.ops.aten.convolution(x, weight, bias, *settings)
    return _convolution_by_tiles(x, weight, bias, settings, form)


def _form_of_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> str:
    if not (takes(x, weight.shape, settings) and _is_in_rows(x, weight)):
        return VENDOR

    def candidates() -> _autotune.Candidates:
        vendor = {VENDOR: partial(torch.ops.aten.convolution, x, weight, bias, *settings)}
        return vendor | {
            tile: partial(_convolution_by_tiles, x, weight, bias, settings, tile) for tile in _kernels().tiles(x.dtype)
        }

    return choose("convolution", (x, weight, bias), settings, candidates)


def _convolution_by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple, tile: str) -> Tensor:
    stride, padding, _, transposed, output_padding, _ = settings
    return _kernels().convolution(x, weight, bias, stride, padding, transposed, output_padding, tile, allows_tf32())


def convolution_moments(x: Tensor, weight: Tensor, settings: tuple, tile: str) -> tuple[Tensor, Tensor, Tensor]:
    """`fastgan::convolution_moments`."""
    stride, padding, _, transposed, output_padding, _ = settings
    return _kernels().convolution_moments(x, weight, stride, padding, transposed, output_padding, tile, allows_tf32())


def convolution_behind_norm(
    x: Tensor, norm: tuple, weight: Tensor, settings: tuple, tile: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastgan::convolution_behind_norm`."""
    stride, padding, _, transposed, output_padding, _ = settings
    options = (stride, padding, transposed, output_padding, tile, allows_tf32(), norm)
    return _kernels().convolution_moments(x, weight, *options)


def weight_grad_behind_norm(
    grad_y: Tensor, x: Tensor, norm: tuple, weight_shape: Sequence[int], settings: tuple, normalise: Callable
) -> Tensor:
    """`fastgan::convolution_weight_grad_behind_norm`. `normalise` gives what the kernels make of x as they load it."""
    stride, padding, _, transposed, _, _ = settings

    def by(form: str) -> Tensor:
        if form == VENDOR:
            return weight_grad(grad_y, normalise(), weight_shape, settings)
        options = (stride, padding, transposed, form, allows_tf32(), norm)
        return _kernels().convolution_weight_grad(grad_y, x, weight_shape, *options)

    def candidates() -> _autotune.Candidates:
        return {form: partial(by, form) for form in (VENDOR, *_kernels().weight_tiles(x.dtype))}

    act = norm[-2]
    key = (tuple(weight_shape), *settings, act)
    return by(choose("convolution_weight_grad_behind_norm", (grad_y, x), key, candidates))


def weight_grad(grad_y: Tensor, x: Tensor, weight_shape: Sequence[int], settings: tuple) -> Tensor:
    """`fastgan::convolution_weight_grad`."""
    form = _form_of_weight_grad(grad_y, x, weight_shape, settings)
    return _weight_grad_by(form, grad_y, x, weight_shape, settings)


def _form_of_weight_grad(grad_y: Tensor, x: Tensor, weight_shape: Sequence[int], settings: tuple) -> str:
    if not (takes(x, weight_shape, settings) and _is_in_rows(grad_y, x)):
        return VENDOR

    def candidates() -> _autotune.Candidates:
        forms = (VENDOR, *_kernels().weight_tiles(x.dtype))
        return {form: partial(_weight_grad_by, form, grad_y, x, weight_shape, settings) for form in forms}

    return choose("convolution_weight_grad", (grad_y, x), (tuple(weight_shape), *settings), candidates)


def _weight_grad_by(form: str, grad_y: Tensor, x: Tensor, weight_shape: Sequence[int], settings: tuple) -> Tensor:
    if form == VENDOR:
        weight = x.new_empty(weight_shape)  # only its shape is read
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(grad_y, x, weight, None, *settings, mask)[1]
    stride, padding, _, transposed, _, _ = settings
    return _kernels().convolution_weight_grad(grad_y, x, weight_shape, stride, padding, transposed, form, allows_tf32())


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, settings: tuple) -> tuple[Tensor, Tensor]:
    """`fastgan::convolution_backward`."""
    if not (takes(x, weight.shape, settings) and _is_in_rows(x, weight)):
        return _vendor_backward(grad_y, x, weight, settings)
    grad_y = dense(grad_y, channels_last=True)
    of_input = settings_of_input_grad(grad_y.shape, weight.shape, x.shape[2:], settings)
    of_x = _form_of_convolution(grad_y, weight, None, of_input)
    of_weight = _form_of_weight_grad(grad_y, x, weight.shape, settings)
    if of_x == of_weight == VENDOR:
        return _vendor_backward(grad_y, x, weight, settings)
    return convolution(grad_y, weight, None, of_input), _weight_grad_by(of_weight, grad_y, x, weight.shape, settings)


def _vendor_backward(grad_y: Tensor, x: Tensor, weight: Tensor, settings: tuple) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(grad_y, x, weight, None, *settings, [True, True, False])[:2]


def choose(
    operator: str, tensors: Iterable[Tensor | None], settings: tuple, candidates: Callable[[], _autotune.Candidates]
) -> str:
    """The fastest form of an operator on such tensors."""
    tensors = tuple(tensors)
    like = next(t for t in tensors if t is not None)
    key = (
        str(like.dtype),
        *(t if t is None else (tuple(t.shape), suggests_channels_last(t)) for t in tensors),
        tuple(tuple(s) if isinstance(s, (list, tuple)) else s for s in settings),
    )
    return _autotune.choose(operator, like.device, key, candidates)


def _is_in_rows(x: Tensor, other: Tensor) -> bool:
    """Whether the vendor computes in channels_last, as the kernels do."""
    return suggests_channels_last(x) or suggests_channels_last(other)


def allows_tf32() -> bool:
    """Whether torch lets float32 convolutions multiply in TF32. Both of its flags tell here, the old and the new one."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _kernels() -> Any:
    return importlib.import_module("fastgan_kernels.conv")
