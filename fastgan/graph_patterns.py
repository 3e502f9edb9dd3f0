"""Patterns in the graph of a forward: AdaIN, chains of layers and of functions that do the same, what is added to them, and
what stands in for all these.

A graph is that of a forward as `tracing` reads it, or one that Dynamo has captured. In the latter `meta["example_value"]`
tells what each node gives.

Each pattern looks at a node. Whether an operator takes the tensors is decided when it is called; otherwise the functions
here do what the graph did.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastgan import ops
from fastgan.chains import (
    ACT_OR_PRELU,
    FLAT,
    NORM,
    Chain,
    FunctionLayer,
    FusedModule,
    Sum,
    is_chain,
    matches,
    plus,
    run_whole,
)
from fastgan.layer_functions import LayerFunction, read
from fastgan.little_work import note_work
from fastgan.nn.group_norm_act import tracks_planes
from fastgan.nn.norm_act import attachment
from fastgan.ops._tensors import DTYPES
from fastgan.ops._types import FixedAct
from fastgan.tracing import IN_PLACE, compiled, require

ADD: tuple[Callable, ...] = (operator.add, torch.add)
_MULTIPLY: tuple[Callable, ...] = (operator.mul, torch.mul)


class StandIn(NamedTuple):
    """What computes a pattern, what to call it on, and the pattern's name."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    pattern: "Pattern | ChainCall"


class Pattern(NamedTuple):
    """One that is no chain: its name, and those of the layers in it."""

    name: str
    layers: tuple[str, ...] = ()

    def examples(self, module: nn.Module) -> list[nn.Module]:
        return list(map(module.get_submodule, self.layers))

    def __str__(self) -> str:
        return self.name


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
                    name = "AdaIN" if act == "none" else f"{act} → AdaIN"
                    layers = (str(norm.target),) if isinstance(norm, fx.Node) else ()
                    return StandIn(function, args, Pattern(name, layers))
    return None


def _plain_norm(node: fx.Node, module: nn.Module) -> float | fx.Node | None:
    """Of an instance norm without parameters its eps, or the layer."""
    if node.target is F.instance_norm and len(node.all_input_nodes) == 1:
        settings = _arguments(node)
        eps, uses_input = settings.pop("eps"), settings.pop("use_input_stats")
        is_plain = uses_input is True and isinstance(eps, float) and isinstance(settings.pop("input"), fx.Node)
        settings.pop("momentum")
        return eps if is_plain and all(value is None for value in settings.values()) else None
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs and node.all_input_nodes:
        return layer_of(node) if isinstance(module.get_submodule(str(node.target)), nn.InstanceNorm2d) else None
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Of a call of a function that is written in Python, by their names, with the defaults."""
    bound = inspect.signature(cast(Callable, node.target)).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _activation_of(node: Any) -> tuple[FixedAct, float, Any]:
    """The activation that a node is, and what it is of."""
    if is_inner(node) and _is_activation(node):
        slope = _arguments(node).get("negative_slope")
        if node.target is F.relu:
            return "relu", 0.0, node.args[0]
        if isinstance(slope, float):
            return "leaky_relu", slope, node.args[0]
    return "none", 0.0, node


def _is_activation(node: fx.Node) -> bool:
    """Whether a node is an activation that leaves its input as it is."""
    return node.target in (F.relu, F.leaky_relu) and len(node.args) > 0 and _arguments(node)["inplace"] is False


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
    return node.target in (*ADD, *_MULTIPLY, F.conv2d, F.conv_transpose2d, F.instance_norm, F.linear)


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
    return any(
        not _leaves_inputs(node) and (_sets_mode(node) or not sharing.isdisjoint(node.all_input_nodes))
        for node in between
    )


def _sets_mode(node: fx.Node) -> bool:
    """Whether a node of Dynamo's computes nothing: it may begin or end autocast or no_grad."""
    graph_is_dynamo_s = "example_value" in next(iter(node.graph.nodes)).meta
    return graph_is_dynamo_s and node.meta.get("example_value") is None


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
        note_work()
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

    Called on x, on the residual if there is a sum with it, and on what is not here: the layers that have names and the
    tensors of functions, an activation's last.
    """

    __name__ = __qualname__ = "chain"

    def __init__(
        self,
        layers: Sequence[str | LayerFunction],
        order: str | None = None,
        act: str | LayerFunction | None = None,
    ):
        self.layers, self.order, self.act = tuple(layers), order, act  # layers that are modules by name

    def __call__(self, x: Any, *given: Any) -> Any:
        if self.order is None:
            return run_whole(self.filled(given).layers, x)
        residual, *rest = given
        layers, sum = self.filled(rest)
        return plus(layers, x, residual, cast(Sum, sum))

    def filled(self, given: Iterable[Any]) -> Chain:
        """The chain, of what is not here."""
        values = iter(given)
        layers = [_filled(layer, values) for layer in self.layers]
        act = None if self.act is None else _filled(self.act, values)
        return Chain(layers, None if self.order is None else Sum(self.order, act))

    def examples(self, module: nn.Module) -> list[nn.Module]:
        """The layers of a module as far as they are known before the call."""
        return [_example(layer, module) for layer in self.layers]

    def __str__(self) -> str:
        names = list(map(_name, self.layers))
        if self.order is None:
            return " → ".join(names)
        total = f"x + {names[-1]}({'x' if len(names) == 1 else '…'})"
        return total if self.act is None else f"{total} → {_name(self.act)}"

    def _key(self) -> tuple:
        return self.layers, self.order, self.act

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChainCall) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _name(layer: str | LayerFunction) -> str:
    return layer if isinstance(layer, str) else type(layer.example()).__name__


def _filled(layer: str | LayerFunction, given: Iterator[Any]) -> nn.Module:
    return next(given) if isinstance(layer, str) else layer.layer(given)


def _example(layer: str | LayerFunction, module: nn.Module) -> nn.Module:
    return module.get_submodule(layer) if isinstance(layer, str) else layer.example()


def find_chain(node: fx.Node, module: nn.Module) -> StandIn | None:
    """Layers that are called one after the other, of which `node` is the last. Nothing else happens in between, so that all
    of it may as well happen at once."""
    if _layer(node) is None or _follows(_after(node), node):
        return None
    nodes = [node]
    while _follows(nodes[0], before := nodes[0].args[0]):
        nodes.insert(0, cast(fx.Node, before))
    first = cast(fx.Node, nodes[0].args[0])
    if len(nodes) > 1 and _is_sum(first) and _is_act(nodes[0], module):
        del nodes[0]  # `find_residual` may have the norm in the sum compute it
    call = ChainCall([cast(str | LayerFunction, _layer(each)) for each in nodes])
    if not _gains(call.examples(module)):
        return None
    return StandIn(call, (nodes[0].args[0], *(part for each in nodes for part in _given(each))), call)


def _layer(node: fx.Node) -> str | LayerFunction | None:
    """The layer that a node calls on one value, by its name, or the function that does what a layer does."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        return str(node.target) if len(node.args) == 1 and not node.kwargs else None
    found = read(node)
    return None if found is None or node.args[0] in found[1] else found[0]


def _given(node: fx.Node) -> list[fx.Node]:
    """What a layer's call takes besides its input: the layer, or the function's tensors."""
    return [layer_of(node)] if node.op == "call_module" else cast(tuple, read(node))[1]


def _after(node: fx.Node) -> fx.Node:
    """What happens next, apart from what may as well have happened before."""
    after = node.next
    while after.op == "get_attr" or _is_idle(after):
        after = after.next
    return after


def _is_idle(node: fx.Node) -> bool:
    """Whether a node of Dynamo's neither changes what layers read nor reads what they change. A batch norm counts its
    batches, in integers, before it runs, and reads its settings, where those are not constant."""
    if node.op != "call_method" or len(node.all_input_nodes) != 1 or node.all_input_nodes[0].op != "placeholder":
        return False
    value = node.all_input_nodes[0].meta.get("example_value")
    if not isinstance(value, Tensor) or value.dim() > 0:
        return False
    if node.target == "add_":
        return not (value.is_floating_point() or value.is_complex())
    return node.target == "item" and all(user.target == "item" for user in node.all_input_nodes[0].users)


def _follows(node: fx.Node, before: Any) -> bool:
    """Whether `node` is a layer that is called on the layer before, and nobody else sees what that gives."""
    return (
        is_inner(before)
        and _after(before) is node
        and node.args[:1] == (before,)
        and _layer(node) is not None
        and _layer(before) is not None
    )


def _gains(layers: list[nn.Module]) -> bool:
    """Whether there are patterns in the chain, or chains that can hand on a layout."""
    classes = tuple(layer.stands_for if isinstance(layer, FunctionLayer) else type(layer) for layer in layers)
    has_patterns = any(True for i in range(len(layers)) for _ in matches(layers[i:], classes[i:]))
    return has_patterns or sum(isinstance(layer, FusedModule) for layer in layers) > 1


class WholeChain(NamedTuple):
    """A graph that is a chain of its one input, and perhaps the sum of both."""

    call: ChainCall
    names: list[str]  # of what is not in `call`

    def of(self, module: nn.Module) -> Chain:
        return self.call.filled(operator.attrgetter(name)(module) for name in self.names)


def whole_chain(graph: fx.Graph) -> WholeChain | None:
    calls = [node for node in graph.nodes if node.op.startswith("call_")]
    x, output = next(iter(graph.nodes)), next(iter(reversed(graph.nodes)))
    if len(calls) != 1 or not isinstance(calls[0].target, ChainCall) or output.args != (calls[0],):
        return None
    call, inputs = calls[0].target, 1 if calls[0].target.order is None else 2
    given = calls[0].args[inputs:]
    if any(arg is not x for arg in calls[0].args[:inputs]) or any(part.op != "get_attr" for part in given):
        return None
    return WholeChain(call, [part.target for part in given])


def resample(graph: fx.Graph, doubled: bool) -> fx.Graph | None:
    """The graph of the doubled input, or with its result halved, where that is next to a convolution that is a function."""
    calls = [node for node in graph.nodes if isinstance(node.target, ChainCall) and node.target.order is None]
    x, output = next(iter(graph.nodes)), next(iter(reversed(graph.nodes)))
    if doubled:
        fits = [call for call in calls if list(x.users) == [call] and call.args[0] is x and x not in call.args[1:]]
    else:
        fits = [call for call in calls if output.args == (call,) and list(call.users) == [output]]
    if x.op != "placeholder" or not fits or any(node.target is require for node in graph.nodes):
        return None
    layers = fits[0].target.layers
    conv = layers[0 if doubled else -1]
    if isinstance(conv, str) or not isinstance(conv.example(), FLAT):
        return None
    rest, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    rest.output(rest.graph_copy(graph, copies))
    copies[fits[0]].target = ChainCall([_DOUBLING, *layers] if doubled else [*layers, _HALVING])
    return rest


_DOUBLING = LayerFunction(F.interpolate, (), {"scale_factor": 2}, ())
_HALVING = LayerFunction(F.avg_pool2d, (2,), {}, ())


# ── Sums ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def find_residual(node: fx.Node, module: nn.Module) -> StandIn | None:
    """x + chain(y), of which the chain has just been called, and an activation of the sum that comes next."""
    if _is_act(node, module):
        total = cast(fx.Node, node.args[0])
        return _find_sum(total, module, node) if is_inner(total) and _after(total) is node else None
    act = _after(node)
    if is_inner(node) and _is_act(act, module) and act.args[0] is node:
        return None  # which is found there
    return _find_sum(node, module)


def _find_sum(node: Any, module: nn.Module, act: fx.Node | None = None) -> StandIn | None:
    is_in_place = node.target in _ADD_IN_PLACE
    orders = ("x += y", "y += x") if is_in_place else ("x + y", "y + x")
    for (part, residual), order in zip(either(node, (*ADD, *_ADD_IN_PLACE)), orders, strict=False):
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
            layers, (x, *given) = part.target.layers, part.args
        else:
            layers, x, given = (str(part.target),), part.args[0], [layer_of(part)]
        call = ChainCall(layers, order, None if act is None else _layer(act))
        return StandIn(call, (x, residual, *given, *(() if act is None else _given(act))), Pattern(str(call)))
    return None


_ADD_IN_PLACE: tuple[Callable, ...] = (IN_PLACE["iadd"], operator.iadd)  # the latter in Dynamo's graphs


def _is_sum(node: fx.Node) -> bool:
    return node.target in (*ADD, *_ADD_IN_PLACE)


def _is_act(node: Any, module: nn.Module) -> bool:
    layer = _layer(node)
    return layer is not None and isinstance(_example(layer, module), ACT_OR_PRELU)


def _is_normed(node: Any, module: nn.Module) -> bool:
    """Whether a node runs a chain that ends with a norm, for the sum alone."""
    if not is_inner(node):
        return False
    if isinstance(node.target, ChainCall):
        return node.target.order is None and _ends_with_norm(node.target.examples(module)[-1])
    is_call = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return is_call and is_chain(chain := module.get_submodule(str(node.target))) and _ends_with_norm(chain)


def _ends_with_norm(layer: nn.Module) -> bool:
    if is_chain(layer):
        return len(children := list(layer.children())) > 0 and _ends_with_norm(children[-1])
    return isinstance(layer, NORM)
