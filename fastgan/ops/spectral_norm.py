"""Spectral normalisation of many weights at once, exact to the second derivative."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, register_gradient
from fastgan.ops._kernels import register_kernels
from fastgan.ops._tensors import (
    DTYPES,
    INTEGERS,
    accumulation_dtype,
    check_count,
    check_eps,
    check_input,
    check_is_tensor,
    dense,
    is_channels_last,
    remember_edges,
    will_use_of_list,
)

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def matrix(weight: Tensor, dim: int) -> Tensor:
    """The weight with rows along `dim`, and the other axes, in order, as columns."""
    return weight.movedim(dim, 0).flatten(1)


def reference(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`spectral_norm` in plain torch."""
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for weight, left, right, dim in zip(weights, u, v, dims, strict=True):
        w = matrix(weight, dim)
        least = min(eps, torch.finfo(weight.dtype).max)  # torch takes no number that the dtype does not have
        with torch.no_grad():
            for _ in range(n_power_iterations):
                left = F.normalize(torch.mv(w, right), dim=0, eps=least)
                right = F.normalize(torch.mv(w.t(), left), dim=0, eps=least)
            if n_power_iterations == 0:
                left, right = left.clone(), right.clone()
        sigma = torch.dot(left, torch.mv(w, right))
        for kind, result in zip(results, (weight / sigma, left, right), strict=True):
            kind.append(result)
    return results


def _double_backward_reference(gg: Tensor, grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, dim: int) -> tuple:
    """The double backward of one weight, of which the third derivative is made. σ is computed anew, as a function of W."""
    acc = accumulation_dtype(weight.dtype)
    gg, g, w, u, v = (t.to(acc) for t in (matrix(gg, dim), matrix(grad, dim), matrix(weight, dim), u, v))
    sigma, c = (u @ (w @ v)), u @ (gg @ v)
    g_grad = gg / sigma - c / sigma**2 * w
    outer = 2 * (g * w).sum() * c / sigma**3 - (gg * g).sum() / sigma**2
    g_weight = outer * torch.outer(u, v) - c / sigma**2 * g
    shape = weight.movedim(dim, 0).shape
    return tuple(t.view(shape).movedim(0, dim).to(weight.dtype) for t in (g_grad, g_weight))


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# All tensors of a call have one dtype and device, sigma (n,) the type of accumulation. u and v are constants to every
# derivative.

torch.library.define(
    "fastgan::spectral_norm",
    "(Tensor[] weights, Tensor[] u, Tensor[] v, int[] dims, int n_power_iterations, float eps) "
    "-> (Tensor[] normalised, Tensor[] new_u, Tensor[] new_v, Tensor sigma)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::spectral_norm_backward",
    "(Tensor[] grads, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, int[] dims) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::spectral_norm_double_backward",
    "(Tensor[] ggs, Tensor[] grads, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, int[] dims) "
    "-> (Tensor[] g_grads, Tensor[] g_weights)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _like(weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(dense(w, is_channels_last(w))) for w in weights]


def _empty_sigma(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=accumulation_dtype(weights[0].dtype))


@torch.library.register_fake("fastgan::spectral_norm")
def _(weights, u, v, dims, n_power_iterations, eps):
    return _like(weights), [t.new_empty(t.shape) for t in u], [t.new_empty(t.shape) for t in v], _empty_sigma(weights)


@torch.library.register_fake("fastgan::spectral_norm_backward")
def _(grads, weights, u, v, sigma, dims):
    return _like(weights)


@torch.library.register_fake("fastgan::spectral_norm_double_backward")
def _(ggs, grads, weights, u, v, sigma, dims):
    return _like(weights), _like(weights)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Saved:
    """What a forward keeps for its backward.

    Not in the node's saved tensors: they are freed by the first backward pass that comes through any of the weights, but
    where networks are independent of each other, a pass through each is right. So this checks what autograd would.
    """

    def __init__(self, weights: list[Tensor], u: list[Tensor], v: list[Tensor], sigma: Tensor, dims: list[int]) -> None:
        self.weights, self.u, self.v, self.sigma, self.dims = weights, u, v, sigma, dims
        self.versions = [w._version for w in weights]

    def of(self, chosen: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, list[int]]:
        for i in chosen:
            if self.weights[i]._version != self.versions[i]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                    f"spectrally normalised weight of shape {tuple(self.weights[i].shape)} is at version "
                    f"{self.weights[i]._version}; expected version {self.versions[i]}"
                )
        return _choose(chosen, self.weights, self.u, self.v, self.sigma, self.dims)


def _choose(chosen: list[int], weights, u, v, sigma: Tensor, dims) -> tuple:
    """The arguments of the weights that take part."""
    if len(chosen) == len(weights):
        return weights, u, v, sigma, dims
    part = torch.stack([sigma[i] for i in chosen])
    return *([of[i] for i in chosen] for of in (weights, u, v)), part, [dims[i] for i in chosen]


def _scatter(chosen: list[int], found: list[Tensor], count: int) -> list[Tensor | None]:
    results: list[Tensor | None] = [None] * count
    for i, grad in zip(chosen, found, strict=True):
        results[i] = grad
    return results


def _save_forward(ctx, inputs, output) -> None:
    weights, _, _, dims, _, _ = inputs
    _, u, v, sigma = output
    remember_edges(ctx, inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*u, *v, sigma)
    ctx.saved = _Saved(weights, u, v, sigma, dims)


def _backward(ctx, grads, _u, _v, _sigma):
    used = will_use_of_list(ctx, 0)
    chosen = [i for i, grad in enumerate(grads) if grad is not None and used[i]]
    n = len(grads)
    if not chosen:
        return [None] * n, [None] * n, [None] * n, None, None, None
    found = torch.ops.fastgan.spectral_norm_backward([grads[i] for i in chosen], *ctx.saved.of(chosen))
    return _scatter(chosen, found, n), [None] * n, [None] * n, None, None, None


register_gradient("spectral_norm", _backward, _save_forward)


def _save_backward(ctx, inputs, output) -> None:
    grads, weights, u, v, sigma, ctx.dims = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads, *weights, *u, *v, sigma)


def _double_backward(ctx, ggs):
    n = len(ggs)
    chosen = [i for i, gg in enumerate(ggs) if gg is not None]
    g_grads: list[Tensor | None] = [None] * n
    g_weights: list[Tensor | None] = [None] * n
    if chosen:
        *saved, sigma = ctx.saved_tensors
        grads, weights, u, v = (saved[i : i + n] for i in range(0, 4 * n, n))
        found = torch.ops.fastgan.spectral_norm_double_backward(
            [ggs[i] for i in chosen], [grads[i] for i in chosen], *_choose(chosen, weights, u, v, sigma, ctx.dims)
        )
        g_grads, g_weights = (_scatter(chosen, grads, n) for grads in found)
    return g_grads, g_weights, [None] * n, [None] * n, None, None


register_gradient("spectral_norm_backward", _double_backward, _save_backward)


def _save_double_backward(ctx, inputs, output) -> None:
    ggs, grads, weights, u, v, _, ctx.dims = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*ggs, *grads, *weights, *u, *v)


def _triple_backward(ctx, of_g_grads, of_g_weights):
    """By differentiating the definition of the double backward."""
    n = len(ctx.dims)
    kinds = [ctx.saved_tensors[i : i + n] for i in range(0, 5 * n, n)]
    grads: list[list[Tensor | None]] = [[None] * n for _ in range(5)]
    keeps_graph = torch.is_grad_enabled()
    for i, dim in enumerate(ctx.dims):
        gg, grad, weight, u, v = (kind[i] for kind in kinds)
        cotangents = (of_g_grads[i], of_g_weights[i])
        if cotangents == (None, None):
            continue
        with torch.enable_grad():
            # Views, so that the derivatives inside stop at the arguments and do not run on into what these were made of.
            inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (gg, grad, weight)]
            outputs = _double_backward_reference(inputs[0], inputs[1], inputs[2], u, v, dim)
            chosen = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None]
            found = torch.autograd.grad(
                [y for y, _ in chosen], inputs, [c for _, c in chosen], create_graph=keeps_graph, materialize_grads=True
            )
        for kind, result in zip(grads, found, strict=False):
            kind[i] = result
    return *grads, None, None


register_gradient("spectral_norm_double_backward", _triple_backward, _save_double_backward)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Layout(NamedTuple):
    """How a weight lies in memory: (A, D, B), of which the rows are D, and the columns (A, B).

    v counts the columns in the order of the axes; in channels_last that is not the order of memory, which the kernels have.
    """

    channels_last: bool
    shape: tuple[int, int, int]
    sizes: tuple[int, ...]  # of the axes that are columns
    order: tuple[int, ...] | None  # of these in memory, where it is another

    def to_memory(self, v: Tensor) -> Tensor:
        return v.contiguous() if self.order is None else v.view(self.sizes).permute(self.order).reshape(-1)

    def from_memory(self, v: Tensor) -> Tensor:
        if self.order is None:
            return v
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return v.view([self.sizes[i] for i in self.order]).permute(inverse).reshape(-1)


@functools.lru_cache(maxsize=4096)
def _layout(shape: torch.Size, channels_last: bool, dim: int) -> _Layout:
    axes = list(range(len(shape)))
    columns = [axis for axis in axes if axis != dim]
    if channels_last:
        axes = [0, *axes[2:], 1]
    place = axes.index(dim)
    sizes = [shape[axis] for axis in axes]
    order = tuple(columns.index(axis) for axis in axes if axis != dim)
    return _Layout(
        channels_last,
        (math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :])),
        tuple(shape[axis] for axis in columns),
        None if order == tuple(sorted(order)) else order,
    )


class _CppWeights:
    """What the three orders pass to C++ alike, as csrc/cpu/kernels.h declares it; holds the tensors that it gives addresses
    of."""

    def __init__(self, weights: list[Tensor], u: list[Tensor], v: list[Tensor], dims: list[int]) -> None:
        self.dtype = DTYPES[weights[0].dtype]
        self.layouts = [_layout(w.shape, is_channels_last(w), dim) for w, dim in zip(weights, dims, strict=True)]
        self.weights = self.laid_out(weights)
        acc = accumulation_dtype(weights[0].dtype)
        if acc != weights[0].dtype:
            u, v = [t.to(acc) for t in u], [t.to(acc) for t in v]
        self.u = [t.contiguous() for t in u]
        self.v = [layout.to_memory(t) for layout, t in zip(self.layouts, v, strict=True)]

    def laid_out(self, tensors: list[Tensor]) -> list[Tensor]:
        return [dense(t, layout.channels_last) for layout, t in zip(self.layouts, tensors, strict=True)]

    def empty(self) -> list[Tensor]:
        return [torch.empty_like(w) for w in self.weights]

    def described_by(self, struct: Callable, *others: list[Tensor]) -> list:
        """A struct for each weight, which ends with the addresses of the `others`."""
        kinds = (self.weights, self.u, self.v, *others)
        return [
            struct(layout.shape, *[t.data_ptr() for t in tensors])
            for layout, *tensors in zip(self.layouts, *kinds, strict=True)
        ]


def _cpp_forward(weights, u, v, dims, n_power_iterations, eps):
    from fastgan import _C

    given = _CppWeights(weights, u, v, dims)
    normalised, sigma = given.empty(), _empty_sigma(weights)
    new_u, new_v = [torch.empty_like(t) for t in given.u], [torch.empty_like(t) for t in given.v]
    structs = given.described_by(_C.SpectralForward, normalised, new_u, new_v)
    _C.spectral_norm_forward(given.dtype, structs, n_power_iterations, eps, sigma.data_ptr())
    if n_power_iterations == 0:
        return normalised, [t.clone() for t in u], [t.clone() for t in v], sigma
    new_v = [layout.from_memory(t) for layout, t in zip(given.layouts, new_v, strict=True)]
    if sigma.dtype != weights[0].dtype:
        new_u, new_v = ([t.to(weights[0].dtype) for t in vectors] for vectors in (new_u, new_v))
    return normalised, new_u, new_v, sigma


def _cpp_backward(grads, weights, u, v, sigma, dims):
    from fastgan import _C

    given = _CppWeights(weights, u, v, dims)
    grads, grad_weights = given.laid_out(grads), given.empty()
    structs = given.described_by(_C.SpectralBackward, grads, grad_weights)
    _C.spectral_norm_backward(given.dtype, structs, sigma.data_ptr())
    return grad_weights


def _cpp_double_backward(ggs, grads, weights, u, v, sigma, dims):
    from fastgan import _C

    given = _CppWeights(weights, u, v, dims)
    ggs, grads, g_grads, g_weights = given.laid_out(ggs), given.laid_out(grads), given.empty(), given.empty()
    structs = given.described_by(_C.SpectralDoubleBackward, ggs, grads, g_grads, g_weights)
    _C.spectral_norm_double_backward(given.dtype, structs, sigma.data_ptr())
    return g_grads, g_weights


def _cuda_forward(*args):
    from fastgan.ops import _spectral_norm_cuda  # which needs Triton

    return _spectral_norm_cuda.forward(*args)


register_kernels("spectral_norm", "spectral_norm", "spectral_norm_forward", _cpp_forward, cuda_cpp=_cuda_forward)
register_kernels("spectral_norm_backward", "spectral_norm", "spectral_norm_backward", _cpp_backward)
register_kernels(
    "spectral_norm_double_backward", "spectral_norm", "spectral_norm_double_backward", _cpp_double_backward
)


# ── The function ─────────────────────────────────────────────────────────────────────────────────────────────────────


def spectral_norm(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int] | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(W / σ of each weight, its u, its v), σ = uᵀ W v, after so many iterations of u = W v / ‖W v‖, v = Wᵀ u / ‖Wᵀ u‖
    (Miyato et al. 2018): what `torch.nn.utils.parametrizations.spectral_norm` computes, of all weights at once.

    The vectors given are left as they are; the ones returned are what the next call begins with.

    Args:
        weights: of any shapes with 2 axes or more; float32, float64, bfloat16 or float16, all of one dtype and device.
            Contiguous tensors and channels_last are fast, and the results keep the layout; other strides are copied first.
        u: of each weight (weight.shape[dim],), in its dtype.
        v: of each weight one number for each column, in its dtype; the columns are the axes but dim, in order.
        dims: of each weight the axis of its rows: by default 0, and of a transposed convolution 1.
        n_power_iterations: 0 leaves u and v as they are.
        eps: a norm that is smaller counts as eps.

    Sums are float32 (float64 for float64), and deterministic, for any number of threads. u and v are constants to every
    derivative: σ alone depends on W. Twice differentiable by its own kernels in the weights; higher orders are exact too,
    through the definition. Saved for backward: the weights, u and v.

    Raises:
        TypeError: a weight is not floating point, or the dtypes differ.
        ValueError: numbers, shapes, devices or settings that do not fit. The message names the argument.
    """
    for name, given in (("weights", weights), ("u", u), ("v", v), ("dims", [] if dims is None else dims)):
        if not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a list, with one for each weight, not {type(given).__name__}")
    weights, u, v = list(weights), list(u), list(v)
    dims = [0] * len(weights) if dims is None else list(dims)
    n_power_iterations = check_count("n_power_iterations", n_power_iterations, least=0)
    _check(weights, u, v, dims, eps)
    dims = [int(dim) % weight.dim() for dim, weight in zip(dims, weights, strict=True)]
    if not weights:
        return [], [], []
    stock = is_transformed() or backend.serving(weights[0].device.type) == "reference"
    if stock or any(weight.numel() == 0 for weight in weights):
        return reference(weights, u, v, dims, n_power_iterations, eps)
    return normalise(weights, u, v, dims, n_power_iterations, eps)


def normalise(
    weights: list[Tensor], u: list[Tensor], v: list[Tensor], dims: list[int], n_power_iterations: int, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """`spectral_norm` of arguments that a kernel takes, on a device that has one."""
    normalised, new_u, new_v, _ = torch.ops.fastgan.spectral_norm(weights, u, v, dims, n_power_iterations, eps)
    return normalised, new_u, new_v


def _check(weights: list, u: list, v: list, dims: list[int], eps: float) -> None:
    for name, given in (("u", u), ("v", v), ("dims", dims)):
        if len(given) != len(weights):
            raise ValueError(f"{name} must have one for each of {len(weights)} weights, not {len(given)}")
    check_eps(eps)
    for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
        name = f"weights[{i}]"
        check_input(weight, name)
        if weight.dim() < 2:
            raise ValueError(f"{name} must have 2 axes or more, not shape {tuple(weight.shape)}")
        if not isinstance(dim, INTEGERS):
            raise TypeError(f"dims[{i}] must be an integer, not {type(dim).__name__}")
        if not -weight.dim() <= dim < weight.dim():
            raise ValueError(f"dims[{i}] must be an axis of a weight with {weight.dim()}, not {dim}")
        rows = weight.shape[dim]
        sizes = {f"u[{i}]": (u[i], rows), f"v[{i}]": (v[i], weight.numel() // max(rows, 1))}
        for part, (vector, size) in sizes.items():
            check_is_tensor(part, vector)
            if vector.shape != (size,):
                raise ValueError(f"{part} must have shape ({size},), not {tuple(vector.shape)}")
        for part, tensor in ((name, weight), (f"u[{i}]", u[i]), (f"v[{i}]", v[i])):
            if tensor.dtype != weights[0].dtype:
                raise TypeError(f"{part} must be {weights[0].dtype} like weights[0], not {tensor.dtype}")
            if tensor.device != weights[0].device:
                raise ValueError(f"{part} is on {tensor.device}, weights[0] on {weights[0].device}")
