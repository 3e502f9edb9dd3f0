"""Spectral norms: of one layer as torch parametrises it, and of all layers of a model by one call of the operator."""

import threading
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm as Hook

from fastgan import backend
from fastgan.ops._autograd import is_checkpointed, is_transformed
from fastgan.ops._tensors import DTYPES
from fastgan.ops.spectral_norm import normalise

Module = TypeVar("Module", bound=nn.Module)

# ── One weight ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Call(NamedTuple):
    """What the operator is given of one weight."""

    weight: Tensor  # as the layer has it
    u: Tensor
    v: Tensor
    n_power_iterations: int
    eps: float
    dim: int
    hook: "SpectralNormHook | None" = None  # where the operator is to see Wᵀ

    @property
    def rows(self) -> int:
        """The axis of the weight that has the rows."""
        return self.dim if self.hook is None else self.hook.dim

    def is_served(self) -> bool:
        """Whether the operator takes it, on a device that has one. Where not, torch has an answer, or an error."""
        weight, u, v = self[:3]
        dtype, device = weight.dtype, weight.device
        return (
            dtype in DTYPES
            and weight.dim() > 1
            and weight.numel() > 0
            and type(weight) in _PLAIN
            and (type(u) in _PLAIN and u.dtype == dtype and u.device == device)
            and (type(v) in _PLAIN and v.dtype == dtype and v.device == device)
            # Of channels_last Wᵀ would be a copy.
            and (self.hook is None or weight.is_contiguous())
            and backend.serving(device.type) != "reference"
        )

    def operand(self) -> Tensor:
        return self.weight if self.hook is None else self.hook.reshape_weight_to_matrix(self.weight)

    def result(self, normalised: Tensor) -> Tensor:
        """The normalised weight with the layer's axes."""
        if self.hook is None:
            return normalised
        dim = self.hook.dim
        return normalised.view(self.weight.movedim(dim, 0).shape).movedim(0, dim)


_PLAIN = (Tensor, nn.Parameter)


# On the CPU torch's own operations are faster at fewer elements than these, of which each weight counts as some more: an
# operator in Python takes longer to call than small weights to read. In evaluation, where they are three, that is so of
# larger ones; but weights whose rows are another axis than the first they copy.
_SMALL, _EACH = 11 << 12, 1 << 12
_SMALL_READ, _SMALL_COPY = 1 << 21, 1 << 18


def _is_torchs(weight: Tensor, elements: int, dim: int, iterates: bool) -> bool:
    """Whether that is so for `elements` of which `weight` has some, of rows along `dim`, or of some along it. Asked before
    anything else, of every weight."""
    is_large = elements >= (_SMALL_READ if dim == 0 else _SMALL_COPY)
    return (
        weight.is_cpu
        and (elements < _SMALL or not (iterates or is_large or (weight.requires_grad and torch.is_grad_enabled())))
        and not torch.compiler.is_compiling()
        and backend.is_automatic()
    )


def _is_watched() -> bool:
    """Whether somebody looks into all operations, and is to see torch's own."""
    return is_transformed() or torch.jit.is_tracing()


def _iterate(matrix: Tensor, u: Tensor, v: Tensor, count: int, eps: float) -> None:
    """torch's power iteration, in place, to the bit: two thirds of its time are what `F.normalize` does besides."""
    with torch.no_grad():
        for _ in range(count):
            for product, vector, to in ((matrix, v, u), (matrix.t(), u, v)):
                torch.mv(product, vector, out=to)
                to.div_(torch.linalg.vector_norm(to, 2.0, 0, True).clamp_min_(eps))


def _divide(weight: Tensor, matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    if weight.requires_grad and torch.is_grad_enabled():
        u, v = u.clone(), v.clone()  # which the next iteration would change before backward
    return weight / torch.dot(u, torch.mv(matrix, v))


class SpectralNorm(_SpectralNorm):
    """W / σ(W) as torch parametrises it, by `fastgan.ops.spectral_norm`; `fastgan.spectral_norm` registers it."""

    def call(self, weight: Tensor) -> _Call:
        buffers = self._buffers  # a vector has none, and is not served
        iterations = self.n_power_iterations if self.training else 0
        return _Call(weight, buffers["_u"], buffers["_v"], iterations, self.eps, self.dim)  # type: ignore[arg-type]

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() < 2 or not weight.is_floating_point():
            return super().forward(weight)
        if (
            not _is_watched()
            and _is_torchs(weight, weight.numel() + _EACH, self.dim, self.training)
            and _shares.are_none()
        ):
            matrix, u, v = self._reshape_weight_to_matrix(weight), self._u, self._v
            if self.training:
                _iterate(matrix, u, v, self.n_power_iterations, self.eps)
            return _divide(weight, matrix, u, v)
        normalised = _normalise(self, self.call(weight))
        return super().forward(weight) if normalised is None else normalised


class SpectralNormHook(Hook):
    """The same for the older `torch.nn.utils.spectral_norm`, a hook, which iterates v first and then u: that is what the
    operator does of Wᵀ."""

    def call(self, layer: nn.Module, iterates: bool) -> _Call:
        weight, u, v = (getattr(layer, self.name + part) for part in ("_orig", "_u", "_v"))
        return _Call(weight, v, u, self.n_power_iterations if iterates else 0, self.eps, 1, self)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        call = self.call(module, do_power_iteration)
        weight, v, u = call[:3]
        if not weight.is_floating_point():
            return super().compute_weight(module, do_power_iteration)
        if (
            not _is_watched()
            and _is_torchs(weight, weight.numel() + _EACH, self.dim, do_power_iteration)
            and _shares.are_none()
        ):
            matrix = self.reshape_weight_to_matrix(weight)
            if do_power_iteration:
                _iterate(matrix.t(), v, u, self.n_power_iterations, self.eps)
            return _divide(weight, matrix, u, v)
        normalised = _normalise((module, self.name), call)
        return super().compute_weight(module, do_power_iteration) if normalised is None else normalised


def _parametrization(layer: nn.Module, name: str) -> Any:
    """torch's list of what a weight goes through; empty where it is none's."""
    return layer.parametrizations[name] if parametrize.is_parametrized(layer, name) else ()  # type: ignore[index]


class Norm(NamedTuple):
    """A spectral norm of a layer, torch's or ours."""

    layer: nn.Module
    name: str  # of the weight
    norm: _SpectralNorm | Hook
    holder: Any  # of the weight as it is without: torch's list of parametrisations, or the layer

    def weight(self) -> Tensor | None:
        """As it is without; None where the norm is one of the past."""
        return getattr(self.holder, f"{self.name}_orig" if isinstance(self.norm, Hook) else "original", None)


def norms(model: nn.Module) -> Iterator[Norm]:
    """All of matrices in `model` that see the weight as the layer has it."""
    for layer in model.modules():
        if parametrize.is_parametrized(layer):
            for name in cast(nn.ModuleDict, layer.parametrizations):
                holder = _parametrization(layer, name)
                if isinstance(holder[0], _SpectralNorm) and holder.original.dim() > 1:
                    yield Norm(layer, name, holder[0], holder)
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, Hook):
                yield Norm(layer, hook.name, hook, layer)


# ── All weights of a forward ─────────────────────────────────────────────────────────────────────────────────────────
# torch iterates whenever a weight is looked at. Before a model's forward all are computed, once each; a layer that looks at
# its weight takes its share, which is when that iteration counts. One that looks again, or looks from elsewhere, computes
# alone.


class _Share:
    """A normalised weight, and the u and v that its buffers will have."""

    def __init__(self, model: nn.Module, call: _Call, normalised: Tensor, u: Tensor, v: Tensor) -> None:
        self.model, self.call, self.normalised, self.u, self.v = model, call, normalised, u, v
        self.versions = _versions(call)

    def answers(self, call: _Call) -> bool:
        """Whether computing now would give the same, in the same graph."""
        own = self.call
        return (
            own.weight is call.weight
            and own.u is call.u
            and own.v is call.v
            and own.n_power_iterations == call.n_power_iterations
            and self.versions == _versions(call)
            and self.normalised.requires_grad == (call.weight.requires_grad and torch.is_grad_enabled())
            and not is_checkpointed()
        )


def _versions(call: _Call) -> tuple[int, ...]:
    return tuple([0 if t.is_inference() else t._version for t in call[:3]])


class _Shares(threading.local):
    """Of the models whose forward runs in this thread."""

    def __init__(self) -> None:
        self.waiting: dict[Hashable, _Share] = {}
        self.taken: list[_Share] = []

    def are_none(self) -> bool:
        return not (self.waiting or self.taken)

    def take(self, place: Hashable, call: _Call) -> _Share | None:
        """The share that waits for the weight at `place`; else None, and the buffers are as they should be."""
        share = self.waiting.pop(place, None)
        if share is None or not share.answers(call):
            self.settle()
            return None
        if call.n_power_iterations:
            self.taken.append(share)
        return share

    def settle(self) -> None:
        """Writes the buffers of what has been taken."""
        if self.taken:
            with torch.no_grad():
                torch._foreach_copy_(
                    [vector for share in self.taken for vector in share.call[1:3]],
                    [vector for share in self.taken for vector in (share.u, share.v)],
                )
            self.taken = []


_shares = _Shares()


def _normalise(place: Hashable, call: _Call) -> Tensor | None:
    """The layer's normalised weight; None where that is torch's affair."""
    share = None if torch.compiler.is_compiling() else _shares.take(place, call)
    if share is not None:
        return call.result(share.normalised)
    weight, iterates = call.weight, call.n_power_iterations > 0
    if _is_watched() or not call.is_served() or _is_torchs(weight, weight.numel() + _EACH, call.rows, iterates):
        return None
    (normalised,), (u,), (v,) = normalise(
        [call.operand()], [call.u], [call.v], [call.dim], call.n_power_iterations, call.eps
    )
    if iterates:
        with torch.no_grad():
            call.u.copy_(u)
            call.v.copy_(v)
    return call.result(normalised)


class Together:
    """The hooks of a model's forward that have all its spectral norms computed at once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.look()

    def look(self) -> None:
        """Which norms the model has, how many elements are theirs, and the last axis that has rows of one."""
        self.norms = list(norms(self.model))
        self.rows = max((norm.norm.dim for norm in self.norms), default=0)
        self.elements = sum(weight.numel() + _EACH for norm in self.norms if (weight := norm.weight()) is not None)

    def before(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or _is_watched():
            return
        found = self.norms if model is self.model else list(norms(model))  # the other is a replica
        weight = found[0].weight() if found else None
        # Else each layer will find the same.
        if weight is None or not _is_torchs(weight, self.elements, self.rows, model.training):
            self.compute(model, found)

    def compute(self, model: nn.Module, norms: list[Norm]) -> None:
        _shares.settle()
        alike: dict[tuple, list[tuple[Hashable, _Call]]] = {}
        for layer, name, norm, holder in norms:
            place: Hashable
            if isinstance(norm, SpectralNormHook) and hasattr(layer, f"{name}_orig"):
                place, call = (layer, name), norm.call(layer, layer.training)
            elif isinstance(norm, SpectralNorm) and not parametrize._cache:  # else torch may have no need of it
                place, call = norm, norm.call(holder.original)
            else:
                continue
            if place not in _shares.waiting and call.is_served():
                alike.setdefault((call.weight.dtype, call.weight.device, *call[3:5]), []).append((place, call))
        for (_, _, iterations, eps), found in alike.items():
            calls = [call for _, call in found]
            elements = sum(call.weight.numel() + _EACH for call in calls)
            rows = max(call.rows for call in calls)
            if len(found) > 1 and not _is_torchs(calls[0].weight, elements, rows, iterations > 0):
                weights, u, v, _, _, dims, _ = map(list, zip(*calls, strict=True))
                weights = [call.operand() for call in calls]
                results = normalise(weights, u, v, dims, iterations, eps)
                for (place, call), *tensors in zip(found, *results, strict=True):
                    _shares.waiting[place] = _Share(model, call, *tensors)

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        if _shares.are_none():
            return
        _shares.settle()
        left = [place for place, share in _shares.waiting.items() if share.model is model]
        for place in left:
            del _shares.waiting[place]
        if left and model is self.model:  # perhaps these layers are gone
            self.look()

    @classmethod
    def begin(cls, model: nn.Module) -> None:
        """Where the model has such hooks, they look for its norms again."""
        for hook in model._forward_pre_hooks.values():
            together = getattr(hook, "__self__", None)
            if isinstance(together, Together):
                together.look()
                return
        together = cls(model)
        model.register_forward_pre_hook(together.before, prepend=True)
        model.register_forward_hook(together.after, always_call=True)

    @classmethod
    def end(cls, model: nn.Module) -> None:
        """Removes the hooks of this very class."""
        for registered in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in registered.items() if type(getattr(hook, "__self__", None)) is cls]:
                del registered[key]
                model._forward_hooks_always_called.pop(key, None)


# ── Functions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def spectral_norm(
    module: Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> Module:
    """W / σ(W) for a weight of `module`: `torch.nn.utils.parametrizations.spectral_norm`, by `fastgan.ops.spectral_norm`.

    Arguments, buffers (`_u`, `_v`), state_dict, numbers and random numbers are torch's: 15 iterations when it is registered,
    `n_power_iterations` at each access in training, none in evaluation. A weight with one axis is divided by its norm.
    Twice differentiable by kernels, further by the definition; tensors that the operator does not take (complex ones, say)
    are torch's affair. Returns `module` itself. `fastgan.spectral_norm_all` computes all norms of a model at once.

    Raises:
        ValueError: `module` has no tensor of that name, or n_power_iterations < 1.
        IndexError: dim is no axis of the weight.
        RuntimeError: the weight is spectrally normalised already, which torch's parametrisation takes for a wish.
    """
    if any(isinstance(part, _SpectralNorm) for part in _parametrization(module, name)):
        raise RuntimeError(f"Cannot register two spectral norms on the same parameter {name}")
    parametrizations.spectral_norm(module, name, n_power_iterations, eps, dim)
    _parametrization(module, name)[-1].__class__ = SpectralNorm
    return module


# torch's classes, and ours that compute the same.
_SERVED: dict[type, type] = {_SpectralNorm: SpectralNorm, Hook: SpectralNormHook}

_NORMALISED = (_ConvNd, nn.Linear, nn.Embedding)


def spectral_norm_all(model: Module) -> Module:
    """Have one call of the operator compute all spectral norms of `model`, before each of its forwards; in training one
    iteration of each.

    Layers that torch has normalised, by its parametrisation or by the older hook `torch.nn.utils.spectral_norm`, and those
    of `fastgan.spectral_norm`, are all served. Where there is none, every convolution, transposed convolution, linear layer
    and embedding gets one of `fastgan.spectral_norm`, as the critics of Miyato et al. 2018 have: to have it on some layers
    only, normalise these before.

    The weights and buffers have the values that they would have in torch, which iterates at every access: a layer that is
    called twice iterates twice, one that is not called does not, and access from outside of the forward computes alone, as
    does all under torch.compile and in a `torch.utils.checkpoint`. State_dicts, `parametrize.cached()`, deepcopy,
    DataParallel, DDP, `remove_parametrizations` and `remove_spectral_norm` stay what they are. Layers that are normalised
    later compute alone until this is called again. Returns `model` itself.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    found = [norm.norm for norm in norms(model)]
    for norm in found:
        if type(norm) in _SERVED:
            norm.__class__ = _SERVED[type(norm)]
    if not found:
        for layer in list(model.modules()):
            if isinstance(layer, _NORMALISED) and "weight" in layer._parameters:
                spectral_norm(layer)
    Together.begin(model)
    return model
