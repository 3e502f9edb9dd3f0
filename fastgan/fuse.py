"""`fuse(model)`: the same model, with what there are patterns for computed by fused operators.

No layer is replaced or changed. A module gets a subclass of its own class. That of an `nn.Sequential` looks at the children
at each call: where some of them make a pattern it runs the operator, and the others it calls. That of a module whose forward
is written by hand runs a graph of it, in which operators stand for the patterns. So whatever reads or edits a model finds
what it has always found, and `unfuse` has only the class to give back.
"""

import functools
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fastgan import ops
from fastgan.nn.conv_norm_act import ConvBnAct2d, ConvTransposeBnAct2d, conv2d, conv_batch_norm_act
from fastgan.nn.group_norm_act import GroupNormAct, InstanceNormAct2d, LayerNormAct, instance_norm_act
from fastgan.nn.norm_act import Activation, BatchNormAct2d, attachment, batch_norm_act
from fastgan.ops._autograd import is_transformed
from fastgan.ops._norm import activate
from fastgan.ops._tensors import DTYPES, dense, is_channels_last
from fastgan.ops._types import Act
from fastgan.ops.conv import is_autocast
from fastgan.tracing import Traces

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
            return length, run
    return 1, None


class _StandIn(nn.Module):
    """Stands before the class of a module that `fuse` has found."""

    _unfused: type[nn.Module]

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
            return _restore(*self._run(input, None))

    def _run(
        self, x: Any, stock: torch.memory_format | None, residual: Tensor | None = None
    ) -> tuple[Any, torch.memory_format | None]:
        """The children's output for x, with a `residual` added, and the layout that it owes.

        Convolutions leave their output in the layout that is fast. Where that is not the layout that stock torch would
        have, `stock` names it, and whoever can tell the difference gets the tensor restored.
        """
        layers = list(self)
        classes: Classes = (None,) * len(layers) if _is_observed() else _classes(layers)
        while layers:
            head, head_class = layers[0], classes[0]
            length, run = _choose(x, layers, classes)
            if (
                run in (_conv_batch_norm_act, _conv_instance_norm_act)
                and residual is not None
                and length == len(layers)
            ):
                length, run = 1, _conv  # the norm comes alone, and adds
            if run is not None:
                if stock is None:
                    stock = torch.channels_last if is_channels_last(x) else torch.contiguous_format
                if isinstance(head, CONV) and is_channels_last(head.weight):
                    stock = torch.channels_last
                if any(isinstance(layer, INSTANCE) for layer in layers[:length]):
                    stock = torch.contiguous_format  # which stock torch makes of any layout
                if residual is not None and length == len(layers) and isinstance(head, NORM) and _can_add(x, residual):
                    x, residual = run(x, *layers, residual=residual), None
                else:
                    x = run(x, *layers[:length])
                if x.is_contiguous(memory_format=stock):
                    stock = None
            elif head_class is not None and isinstance(head, Fused):
                x, stock = head._run(x, stock)
            elif head_class is not None and isinstance(head, FusedForward) and (chain := head._chain_of_residual(x)):
                x, stock = chain._run(x, stock, residual=x)
            else:
                if head_class not in LAYOUT_BLIND:
                    x, stock = _restore(x, stock), None
                x = head(x)
            layers, classes = layers[length:], classes[length:]
        return (x, stock) if residual is None else (_restore(x, stock) + residual, None)

    def extra_repr(self) -> str:
        fused = [f"fused ({row.place}): {row.pattern}" for row in _rows_of_chain("", self) if row.fused]
        return "\n".join([*filter(None, [super().extra_repr()]), *fused])


class FusedForward(_StandIn):
    """A module whose forward is written by hand."""

    _traces: ClassVar[Traces]

    def forward(self, *args, **kwargs):
        if _is_observed() or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        run, tensors = self._traces.find(self, args, kwargs)
        return super().forward(*args, **kwargs) if run is None else run.function(self, *tensors)

    def _chain_of_residual(self, x: Any) -> Fused | None:
        """The chain with which the forward is x + chain(x), and nothing else."""
        if _is_observed() or torch.compiler.is_compiling():
            return None
        run, _ = self._traces.find(self, (x,), {})
        calls = [] if run is None else [node for node in run.graph.nodes if node.op.startswith("call_")]
        if len(calls) != 1 or calls[0].target is not _plus or calls[0].args[1] is not calls[0].args[2]:
            return None
        chain = getattr(self, calls[0].args[0].target)
        return chain if isinstance(chain, Fused) and not attachment(chain) else None

    def extra_repr(self) -> str:
        patterns, _ = self._traces.survey(self)
        return "\n".join([*filter(None, [super().extra_repr()]), *(f"fused: {pattern}" for pattern in patterns)])


def _can_add(x: Tensor, residual: Any) -> bool:
    return type(residual) is Tensor and (x.shape, x.dtype, x.device) == (
        residual.shape,
        residual.dtype,
        residual.device,
    )


def _restore(x: Any, stock: torch.memory_format | None) -> Any:
    return x if stock is None else dense(x, stock == torch.channels_last)


_FUSED: dict[type[nn.Module], type[_StandIn]] = {}  # the class that stands in for each


def _set_fused(module: nn.Module) -> nn.Module:
    """Swap the class of a module."""
    unfused = type(module)
    if unfused not in _FUSED:
        namespace: dict[str, Any] = {"_unfused": unfused, "__module__": __name__}
        stand_in = Fused if issubclass(unfused, nn.Sequential) else FusedForward
        if stand_in is FusedForward:
            namespace["_traces"] = Traces(unfused, rewrite)
        _FUSED.setdefault(unfused, type(f"Fused{unfused.__name__}", (stand_in, unfused), namespace))
    module.__class__ = _FUSED[unfused]
    return module


def _remake(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return _set_fused(make(*args))


# ── Patterns in graphs ───────────────────────────────────────────────────────────────────────────────────────────────
# Each looks at a node: what stands in for it, its arguments, and the name of the pattern. Whether an operator takes the
# tensors is decided when it is called; otherwise the functions here do what the graph did.


_ADD, _MULTIPLY = (operator.add, operator.iadd, torch.add), (operator.mul, torch.mul)


class StandIn(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pattern: str


def _find_residual(node: fx.Node, module: nn.Module) -> StandIn | None:
    """x + chain(y), of which the chain has just been called."""
    for part, residual in _either(node, _ADD):
        if (
            _is_inner(part)
            and part.op == "call_module"
            and node.prev is part
            and len(part.args) == 1
            and not part.kwargs
        ):
            chain = module.get_submodule(str(part.target))
            if _is_chain(chain) and _classes(chain.children())[-1:] and isinstance(list(chain.children())[-1], NORM):
                return StandIn(_plus, (_layer(part), part.args[0], residual), {}, f"x + {part.target}(x)")
    return None


def _layer(call: fx.Node) -> fx.Node:
    """The layer that a node calls, as an argument."""
    with call.graph.inserting_before(call), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph that has no module to look it up in
        return call.graph.get_attr(str(call.target))


def _plus(chain: nn.Module, x: Any, residual: Any) -> Any:
    """residual + chain(x)."""
    if isinstance(chain, Fused) and not attachment(chain) and not is_channels_last(residual):
        return _restore(*chain._run(x, None, residual))
    return chain(x) + residual


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
                args = (_addends(before), scale, shift, norm, act, slope)
                return StandIn(_adain, args, {}, "AdaIN" if act == "none" else f"{act} → AdaIN")
    return None


def _plain_norm(node: fx.Node, module: nn.Module) -> float | fx.Node | None:
    """Of an instance norm without parameters its eps, or the layer."""
    if node.target is F.instance_norm and len(node.args) == 1:
        settings = dict(node.kwargs)
        eps, uses_input = settings.pop("eps", 1e-5), settings.pop("use_input_stats", True)
        settings.pop("momentum", None)
        is_plain = uses_input is True and isinstance(eps, float) and all(value is None for value in settings.values())
        return cast(float, eps) if is_plain else None
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return _layer(node) if isinstance(module.get_submodule(str(node.target)), INSTANCE) else None
    return None


def _activation_of(node: Any) -> tuple[Act, float, Any]:
    """The activation that a node is, and what it is of."""
    if _is_inner(node) and len(node.args) in (1, 2):
        if node.target is F.relu and len(node.args) == 1:
            return "relu", 0.0, node.args[0]
        if node.target is F.leaky_relu:
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) == 2 else 0.01)
            return "leaky_relu", slope, node.args[0]
    return "none", 0.0, node


def _addends(node: Any) -> list[Any]:
    """What a node is the sum of; of a product a pair."""
    if _is_inner(node) and node.target in (operator.add, torch.add) and len(node.args) == 2 and not node.kwargs:
        return [addend for part in node.args for addend in _addends(part)]
    if _is_inner(node) and node.target in _MULTIPLY and len(node.args) == 2 and not node.kwargs:
        return [node.args]
    return [node]


def _is_inner(node: Any) -> bool:
    """Whether nobody but the pattern sees a node's value."""
    return isinstance(node, fx.Node) and len(node.users) == 1


def _either(node: fx.Node, targets: tuple[Callable, ...]) -> Iterator[tuple[Any, Any]]:
    """The two arguments of a node that is a call of one of `targets`, in either order."""
    if node.target in targets and len(node.args) == 2 and not node.kwargs:
        yield node.args
        yield node.args[::-1]


def _adain(
    addends: list[Any], scale: Any, shift: Any, norm: float | nn.InstanceNorm2d, act: Act, negative_slope: float
) -> Tensor:
    is_plain = isinstance(norm, float) or _is_plain_norm(norm)
    found = _as_adain(addends, scale, shift) if is_plain else None
    if found is not None:
        eps = norm if isinstance(norm, float) else norm.eps
        return ops.adain(eps=eps, act=act, negative_slope=negative_slope, **found)
    first, *others = (a[0] * a[1] if isinstance(a, tuple) else a for a in addends)
    y = activate(sum(others, start=first), act, negative_slope)
    return scale * (F.instance_norm(y, eps=norm) if isinstance(norm, float) else norm(y)) + shift


def _is_plain_norm(norm: nn.Module) -> bool:
    return (
        type(norm) is nn.InstanceNorm2d
        and norm.weight is None
        and norm.bias is None
        and not _tracks_planes(norm)
        and not attachment(norm)
    )


def _as_adain(addends: list[Any], scale: Any, shift: Any) -> dict[str, Any] | None:
    """The arguments of `ops.adain`, where the shapes say which is which."""
    flat = [
        tensor for addend in (*addends, scale, shift) for tensor in (addend if isinstance(addend, tuple) else (addend,))
    ]
    if not all(isinstance(tensor, Tensor) for tensor in flat):
        return None
    x = next((a for a in addends if not isinstance(a, tuple) and a.dim() == 4), None)
    if x is None or math.prod(x.shape[2:]) < 2 or x.dtype not in DTYPES:
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
    """Whether there are patterns for something in the chain, in a chain that it holds, or in a forward written by hand."""
    if isinstance(module, nn.Sequential):
        return _is_chain(module) and any(
            isinstance(child, CONV + NORM) or _can_fuse(child) for child in module.children()
        )
    return _has_own_forward(module) and bool(Traces(type(module), rewrite).survey(module)[0])


def _has_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` is to run a forward that is neither torch's nor this library's."""
    return (
        not type(module).forward.__module__.startswith(("torch.", "fastgan.nn", "fastgan.fuse"))
        and type(module).__call__ is nn.Module.__call__
        and not isinstance(module, (torch.jit.ScriptModule, fx.GraphModule))
        and "forward" not in module.__dict__
    )


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")


def fuse(model: Model) -> Model:
    """Have fused operators compute what there are patterns for in the `nn.Sequential` containers of `model`.

    The patterns are [Conv2d | ConvTranspose2d] → BatchNorm2d → [ReLU | LeakyReLU] and its parts, except an activation
    alone. Returns `model` itself. Layers, parameters, buffers and state_dict stay what they are, and the model computes
    the same to rounding, in training and evaluation, to the second derivative. A layer that has hooks, is of a subclass
    or has a parametrized weight is called as before: `explain(model)` says which, and why. A container is looked at
    whenever it is called, so layers may come and go after fusing. A second `fuse` finds nothing to do.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    _require_module(model)
    for module in model.modules():
        if not isinstance(module, _StandIn) and _can_fuse(module):
            _set_fused(module)
    return model


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
    """What is fused in `model`, and which convolutions and norms are not, with the reason.

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
