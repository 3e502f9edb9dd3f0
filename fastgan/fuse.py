"""`fuse(model)`: the same model, with what there are patterns for computed by fused operators.

No layer is replaced or changed. A module gets a subclass of its own class. That of an `nn.Sequential` looks at the children
at each call: where some of them make a pattern it runs the operator, and the others it calls. That of a module whose forward
is written by hand runs a graph of it, in which operators stand for the patterns. So whatever reads or edits a model finds
what it has always found, and `unfuse` has only the class to give back.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook

from fastgan import backend, ops
from fastgan.graph_patterns import ADD, StandIn, either, find_adain, find_conv, is_inner, layer_of, resample
from fastgan.nn.conv_norm_act import (
    ConvBnAct2d,
    ConvTransposeBnAct2d,
    conv2d,
    conv_batch_norm_act,
    is_doubling,
    is_halving,
    slides,
)
from fastgan.nn.gradient_reversal import GradientReversal, ReversedLinear, WarmStartGradientReversal, next_coeff
from fastgan.nn.group_norm_act import (
    GroupNormAct,
    InstanceNormAct2d,
    LayerNormAct,
    instance_norm_act,
    tracks_planes,
)
from fastgan.nn.norm_act import Activation, BatchNormAct2d, attachment, batch_norm_act
from fastgan.nn.spectral_norm import SpectralNorm, SpectralNormHook, Together, norms
from fastgan.ops._autograd import is_transformed
from fastgan.ops._tensors import DTYPES, dense, is_channels_last
from fastgan.ops.conv import is_autocast
from fastgan.tracing import IN_PLACE, Traces, compiled

Model = TypeVar("Model", bound=nn.Module)

# ── Patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _conv_batch_norm_act(x: Tensor, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    return conv_batch_norm_act(x, conv, norm, Activation.of(act), keep_layout=False)


def _conv_instance_norm_act(x: Tensor, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    y = conv2d(x, conv, with_bias=False, keep_layout=False)
    return instance_norm_act(y, norm, Activation.of(act), conv_bias=conv.bias)


def _conv(x: Tensor, conv: Any) -> Tensor:
    return conv2d(x, conv, keep_layout=False)


def _up_conv_batch_norm_act(x: Tensor, _up: Any, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    return conv_batch_norm_act(x, conv, norm, Activation.of(act), doubled=True, keep_layout=False)


def _up_conv_instance_norm_act(x: Tensor, _up: Any, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    y = ops.upsample_conv2d(x, conv.weight, padding=conv.padding, groups=conv.groups, keep_layout=False)
    return instance_norm_act(y, norm, Activation.of(act), conv_bias=conv.bias)


def _up_conv(x: Tensor, _up: Any, conv: Any) -> Tensor:
    return ops.upsample_conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups, keep_layout=False)


def _conv_down(x: Tensor, conv: Any, _pool: Any) -> Tensor:
    return ops.conv2d_avg_pool2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups, keep_layout=False)


def _batch_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    return batch_norm_act(x, norm, Activation.of(act), residual)


def _instance_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    return instance_norm_act(x, norm, Activation.of(act), residual)


def _reversed_linear(x: Tensor, reversal: Any, linear: Any) -> Tensor:
    return ops.reversed_linear(x, linear.weight, linear.bias, next_coeff(reversal))


CONV = (nn.Conv2d, nn.ConvTranspose2d)
BATCH, INSTANCE = (nn.BatchNorm2d,), (nn.InstanceNorm2d,)
NORM = BATCH + INSTANCE
ACT = (nn.ReLU, nn.LeakyReLU)
UP, FLAT, DOWN = (nn.Upsample,), (nn.Conv2d,), (nn.AvgPool2d,)
REVERSAL, LINEAR = (GradientReversal, WarmStartGradientReversal), (nn.Linear,)

# Consecutive layers of exactly these classes, and what computes them at once. The longest that fits is taken.
PATTERNS: tuple[tuple[tuple[tuple[type[nn.Module], ...], ...], Callable[..., Tensor]], ...] = (
    ((CONV, BATCH, ACT), _conv_batch_norm_act),
    ((CONV, BATCH), _conv_batch_norm_act),
    ((CONV, INSTANCE, ACT), _conv_instance_norm_act),
    ((CONV, INSTANCE), _conv_instance_norm_act),
    ((UP, FLAT, BATCH, ACT), _up_conv_batch_norm_act),
    ((UP, FLAT, BATCH), _up_conv_batch_norm_act),
    ((UP, FLAT, INSTANCE, ACT), _up_conv_instance_norm_act),
    ((UP, FLAT, INSTANCE), _up_conv_instance_norm_act),
    ((UP, FLAT), _up_conv),
    ((FLAT, DOWN), _conv_down),
    ((CONV,), _conv),
    ((BATCH, ACT), _batch_norm_act),
    ((BATCH,), _batch_norm_act),
    ((INSTANCE, ACT), _instance_norm_act),
    ((INSTANCE,), _instance_norm_act),
    ((REVERSAL, LINEAR), _reversed_linear),
)

# Layers that compute the same however their input lies in memory. Dropout is not one: it draws in the order of memory.
LAYOUT_BLIND = {
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.CELU, nn.ELU, nn.GELU, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.PReLU,
    nn.PixelShuffle, nn.ReLU, nn.ReLU6, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Tanh, nn.Upsample, nn.ZeroPad2d,
}  # fmt: skip

Classes = tuple[type[nn.Module] | None, ...]
_RUNS: dict[Classes, Callable[..., Tensor]] = {
    classes: run for pattern, run in PATTERNS for classes in product(*pattern)
}
_LONGEST = max(map(len, _RUNS))


def _classes(layers: Iterable[nn.Module]) -> Classes:
    """What the patterns are matched against. A layer that must be called stands as None, which is in no pattern."""
    return tuple(None if attachment(layer) or tracks_planes(layer) else type(layer) for layer in layers)


def _matches(layers: list[nn.Module], classes: Classes) -> Iterator[tuple[int, Callable[..., Tensor]]]:
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

_has_global_hooks = getattr(torch_module, "_has_any_global_hook", bool)  # private to torch


def _is_observed() -> bool:
    """Whether someone follows or transforms each layer: hooks on all modules, a tracer, `torch.func`, forward AD."""
    if torch.compiler.is_compiling():
        return False
    return _has_global_hooks() or torch.jit.is_tracing() or is_transformed()


def _fits(x: Any, layers: list[nn.Module]) -> bool:
    """Whether an operator takes x and the layers' tensors. Where not, stock has an answer or an error of its own."""
    if not (type(x) in (Tensor, nn.Parameter) or torch.compiler.is_compiling()):
        return False
    if x.dtype not in DTYPES:
        return False
    if isinstance(layers[0], REVERSAL):
        return True
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
        elif isinstance(layer, NORM):
            if channels != layer.num_features:
                return False
            params = layer.running_mean if layer.weight is None else layer.weight  # None: of an instance norm
            if params is not None and params.dtype not in (x.dtype, torch.float32):
                return False
        if params is not None and params.device != x.device:
            return False
    return True


def _choose(x: Any, layers: list[nn.Module], classes: Classes) -> tuple[int, Callable[..., Tensor] | None]:
    """How many layers to compute next, and what computes them: None where one layer is to be called."""
    for length, run in _matches(layers, classes):
        if _is_resampling(layers[:length]) and _has_few_pixels(x, isinstance(layers[0], UP)):
            continue
        if _fits(x, layers[:length]):
            return (1, None) if _is_little(x, layers[0]) else (length, run)
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


# Multiplications of a thread in a convolution, and elements that come out: with fewer of both an operator's call in Python,
# and the change of the layout, take longer on the CPU than the operator gains.
_FEW_PRODUCTS, _FEW_ELEMENTS = 1 << 25, 1 << 17


def _is_little(x: Tensor, layer: nn.Module) -> bool:
    """Whether `layer` is a convolution that had better be called. The norms' operators decide for themselves."""
    if not isinstance(layer, CONV) or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    positions, spread = _pixels(x), math.prod(layer.stride)
    pixels = positions * spread  # that come out
    if isinstance(layer, nn.Conv2d):
        pixels = positions = positions // spread
    threads = torch.get_num_threads()
    is_quick = layer.weight.numel() * positions < _FEW_PRODUCTS * threads
    return is_quick and pixels * layer.out_channels <= _FEW_ELEMENTS * threads


class _StandIn(nn.Module):
    """Stands before the class of a module that `fuse` has found."""

    _unfused: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: what the class does about its subclasses is meant for others."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickles as the unfused module, to be fused again: the class is made at run time and has no name to import."""
        make, args, *state = cast(tuple, super().__reduce_ex__(protocol))
        parts = [self._unfused if part is type(self) else part for part in (make, *args)]
        return (_remake, tuple(parts), *state)


class Fused(_StandIn, nn.Sequential):
    """A chain."""

    def forward(self, input):
        if torch.jit.is_scripting():  # compiles this branch only
            for module in self:
                input = module(input)
            return input
        else:
            x, stock, _ = self._run(input, None)
            return _restore(x, stock)

    def _run(
        self, x: Any, stock: torch.memory_format | None, residual: Tensor | None = None, layout: Any = None
    ) -> tuple[Any, torch.memory_format | None, bool]:
        """The children's output for x, the layout that it owes, and whether it holds the `residual`.

        Convolutions leave their output in the layout that is fast. Where that is not the layout that stock torch would
        have, `stock` names it, and whoever can tell the difference gets the tensor restored. A last norm adds a residual
        that owes its own `layout`: then the sum owes that too, in whichever order stock adds.
        """
        layers, is_added = list(self), False
        classes: Classes = (None,) * len(layers) if _is_observed() else _classes(layers)
        while layers:
            head, head_class = layers[0], classes[0]
            length, run = _choose(x, layers, classes)
            is_last = residual is not None and length == len(layers) and isinstance(layers[-1], NORM)
            if is_last and length > 1:
                length -= 1  # the norm comes alone, and adds
                run = _RUNS[classes[:length]]
            if run is not None and not isinstance(head, REVERSAL):
                if stock is None:
                    stock = torch.channels_last if is_channels_last(x) else torch.contiguous_format
                if any(isinstance(layer, CONV) and is_channels_last(layer.weight) for layer in layers[:length]):
                    stock = torch.channels_last
                if any(isinstance(layer, INSTANCE) for layer in layers[:length]):
                    stock = torch.contiguous_format  # which stock torch makes of any layout
                is_added = is_last and length == len(layers) and stock == layout and _can_add(x, residual)
                x = run(x, head, residual=residual) if is_added else run(x, *layers[:length])
                if x.is_contiguous(memory_format=stock):
                    stock = None
            elif head_class is not None and isinstance(head, Fused):
                x, stock, _ = head._run(x, stock)
            elif head_class is not None and isinstance(head, FusedForward) and (found := head._find_residual(x)):
                chain, order = found
                x, stock = _plus_owing(chain, x, x, stock, order)
            elif (resampled := _find_resampled(x, layers, classes)) is not None:
                x, stock, length = resampled(_restore(x, stock)), None, 2
            else:
                if head_class not in LAYOUT_BLIND:
                    x, stock = _restore(x, stock), None
                x = head(x) if run is None else run(x, *layers[:length])
            layers, classes = layers[length:], classes[length:]
        return x, stock, is_added

    def extra_repr(self) -> str:
        fused = [f"fused ({row.place}): {row.pattern}" for row in _rows_of_chain("", self) if row.fused]
        return "\n".join([*filter(None, [super().extra_repr()]), *fused])


class FusedForward(_StandIn):
    """A module whose forward is written by hand."""

    _traces: ClassVar[Traces]
    _resampled: ClassVar[dict[Any, Callable[..., Any] | None]]

    def _find_residual(self, x: Any) -> tuple[Fused, str] | None:
        """Where the forward is x + chain(x), and nothing else: the chain, and the order."""
        if _is_observed() or torch.compiler.is_compiling():
            return None
        run = _find_run(self, (x,), {})[0]
        calls = [] if run is None else [node for node in run.graph.nodes if node.op.startswith("call_")]
        if len(calls) != 1 or calls[0].target is not _plus or next(reversed(run.graph.nodes)).args != (calls[0],):
            return None
        layer, given, residual, order = calls[0].args
        chain = self.get_submodule(layer.target)
        return (chain, order) if given is residual and isinstance(chain, Fused) and not attachment(chain) else None

    def _find_resampled(self, x: Any, doubled: bool) -> Callable[[Any], Any] | None:
        """Where x is the input of a functional convolution alone, and the result that of the only one: the forward with
        that of a doubled x, or with the means of 2×2 of the result."""
        run = _find_run(self, (x,), {})[0]
        if run is None:
            return None
        key = (run.function, doubled)
        if key not in self._resampled:
            graph = resample(run.graph, doubled)
            self._resampled[key] = None if graph is None else compiled(graph)
        resampled = self._resampled[key]
        return None if resampled is None else functools.partial(resampled, self)

    def extra_repr(self) -> str:
        patterns, _ = self._traces.survey(self)
        return "\n".join([*filter(None, [super().extra_repr()]), *(f"fused: {pattern}" for pattern in patterns)])


def _find_resampled(x: Any, layers: list[nn.Module], classes: Classes) -> Callable[[Any], Any] | None:
    """What computes a doubling and a forward that convolves, or such a forward and a halving, at once."""
    if len(layers) == 1 or None in classes[:2] or torch.compiler.is_compiling():
        return None
    first, second = layers[:2]
    if isinstance(first, UP) and isinstance(second, FusedForward) and is_doubling(first):
        return None if _has_few_pixels(x, True) else second._find_resampled(x, True)
    if isinstance(first, FusedForward) and isinstance(second, DOWN) and is_halving(second):
        return None if _has_few_pixels(x, False) else first._find_resampled(x, False)
    return None


def _find_run(module: FusedForward, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A class that others have made of a fused one runs as it is written."""
    if type(module) is not _FUSED.get(module._unfused):
        return None, []
    return module._traces.find(module, args, kwargs)


def _run_forward(module: FusedForward, args: tuple, kwargs: dict[str, Any]) -> Any:
    if not (_is_observed() or torch.compiler.is_compiling()):
        run, tensors = _find_run(module, args, kwargs)
        if run is not None:
            return run.function(module, *tensors)
    return module._unfused.forward(module, *args, **kwargs)


def _like(stock: Any) -> FunctionType:
    """A forward that has the signature of `stock`, and its source and names for torch.jit.script."""
    run_forward = _run_forward

    def forward(self, *args, **kwargs):
        return run_forward(self, args, kwargs)

    assert isinstance(forward, FunctionType)
    like = FunctionType(forward.__code__, stock.__globals__, stock.__name__, None, forward.__closure__)
    return functools.wraps(stock)(like)  # type: ignore[return-value]


def _can_add(x: Tensor, residual: Any) -> bool:
    return type(residual) is Tensor and (x.shape, x.dtype, x.device) == (
        residual.shape,
        residual.dtype,
        residual.device,
    )


def _restore(x: Any, stock: torch.memory_format | None) -> Any:
    return x if stock is None else dense(x, stock == torch.channels_last)


class FusedSpectralNorm(_StandIn, SpectralNorm):
    """torch's parametrisation."""

    _unfused = _SpectralNorm


class FusedSpectralNormHook(SpectralNormHook):
    """torch's older hook, which is no module."""


class FusedTogether(Together):
    """What has the spectral norms of a fused model computed together."""


_FUSED: dict[type[nn.Module], type[_StandIn]] = {_SpectralNorm: FusedSpectralNorm}  # the class that stands in for each


def _set_fused(module: nn.Module) -> nn.Module:
    """Swap the class of a module."""
    unfused = type(module)
    if unfused not in _FUSED:
        namespace: dict[str, Any] = {"_unfused": unfused, "__module__": __name__}
        stand_in = Fused if issubclass(unfused, nn.Sequential) else FusedForward
        if stand_in is FusedForward:
            namespace |= {"_traces": Traces(unfused, rewrite), "_resampled": {}, "forward": _like(unfused.forward)}
        _FUSED.setdefault(unfused, type(f"Fused{unfused.__name__}", (stand_in, unfused), namespace))
    module.__class__ = _FUSED[unfused]
    return module


def _remake(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return _set_fused(make(*args))


# ── Residual sums in graphs ──────────────────────────────────────────────────────────────────────────────────────────


def _find_residual(node: fx.Node, module: nn.Module) -> StandIn | None:
    """x + chain(y), of which the chain has just been called."""
    orders = ("x + y", "y + x") if node.target in ADD else ("x += y", "y += x")
    for (part, residual), order in zip(either(node, (*ADD, IN_PLACE["iadd"])), orders, strict=False):
        if node.prev is not part or not _calls_normed_chain(part, module) or not isinstance(residual, fx.Node):
            continue
        if order == "y += x" and not _calls_normed_chain(residual, module):
            continue  # somebody may see what is added to
        return StandIn(_plus, (layer_of(part), part.args[0], residual, order), {}, f"x + {part.target}(x)")
    return None


def _calls_normed_chain(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node calls a chain that ends with a norm, for the pattern alone."""
    if node.op != "call_module" or not is_inner(node) or len(node.args) != 1 or node.kwargs:
        return False
    chain = module.get_submodule(str(node.target))
    return _is_chain(chain) and isinstance([None, *chain.children()][-1], NORM)


def _plus(chain: nn.Module, x: Any, residual: Any, order: str) -> Any:
    """chain(x) plus the residual."""
    if isinstance(chain, Fused) and not attachment(chain) and type(residual) is Tensor:
        return _restore(*_plus_owing(chain, x, residual, None, order))
    return _ORDERS[order](chain(x), residual)


_ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "x + y": operator.add,
    "y + x": lambda x, y: y + x,  # which decides the layout of a sum of two
    "x += y": operator.iadd,  # and which the type
    "y += x": lambda x, y: operator.iadd(y, x),
}


def _plus_owing(
    chain: Fused, x: Any, residual: Any, stock: torch.memory_format | None, order: str
) -> tuple[Any, torch.memory_format | None]:
    """chain(x) plus the residual, and the layout that the sum owes. x and the residual owe `stock`."""
    layout = stock
    if layout is None:
        layouts = (torch.contiguous_format, torch.channels_last) if residual.dim() == 4 else ()
        layout = next((layout for layout in layouts if residual.is_contiguous(memory_format=layout)), None)
    part, owed, is_added = chain._run(x, stock, residual, layout)
    return (part, owed) if is_added else (_ORDERS[order](_restore(part, owed), _restore(residual, stock)), None)


GRAPH_PATTERNS = (_find_residual, find_adain, find_conv)


def rewrite(graph: fx.Graph, module: nn.Module) -> list[str]:
    """Puts operators into the graph of `module`'s forward. The names of the patterns that were found."""
    patterns = []
    for node in list(graph.nodes):
        found = None
        if node.op == "call_function":
            found = next(filter(None, (find(node, module) for find in GRAPH_PATTERNS)), None)
        if found is None:
            continue
        with graph.inserting_after(node):
            made = graph.call_function(found.function, found.args, found.kwargs)
        node.replace_all_uses_with(made)
        _erase(node)
        patterns.append(found.pattern)
    return patterns


def _erase(node: fx.Node) -> None:
    """Removes a node that nobody uses, and what was there for it alone."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for part in inputs:
        if not part.users and part.op.startswith("call_"):
            _erase(part)


# ── Finding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_chain(module: nn.Module) -> bool:
    """Whether calling `module` is to call its children one after the other, and nothing else."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward in (nn.Sequential.forward, Fused.forward)
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
    )


def _can_fuse(module: nn.Module) -> bool:
    """Whether there are patterns for something in the chain, in a chain that it holds, or in a forward written by hand; or
    whether it is a spectral norm."""
    if isinstance(module, _StandIn) or type(module) is _SpectralNorm:
        return True
    if isinstance(module, nn.Sequential):
        return _is_chain(module) and any(
            isinstance(child, CONV + NORM + REVERSAL) or _can_fuse(child) for child in module.children()
        )
    return _has_own_forward(module) and bool(Traces(type(module), rewrite).survey(module)[0])


def _has_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` is to run a forward that is neither torch's nor this library's."""
    if isinstance(module, (_StandIn, torch.jit.ScriptModule, fx.GraphModule)) or "forward" in module.__dict__:
        return False
    forward = type(module).forward
    return (
        isinstance(forward, FunctionType)
        and not (forward.__module__ or "").startswith(("torch.", "fastgan.nn"))
        and type(module).__call__ is nn.Module.__call__
    )


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")


def fuse(model: Model) -> Model:
    """Have fused operators compute what there are patterns for in `model`.

    In `nn.Sequential`: [Conv2d | ConvTranspose2d] → [BatchNorm2d | InstanceNorm2d] → [ReLU | LeakyReLU] and its parts,
    except an activation alone; an Upsample that doubles before a Conv2d, and an AvgPool2d that halves after one, which
    become part of the convolution; [GradientReversal | WarmStartGradientReversal] → Linear. In a forward written by hand:
    x + chain(x), of a chain that ends in a norm; scale · instance_norm(act(x + noise_weight · noise + bias)) + shift;
    `F.conv2d` and `F.conv_transpose2d`. Anywhere: torch's spectral norms, parametrisations or the older hook; those of the
    whole model are computed at once before its forward, as `fastgan.spectral_norm_all` says.

    Returns `model` itself. Layers, parameters, buffers and state_dict stay what they are, and the model computes the same
    to rounding, in training and evaluation, to the second derivative. A layer that has hooks, is of a subclass or has a
    parametrized weight is called as before, and a forward is left alone unless it is certain to do again what it did when
    it was read: `explain(model)` says which, and why. A container is looked at whenever it is called, so layers may come
    and go after fusing. A second `fuse` finds nothing to do. Under torch.compile forwards written by hand run as they are.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    _require_module(model)
    # Children first: each forward is read once, however deep it lies.
    for module in reversed(list(model.modules())):
        if not isinstance(module, _StandIn) and _can_fuse(module):
            _set_fused(module)
    _swap_hooks(model, StockHook, FusedSpectralNormHook)
    if any(isinstance(found.norm, (SpectralNorm, SpectralNormHook)) for found in norms(model)):
        FusedTogether.begin(model)
    return model


def _swap_hooks(model: nn.Module, old: type, new: type) -> None:
    for found in norms(model):
        if type(found.norm) is old:
            found.norm.__class__ = new


def unfuse(model: Model) -> Model:
    """Take back what `fuse` did, and return `model` itself.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    _require_module(model)
    for module in model.modules():
        unfused = getattr(type(module), "_unfused", None)
        if unfused is not None and type(module) is _FUSED[unfused]:  # not a class that others made from it
            module.__class__ = unfused
    _swap_hooks(model, FusedSpectralNormHook, StockHook)
    FusedTogether.end(model)
    return model


# ── Explaining ───────────────────────────────────────────────────────────────────────────────────────────────────────

_OURS = (
    BatchNormAct2d, ConvBnAct2d, ConvTransposeBnAct2d, GroupNormAct, InstanceNormAct2d, LayerNormAct, ReversedLinear,
)  # fmt: skip
_LISTED = (_ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm, *REVERSAL, ReversedLinear)


class Row(NamedTuple):
    """One line of an `Explanation`: layers that belong together."""

    place: str  # the path of the layer; of several, the path of the first and the name of the last
    pattern: str
    fused: bool
    reason: str  # why not


class Explanation(tuple[Row, ...]):
    """The rows that `explain` returns; as text, a table."""

    def __str__(self) -> str:
        table = [("place", "pattern", "")]
        table += [(row.place, row.pattern, "fused" if row.fused else f"not fused: {row.reason}") for row in self]
        widths = [max(len(line[i]) for line in table) for i in range(2)]
        lines = [f"{place:{widths[0]}}  {pattern:{widths[1]}}  {outcome}".rstrip() for place, pattern, outcome in table]
        return "\n".join([*lines, f"{sum(row.fused for row in self)} of {len(self)} fused"])


def explain(model: nn.Module) -> Explanation:
    """What is fused in `model`, and which convolutions, norms (spectral ones too) and reversals are not, with the reason.

    `print(explain(model))` shows a table; its rows are tuples (place, pattern, fused, reason). They tell what the
    layers allow: a batch that an operator does not take (one that is not 4-d, say) goes through the layers themselves.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    _require_module(model)
    return Explanation(_rows(model))


def _rows(model: nn.Module) -> Iterator[Row]:
    if isinstance(model, _LISTED):
        yield _row_of_layer("(the model)", model, "it is not in an nn.Sequential")
    for path, parent in model.named_modules():
        if _is_chain(parent):
            yield from _rows_of_chain(path, parent)
        elif not isinstance(parent, _OURS):
            holder, overrides = _name(parent), isinstance(parent, nn.Sequential)
            yield from _rows_of_forward(path or "(the model)", parent)
            why = f"{holder} has a forward of its own" if overrides else f"it is in {holder}, not in an nn.Sequential"
            for name, layer in parent.named_children():
                if isinstance(layer, _LISTED):
                    yield _row_of_layer(_join(path, name), layer, why)
    yield from _rows_of_spectral_norms(model)


def _rows_of_spectral_norms(model: nn.Module) -> Iterator[Row]:
    paths = {module: path for path, module in model.named_modules()}
    for layer, name, norm, _ in norms(model):
        fused = isinstance(norm, (SpectralNorm, SpectralNormHook))
        why = "fastgan.fuse has not been called"
        if type(norm) not in (_SpectralNorm, StockHook):
            why = f"{type(norm).__name__} is a subclass of torch's"
        yield Row(_join(paths[layer], name), "spectral norm", fused, "" if fused else why)


def _rows_of_chain(path: str, chain: nn.Module) -> Iterator[Row]:
    names, layers = list(chain._modules), [layer for layer in chain._modules.values() if layer is not None]
    classes = _classes(layers)
    fused = isinstance(chain, Fused)
    while layers:
        length, run = next(_matches(layers, classes), (1, None))
        if run is not None:
            place = names[0] if length == 1 else f"{names[0]}–{names[length - 1]}"
            pattern = " → ".join(type(layer).__name__ for layer in layers[:length])
            yield Row(_join(path, place), pattern, fused, "" if fused else "fastgan.fuse has not been called")
        elif isinstance(layers[0], _LISTED):
            yield _row_of_layer(_join(path, names[0]), layers[0], _obstacle(layers[0]))
        names, layers, classes = names[length:], layers[length:], classes[length:]


def _rows_of_forward(place: str, module: nn.Module) -> Iterator[Row]:
    fused = isinstance(module, FusedForward)
    unfused = module._unfused if isinstance(module, FusedForward) else type(module)
    if fused or _has_own_forward(module):
        for pattern in Traces(unfused, rewrite).survey(module)[0]:
            yield Row(place, pattern, fused, "" if fused else "fastgan.fuse has not been called")


def _name(module: nn.Module) -> str:
    return (module._unfused if isinstance(module, _StandIn) else type(module)).__name__


def _row_of_layer(place: str, layer: nn.Module, why_not: str) -> Row:
    name = _name(layer)
    return Row(place, name, True, "") if isinstance(layer, _OURS) else Row(place, name, False, why_not)


def _obstacle(layer: nn.Module) -> str:
    """Why a layer in a chain is in no pattern."""
    attached, name = attachment(layer), _name(layer)
    if attached:
        return f"it has {attached}"
    if parametrize.is_parametrized(layer):
        return f"its {' and '.join(layer.parametrizations)} is parametrized"  # type: ignore[arg-type]
    if tracks_planes(layer):
        return "it has running statistics"
    if isinstance(layer, REVERSAL):
        return "no plain nn.Linear follows it"
    base = next((base for base in CONV + NORM if isinstance(layer, base)), None)
    return f"there is no pattern for {name}" if base is None else f"{name} is a subclass of {base.__name__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
