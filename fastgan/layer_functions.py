"""Calls of torch's functions that compute what layers of torch.nn do: which layer each one is.

A function of one tensor is a layer of its settings. One that is also given what a layer would hold, a weight and running
statistics, is a layer for as long as it runs: `LayerFunction.layer` makes it of the tensors that the call is given.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastgan.chains import NORM, FunctionLayer
from fastgan.ops._tensors import DTYPES

# ── Layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Each of the functions below takes what torch's function takes behind its input, and returns the attributes of a layer that
# does the same; None where there is none. They raise TypeError and ValueError of what a layer has no place for.

Attributes = dict[str, Any] | None


def _of(kind: Callable[..., nn.Module]) -> Callable[..., Attributes]:
    """Of a layer without tensors that has the function's parameters."""

    def attributes(*args: Any, **kwargs: Any) -> Attributes:
        has_tensors = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        return None if has_tensors else vars(kind(*args, **kwargs))

    return attributes


def _upsample(
    size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None, antialias=False
) -> Attributes:
    if antialias or recompute_scale_factor:
        return None
    return vars(nn.Upsample(size, scale_factor, mode, align_corners))


def _reflection_pad2d(pad, mode="constant", value=None) -> Attributes:
    return vars(nn.ReflectionPad2d(pad)) if mode == "reflect" and len(pad) == 4 else None


def _conv2d(weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Attributes:
    return _convolution(weight, bias, stride, padding, dilation, groups)


def _conv_transpose2d(weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1) -> Attributes:
    return _convolution(weight, bias, stride, padding, dilation, groups, output_padding)


def _convolution(weight, bias, stride, padding, dilation, groups, output_padding=None) -> Attributes:
    """Of a transposed one with `output_padding`. Of an unknown weight: one that is as large as need be."""
    kernel_size = (math.inf, math.inf)
    if weight is not None:
        if not _are_alike(weight, bias) or weight.dim() != 4:
            return None
        kernel_size = tuple(weight.shape[2:])
    stride, dilation = _pair(stride, 1), _pair(dilation, 1)
    if isinstance(padding, str):
        padding = 0 if weight is None else _named_padding(padding, kernel_size, stride, dilation)
    padding = _pair(padding, 0)
    if None in (stride, padding, dilation) or type(groups) is not int or groups < 1:
        return None
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": "zeros"}
    if output_padding is not None:
        output_padding = _pair(output_padding, 0)
        if output_padding is None or any(map(_exceeds, output_padding, stride, dilation)):
            return None
        settings["output_padding"] = output_padding
    if weight is None:
        return settings | {"kernel_size": kernel_size, "in_channels": None, "out_channels": None}
    first, second = weight.shape[0], weight.shape[1] * groups
    channels, outputs = (second, first) if output_padding is None else (first, second)
    if first % groups or (bias is not None and bias.shape != (outputs,)):
        return None
    return settings | {
        "weight": weight, "bias": bias, "kernel_size": kernel_size, "in_channels": channels, "out_channels": outputs,
    }  # fmt: skip


def _exceeds(output_padding: int, stride: int, dilation: int) -> bool:
    return output_padding >= max(stride, dilation)


def _pair(size: Any, least: int) -> tuple[int, int] | None:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) == 1:
        pair *= 2
    fits = len(pair) == 2 and all(isinstance(side, int) and side >= least for side in pair)
    return pair if fits else None


def _named_padding(name: str, kernel_size: tuple, stride: Any, dilation: Any) -> Any:
    """Zeros on both sides alike; -1 where those are not."""
    if name == "valid":
        return 0
    around = [by * (taps - 1) for by, taps in zip(dilation, kernel_size, strict=True)]
    is_even = name == "same" and stride == (1, 1) and all(total % 2 == 0 for total in around)
    return tuple(total // 2 for total in around) if is_even else -1


def _batch_norm(
    running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
) -> Attributes:
    if type(training) is not bool or (running_mean is None) != (running_var is None):
        return None
    if running_mean is None and not training:
        return None
    return _norm(running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
) -> Attributes:
    if running_mean is not None or running_var is not None or use_input_stats is not True:
        return None
    return _norm(None, None, weight, bias, True, momentum, eps)


def _group_norm(num_groups, weight=None, bias=None, eps=1e-5) -> Attributes:
    if type(num_groups) is not int or num_groups < 1 or not _is_affine(weight, bias, eps):
        return None
    (channels,) = (None,) if weight is None else weight.shape  # else a ValueError
    return {"num_groups": num_groups, "num_channels": channels, "weight": weight, "bias": bias, "eps": eps}


def _layer_norm(normalized_shape, weight=None, bias=None, eps=1e-5) -> Attributes:
    shape = tuple(normalized_shape)
    if not _is_affine(weight, bias, eps) or (weight is not None and weight.shape != shape):
        return None
    return {"normalized_shape": shape, "weight": weight, "bias": bias, "eps": eps}


def _is_affine(weight, bias, eps) -> bool:
    """Whether a norm of samples may have these: both parameters or neither, alike and of one shape."""
    if (weight is None) != (bias is None) or not _are_alike(weight, bias):
        return False
    return isinstance(eps, (int, float)) and eps >= 0 and (weight is None or weight.shape == bias.shape)


def _norm(running_mean, running_var, weight, bias, training, momentum, eps) -> Attributes:
    tensors = [t for t in (weight, bias, running_mean, running_var) if t is not None]
    if (weight is None) != (bias is None) or not _are_alike(*tensors):
        return None
    if not all(isinstance(number, (int, float)) for number in (momentum, eps)) or eps < 0:
        return None
    if any(statistic is not None and statistic.requires_grad for statistic in (running_mean, running_var)):
        return None
    shape = tensors[0].shape if tensors else (None,)  # which any number of channels fits
    if len(shape) != 1 or any(tensor.shape != shape for tensor in tensors):
        return None
    return {
        "num_features": shape[0], "weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var,
        "num_batches_tracked": None, "track_running_stats": running_mean is not None, "training": training,
        "momentum": momentum, "eps": eps,
    }  # fmt: skip


def _prelu(weight) -> Attributes:
    return {"weight": weight} if weight is not None and _are_alike(weight) and weight.dim() == 1 else None


def _are_alike(*tensors: Any) -> bool:
    """Whether tensors are plain ones of one dtype, which the operators have, and device. Those that are None are."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in given):
        return False
    kinds = {(tensor.dtype, tensor.device) for tensor in given}
    return not kinds or (len(kinds) == 1 and given[0].dtype in DTYPES)


# ── Functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Row(NamedTuple):
    layer: type[FunctionLayer]
    attributes: Callable[..., Attributes]


def _row(kind: type[nn.Module], attributes: Callable[..., Attributes], name: str | None = None) -> _Row:
    """`name`: of the function, where a layer of the kind would hold what it is given."""
    return _Row(type(name or kind.__name__, (FunctionLayer, kind), {"stands_for": kind}), attributes)


def _plain(kind: type[nn.Module], **settings: Any) -> _Row:
    return _row(kind, _of(functools.partial(kind, **settings)))


_ROWS: dict[Any, _Row] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _plain(nn.ReLU)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _plain(nn.ReLU, inplace=True)),
    F.leaky_relu: _plain(nn.LeakyReLU),
    F.leaky_relu_: _row(nn.LeakyReLU, _of(lambda negative_slope=0.01: nn.LeakyReLU(negative_slope, True))),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), _plain(nn.Tanh)),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), _plain(nn.Sigmoid)),
    F.elu: _plain(nn.ELU),
    F.gelu: _plain(nn.GELU),
    F.silu: _plain(nn.SiLU),
    F.softplus: _plain(nn.Softplus),
    F.adaptive_avg_pool2d: _plain(nn.AdaptiveAvgPool2d),
    F.avg_pool2d: _plain(nn.AvgPool2d),
    F.pixel_shuffle: _plain(nn.PixelShuffle),
    F.interpolate: _row(nn.Upsample, _upsample),
    **dict.fromkeys((F.pad, torch._C._nn.pad), _row(nn.ReflectionPad2d, _reflection_pad2d)),
    **dict.fromkeys((F.prelu, Tensor.prelu), _row(nn.PReLU, _prelu, "F.prelu")),
    F.conv2d: _row(nn.Conv2d, _conv2d, "F.conv2d"),
    F.conv_transpose2d: _row(nn.ConvTranspose2d, _conv_transpose2d, "F.conv_transpose2d"),
    F.batch_norm: _row(nn.BatchNorm2d, _batch_norm, "F.batch_norm"),
    F.instance_norm: _row(nn.InstanceNorm2d, _instance_norm, "F.instance_norm"),
    F.group_norm: _row(nn.GroupNorm, _group_norm, "F.group_norm"),
    F.layer_norm: _row(nn.LayerNorm, _layer_norm, "F.layer_norm"),
}
_PLACES_OF_STATISTICS = {0, 1, "running_mean", "running_var"}


class LayerFunction:
    """A call of a function on one value that changes along a chain, where a layer does the same.

    Other arguments may be given at each call, like the weight of a convolution; `places` says where they go.
    """

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any], places: tuple[int | str, ...]):
        self.function, self.args, self.kwargs, self.places = function, args, kwargs, places
        self._row = _ROWS[function]
        self._known = None if places else self._layer(args, kwargs)

    def layer(self, given: Iterator[Any]) -> FunctionLayer:
        """The layer that the call is, of as many given values as there are places."""
        if self._known is not None:
            return self._known
        args, kwargs = list(self.args), dict(self.kwargs)
        for place in self.places:
            _put(args, kwargs, place, next(given))
        return self._layer(args, kwargs)

    def example(self) -> FunctionLayer:
        """The layer as far as it is known before the call: of the class that it will have, if the tensors allow it."""
        if self._known is not None:
            return self._known
        if self.function is F.instance_norm and not _PLACES_OF_STATISTICS.isdisjoint(self.places):
            return self._made(None, self.args, self.kwargs)  # no operator keeps statistics of planes
        if issubclass(self._row.layer, (*NORM, nn.PReLU)):
            return self._made({}, self.args, self.kwargs)
        return self._layer(self.args, self.kwargs)

    def _layer(self, args: Sequence[Any], kwargs: dict[str, Any]) -> FunctionLayer:
        try:
            attributes = self._row.attributes(*args, **kwargs)
        except (TypeError, ValueError):  # stock has an answer, or an error of its own
            attributes = None
        return self._made(attributes, args, kwargs)

    def _made(self, attributes: Attributes, args: Sequence[Any], kwargs: dict[str, Any]) -> FunctionLayer:
        kind = FunctionLayer if attributes is None else self._row.layer
        layer = kind.__new__(kind)
        vars(layer).update(attributes or {}, function=self.function, args=args, kwargs=kwargs)
        return layer

    def _key(self) -> tuple:
        return self.function, repr((self.args, self.kwargs)), self.places

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerFunction) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def put_input_first(node: fx.Node) -> None:
    """Gives a function its input by place, if it is given by name."""
    if node.target in _ROWS and not node.args and "input" in node.kwargs:
        node.args = (node.kwargs["input"],)
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "input"}


def read(node: fx.Node) -> tuple[LayerFunction, list[fx.Node]] | None:
    """The layer that a node is a call of, on its first argument, and the nodes of what else it is given."""
    function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    if node.op not in ("call_function", "call_method") or function not in _ROWS or not node.args:
        return None
    args, kwargs = list(node.args[1:]), dict(node.kwargs)
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    places = tuple(place for place, value in arguments if isinstance(value, fx.Node))
    given = [_put(args, kwargs, place, None) for place in places]
    inside: list[fx.Node] = []  # lists and tuples
    fx.node.map_arg((args, kwargs), inside.append)
    found = LayerFunction(function, tuple(args), kwargs, places)
    return None if inside or found.example().stands_for is None else (found, given)


def _put(args: list, kwargs: dict[str, Any], place: int | str, value: Any) -> Any:
    """Sets an argument, and returns what it was."""
    arguments: Any = args if isinstance(place, int) else kwargs
    before, arguments[place] = arguments[place], value
    return before
