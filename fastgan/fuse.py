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
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook

from fastgan import backend, ops
from fastgan.nn.conv_norm_act import ConvBnAct2d, ConvTransposeBnAct2d, conv2d, conv_batch_norm_act
from fastgan.nn.group_norm_act import GroupNormAct, InstanceNormAct2d, LayerNormAct, instance_norm_act
from fastgan.nn.norm_act import Activation, BatchNormAct2d, attachment, batch_norm_act
from fastgan.nn.spectral_norm import SpectralNorm, SpectralNormHook, Together, norms
from fastgan.ops._autograd import is_transformed
from fastgan.ops._tensors import DTYPES, dense, is_channels_last
from fastgan.ops._types import Act
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


def _batch_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    return batch_norm_act(x, norm, Activation.of(act), residual)


def _instance_norm_act(x: Tensor, norm: Any, act: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    return instance_norm_act(x, norm, Activation.of(act), residual)


CONV = (nn.Conv2d, nn.ConvTranspose2d)
BATCH, INSTANCE = (nn.BatchNorm2d,), (nn.InstanceNorm2d,)
NORM = BATCH + INSTANCE
ACT = (nn.ReLU, nn.LeakyReLU)

# Consecutive layers of exactly these classes, and what computes them at once. The longest that fits is taken.
PATTERNS: tuple[tuple[tuple[tuple[type[nn.Module], ...], ...], Callable[..., Tensor]], ...] = (
    ((CONV, BATCH, ACT), _conv_batch_norm_act),
    ((CONV, BATCH), _conv_batch_norm_act),
    ((CONV, INSTANCE, ACT), _conv_instance_norm_act),
    ((CONV, INSTANCE), _conv_instance_norm_act),
    ((CONV,), _conv),
    ((BATCH, ACT), _batch_norm_act),
    ((BATCH,), _batch_norm_act),
    ((INSTANCE, ACT), _instance_norm_act),
    ((INSTANCE,), _instance_norm_act),
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
    return tuple(None if attachment(layer) or _tracks_planes(layer) else type(layer) for layer in layers)


def _tracks_planes(layer: nn.Module) -> bool:
    """Whether an instance norm has running statistics, which no operator keeps."""
    return isinstance(layer, INSTANCE) and (layer.track_running_stats or layer.running_mean is not None)


def _matches(classes: Classes) -> Iterator[tuple[int, Callable[..., Tensor]]]:
    """The patterns that `classes` begin with, the longest first: how many layers, and what computes them."""
    for length in range(min(_LONGEST, len(classes)), 0, -1):
        run = _RUNS.get(classes[:length])
        if run is not None:
            yield length, run


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
    if x.dim() != 4 or x.dtype not in DTYPES:
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
    for length, run in _matches(classes):
        if _fits(x, layers[:length]):
            return (1, None) if _is_little(x, layers[0]) else (length, run)
    return 1, None


# Multiplications of a thread in a convolution, and elements that come out: with fewer of both an operator's call in Python,
# and the change of the layout, take longer on the CPU than the operator gains.
_FEW_PRODUCTS, _FEW_ELEMENTS = 1 << 25, 1 << 17


def _is_little(x: Tensor, layer: nn.Module) -> bool:
    """Whether `layer` is a convolution that had better be called. The norms' operators decide for themselves."""
    if not isinstance(layer, CONV) or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    positions, spread = x.shape[0] * x.shape[2] * x.shape[3], math.prod(layer.stride)
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
            if is_last and length == 2:
                length, run = 1, _conv  # the norm comes alone, and adds
            if run is not None:
                if stock is None:
                    stock = torch.channels_last if is_channels_last(x) else torch.contiguous_format
                if isinstance(head, CONV) and is_channels_last(head.weight):
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
            else:
                if head_class not in LAYOUT_BLIND:
                    x, stock = _restore(x, stock), None
                x = head(x)
            layers, classes = layers[length:], classes[length:]
        return x, stock, is_added

    def extra_repr(self) -> str:
        fused = [f"fused ({row.place}): {row.pattern}" for row in _rows_of_chain("", self) if row.fused]
        return "\n".join([*filter(None, [super().extra_repr()]), *fused])


class FusedForward(_StandIn):
    """A module whose forward is written by hand."""

    _traces: ClassVar[Traces]

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

    def extra_repr(self) -> str:
        patterns, _ = self._traces.survey(self)
        return "\n".join([*filter(None, [super().extra_repr()]), *(f"fused: {pattern}" for pattern in patterns)])


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
            namespace |= {"_traces": Traces(unfused, rewrite), "forward": _like(unfused.forward)}
        _FUSED.setdefault(unfused, type(f"Fused{unfused.__name__}", (stand_in, unfused), namespace))
    module.__class__ = _FUSED[unfused]
    return module


def _remake(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return _set_fused(make(*args))


# ── Patterns in graphs ───────────────────────────────────────────────────────────────────────────────────────────────
# Each looks at a node: what stands in for it, its arguments, and the name of the pattern. Whether an operator takes the
# tensors is decided when it is called; otherwise the functions here do what the graph did.


_ADD, _MULTIPLY = (operator.add, torch.add), (operator.mul, torch.mul)


class StandIn(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pattern: str


def _find_residual(node: fx.Node, module: nn.Module) -> StandIn | None:
    """x + chain(y), of which the chain has just been called."""
    orders = ("x + y", "y + x") if node.target in _ADD else ("x += y", "y += x")
    for (part, residual), order in zip(_either(node, (*_ADD, IN_PLACE["iadd"])), orders, strict=False):
        if node.prev is not part or not _calls_normed_chain(part, module) or not isinstance(residual, fx.Node):
            continue
        if order == "y += x" and not _calls_normed_chain(residual, module):
            continue  # somebody may see what is added to
        return StandIn(_plus, (_layer(part), part.args[0], residual, order), {}, f"x + {part.target}(x)")
    return None


def _calls_normed_chain(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node calls a chain that ends with a norm, for the pattern alone."""
    if node.op != "call_module" or not _is_inner(node) or len(node.args) != 1 or node.kwargs:
        return False
    chain = module.get_submodule(str(node.target))
    return _is_chain(chain) and isinstance([None, *chain.children()][-1], NORM)


def _layer(call: fx.Node) -> fx.Node:
    """The layer that a node calls, as an argument."""
    with call.graph.inserting_before(call):
        return call.graph.create_node("get_attr", str(call.target))


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


def _find_conv(node: fx.Node, module: nn.Module) -> StandIn | None:
    run = _CONV_FUNCTIONS.get(node.target)
    return None if run is None else StandIn(run, node.args, node.kwargs, run.__name__.replace("_", "F.", 1))


def _conv2d(*args: Any, **kwargs: Any) -> Tensor:
    return _operator_or_stock(ops.conv2d, F.conv2d, args, kwargs)


def _conv_transpose2d(*args: Any, **kwargs: Any) -> Tensor:
    return _operator_or_stock(ops.conv_transpose2d, F.conv_transpose2d, args, kwargs)


def _operator_or_stock(op: Callable, stock: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    try:
        return op(*args, **kwargs)
    except (TypeError, ValueError):  # no batch, integers, padding="same": stock has an answer, or an error of its own
        return stock(*args, **kwargs)


_CONV_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {F.conv2d: _conv2d, F.conv_transpose2d: _conv_transpose2d}


def _find_adain(node: fx.Node, module: nn.Module) -> StandIn | None:
    """scale · instance_norm(act(a + b + …)) + shift, of whatever the addends are."""
    for scaled, shift in _either(node, _ADD):
        for normal, scale in _either(scaled, _MULTIPLY) if _is_inner(scaled) else ():
            norm = _plain_norm(normal, module) if _is_inner(normal) else None
            if norm is not None:
                act, slope, before = _activation_of(normal.args[0])
                inner = {node, scaled, normal}
                if act != "none":
                    inner.add(normal.args[0])
                addends = _addends(before, inner)
                if not _is_disturbed(inner, addends):
                    function, args = _adain_of(inner, norm, addends, scale, shift, act, slope)
                    return StandIn(function, args, {}, "AdaIN" if act == "none" else f"{act} → AdaIN")
    return None


def _plain_norm(node: fx.Node, module: nn.Module) -> float | fx.Node | None:
    """Of an instance norm without parameters its eps, or the layer."""
    if node.target is F.instance_norm and len(node.args) == 1 and node.all_input_nodes:
        settings = dict(node.kwargs)
        eps, uses_input = settings.pop("eps", 1e-5), settings.pop("use_input_stats", True)
        settings.pop("momentum", None)
        is_plain = uses_input is True and isinstance(eps, float) and all(value is None for value in settings.values())
        return cast(float, eps) if is_plain else None
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and node.all_input_nodes:
        return _layer(node) if isinstance(module.get_submodule(str(node.target)), INSTANCE) else None
    return None


def _activation_of(node: Any) -> tuple[Act, float, Any]:
    """The activation that a node is, and what it is of."""
    if _is_inner(node) and len(node.args) in (1, 2):
        if node.target is F.relu and len(node.args) == 1 and not node.kwargs:
            return "relu", 0.0, node.args[0]
        if node.target is F.leaky_relu and node.kwargs.keys() <= {"negative_slope"}:
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) == 2 else 0.01)
            if isinstance(slope, float):
                return "leaky_relu", slope, node.args[0]
    return "none", 0.0, node


def _addends(node: Any, inner: set[fx.Node]) -> list[Any]:
    """What a node is the sum of; of a product a pair. The nodes of both join the `inner` ones."""
    if _is_inner(node) and node.target in _ADD + _MULTIPLY and len(node.args) == 2 and not node.kwargs:
        inner.add(node)
        return (
            [addend for part in node.args for addend in _addends(part, inner)] if node.target in _ADD else [node.args]
        )
    return [node]


def _is_inner(node: Any) -> bool:
    """Whether nobody but the pattern sees a node's value."""
    return isinstance(node, fx.Node) and len(node.users) == 1


def _either(node: fx.Node, targets: tuple[Callable, ...]) -> Iterator[tuple[Any, Any]]:
    """The two arguments of a node that is a call of one of `targets`, in either order."""
    if node.target in targets and len(node.args) == 2 and not node.kwargs:
        yield node.args
        yield node.args[::-1]


def _is_new(node: fx.Node) -> bool:
    """Whether a node's value has memory of its own, and it leaves its inputs as they are."""
    if node.target in (F.relu, F.leaky_relu):
        return len(node.args) <= 2 and node.kwargs.keys() <= {"negative_slope"}
    return node.target in (*_ADD, *_MULTIPLY, *_CONV_FUNCTIONS, *_CONV_FUNCTIONS.values(), F.instance_norm, F.linear)


def _is_disturbed(inner: set[fx.Node], addends: list[Any]) -> bool:
    """Whether what is added up may be changed before the pattern's last node, which is when the operator reads it."""
    sharing = {a for addend in addends for a in (addend if isinstance(addend, tuple) else (addend,))}
    pending = [node for node in sharing if isinstance(node, fx.Node)]
    while pending:  # all that may be views of one another
        node = pending.pop()
        others = [user for user in node.users if not _is_new(user)] + ([] if _is_new(node) else node.all_input_nodes)
        pending += [other for other in others if other not in sharing]
        sharing |= set(others)
    nodes = list(next(iter(inner)).graph.nodes)
    places = [nodes.index(node) for node in inner]
    between = set(nodes[min(places) : max(places)]) - inner
    return any(not _is_new(node) and not sharing.isdisjoint(node.all_input_nodes) for node in between)


def _adain_of(
    inner: set[fx.Node], norm: float | fx.Node, addends: list[Any], scale: Any, shift: Any, act: Act, slope: float
) -> tuple[Callable[..., Tensor], tuple[fx.Node, ...]]:
    """The operator where it takes the tensors, and otherwise the `inner` nodes as they are; and what to call that on."""
    nodes = [node for node in next(iter(inner)).graph.nodes if node in inner]
    layer = norm if isinstance(norm, fx.Node) else None
    inputs = [layer] if layer is not None else []
    inputs += dict.fromkeys(part for node in nodes for part in node.all_input_nodes if part not in inner)
    stock = _compiled_part(nodes, inputs, layer)

    def adain(*values: Any) -> Tensor:
        of = dict(zip(inputs, values, strict=True))
        eps, features = (norm, None) if layer is None else _plain_settings(of[layer])
        found = None
        if eps is not None:
            here = fx.node.map_arg((tuple(addends), scale, shift), of.__getitem__)
            found = _as_adain(*here, features)
        return (
            stock(None, *values)
            if found is None
            else ops.adain(eps=cast(float, eps), act=act, negative_slope=slope, **found).contiguous()
        )

    return adain, tuple(inputs)


def _compiled_part(nodes: list[fx.Node], inputs: list[fx.Node], layer: fx.Node | None) -> Callable[..., Any]:
    """A part of a graph as a function of (None, \\*inputs). Its last node is the result."""
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in nodes:
        if node.op == "call_module" and layer is not None:
            (given,) = node.all_input_nodes
            copies[node] = part.call_method("__call__", (copies[layer], copies[given]))
        else:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[nodes[-1]])
    return compiled(part)


def _plain_settings(norm: Any) -> tuple[float | None, int | None]:
    """(eps, channels) of an instance norm without parameters; of another layer None."""
    is_plain = type(norm) is nn.InstanceNorm2d and norm.weight is None and norm.bias is None
    if not is_plain or _tracks_planes(norm) or attachment(norm):
        return None, None
    return norm.eps, norm.num_features


def _as_adain(addends: tuple[Any, ...], scale: Any, shift: Any, features: int | None) -> dict[str, Any] | None:
    """The arguments of `ops.adain`, where the shapes say which is which."""
    flat = [
        tensor for addend in (*addends, scale, shift) for tensor in (addend if isinstance(addend, tuple) else (addend,))
    ]
    if not all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES for tensor in flat):
        return None
    x = next((a for a in addends if not isinstance(a, tuple) and a.dim() == 4), None)
    if x is None or x.numel() == 0 or math.prod(x.shape[2:]) == 1 or features not in (None, x.shape[1]):
        return None
    if any(tensor.device != x.device for tensor in flat):
        return None
    found: dict[str, Any] = {}
    for addend in addends:
        if addend is x:
            continue
        if isinstance(addend, tuple):
            weight, noise = addend if _is_of_channels(addend[0], x) else addend[::-1]
            if not _is_of_channels(weight, x):
                return None
            names = {"noise_weight": weight.flatten(), "noise": noise}
        else:
            names = {"bias": addend.flatten()} if _is_of_channels(addend, x) else {"noise": addend}
        if names.keys() & found.keys():
            return None
        found |= names
    noise = found.get("noise")
    if noise is not None and noise.shape not in ((1, 1, *x.shape[2:]), (len(x), 1, *x.shape[2:])):
        return None
    planes = x.shape[:2]
    if any(style.shape not in ((*planes, 1, 1), (1, planes[1], 1, 1)) for style in (scale, shift)):
        return None
    found |= {"scale": scale.flatten(1).expand(planes), "shift": shift.flatten(1).expand(planes)}
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in flat))
    return {"x": x.to(dtype)} | {name: tensor.to(dtype) for name, tensor in found.items()}


def _is_of_channels(tensor: Tensor, x: Tensor) -> bool:
    channels = x.shape[1]
    return tensor.shape in ((channels, 1, 1), (1, channels, 1, 1)) and tensor.shape != (1, 1, *x.shape[2:])


GRAPH_PATTERNS = (_find_residual, _find_adain, _find_conv)


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
            isinstance(child, CONV + NORM) or _can_fuse(child) for child in module.children()
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
    except an activation alone. In a forward written by hand: x + chain(x), of a chain that ends in a norm; scale ·
    instance_norm(act(x + noise_weight · noise + bias)) + shift; `F.conv2d` and `F.conv_transpose2d`. Anywhere: torch's
    spectral norms, parametrisations or the older hook; those of the whole model are computed at once before its forward,
    as `fastgan.spectral_norm_all` says.

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

_OURS = (BatchNormAct2d, ConvBnAct2d, ConvTransposeBnAct2d, GroupNormAct, InstanceNormAct2d, LayerNormAct)
_LISTED = (_ConvNd, _NormBase, nn.GroupNorm, nn.LayerNorm)


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
    """What is fused in `model`, and which convolutions and norms are not, spectral norms among them, with the reason.

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
        length, run = next(_matches(classes), (1, None))
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
    if _tracks_planes(layer):
        return "it has running statistics"
    base = next((base for base in CONV + NORM if isinstance(layer, base)), None)
    return f"there is no pattern for {name}" if base is None else f"{name} is a subclass of {base.__name__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
