"""Layers from which an operator has too little to gain: what calls each, and modules that hold nothing else.

An operator's call in Python takes longer than what small layers do. On the CPU those are called, as stock PyTorch does it;
and so is a convolution, however large, for which alone an image would be laid out anew, and back.
"""

import functools
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan import backend
from fastgan.nn.norm_act import is_observed
from fastgan.ops._conv_cpu import FEW_CHANNELS, stays_in_planes, vendor_takes
from fastgan.ops._tensors import in_layout, suggests_channels_last, with_contiguous_gradient
from fastgan.ops._types import Act
from fastgan.ops.conv import is_autocast
from fastgan.ops.norm_act import stock_is_faster

# ── Layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# Multiplications of a thread in a convolution, and elements that come out: with fewer of both an operator's call takes
# longer than the operator gains, which is little with AVX2. Some convolutions are slow in stock sooner.
_FEW_PRODUCTS, _FEW_ELEMENTS = 1 << 25, 1 << 17
_FEW_PRODUCTS_NARROW, _FEW_ELEMENTS_NARROW = 1 << 27, 1 << 20
_FEW_PRODUCTS_SLOW = 1 << 22
# Multiplications of a thread from which stock's own convolutions gain in channels_last: looking at each layer takes time.
# And elements of a weight, for each of the larger image, above which oneDNN's copies of it in that layout cost more.
_PRODUCTS_IN_ROWS, _PRODUCTS_IN_ROWS_SLOW, _WEIGHT_PER_IMAGE = 1 << 22, 1 << 19, 2


class LittleCall(NamedTuple):
    """Of a layer that had better be called: what calls it on an x that owes a layout, or is faster in the other one. None
    where it is just to be called."""

    run: Callable[..., Tensor] | None


_AS_IT_STANDS = LittleCall(None)


def call_of_little(x: Any, layers: Sequence[Any], owes: bool) -> LittleCall | None:
    """Of the first of the layers, a convolution or a norm, if it had better be called. `owes`: whether x owes a layout."""
    layer = layers[0]
    is_conv = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    if not (is_conv or isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm))):
        return None
    if torch.compiler.is_compiling() or not backend.is_automatic():
        return None
    if type(x) is not Tensor or x.dim() != 4 or x.device.type != "cpu":
        return None
    if not is_conv:  # an operator that leaves x to stock has looked at all its arguments
        act: Act = "prelu" if isinstance(layers[1] if len(layers) > 1 else None, nn.PReLU) else "none"
        if not stock_is_faster(x, layer.training, act):
            return None
        return LittleCall(_call) if owes else _AS_IT_STANDS
    dtype = torch.get_autocast_dtype("cpu") if is_autocast(x) else x.dtype
    if not vendor_takes(dtype):
        return None  # stock's own sums in 16 bits are slow, however few they are
    transposed = isinstance(layer, nn.ConvTranspose2d)
    work = _work_of(x.shape, layer.weight.shape, layer.stride, layer.padding, layer.groups, transposed)
    threads = torch.get_num_threads()
    few, most = _FEW_PRODUCTS, _FEW_ELEMENTS
    if not backend.has_wide_lanes():
        few, most = _FEW_PRODUCTS_NARROW, _FEW_ELEMENTS_NARROW
    if work.is_slow:
        few = _FEW_PRODUCTS_SLOW
    is_alone = not owes and _is_alone_in_planes(x, layers)
    if work.products >= few * threads or work.elements > most * threads:
        return _AS_IT_STANDS if is_alone and _stays_in_planes(x, layer, dtype) else None
    if work.weight > _WEIGHT_PER_IMAGE * work.image:
        return _AS_IT_STANDS
    least = _PRODUCTS_IN_ROWS_SLOW if work.is_slow else _PRODUCTS_IN_ROWS
    gains = work.products >= least * threads and (work.is_slow or not is_alone)
    return LittleCall(_call_in_rows) if owes or gains else _AS_IT_STANDS


def _is_alone_in_planes(x: Tensor, layers: Sequence[Any]) -> bool:
    """Whether a convolution of an image in NCHW is the only one before that is asked for again, and no operator's with the
    pool behind it."""
    if len(layers) > 1 and isinstance(layers[1], nn.AvgPool2d):
        return False
    if suggests_channels_last(x) or suggests_channels_last(layers[0].weight):
        return False
    convolves = (nn.Conv2d, nn.ConvTranspose2d)
    # What stands for a function has nothing else of a module.
    return not any(isinstance(layer, convolves) or getattr(layer, "_modules", None) for layer in layers[1:])


def _stays_in_planes(x: Tensor, conv: Any, dtype: torch.dtype) -> bool:
    """Whether stock's convolution in NCHW is faster than an operator between two changes of the layout."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    transposed = isinstance(conv, nn.ConvTranspose2d)
    output_padding = conv.output_padding if transposed else (0, 0)
    settings = (conv.stride, conv.padding, conv.dilation, transposed, output_padding, conv.groups)
    return stays_in_planes(dtype, x.shape, conv.weight.shape, *settings)


class _Work(NamedTuple):
    """Of a convolution."""

    products: int
    elements: int  # that come out
    weight: int  # elements
    image: int  # elements of the larger one
    is_slow: bool  # whether oneDNN's vectors are empty for the most part


@functools.lru_cache(maxsize=4096)
def _work_of(
    x_shape: torch.Size, weight_shape: torch.Size, stride: Any, padding: Any, groups: int, transposed: bool
) -> _Work:
    n, _, *size = x_shape
    first, second = weight_shape[0], weight_shape[1] * groups
    outputs, is_patch = first, tuple(size) == weight_shape[2:]
    positions = pixels = n * math.prod(size) // math.prod(stride)
    if transposed:
        outputs, is_patch = second, size == [1, 1]
        positions, pixels = n * math.prod(size), n * math.prod(size) * math.prod(stride)
    weight, elements = weight_shape.numel(), pixels * outputs
    is_slow = min(first, second) <= FEW_CHANNELS or (is_patch and padding in ((0, 0), "valid"))
    return _Work(weight * positions, elements, weight, max(x_shape.numel(), elements), is_slow)


def _call(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


def _call_in_rows(x: Tensor, conv: nn.Module) -> Tensor:
    return conv(in_layout(with_contiguous_gradient(x), channels_last=True))


# ── Modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Operators(threading.local):
    count = 0


_operators = _Operators()


def note_work() -> None:
    """An operator has run, or may run when the same layers are called next."""
    if not torch.compiler.is_compiling():  # Dynamo would keep a guard on the count
        _operators.count += 1


# Of modules, by id, the inputs for which all that they hold is too little to gain, and how many to remember of each. Asking
# every layer takes longer than what small layers do. Calling them is always right: that they have changed makes it slow at
# worst.
_LITTLE: dict[int, set[tuple]] = {}
_MOST_LITTLE = 64


class LittleWork:
    """What `module` does with inputs of these shapes: whether that is known to be little, and a `with` block to find out."""

    def __init__(self, module: nn.Module, inputs: Sequence[Any]):
        self.module, self.key = module, (module.training, *[x.shape if type(x) is Tensor else None for x in inputs])
        self.is_known = backend.is_automatic() and self.key in _LITTLE.get(id(module), ())

    def __enter__(self) -> None:
        self.before = _operators.count

    def __exit__(self, *error: object) -> None:
        if (
            self.before != _operators.count
            or error != (None, None, None)
            or not backend.is_automatic()
            or is_observed()
        ):
            return
        if id(self.module) not in _LITTLE:
            weakref.finalize(self.module, _LITTLE.pop, id(self.module), None).atexit = False
        known = _LITTLE.setdefault(id(self.module), set())
        if len(known) < _MOST_LITTLE:
            known.add(self.key)
