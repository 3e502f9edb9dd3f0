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

from fastgan import backend, ops
from fastgan.ops._autograd import is_checkpointed, is_transformed
from fastgan.ops._tensors import DTYPES

Module = TypeVar("Module", bound=nn.Module)

# ── One weight ───────────────────────────────────────────────────────────────────────────────────────────────────────


class _Call(NamedTuple):
    """What the operator is given of one weight."""

    original: Tensor  # as the layer has it, and …
    weight: Tensor  # … as the operator is to see it
    u: Tensor
    v: Tensor
    dim: int
    n_power_iterations: int
    eps: float

    def if_served(self) -> "_Call | None":
        """Itself where the operator takes it. Where not, torch has an answer, or an error of its own."""
        weight, tensors = self.weight, (self.original, self.u, self.v)
        is_served = (
            weight.numel() > 0
            and weight.dtype in DTYPES
            and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
            and all(t.dtype == weight.dtype and t.device == weight.device for t in tensors)
            and backend.serving(weight.device.type) != "reference"
            and not is_transformed()
            and not torch.jit.is_tracing()
        )
        return self if is_served else None


class SpectralNorm(_SpectralNorm):
    """W / σ(W) as torch parametrises it, by `fastgan.ops.spectral_norm`; `fastgan.spectral_norm` registers it."""

    def call(self, weight: Tensor) -> _Call | None:
        if weight.dim() < 2:  # a vector has no u and v
            return None
        iterations = self.n_power_iterations if self.training else 0
        return _Call(weight, weight, self._u, self._v, self.dim, iterations, self.eps).if_served()

    def forward(self, weight: Tensor) -> Tensor:
        call = self.call(weight)
        return super().forward(weight) if call is None else _normalise(self, call)


class SpectralNormHook(Hook):
    """The same for the older `torch.nn.utils.spectral_norm`, a hook, which iterates v first and then u: that is what the
    operator does of Wᵀ."""

    def call(self, layer: nn.Module, iterates: bool) -> _Call | None:
        original, u, v = (getattr(layer, self.name + part) for part in ("_orig", "_u", "_v"))
        if not original.is_contiguous():  # of channels_last Wᵀ would be a copy
            return None
        iterations = self.n_power_iterations if iterates else 0
        return _Call(original, self.reshape_weight_to_matrix(original), v, u, 1, iterations, self.eps).if_served()

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        call = self.call(module, do_power_iteration)
        if call is None:
            return super().compute_weight(module, do_power_iteration)
        normalised = _normalise((module, self.name), call)
        return normalised.view(call.original.movedim(self.dim, 0).shape).movedim(0, self.dim)


def _parametrization(layer: nn.Module, name: str) -> Any:
    """torch's list of what a weight goes through; empty where it is none's."""
    return layer.parametrizations[name] if parametrize.is_parametrized(layer, name) else ()  # type: ignore[index]


class Norm(NamedTuple):
    """A spectral norm of a layer, torch's or ours."""

    layer: nn.Module
    name: str  # of the weight
    norm: _SpectralNorm | Hook


def norms(model: nn.Module) -> Iterator[Norm]:
    """All in `model` that see the weight as the layer has it."""
    for layer in model.modules():
        if parametrize.is_parametrized(layer):
            for name in cast(nn.ModuleDict, layer.parametrizations):
                first = _parametrization(layer, name)[0]
                if isinstance(first, _SpectralNorm):
                    yield Norm(layer, name, first)
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, Hook):
                yield Norm(layer, hook.name, hook)


# ── All weights of a forward ─────────────────────────────────────────────────────────────────────────────────────────
# torch iterates whenever a weight is looked at. Before a model's forward all are computed, once each; a layer that looks at
# its weight takes its share, which is when that iteration counts. One that looks again, or looks from elsewhere, computes
# alone.


class _Share:
    """A normalised weight, and the u and v that its buffers will have."""

    def __init__(self, model: nn.Module, call: _Call, normalised: Tensor, u: Tensor, v: Tensor) -> None:
        self.model, self.call, self.normalised, self.u, self.v = model, call, normalised, u, v
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [t._version for t in (self.call.original, self.call.u, self.call.v) if not t.is_inference()]

    def answers(self, call: _Call) -> bool:
        """Whether computing now would give the same, in the same graph."""
        own, needs_graph = self.call, torch.is_grad_enabled() and call.original.requires_grad
        return (
            all(a is b for a, b in ((own.original, call.original), (own.u, call.u), (own.v, call.v)))
            and own[4:] == call[4:]
            and self.versions == self._versions()
            and self.normalised.requires_grad == needs_graph
            and not is_checkpointed()
        )


class _Shares(threading.local):
    """Of the models whose forward runs in this thread."""

    def __init__(self) -> None:
        self.waiting: dict[Hashable, _Share] = {}
        self.taken: list[_Share] = []

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
                    [vector for share in self.taken for vector in (share.call.u, share.call.v)],
                    [vector for share in self.taken for vector in (share.u, share.v)],
                )
            self.taken = []


_shares = _Shares()


def _normalise(place: Hashable, call: _Call) -> Tensor:
    share = None if torch.compiler.is_compiling() else _shares.take(place, call)
    if share is not None:
        return share.normalised
    (normalised,), (u,), (v,) = ops.spectral_norm(
        [call.weight], [call.u], [call.v], [call.dim], call.n_power_iterations, call.eps
    )
    if call.n_power_iterations:
        with torch.no_grad():
            call.u.copy_(u)
            call.v.copy_(v)
    return normalised


def _calls(model: nn.Module) -> Iterator[tuple[Hashable, _Call]]:
    """What the next access of each weight in `model` will call, and where it looks for its share."""
    for layer, name, norm in norms(model):
        place: Hashable
        if isinstance(norm, SpectralNormHook):
            place, call = (layer, name), norm.call(layer, layer.training)
        elif isinstance(norm, SpectralNorm) and not parametrize._cache:  # else torch may have no need of it
            place, call = norm, norm.call(_parametrization(layer, name).original)
        else:
            continue
        if call is not None and place not in _shares.waiting:
            yield place, call


class Together:
    """The hooks of a model's forward that have all its spectral norms computed at once."""

    def before(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or is_transformed():
            return
        _shares.settle()
        alike: dict[tuple, list[tuple[Hashable, _Call]]] = {}
        for place, call in _calls(model):
            kind = (call.weight.dtype, call.weight.device, call.n_power_iterations, call.eps)
            alike.setdefault(kind, []).append((place, call))
        for (_, _, iterations, eps), found in alike.items():
            if len(found) > 1:
                places, calls = zip(*found, strict=True)
                _, weights, u, v, dims, _, _ = zip(*calls, strict=True)
                results = ops.spectral_norm(weights, u, v, dims, iterations, eps)
                for place, call, *tensors in zip(places, calls, *results, strict=True):
                    _shares.waiting[place] = _Share(model, call, *tensors)

    def after(self, model: nn.Module, args: tuple, output: Any) -> None:
        _shares.settle()
        for place in [place for place, share in _shares.waiting.items() if share.model is model]:
            del _shares.waiting[place]

    @classmethod
    def begin(cls, model: nn.Module) -> None:
        """Nothing where the model has such hooks."""
        if not any(isinstance(getattr(hook, "__self__", None), Together) for hook in model._forward_pre_hooks.values()):
            together = cls()
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
SERVED: dict[type, type] = {_SpectralNorm: SpectralNorm, Hook: SpectralNormHook}

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
    DataParallel, DDP, `remove_parametrizations` and `remove_spectral_norm` stay what they are. Returns `model` itself.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    found = [norm for _, _, norm in norms(model)]
    for norm in found:
        if type(norm) in SERVED:
            norm.__class__ = SERVED[type(norm)]
    if not found:
        for layer in list(model.modules()):
            if isinstance(layer, _NORMALISED) and "weight" in layer._parameters:
                spectral_norm(layer)
    Together.begin(model)
    return model
