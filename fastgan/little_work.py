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
from fastgan.ops._conv_cpu import (
    FEW_CHANNELS,
    Form,
    copies_weights,
    forms_of_passes,
    stays_in_planes,
    vendor_takes,
)
from fastgan.ops._tensors import in_layout, is_channels_last, suggests_channels_last, with_contiguous_gradient
from fastgan.ops._types import Act
from fastgan.ops.conv import is_autocast
from fastgan.ops.group_norm_act import is_small
from fastgan.ops.norm_act import stock_is_faster

# ── Layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# Multiplications of a thread in a convolution, and elements that come out: with fewer of both an operator's call takes
# longer than the operator gains. That is most on a matrix unit, by Winograd's form of 3×3 taps, and where oneDNN's vectors
# are empty or its copy of a weight is most of the work; and little with AVX2, or where the forms of all passes are oneDNN's.
# It takes more of them where an image would be laid out anew for this convolution alone.
_FEW_PRODUCTS, _FEW_ELEMENTS = 1 << 25, 1 << 17
_FEW_PRODUCTS_IN_LANES = 3 << 25
_FEW_PRODUCTS_NARROW, _FEW_ELEMENTS_NARROW = 1 << 27, 1 << 20
_FEW_PRODUCTS_SLOW, _FEW_PRODUCTS_OF_SCORES = 1 << 22, 1 << 17
_MORE_IN_PLANES = 2
# Multiplications of a thread from which stock's own convolutions gain in channels_last: looking at each layer takes time.
# And elements of a weight, for each of the larger image, above which oneDNN's copies of it in that layout cost more.
_PRODUCTS_IN_ROWS, _PRODUCTS_IN_ROWS_SLOW, _WEIGHT_PER_IMAGE = 1 << 22, 1 << 19, 1


class LittleCall(NamedTuple):
    """Of a layer that had better be called: what calls it on an x that owes a layout, or is faster in the other one. None
    where it is just to be called."""

    run: Callable[..., Tensor] | None


def _call(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


def _call_in_rows(x: Tensor, conv: nn.Module) -> Tensor:
    return conv(in_rows(x))


def in_rows(x: Tensor) -> Tensor:
    return in_layout(with_contiguous_gradient(x), channels_last=True)


_AS_IT_STANDS, IN_ROWS = LittleCall(None), LittleCall(_call_in_rows)


def call_of_little(x: Any, layers: Sequence[Any], owes: bool) -> LittleCall | None:
    """Of the first of the layers, a convolution or a norm, if it had better be called. `owes`: whether x owes a layout."""
    layer = layers[0]
    is_conv = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    if not (is_conv or isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm, *_OF_SAMPLES))):
        return None
    if torch.compiler.is_compiling() or not backend.is_automatic():
        return None
    if type(x) is not Tensor or x.dim() != 4 or x.device.type != "cpu":
        return None
    if not is_conv:  # an operator that leaves x to stock has looked at all its arguments
        if not _has_little_to_norm(x, layers):
            return None
        # Of a channels_last x torch 2.13 crashes in group norm's backward to the parameters alone.
        if owes and isinstance(layer, _OF_SAMPLES):
            return None
        return LittleCall(_call) if owes else _AS_IT_STANDS
    dtype = torch.get_autocast_dtype("cpu") if is_autocast(x) else x.dtype
    if not vendor_takes(dtype):
        return None  # stock's own sums in 16 bits are slow, however few they are
    weight = layer.weight
    work = _work(x, layer, weight.shape, dtype)
    if work is None:
        return None
    forms = work.forms(x.requires_grad or not weight.requires_grad)
    threads = torch.get_num_threads()
    is_halved = len(layers) > 1 and isinstance(layers[1], nn.AvgPool2d)  # and then is an operator's with the pool
    few, most = _limits(work, forms, is_halved)
    is_heavy = work.weight > _WEIGHT_PER_IMAGE * work.image
    if work.products >= few * threads or work.elements > most * threads:
        if is_heavy and not work.is_patch and copies_weights(dtype, forms):
            return _AS_IT_STANDS
        stays = work.has_few_channels and work.products < _MORE_IN_PLANES * few * threads
        stays = (stays or _stays_in_planes(x, layer, dtype)) and _is_alone_in_planes(x, layers)
        return _AS_IT_STANDS if stays and not (owes or is_halved) else None
    if owes:
        return _AS_IT_STANDS if is_heavy else IN_ROWS
    least = _PRODUCTS_IN_ROWS_SLOW if work.has_few_channels or work.is_patch else _PRODUCTS_IN_ROWS
    if work.products < least * threads or is_channels_last(x) or _is_alone_in_planes(x, layers):
        return _AS_IT_STANDS
    return IN_ROWS if _weights(layers) <= _WEIGHT_PER_IMAGE * work.image else _AS_IT_STANDS


_OF_SAMPLES = (nn.GroupNorm, nn.LayerNorm)  # norms, each by itself


def _has_little_to_norm(x: Tensor, layers: Sequence[Any]) -> bool:
    norm = layers[0]
    if isinstance(norm, _OF_SAMPLES):
        is_layer_norm = isinstance(norm, nn.LayerNorm)
        return is_small(x, is_layer_norm and norm.weight is not None, as_it_lies=not is_layer_norm)
    act: Act = "prelu" if isinstance(layers[1] if len(layers) > 1 else None, nn.PReLU) else "none"
    return stock_is_faster(x, norm.training, act)


def _limits(work: "_Work", forms: tuple[Form, ...], is_halved: bool) -> tuple[int, int]:
    """(multiplications, elements) of a thread that are few."""
    few, most = _FEW_PRODUCTS_NARROW, _FEW_ELEMENTS_NARROW
    if forms.count("vendor") == len(forms) and not is_halved:
        return few, most
    if backend.has_wide_lanes():
        few, most = _FEW_PRODUCTS if work.saves_most else _FEW_PRODUCTS_IN_LANES, _FEW_ELEMENTS
    if work.is_patch or work.has_few_channels:
        few = _FEW_PRODUCTS_OF_SCORES if work.is_patch and work.has_few_channels else _FEW_PRODUCTS_SLOW
    return few, most


def _is_alone_in_planes(x: Tensor, layers: Sequence[Any]) -> bool:
    """Whether a convolution of an image in NCHW is the only one before that is asked for again."""
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


def _weights(layers: Sequence[Any]) -> int:
    """Elements of the convolutions' weights. One that is computed when it is asked for does not count."""
    convolutions = [layer for layer in layers if type(layer) in (nn.Conv2d, nn.ConvTranspose2d)]
    return sum(layer.weight.numel() for layer in convolutions)


class _Work(NamedTuple):
    """Of a convolution."""

    products: int
    elements: int  # that come out
    weight: int  # elements
    image: int  # elements of the larger one
    is_patch: bool  # whether each image is one patch
    has_few_channels: bool  # on either side: oneDNN's vectors are empty for the most part
    saves_most: bool  # of the time in oneDNN
    all_forms: tuple[Form, Form, Form]  # of what comes out, and of the gradients in x and the weight

    def forms(self, of_x: bool) -> tuple[Form, ...]:
        """Those of the passes there will be, perhaps for the gradient in x."""
        if not torch.is_grad_enabled():
            return self.all_forms[:1]
        return self.all_forms if of_x else (self.all_forms[0], self.all_forms[2])


def _work(x: Tensor, conv: Any, weight_shape: torch.Size, dtype: torch.dtype) -> _Work | None:
    """None where a setting is not what the layer's own constructor makes of it."""
    transposed = isinstance(conv, nn.ConvTranspose2d)
    pads = conv.padding_mode != "zeros" or isinstance(conv.padding, str)  # by itself, and then has no padding
    padding = (0, 0) if pads else conv.padding
    output_padding = conv.output_padding if transposed else (0, 0)
    if not all(
        type(size) is tuple and len(size) == 2 for size in (conv.stride, padding, conv.dilation, output_padding)
    ):
        return None
    settings = (conv.stride, padding, conv.dilation, transposed, output_padding, conv.groups)
    return _work_of(backend.serving("cpu"), dtype, x.shape, weight_shape, *settings)


@functools.lru_cache(maxsize=4096)
def _work_of(
    _serving: str, dtype: torch.dtype, x_shape: torch.Size, weight_shape: torch.Size, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> _Work:  # fmt: skip
    n, _, *size = x_shape
    first, second = weight_shape[0], weight_shape[1] * groups
    is_patch = (size == [1, 1] if transposed else tuple(size) == weight_shape[2:]) and padding == (0, 0)
    positions = n if is_patch else n * math.prod(size) // (1 if transposed else math.prod(stride))
    elements = positions * first
    if transposed:
        elements = second * n * (math.prod(weight_shape[2:]) if is_patch else math.prod(size) * math.prod(stride))
    weight, has_few_channels = weight_shape.numel(), min(first, second) <= FEW_CHANNELS
    forms = forms_of_passes(dtype, x_shape, weight_shape, stride, padding, dilation, transposed, output_padding, groups)
    image, saves_most = max(x_shape.numel(), elements), "tiles" in forms or weight_shape[2:] == (3, 3)
    return _Work(weight * positions, elements, weight, image, is_patch, has_few_channels, saves_most, forms)


# ── Modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Operators(threading.local):
    count = 0


_operators = _Operators()


def note_work() -> None:
    """An operator has run, or may run when the same layers are called next."""
    if not torch.compiler.is_compiling():  # Dynamo would keep a guard on the count
        _operators.count += 1


class Route(NamedTuple):
    """Of a chain whose layers are all called: their classes, and the layouts that the input of each, and at last the result,
    is put into. None: as it is."""

    classes: Sequence[type[nn.Module] | None]
    layouts: Sequence[torch.memory_format | None]


# Of modules, by id, the inputs for which all that they hold is too little to gain, and how many to remember of each. Asking
# every layer takes longer than what small layers do. Calling them is always right: that they have changed makes it slow at
# worst. A chain may have a route, if some of its layers gain from another layout.
_LITTLE: dict[int, dict[tuple, Route | None]] = {}
_MOST_LITTLE = 64


class LittleWork:
    """What `module` does with such inputs: whether that is known to be little, and a `with` block to find out."""

    def __init__(self, module: nn.Module, inputs: Sequence[Any]):
        facts = [(x.shape, x.stride(), x.requires_grad) if type(x) is Tensor else None for x in inputs]
        self.module, self.key = module, (module.training, torch.is_grad_enabled(), *facts)
        known = _LITTLE.get(id(module), {})
        self.is_known = self.key in known and backend.is_automatic()
        self.route = known.get(self.key)

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
        known = _LITTLE.setdefault(id(self.module), {})
        if len(known) < _MOST_LITTLE:
            known[self.key] = self.route
