"""Chains of layers: which patterns there are in them, and how a chain is run, each pattern by its operator.

A chain is what an `nn.Sequential` holds, or what a forward written by hand calls one after the other. It is looked at
whenever it runs, as layers may have changed; what is in no pattern, or must be called, is called.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgan import backend, ops
from fastgan.little_work import IN_ROWS, Route, call_of_little, in_rows, note_work
from fastgan.nn.conv_norm_act import (
    conv2d,
    conv_batch_norm_act,
    conv_batch_norm_act_in_chain,
    is_doubling,
    is_halving,
    slides,
    up_conv2d,
)
from fastgan.nn.gradient_reversal import GradientReversal, WarmStartGradientReversal, next_coeff
from fastgan.nn.group_norm_act import instance_norm_act, subtracts_means
from fastgan.nn.norm_act import Activation, attachment, batch_norm_act, is_distributed, is_observed
from fastgan.ops._tensors import DTYPES, in_layout, lies_in_both, suggests_channels_last
from fastgan.ops.conv import is_autocast
from fastgan.ops.conv_norm_act import Norm

# ── Patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _conv_batch_norm_act(x: Tensor, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    return conv_batch_norm_act(x, conv, norm, Activation.of(act), keep_layout=False)


def _conv_batch_norm_act_in_chain(
    x: Tensor, layers: list[Any], before: Norm | None, hands_on: bool
) -> tuple[Tensor, Norm | None]:
    conv, norm, *act = layers
    return conv_batch_norm_act_in_chain(x, conv, norm, Activation.of(*act or [None]), before, hands_on)


def _conv_instance_norm_act(x: Tensor, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    y = conv2d(x, conv, with_bias=not subtracts_means(norm), keep_layout=False)
    return _instance_norm_act_of(y, conv, norm, act)


def _instance_norm_act_of(y: Tensor, conv: Any, norm: Any, act: nn.Module | None) -> Tensor:
    """Of a convolution's y without the bias, where the norm subtracts that anyway."""
    return instance_norm_act(y, norm, Activation.of(act), conv_bias=conv.bias if subtracts_means(norm) else None)


def _conv(x: Tensor, conv: Any) -> Tensor:
    return conv2d(x, conv, keep_layout=False)


def _up_conv_batch_norm_act(x: Tensor, _up: Any, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    return conv_batch_norm_act(x, conv, norm, Activation.of(act), doubled=True, keep_layout=False)


def _up_conv_instance_norm_act(x: Tensor, _up: Any, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    return _instance_norm_act_of(up_conv2d(x, conv, with_bias=not subtracts_means(norm)), conv, norm, act)


def _up_conv(x: Tensor, _up: Any, conv: Any) -> Tensor:
    return up_conv2d(x, conv)


def _conv_down(x: Tensor, conv: Any, _pool: Any) -> Tensor:
    return ops.conv2d_avg_pool2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups, keep_layout=False)


def _batch_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    return batch_norm_act(x, norm, Activation.of(act), residual)


def _instance_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    return instance_norm_act(x, norm, Activation.of(act), residual)


def _group_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    settings: Any = {**Activation.of(act).fixed, "residual": residual}
    return ops.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **settings)


def _layer_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None) -> Tensor:
    return ops.layer_norm_act(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, **Activation.of(act).fixed)


def _conv_pixel_shuffle_act(x: Tensor, conv: Any, shuffle: Any, act: nn.Module | None = None) -> Tensor:
    return _pixel_shuffle_act(conv2d(x, conv, keep_layout=False), shuffle, act)


def _pixel_shuffle_act(x: Tensor, shuffle: Any, act: nn.Module | None) -> Tensor:
    return ops.pixel_shuffle_act(x, shuffle.upscale_factor, **Activation.of(act)._asdict())


def _reversed_linear(x: Tensor, reversal: Any, linear: Any) -> Tensor:
    return ops.reversed_linear(x, linear.weight, linear.bias, next_coeff(reversal))


CONV = (nn.Conv2d, nn.ConvTranspose2d)
BATCH, INSTANCE = (nn.BatchNorm2d, nn.SyncBatchNorm), (nn.InstanceNorm2d,)
GROUP, LAYER = (nn.GroupNorm,), (nn.LayerNorm,)
NORM = BATCH + INSTANCE + GROUP + LAYER
ACT = (nn.ReLU, nn.LeakyReLU)
ACT_OR_PRELU = (*ACT, nn.PReLU)
UP, FLAT, DOWN = (nn.Upsample, nn.UpsamplingNearest2d), (nn.Conv2d,), (nn.AvgPool2d,)
SHUFFLE = (nn.PixelShuffle,)
REVERSAL, LINEAR = (GradientReversal, WarmStartGradientReversal), (nn.Linear,)

# Consecutive layers of exactly these classes, and what computes them at once. The longest that fits is taken.
PATTERNS: tuple[tuple[tuple[tuple[type[nn.Module], ...], ...], Callable[..., Tensor]], ...] = (
    ((CONV, BATCH, ACT_OR_PRELU), _conv_batch_norm_act),
    ((CONV, BATCH), _conv_batch_norm_act),
    ((CONV, INSTANCE, ACT), _conv_instance_norm_act),
    ((CONV, INSTANCE), _conv_instance_norm_act),
    ((UP, FLAT, BATCH, ACT_OR_PRELU), _up_conv_batch_norm_act),
    ((UP, FLAT, BATCH), _up_conv_batch_norm_act),
    ((UP, FLAT, INSTANCE, ACT), _up_conv_instance_norm_act),
    ((UP, FLAT, INSTANCE), _up_conv_instance_norm_act),
    ((UP, FLAT), _up_conv),
    ((FLAT, DOWN), _conv_down),
    ((FLAT, SHUFFLE, ACT_OR_PRELU), _conv_pixel_shuffle_act),
    ((FLAT, SHUFFLE), _conv_pixel_shuffle_act),
    ((SHUFFLE, ACT_OR_PRELU), _pixel_shuffle_act),
    ((CONV,), _conv),
    ((BATCH, ACT_OR_PRELU), _batch_norm_act),
    ((BATCH,), _batch_norm_act),
    ((INSTANCE, ACT), _instance_norm_act),
    ((INSTANCE,), _instance_norm_act),
    ((GROUP, ACT), _group_norm_act),
    ((GROUP,), _group_norm_act),
    ((LAYER, ACT), _layer_norm_act),
    ((LAYER,), _layer_norm_act),
    ((REVERSAL, LINEAR), _reversed_linear),
)

# Layers that compute the same however their input lies in memory. Dropout is not one: it draws in the order of memory.
LAYOUT_BLIND = {
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.PReLU,
    nn.PixelShuffle, nn.ReLU, nn.ReLU6, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Tanh, nn.Upsample, nn.UpsamplingNearest2d, nn.ZeroPad2d,
}  # fmt: skip

Classes = tuple[type[nn.Module] | None, ...]
_RUNS: dict[Classes, Callable[..., Tensor]] = {
    classes: run for pattern, run in PATTERNS for classes in product(*pattern)
}
_LONGEST = max(map(len, _RUNS))
# Where a layer of these is called, it may be for a reason that passes: a hook (None), a tensor of another dtype.
_GAINING = {None, *(kind for classes in _RUNS for kind in classes)} - LAYOUT_BLIND


class FunctionLayer(nn.Module):
    """Stands before the class of the layer that a call of a function is. It has that layer's attributes, and nothing else of
    a module: to call it is to call the function."""

    stands_for: type[nn.Module] | None = None  # where no layer does the same
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def __call__(self, x: Any) -> Any:
        return self.function(x, *self.args, **self.kwargs)


def classes_of(layers: Iterable[nn.Module]) -> Classes:
    """What the patterns are matched against. A layer that must be called stands as None, which is in no pattern."""
    return tuple(map(_class_of, layers))


def _class_of(layer: nn.Module) -> type[nn.Module] | None:
    if isinstance(layer, FunctionLayer):
        return layer.stands_for
    return None if attachment(layer) else type(layer)


def matches(layers: list[nn.Module], classes: Classes) -> Iterator[tuple[int, Callable[..., Tensor]]]:
    """The patterns that the layers begin with, the longest first: how many layers, and what computes them."""
    for length in range(min(_LONGEST, len(classes)), 0, -1):
        run = _RUNS.get(classes[:length])
        if run is not None and _is_resampling(layers[:length]) in (None, True):
            yield length, run


def _is_resampling(layers: list[nn.Module]) -> bool | None:
    """Whether what a pattern doubles or halves is doubled or halved as the operators do it; None where nothing is."""
    if isinstance(layers[0], UP):
        return is_doubling(layers[0]) and slides(layers[1])
    return is_halving(layers[-1]) and slides(layers[-2]) if isinstance(layers[-1], DOWN) else None


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fits(x: Any, layers: list[nn.Module]) -> bool:
    """Whether an operator takes x and the layers' tensors. Where not, stock has an answer or an error of its own."""
    if not (type(x) in (Tensor, nn.Parameter) or torch.compiler.is_compiling()):
        return False
    if x.dtype not in DTYPES:
        return False
    if isinstance(layers[0], REVERSAL):
        linear: Any = layers[1]
        return x.shape[-1:] == (linear.in_features,) and (x.dtype == linear.weight.dtype or is_autocast(x))
    if x.dim() != 4:
        return False
    channels, params = x.shape[1], x
    for layer in layers:
        if isinstance(layer, CONV):
            if channels != layer.in_channels:
                return False
            channels, params = layer.out_channels, layer.weight
            if params.dtype != x.dtype and not is_autocast(x):
                return False
        elif isinstance(layer, GROUP + LAYER):
            params = layer.weight
            if not _is_normed_by_sample(x, layer):
                return False
        elif isinstance(layer, NORM):
            if layer.num_features not in (channels, None):  # None: of a function without parameters
                return False
            if isinstance(layer, nn.SyncBatchNorm) and layer.training and not _is_synchronised_on(x.device):
                return False
            params = layer.running_mean if layer.weight is None else layer.weight  # None: of an instance norm
            if params is not None and params.dtype not in (x.dtype, torch.float32):
                return False
        elif isinstance(layer, SHUFFLE):
            channels, rest = divmod(channels, layer.upscale_factor**2)
            if rest:
                return False
        elif isinstance(layer, nn.PReLU):
            params = layer.weight
            # Under autocast stock computes it in 16 bits, which is what convolutions give.
            is_16_bit = x.dtype != torch.float32 or any(isinstance(part, CONV) for part in layers)
            if params.numel() not in (1, channels) or not (is_16_bit if is_autocast(x) else params.dtype == x.dtype):
                return False
        if params is not None and params.device != x.device:
            return False
    return True


def _is_normed_by_sample(x: Tensor, norm: Any) -> bool:
    """Whether a group norm, or a layer norm of whole samples, does to x what its operator does. Elsewhere than on the CPU
    autocast has stock compute it in float32, and where each group has one element in all of x stock raises."""
    if isinstance(norm, LAYER):
        fits = norm.normalized_shape == x.shape[1:]
    else:  # of a function without parameters num_channels is None
        fits = norm.num_channels in (x.shape[1], None) and x.shape[1] % norm.num_groups == 0
        fits = fits and x.numel() > norm.num_groups
    is_alike = norm.weight is None or norm.weight.dtype == x.dtype
    return fits and is_alike and (x.device.type == "cpu" or not is_autocast(x))


def _is_synchronised_on(device: torch.device) -> bool:
    """Whether synchronised norms train there: on the CPU stock refuses to wait for other processes."""
    return not is_distributed() or (device.type == "cuda" and not torch.compiler.is_compiling())


def _choose(x: Any, layers: list[nn.Module], classes: Classes) -> tuple[int, Callable[..., Tensor] | None]:
    """How many layers to compute next, and what computes them: None where one layer is to be called."""
    for length, run in matches(layers, classes):
        if _is_resampling(layers[:length]) and _has_few_pixels(x, isinstance(layers[0], UP)):
            continue
        if _fits(x, layers[:length]):
            return length, run
    return 1, None


# Pixels of the larger image, in the whole batch, below which the sums of weights take longer than what they save.
_FEW_PIXELS = 1 << 11


def _has_few_pixels(x: Any, doubled: bool) -> bool:
    """Whether a convolution had better be computed at every pixel before a pool, or after x is doubled."""
    if type(x) is not Tensor or x.dim() != 4 or torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    return x.device.type != "cpu" or _pixels(x) * (4 if doubled else 1) < _FEW_PIXELS


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


class FusedModule(nn.Module):
    """Stands before the class of a module that `fuse` has found, and says what the module comes to in a chain."""

    def chain(self, x: Any) -> "Chain | None":
        """Where calling the module on x is to run a chain on it, and nothing else."""
        return None

    def resampled(self, x: Any, doubled: bool) -> Callable[[Any], Any] | None:
        """Where the module convolves x once: what convolves a doubled x, or gives the means of 2×2 of the result."""
        return None


def is_chain(module: nn.Module) -> bool:
    """Whether calling `module` is to call its children one after the other, and nothing else."""
    forward = type(module).forward
    return (
        isinstance(module, nn.Sequential)
        and (forward is nn.Sequential.forward or getattr(forward, "is_of_chain", False))
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
    )


class Sum(NamedTuple):
    """What becomes of the layers' output y and some x."""

    order: str  # of `ORDERS`
    act: nn.Module | None = None  # on the sum


class Chain(NamedTuple):
    layers: list[nn.Module]
    sum: Sum | None = None  # with what the chain is called on


class Residual(NamedTuple):
    """What a last norm may as well add, and do with the sum."""

    tensor: Tensor
    layout: torch.memory_format | None  # that it owes
    act: nn.Module | None


Layouts = list[torch.memory_format | None]


def run_chain(
    layers: list[nn.Module],
    x: Any,
    stock: torch.memory_format | None = None,
    residual: Residual | None = None,
    layouts: Layouts | None = None,
) -> tuple[Any, torch.memory_format | None, bool]:
    """The layers' output for x, the layout that it owes, and whether it holds the `residual`.

    Convolutions leave their output in the layout that is fast. Where that is not the layout that stock torch would have,
    `stock` names it, and whoever can tell the difference gets the tensor restored. A last norm adds a residual that owes its
    own layout: then the sum owes that too, in whichever order stock adds. `layouts` becomes those of a `Route`, where all
    layers turn out to be called.
    """
    is_added, before = False, None  # the norm that x is still to go through
    put = given = None  # the layouts that x is put into before a layer, and behind it
    classes: Classes = (None,) * len(layers) if is_observed() else classes_of(layers)
    while layers:
        head, head_class = layers[0], classes[0]
        # What is to be called as it stands is not looked at: each look at a parametrized weight computes it.
        little = call_of_little(x, layers, stock is not None) if (head_class,) in _RUNS else None
        length, run = _choose(x, layers, classes) if little is None else (1, little.run)
        if layouts is None if little is not None and little.run else little is None and (run or head_class in _GAINING):
            note_work()
        put, given = given, None
        added = residual if little is None and length == len(layers) and _adds(layers[-1]) else None
        if added is not None and length > 1:
            length -= 1  # the norm comes alone, and adds
            run = _RUNS[classes[:length]]
        if before is not None and run is not _conv_batch_norm_act:
            x, before = before.of(x), None
        if run is not None and not isinstance(head, REVERSAL):
            if stock is None:
                stock = torch.channels_last if suggests_channels_last(x) else torch.contiguous_format
            stock = _layout_of_stock(layers[:length], stock, x.device)
            if added is not None and length == len(layers) and _can_add(x, stock, head, added):
                x, is_added = run(x, head, added.act, residual=added.tensor), True
            elif run is _conv_batch_norm_act and _loads_by_kernels(x):
                hands_on = _starts_with_conv_batch_norm(layers[length:], classes[length:])
                x, before = _conv_batch_norm_act_in_chain(x, layers[:length], before, hands_on)
            else:
                x = run(x, *layers[:length])
            if lies_in_both(x) and any(map(_makes_anew, layers[:length])):
                stock = torch.contiguous_format
            if little is IN_ROWS:
                put = torch.channels_last
        elif head_class is not None and isinstance(head, FusedModule) and (chain := head.chain(x)) is not None:
            owed = stock
            if chain.sum is None:
                x, stock, is_added = run_chain(chain.layers, x, stock, residual if len(layers) == 1 else None)
            else:
                if _may_change_input(chain.layers, x):  # and then the sum is of what it leaves
                    x, stock = restore(x, stock), None
                x, stock = _plus_owing(chain.layers, x, x, stock, chain.sum)
            if (owed, stock) != (None, None):
                note_work()
        elif (resampled := _find_resampled(x, layers, classes)) is not None:
            note_work()
            x, stock, length = resampled(restore(x, stock)), None, 2
        else:
            if head_class not in LAYOUT_BLIND:
                put = stock or put
                x, stock = restore(x, stock), None
            x = head(x) if run is None else run(x, *layers[:length])
        if stock is not None and x.is_contiguous(memory_format=stock):
            given = stock
            x, stock = restore(x, stock), None
        layers, classes = layers[length:], classes[length:]
        if layouts is not None:
            layouts.append(put)
    if layouts is not None:
        layouts.append(stock or given)
    return x, stock, is_added


def _layout_of_stock(layers: list[nn.Module], stock: torch.memory_format, device: torch.device) -> torch.memory_format:
    """The layout that stock's layers give to an image that they are given in the layout `stock`."""
    for layer in layers:
        if isinstance(layer, CONV):
            if layer.padding_mode == "circular":
                stock = torch.contiguous_format  # which torch's circular padding makes of any layout
            if suggests_channels_last(layer.weight):
                stock = torch.channels_last
        elif isinstance(layer, INSTANCE + LAYER) or (isinstance(layer, GROUP) and device.type != "cpu"):
            stock = torch.contiguous_format  # which stock torch makes of any layout
    return stock


def _loads_by_kernels(x: Any) -> bool:
    """Whether a convolution may take in the batch norm before it as it loads, so that one may be left to the next."""
    return type(x) is Tensor and x.device.type == "cuda" and not torch.compiler.is_compiling()


def _starts_with_conv_batch_norm(layers: list[nn.Module], classes: Classes) -> bool:
    return next((run for _, run in matches(layers, classes)), None) is _conv_batch_norm_act


def _makes_anew(layer: nn.Module) -> bool:
    """Whether stock's output is contiguous where that and channels_last are the same: not after a convolution, a shuffle or
    a group norm, nor what works in place on that."""
    return isinstance(layer, (*BATCH, *INSTANCE, *LAYER, *ACT_OR_PRELU)) and not getattr(layer, "inplace", False)


def _may_change_input(layers: list[nn.Module], x: Any) -> bool:
    """Whether layers may work in place on their input, of which they would get a copy where it owes a layout."""
    first, (kind,) = layers[0], classes_of(layers[:1])
    if kind is not None and isinstance(first, FusedModule) and (chain := first.chain(x)) is not None:
        return _may_change_input(chain.layers, x)
    return not isinstance(first, (*CONV, *NORM)) and (kind not in LAYOUT_BLIND or kind is nn.Identity)


def _adds(layer: nn.Module) -> bool:
    """Whether a norm makes a pass of its own over its input, in which it may as well add to it. In evaluation convolutions
    take batch norms in."""
    return isinstance(layer, INSTANCE + GROUP) or (isinstance(layer, BATCH) and layer.training)


def run_whole(layers: list[nn.Module], x: Any) -> Any:
    """`run_chain` for those who see the output."""
    x, stock, _ = run_chain(layers, x)
    return restore(x, stock)


def run_and_find_route(layers: list[nn.Module], x: Any) -> tuple[Any, Route | None]:
    """`run_whole`, and the route on which the layers may as well be called from now on, if nothing but calls was found. None
    where each is called as it stands."""
    layouts: Layouts = []
    x, stock, _ = run_chain(layers, x, layouts=layouts)
    return restore(x, stock), Route(classes_of(layers), layouts) if any(layouts) else None


def call_on_route(layers: list[nn.Module], x: Any, route: Route) -> Any:
    for layer, layout in zip(layers, route.layouts, strict=False):
        if layout is not None:
            x = in_rows(x) if layout is torch.channels_last else restore(x, layout)
        x = layer(x)
    return restore(x, route.layouts[-1])


def is_on_route(layers: list[nn.Module], route: Route) -> bool:
    """Whether the layers can still be told only by what they compute."""
    return not is_observed() and classes_of(layers) == route.classes


def _find_resampled(x: Any, layers: list[nn.Module], classes: Classes) -> Callable[[Any], Any] | None:
    """What computes a doubling and a forward that convolves, or such a forward and a halving, at once."""
    if len(layers) == 1 or None in classes[:2] or torch.compiler.is_compiling():
        return None
    first, second = layers[:2]
    if isinstance(first, UP) and isinstance(second, FusedModule) and is_doubling(first):
        return None if _has_few_pixels(x, True) else second.resampled(x, True)
    if isinstance(first, FusedModule) and isinstance(second, DOWN) and is_halving(second):
        return None if _has_few_pixels(x, False) else first.resampled(x, False)
    return None


def restore(x: Any, stock: torch.memory_format | None) -> Any:
    return x if stock is None else in_layout(x, stock == torch.channels_last)


# ── Sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "x + y": operator.add,
    "y + x": lambda x, y: y + x,  # which decides the layout of a sum of two
    "x += y": operator.iadd,  # and which the type
    "y += x": lambda x, y: operator.iadd(y, x),
}


def plus(layers: list[nn.Module], x: Any, residual: Any, sum: Sum) -> Any:
    """What the layers give for x, plus the residual."""
    if type(residual) is Tensor:
        return restore(*_plus_owing(layers, x, residual, None, sum))
    return _added(run_whole(layers, x), residual, sum)


def _added(y: Any, residual: Any, sum: Sum) -> Any:
    total = ORDERS[sum.order](y, residual)
    return total if sum.act is None else sum.act(total)


def _plus_owing(
    layers: list[nn.Module], x: Any, residual: Any, stock: torch.memory_format | None, sum: Sum
) -> tuple[Any, torch.memory_format | None]:
    """`plus`, and the layout that the sum owes. x and the residual owe `stock`."""
    layout = stock
    if layout is None:
        layouts = (torch.contiguous_format, torch.channels_last) if residual.dim() == 4 else ()
        layout = next((layout for layout in layouts if residual.is_contiguous(memory_format=layout)), None)
    part, owed, is_added = run_chain(layers, x, stock, Residual(residual, layout, sum.act))
    return (part, owed) if is_added else (_added(restore(part, owed), restore(residual, stock), sum), None)


def _can_add(x: Tensor, stock: torch.memory_format | None, norm: nn.Module, residual: Residual) -> bool:
    """Whether a norm's operator takes the residual and the activation."""
    tensor, layout, act = residual
    if act is not None:
        classes = classes_of([norm, act])
        if classes not in _RUNS or not _fits(x, [norm, act]):
            return False
    is_like_x = type(tensor) is Tensor and (x.shape, x.dtype, x.device) == (tensor.shape, tensor.dtype, tensor.device)
    return is_like_x and stock == layout
