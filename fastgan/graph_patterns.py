"""Patterns in the graph of a forward: AdaIN, convolutions that are functions, chains of layers, what is added to them, and
what stands in for all these.

Each pattern looks at a node. Whether an operator takes the tensors is decided when it is called; otherwise the functions
here do what the graph did.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastgan import ops
from fastgan.chains import NORM, FusedModule, is_chain, matches, plus, run_whole
from fastgan.nn.group_norm_act import tracks_planes
from fastgan.nn.norm_act import attachment
from fastgan.ops._tensors import DTYPES
from fastgan.ops._types import FixedAct
from fastgan.tracing import IN_PLACE, compiled

ADD, _MULTIPLY = (operator.add, torch.add), (operator.mul, torch.mul)


class StandIn(NamedTuple):
    """What computes a pattern, what to call it on, and the pattern's name."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pattern: "str | ChainCall"


def is_inner(node: Any) -> bool:
    """Whether nobody but the pattern sees a node's value."""
    return isinstance(node, fx.Node) and len(node.users) == 1


def either(node: fx.Node, targets: tuple[Callable, ...]) -> Iterator[tuple[Any, Any]]:
    """The two arguments of a node that is a call of one of `targets`, in either order."""
    if node.target in targets and len(node.args) == 2 and not node.kwargs:
        yield node.args
        yield node.args[::-1]


def layer_of(call: fx.Node) -> fx.Node:
    """The layer that a node calls, as an argument."""
    with call.graph.inserting_before(call):
        return call.graph.create_node("get_attr", str(call.target))


# ── Convolutions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def find_conv(node: fx.Node, module: nn.Module) -> StandIn | None:
    run = _CONV_FUNCTIONS.get(node.target)
    return None if run is None else StandIn(run, node.args, node.kwargs, run.__name__.replace("_", "F.", 1))


def _conv2d(*args: Any, **kwargs: Any) -> Tensor:
    return _operator_or_stock(ops.conv2d, F.conv2d, args, kwargs)


def _conv_transpose2d(*args: Any, **kwargs: Any) -> Tensor:
    return _operator_or_stock(ops.conv_transpose2d, F.conv_transpose2d, args, kwargs)


def _conv2d_avg_pool2d(*args: Any, **kwargs: Any) -> Tensor:
    """F.avg_pool2d(F.conv2d(…), 2)"""
    found = _resampled(ops.conv2d_avg_pool2d, *args, **kwargs)
    return F.avg_pool2d(_conv2d(*args, **kwargs), 2) if found is None else found


def _upsample_conv2d(x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """F.conv2d(F.interpolate(x, scale_factor=2), …)"""
    found = _resampled(ops.upsample_conv2d, x, *args, **kwargs)
    return _conv2d(F.interpolate(x, scale_factor=2), *args, **kwargs) if found is None else found


def resample(graph: fx.Graph, doubled: bool) -> fx.Graph | None:
    """The graph with its only convolution of the doubled input, or of which the result is halved, if it has such a one."""
    convs = [node for node in graph.nodes if node.target is _conv2d]
    if len(convs) != 1 or not convs[0].args:
        return None
    (conv,), given, output = convs, next(iter(graph.nodes)), next(reversed(graph.nodes))
    if doubled:
        fits = given.op == "placeholder" and list(given.users) == [conv] and conv.args[0] is given
        fits = fits and given not in _nodes_of((conv.args[1:], conv.kwargs))
    else:
        fits = output.args == (conv,) and list(conv.users) == [output]
    if not fits:
        return None
    rest, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    rest.output(rest.graph_copy(graph, copies))
    copies[conv].target = _upsample_conv2d if doubled else _conv2d_avg_pool2d
    return rest


def _nodes_of(arguments: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    fx.node.map_arg(arguments, nodes.append)
    return nodes


def _resampled(
    op: Callable, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: Any = 1,
) -> Tensor | None:  # fmt: skip
    """By the operator, where the convolution has taps at every pixel, is wider than one, and the tensors fit."""
    slides = stride in (1, (1, 1), [1, 1]) and dilation in (1, (1, 1), [1, 1])
    if not slides or type(weight) not in (Tensor, nn.Parameter) or min(weight.shape[2:], default=1) < 2:
        return None
    try:
        return op(x, weight, bias, padding=padding, groups=groups)
    except (TypeError, ValueError):  # stock has an answer, or an error of its own
        return None


def _operator_or_stock(op: Callable, stock: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    try:
        return op(*args, **kwargs)
    except (TypeError, ValueError):  # no batch, integers, padding="same": stock has an answer, or an error of its own
        return stock(*args, **kwargs)


_CONV_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {F.conv2d: _conv2d, F.conv_transpose2d: _conv_transpose2d}


# ── AdaIN ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_adain(node: fx.Node, module: nn.Module) -> StandIn | None:
    """scale · instance_norm(act(a + b + …)) + shift, of whatever the addends are."""
    for scaled, shift in either(node, ADD):
        for normal, scale in either(scaled, _MULTIPLY) if is_inner(scaled) else ():
            norm = _plain_norm(normal, module) if is_inner(normal) else None
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
        return layer_of(node) if isinstance(module.get_submodule(str(node.target)), nn.InstanceNorm2d) else None
    return None


def _activation_of(node: Any) -> tuple[FixedAct, float, Any]:
    """The activation that a node is, and what it is of."""
    if is_inner(node) and _is_activation(node):
        slope = node.kwargs.get("negative_slope")
        if node.target is F.relu:
            return "relu", 0.0, node.args[0]
        if isinstance(slope, float):
            return "leaky_relu", slope, node.args[0]
    return "none", 0.0, node


def _is_activation(node: fx.Node) -> bool:
    """Whether a node is an activation that leaves its input as it is."""
    return node.target in (F.relu, F.leaky_relu) and len(node.args) == 1 and node.kwargs.get("inplace") is False


def _addends(node: Any, inner: set[fx.Node]) -> list[Any]:
    """What a node is the sum of; of a product a pair. The nodes of both join the `inner` ones."""
    if is_inner(node) and node.target in ADD + _MULTIPLY and len(node.args) == 2 and not node.kwargs:
        inner.add(node)
        return [addend for part in node.args for addend in _addends(part, inner)] if node.target in ADD else [node.args]
    return [node]


def _is_new(node: fx.Node) -> bool:
    """Whether a node's value has memory of its own, and it leaves its inputs as they are."""
    if _is_activation(node):
        return True
    return node.target in (*ADD, *_MULTIPLY, *_CONV_FUNCTIONS, *_CONV_FUNCTIONS.values(), F.instance_norm, F.linear)


_VIEWS = ("chunk", "expand", "flatten", "reshape", "split", "squeeze", "unsqueeze", "view")
_VIEW_FUNCTIONS = (operator.getitem, *(getattr(torch, name) for name in _VIEWS if hasattr(torch, name)))


def _leaves_inputs(node: fx.Node) -> bool:
    """Whether a node changes nothing that there was before it."""
    is_view = node.target in (_VIEWS if node.op == "call_method" else _VIEW_FUNCTIONS)
    return is_view or node.op in ("get_attr", "placeholder") or _is_new(node)


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
    return any(not _leaves_inputs(node) and not sharing.isdisjoint(node.all_input_nodes) for node in between)


def _adain_of(
    inner: set[fx.Node], norm: float | fx.Node, addends: list[Any], scale: Any, shift: Any, act: FixedAct, slope: float
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
    if not is_plain or tracks_planes(norm) or attachment(norm):
        return None, None
    return norm.eps, norm.num_features


def _as_adain(addends: tuple[Any, ...], scale: Any, shift: Any, features: int | None) -> dict[str, Any] | None:
    """The arguments of `ops.adain`, where the shapes say which is which."""
    flat = [
        tensor for addend in (*addends, scale, shift) for tensor in (addend if isinstance(addend, tuple) else (addend,))
    ]
    if not all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in DTYPES for tensor in flat):
        return None
    images = [a for a in addends if not isinstance(a, tuple) and a.dim() == 4]
    x = max(images, key=Tensor.numel, default=None)
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


# ── Chains ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class ChainCall:
    """Runs a chain, perhaps adding: what stands in a graph for layers that are called one after the other.

    Called on x, on the residual if there is an `order` of adding it, and on the layers that have names.
    """

    __name__ = __qualname__ = "chain"

    def __init__(self, layers: Sequence[str | nn.Module], order: str | None = None):
        self.layers, self.order = tuple(layers), order  # by name; layers that stand for functions are here

    def __call__(self, x: Any, *given: Any) -> Any:
        if self.order is None:
            return run_whole(self._filled(given), x)
        residual, *modules = given
        return plus(self._filled(modules), x, residual, self.order)

    def _filled(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        named = iter(modules)
        return [next(named) if isinstance(layer, str) else layer for layer in self.layers]

    def layers_of(self, module: nn.Module) -> list[nn.Module]:
        return [module.get_submodule(layer) if isinstance(layer, str) else layer for layer in self.layers]

    def _key(self) -> tuple:
        return self.order, *(layer if isinstance(layer, str) else _settings_of(layer) for layer in self.layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChainCall) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _settings_of(layer: nn.Module) -> tuple[type[nn.Module], str]:
    """All that tells a layer without parameters from others: its repr leaves settings out."""
    return type(layer), repr([item for item in vars(layer).items() if not item[0].startswith("_")])


def find_chain(node: fx.Node, module: nn.Module) -> StandIn | None:
    """Layers that are called one after the other, of which `node` is the last. Nothing else happens in between, so that all
    of it may as well happen at once."""
    if _layer(node, module) is None or _follows(_after(node), node, module):
        return None
    nodes = [node]
    while _follows(nodes[0], before := nodes[0].args[0], module):
        nodes.insert(0, cast(fx.Node, before))
    layers = cast(list[str | nn.Module], [_layer(each, module) for each in nodes])
    if not _gains([module.get_submodule(layer) if isinstance(layer, str) else layer for layer in layers]):
        return None
    call = ChainCall(layers)
    modules = [layer_of(each) for each in nodes if each.op == "call_module"]
    return StandIn(call, (nodes[0].args[0], *modules), {}, call)


def _layer(node: fx.Node, module: nn.Module) -> str | nn.Module | None:
    """The layer that a node calls on one value, by its name, or one that does what the node's function does."""
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        return str(node.target) if len(node.args) == 1 and not node.kwargs else None
    make = _LAYERS.get(node.target) if node.op == "call_function" else None
    try:
        return None if make is None else make(*node.args[1:], **node.kwargs)
    except (TypeError, ValueError):  # arguments that the layer has no place for
        return None


def _interpolation(
    size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None, antialias=False
) -> nn.Upsample | None:
    return None if antialias or recompute_scale_factor else nn.Upsample(size, scale_factor, mode, align_corners)


_LAYERS: dict[Any, Callable[..., nn.Module | None]] = {
    F.relu: nn.ReLU, torch.relu: lambda: nn.ReLU(), F.leaky_relu: nn.LeakyReLU, torch.tanh: nn.Tanh, F.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid, F.sigmoid: nn.Sigmoid, F.avg_pool2d: nn.AvgPool2d, F.interpolate: _interpolation,
    F.pixel_shuffle: nn.PixelShuffle,
}  # fmt: skip


def _after(node: fx.Node) -> fx.Node:
    after = node.next
    while after.op == "get_attr":
        after = after.next
    return after


def _follows(node: fx.Node, before: Any, module: nn.Module) -> bool:
    """Whether `node` is a layer that is called on the layer before, and nobody else sees what that gives."""
    return (
        is_inner(before)
        and _after(before) is node
        and node.args[:1] == (before,)
        and _layer(node, module) is not None
        and _layer(before, module) is not None
    )


def _gains(layers: list[nn.Module]) -> bool:
    """Whether there are patterns in the chain, or chains that can hand on a layout."""
    classes = tuple(map(type, layers))
    has_patterns = any(True for i in range(len(layers)) for _ in matches(layers[i:], classes[i:]))
    return has_patterns or sum(isinstance(layer, FusedModule) for layer in layers) > 1


def whole_chain(graph: fx.Graph) -> ChainCall | None:
    """Where a graph of one input is a chain of it, and perhaps the sum of both."""
    calls = [node for node in graph.nodes if node.op.startswith("call_")]
    given, output = next(iter(graph.nodes)), next(reversed(graph.nodes))
    if len(calls) != 1 or not isinstance(calls[0].target, ChainCall) or output.args != (calls[0],):
        return None
    call = calls[0].target
    is_of_input = all(arg is given for arg in calls[0].args[: 1 if call.order is None else 2])
    return call if is_of_input else None


# ── Sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_residual(node: fx.Node, module: nn.Module) -> StandIn | None:
    """x + chain(y), of which the chain has just been called."""
    orders = ("x + y", "y + x") if node.target in ADD else ("x += y", "y += x")
    for (part, residual), order in zip(either(node, (*ADD, IN_PLACE["iadd"])), orders, strict=False):
        if (
            not isinstance(residual, fx.Node)
            or residual is part
            or not _is_normed(part, module)
            or _after(part) is not node
        ):
            continue
        if order == "y += x" and not _is_normed(residual, module):
            continue  # somebody may see what is added to
        if isinstance(part.target, ChainCall):
            call, (x, *layers) = ChainCall(part.target.layers, order), part.args
        else:
            call, x, layers = ChainCall([str(part.target)], order), part.args[0], [layer_of(part)]
        name = next(layer for layer in reversed(call.layers) if isinstance(layer, str))
        return StandIn(call, (x, residual, *layers), {}, f"x + {name}({'x' if len(call.layers) == 1 else '…'})")
    return None


def _is_normed(node: Any, module: nn.Module) -> bool:
    """Whether a node runs a chain that ends with a norm, for the sum alone."""
    if not is_inner(node):
        return False
    if isinstance(node.target, ChainCall):
        return node.target.order is None and _ends_with_norm(node.target.layers_of(module)[-1])
    is_call = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return is_call and is_chain(chain := module.get_submodule(str(node.target))) and _ends_with_norm(chain)


def _ends_with_norm(layer: nn.Module) -> bool:
    if is_chain(layer):
        return len(children := list(layer.children())) > 0 and _ends_with_norm(children[-1])
    return isinstance(layer, NORM)
