"""`fuse(model)`: the same model, with what there are patterns for computed by fused operators.

No layer is replaced or changed. A module gets a subclass of its own class. That of an `nn.Sequential` looks at the children
at each call: where some of them make a pattern it runs the operator, and the others it calls. That of a module whose forward
is written by hand runs a graph of it, in which operators stand for the patterns. So whatever reads or edits a model finds
what it has always found, and `unfuse` has only the class to give back.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as StockHook

from fastgan.chains import (
    CONV,
    NORM,
    REVERSAL,
    Chain,
    FusedModule,
    call_on_route,
    classes_of,
    is_chain,
    is_on_route,
    matches,
    run_and_find_route,
    run_whole,
)
from fastgan.graph_patterns import (
    ChainCall,
    Pattern,
    WholeChain,
    find_adain,
    find_chain,
    find_residual,
    resample,
    whole_chain,
)
from fastgan.layer_functions import put_input_first
from fastgan.little_work import LittleWork
from fastgan.nn.conv_norm_act import ConvBnAct2d, ConvTransposeBnAct2d
from fastgan.nn.gradient_reversal import ReversedLinear
from fastgan.nn.group_norm_act import GroupNormAct, InstanceNormAct2d, LayerNormAct
from fastgan.nn.norm_act import BatchNormAct2d, attachment, is_observed
from fastgan.nn.spectral_norm import SpectralNorm, SpectralNormHook, Together, norms
from fastgan.tracing import BrokenAssertion, Traces, compiled

Model = TypeVar("Model", bound=nn.Module)

# ── Stand-ins ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Made(FusedModule):
    """A stand-in of a class that is made at run time."""

    _unfused: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: what the class does about its subclasses is meant for others."""

    def _get_name(self) -> str:
        """For `print` alone: code that knows layers by the name of their class finds what it has always found."""
        return f"Fused{self._unfused.__name__.lstrip('_')}"

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickles as the unfused module, to be fused again: the class has no name to import."""
        make, args, *state = cast(tuple, super().__reduce_ex__(protocol))
        parts = [self._unfused if part is type(self) else part for part in (make, *args)]
        return (_remake, tuple(parts), *state)


class Fused(_Made, nn.Sequential):
    """A chain."""

    def forward(self, input):
        if torch.jit.is_scripting():  # compiles this branch only
            for module in self:
                input = module(input)
            return input
        else:
            return _run_layers(self, input)

    forward.is_of_chain = True  # type: ignore[attr-defined]

    def chain(self, x: Any) -> Chain:
        return Chain(list(self))

    def extra_repr(self) -> str:
        fused = [f"fused ({row.place}): {row.pattern}" for row in _rows_of_chain("", self) if row.fused]
        return "\n".join([*filter(None, [super().extra_repr()]), *fused])


class FusedForward(_Made):
    """A module whose forward is written by hand."""

    _traces: ClassVar[Traces]
    _chains: ClassVar[dict[Any, WholeChain | None]]
    _resampled: ClassVar[dict[Any, Callable[..., Any] | None]]

    def chain(self, x: Any) -> Chain | None:
        if is_observed() or torch.compiler.is_compiling():
            return None
        run = _find_run(self, (x,), {})[0]
        if run is None:
            return None
        if run.function not in self._chains:
            self._chains[run.function] = whole_chain(run.graph)
        whole = self._chains[run.function]
        return None if whole is None else whole.of(self)

    def resampled(self, x: Any, doubled: bool) -> Callable[[Any], Any] | None:
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
        rows = _rows_of_forward("", self, _survey(self)[0])
        fused = [f"fused: {row.pattern}" for row in rows if row.fused]
        return "\n".join([*filter(None, [super().extra_repr()]), *fused])


def _run_layers(module: Fused, input: Any) -> Any:
    if torch.compiler.is_compiling():
        return run_whole(list(module), input)
    work, layers = LittleWork(module, (input,)), list(module)
    if work.is_known:
        if work.route is None:
            for layer in layers:
                input = layer(input)
            return input
        if is_on_route(layers, work.route):
            return call_on_route(layers, input, work.route)
    with work:
        output, work.route = run_and_find_route(layers, input)
    return output


def _find_run(module: FusedForward, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A class that others have made of a fused one, as FSDP does, may have a forward of its own."""
    if type(module).forward is not _FUSED[module._unfused].forward:
        return None, []
    return module._traces.find(module, args, kwargs)


def _run_forward(module: FusedForward, args: tuple, kwargs: dict[str, Any]) -> Any:
    if not (is_observed() or torch.compiler.is_compiling()):
        work = LittleWork(module, (*args, *kwargs.values()))
        run, tensors = (None, []) if work.is_known else _find_run(module, args, kwargs)
        if run is not None:
            with work, contextlib.suppress(BrokenAssertion):
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


class FusedSpectralNorm(_Made, SpectralNorm):
    """torch's parametrisation."""

    _unfused = _SpectralNorm


class FusedSpectralNormHook(SpectralNormHook):
    """torch's older hook, which is no module."""


class FusedTogether(Together):
    """What has the spectral norms of a fused model computed together."""


_FUSED: dict[type[nn.Module], type[_Made]] = {_SpectralNorm: FusedSpectralNorm}  # the class that stands in for each


def _set_fused(module: nn.Module) -> nn.Module:
    """Swap the class of a module."""
    unfused = type(module)
    if unfused not in _FUSED:
        namespace: dict[str, Any] = {
            "_unfused": unfused, "__module__": __name__, "__qualname__": unfused.__qualname__,
        }  # fmt: skip
        stand_in = Fused if issubclass(unfused, nn.Sequential) else FusedForward
        if stand_in is FusedForward:
            namespace |= {"_traces": Traces(unfused, rewrite), "_chains": {}, "_resampled": {}}
            namespace["forward"] = _like(unfused.forward)
        _FUSED.setdefault(unfused, type(unfused.__name__, (stand_in, unfused), namespace))
    module.__class__ = _FUSED[unfused]
    return module


def _remake(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return _set_fused(make(*args))


# ── Graphs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

# Each is looked for in the whole graph before the next one is.
GRAPH_PATTERNS = (find_adain, find_chain, find_residual)


def rewrite(graph: fx.Graph, module: nn.Module) -> list[Pattern | ChainCall]:
    """Puts operators into the graph of `module`'s forward. The patterns that were found, and the chains."""
    patterns = []
    for node in graph.nodes:
        put_input_first(node)
    for find in GRAPH_PATTERNS:
        for node in [node for node in graph.nodes if node.op.startswith("call_")]:
            found = find(node, module)
            if found is None:
                continue
            with graph.inserting_after(node):
                made = graph.call_function(found.function, found.args)
            made.meta = node.meta.copy()
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


def _can_fuse(module: nn.Module) -> bool:
    """Whether there are patterns for something in the chain, in a chain that it holds, or in a forward written by hand; or
    whether it is a spectral norm."""
    if isinstance(module, _Made) or type(module) is _SpectralNorm:
        return True
    if isinstance(module, nn.Sequential):
        return is_chain(module) and any(
            isinstance(child, CONV + NORM + REVERSAL) or _can_fuse(child) for child in module.children()
        )
    return bool(_survey(module)[0])


def _has_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` is to run a forward that is neither torch's nor this library's."""
    if isinstance(module, (_Made, torch.jit.ScriptModule, fx.GraphModule)) or "forward" in module.__dict__:
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
    except an activation alone; [GroupNorm | LayerNorm of whole samples] → [ReLU | LeakyReLU]; an Upsample that doubles
    before a Conv2d, and an AvgPool2d that halves after one, which become part of the convolution; [GradientReversal |
    WarmStartGradientReversal] → Linear. In a forward written by hand: the same of layers, of functions such as
    `F.conv2d` and `F.batch_norm`, or of both; act(x + chain(x)), of a chain that ends in a norm; scale ·
    instance_norm(act(x + noise_weight · noise + bias)) + shift. Anywhere: torch's spectral norms, parametrisations or
    the older hook; those of the whole model are computed at once before its forward, as `fastgan.spectral_norm_all`
    says.

    Returns `model` itself. Layers, parameters, buffers and state_dict stay what they are, and the model computes the
    same to rounding, in training and evaluation, to the second derivative. A layer that has hooks, is of a subclass or
    has a parametrized weight is called as before, and a forward is left alone unless it is certain to do again what it
    did when it was read: `explain(model)` says which, and why. A container is looked at whenever it is called, so
    layers may come and go after fusing. A second `fuse` finds nothing to do. Under torch.compile forwards written by
    hand run as they are; `fastgan.dynamo` is a backend of it that finds the patterns by itself.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    _require_module(model)
    # Children first: each forward is read once, however deep it lies.
    for module in reversed(list(model.modules())):
        if not isinstance(module, _Made) and _can_fuse(module):
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
    called: set[nn.Module] = set()  # in patterns of forwards that have been looked at
    for path, parent in model.named_modules():
        if is_chain(parent):
            yield from _rows_of_chain(path, parent)
        elif not isinstance(parent, (*_OURS, *_HOLDERS)):
            patterns, why = _survey(parent)
            yield from _rows_of_forward(path, parent, patterns)
            called.update(*(found.examples(parent) for found in patterns))
            for name, layer in _held(parent):
                if isinstance(layer, _LISTED) and layer not in called and not _survey(layer)[0]:
                    yield _row_of_layer(_join(path, name), layer, _obstacle(layer) or why)
    yield from _rows_of_spectral_norms(model)


_HOLDERS = (nn.ModuleList, nn.ModuleDict)


def _held(parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module, those in lists and dictionaries of layers too."""
    for name, child in parent.named_children():
        if type(child) in _HOLDERS:
            yield from ((_join(name, path), layer) for path, layer in _held(child))
        else:
            yield name, child


def _survey(module: nn.Module) -> tuple[list[Pattern | ChainCall], str]:
    """The patterns in a module's forward, and why there are none for what is in none of them."""
    name = _name(module)
    if isinstance(module, nn.Sequential):
        return [], f"{name} has a forward of its own"
    if not isinstance(module, FusedForward) and not _has_own_forward(module):
        return [], f"it is in {name}, not in an nn.Sequential"
    unfused = module._unfused if isinstance(module, FusedForward) else type(module)
    patterns, reason = Traces(unfused, rewrite).survey(module)
    reason = reason or "its forward does not call the layer on one tensor, next to others"
    return patterns, reason.replace("its forward", f"the forward of {name}")


def _rows_of_spectral_norms(model: nn.Module) -> Iterator[Row]:
    paths = {module: path for path, module in model.named_modules()}
    for layer, name, norm, _ in norms(model):
        fused = isinstance(norm, (SpectralNorm, SpectralNormHook))
        why = _NOT_YET
        if type(norm) not in (_SpectralNorm, StockHook):
            why = f"{type(norm).__name__} is a subclass of torch's"
        yield Row(_join(paths[layer], name), "spectral norm", fused, "" if fused else why)


_NOT_YET = "fastgan.fuse has not been called"


def _rows_of_chain(path: str, chain: nn.Module) -> Iterator[Row]:
    named = [(name, layer) for name, layer in chain._modules.items() if layer is not None]
    yield from _rows_of_layers(path, named, isinstance(chain, Fused))


def _rows_of_layers(path: str, named: list[tuple[str, nn.Module]], fused: bool) -> Iterator[Row]:
    layers = [layer for _, layer in named]
    classes = classes_of(layers)
    while layers:
        length, run = next(matches(layers, classes), (1, None))
        if run is not None:
            names = [name for name, _ in named[:length] if name]
            pattern = " → ".join(type(layer).__name__ for layer in layers[:length])
            place = _join(path, "–".join(dict.fromkeys((names[0], names[-1])))) if names else path or "(the model)"
            yield Row(place, pattern, fused, "" if fused else _NOT_YET)
        elif isinstance(layers[0], _LISTED) and not _survey(layers[0])[0]:
            is_reversal = isinstance(layers[0], REVERSAL)
            missing = "no plain nn.Linear follows it" if is_reversal else f"there is no pattern for {_name(layers[0])}"
            yield _row_of_layer(_join(path, named[0][0]), layers[0], _obstacle(layers[0]) or missing)
        named, layers, classes = named[length:], layers[length:], classes[length:]


def _rows_of_forward(path: str, module: nn.Module, patterns: list[Pattern | ChainCall]) -> Iterator[Row]:
    fused = isinstance(module, FusedForward)
    for found in patterns:
        if isinstance(found, ChainCall):
            # What stands for a function has no name.
            names = [layer if isinstance(layer, str) else "" for layer in found.layers]
            yield from _rows_of_layers(path, list(zip(names, found.examples(module), strict=True)), fused)
        else:
            yield Row(path or "(the model)", str(found), fused, "" if fused else _NOT_YET)


def _name(module: nn.Module) -> str:
    return (module._unfused if isinstance(module, _Made) else type(module)).__name__


def _row_of_layer(place: str, layer: nn.Module, why_not: str) -> Row:
    name = _name(layer)
    return Row(place, name, True, "") if isinstance(layer, _OURS) else Row(place, name, False, why_not)


def _obstacle(layer: nn.Module) -> str:
    """What of a layer itself keeps it out of every pattern; nothing where it may be in one."""
    attached, name = attachment(layer), _name(layer)
    if attached:
        return f"it has {attached}"
    if parametrize.is_parametrized(layer):
        return f"its {' and '.join(layer.parametrizations)} is parametrized"  # type: ignore[arg-type]
    base = next((base for base in CONV + NORM if isinstance(layer, base)), None)
    return "" if base in (None, type(layer)) else f"{name} is a subclass of {base.__name__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
