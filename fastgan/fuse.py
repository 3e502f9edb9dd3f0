"""`fuse(model)`: the same model, with the chains in its `nn.Sequential` containers computed by fused operators.

No layer is replaced or changed. A container gets a subclass of its own class, whose `forward` looks at the children at
each call: where some of them make a pattern it runs the operator, and the others it calls. So whatever reads or edits a
model finds what it has always found, and `unfuse` has only the class to give back.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from fastgan.nn.conv_norm_act import ConvBnAct2d, ConvTransposeBnAct2d, conv2d, conv_batch_norm_act
from fastgan.nn.norm_act import Activation, BatchNormAct2d, attachment, batch_norm_act
from fastgan.ops._autograd import is_transformed
from fastgan.ops._tensors import DTYPES, is_channels_last
from fastgan.ops.conv import is_autocast

Model = TypeVar("Model", bound=nn.Module)

# ── Patterns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _conv_norm_act(x: Tensor, conv: Any, norm: Any, act: nn.Module | None = None) -> Tensor:
    return conv_batch_norm_act(x, conv, norm, Activation.of(act), keep_layout=False)


def _conv(x: Tensor, conv: Any) -> Tensor:
    return conv2d(x, conv, keep_layout=False)


def _norm_act(x: Tensor, norm: Any, act: nn.Module | None = None) -> Tensor:
    return batch_norm_act(x, norm, Activation.of(act))


CONV = (nn.Conv2d, nn.ConvTranspose2d)
NORM = (nn.BatchNorm2d,)
ACT = (nn.ReLU, nn.LeakyReLU)

# Consecutive layers of exactly these classes, and what computes them at once. The longest that fits is taken.
PATTERNS: tuple[tuple[tuple[tuple[type[nn.Module], ...], ...], Callable[..., Tensor]], ...] = (
    ((CONV, NORM, ACT), _conv_norm_act),
    ((CONV, NORM), _conv_norm_act),
    ((CONV,), _conv),
    ((NORM, ACT), _norm_act),
    ((NORM,), _norm_act),
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
    return tuple(None if attachment(layer) else type(layer) for layer in layers)


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
            params = layer.running_mean if layer.weight is None else layer.weight
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


class Fused(nn.Sequential):
    """Stands before the class of a container that `fuse` has found."""

    _unfused: type[nn.Sequential]

    def forward(self, input):
        if torch.jit.is_scripting():  # compiles this branch only
            for module in self:
                input = module(input)
            return input
        else:
            return _restore(*self._run(input, None))

    def _run(self, x: Any, stock: torch.memory_format | None) -> tuple[Any, torch.memory_format | None]:
        """The children's output for x, and the layout that it owes.

        Convolutions leave their output in the layout that is fast. Where that is not the layout that stock torch would
        have, `stock` names it, and whoever can tell the difference gets the tensor restored.
        """
        layers = list(self)
        classes: Classes = (None,) * len(layers) if _is_observed() else _classes(layers)
        while layers:
            head, head_class = layers[0], classes[0]
            length, run = _choose(x, layers, classes)
            if run is not None:
                if stock is None:
                    stock = torch.channels_last if is_channels_last(x) else torch.contiguous_format
                if isinstance(head, CONV) and is_channels_last(head.weight):
                    stock = torch.channels_last
                x = run(x, *layers[:length])
                if x.is_contiguous(memory_format=stock):
                    stock = None
            elif isinstance(head, Fused) and head_class is not None:
                x, stock = head._run(x, stock)
            else:
                if head_class not in LAYOUT_BLIND:
                    x, stock = _restore(x, stock), None
                x = head(x)
            layers, classes = layers[length:], classes[length:]
        return x, stock

    def extra_repr(self) -> str:
        fused = [f"fused ({row.place}): {row.pattern}" for row in _rows_of_chain("", self) if row.fused]
        return "\n".join([*filter(None, [super().extra_repr()]), *fused])

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Pickles as the unfused module, to be fused again: the class is made at run time and has no name to import."""
        make, args, *state = cast(tuple, super().__reduce_ex__(protocol))
        parts = [self._unfused if part is type(self) else part for part in (make, *args)]
        return (_remake, tuple(parts), *state)


def _restore(x: Any, stock: torch.memory_format | None) -> Any:
    return x if stock is None else x.contiguous(memory_format=stock)


_FUSED: dict[type[nn.Module], type[Fused]] = {}  # the class that stands in for each


def _set_fused(module: nn.Module) -> nn.Module:
    """Swap the class of a container."""
    unfused = type(module)
    if unfused not in _FUSED:
        namespace = {"_unfused": unfused, "__module__": __name__}
        _FUSED.setdefault(unfused, type(f"Fused{unfused.__name__}", (Fused, unfused), namespace))
    module.__class__ = _FUSED[unfused]
    return module


def _remake(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return _set_fused(make(*args))


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
    """Whether there are patterns for something in the chain, or in a chain that it holds."""
    return _is_chain(module) and any(isinstance(child, CONV + NORM) or _can_fuse(child) for child in module.children())


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
        if not isinstance(module, Fused) and _can_fuse(module):
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

_OURS = (BatchNormAct2d, ConvBnAct2d, ConvTransposeBnAct2d)
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
            holder, overrides = type(parent).__name__, isinstance(parent, nn.Sequential)
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


def _row_of_layer(place: str, layer: nn.Module, why_not: str) -> Row:
    name = type(layer).__name__
    return Row(place, name, True, "") if isinstance(layer, _OURS) else Row(place, name, False, why_not)


def _obstacle(layer: nn.Module) -> str:
    """Why a layer in a chain is in no pattern."""
    attached, name = attachment(layer), type(layer).__name__
    if attached:
        return f"it has {attached}"
    if parametrize.is_parametrized(layer):
        return f"its {' and '.join(layer.parametrizations)} is parametrized"  # type: ignore[arg-type]
    base = next((base for base in CONV + NORM if isinstance(layer, base)), None)
    return f"there is no pattern for {name}" if base is None else f"{name} is a subclass of {base.__name__}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
