"""The layers whose weights one launch serves: how each counts as a matrix, and where its results lie."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

# Where a result begins, so that whatever reads it can do so by its widest loads.
_ALIGNMENT_BYTES = 128


class Matrix(NamedTuple):
    """A weight whose rows lie along one axis: its memory is (cols / inner, rows, inner). Columns are counted in the order
    of memory; among those of a contiguous weight column c is c % turn * (cols / turn) + c / turn."""

    rows: int
    cols: int
    inner: int
    turn: int


class Layer(NamedTuple):
    """What a launch depends on of a layer: its place among all, its weight, and the axis of the rows."""

    place: int
    size: torch.Size
    channels_last: bool
    dim: int

    def matrix(self) -> Matrix:
        size, dim = self.size, self.dim
        if size.numel() >= 2**31:
            raise ValueError(f"a weight must have fewer than 2**31 elements, not {size.numel()}")
        rows, cols = size[dim], size.numel() // size[dim]
        if not self.channels_last:
            return Matrix(rows, cols, size[dim + 1 :].numel(), 1)
        return Matrix(rows, cols, cols, size[1]) if dim == 0 else Matrix(rows, cols, 1, 1)


class Results:
    """One buffer for a result of every layer: shapes and strides, and where each begins."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.size = 0
        self._alignment = _ALIGNMENT_BYTES // dtype.itemsize
        self._views: list[tuple[torch.Size, tuple[int, ...], int]] = []

    def add(self, size: Sequence[int], channels_last: bool = False) -> int:
        """The offset of the next."""
        like, start = _dense(torch.empty(size, device="meta"), channels_last), self.size
        self._views.append((like.shape, like.stride(), start))
        self.size += -(-like.numel() // self._alignment) * self._alignment
        return start

    def of(self, buffer: Tensor) -> list[Tensor]:
        return [buffer.as_strided(*view) for view in self._views]


Plan = TypeVar("Plan")


class Group(Generic[Plan]):
    """Some of the layers, which the same launches serve, as their plan says: plan(layers, dtype, device)."""

    def __init__(
        self, layers: Sequence[int], weights: Sequence[Tensor], dims: Sequence[int], plan: Callable[..., Plan]
    ) -> None:
        self._like = weights[0]
        self.layers = tuple(Layer(i, weights[i].shape, _is_channels_last(weights[i], dims[i]), dims[i]) for i in layers)
        self.plan = plan(self.layers, self._like.dtype, self._like.device)

    def matrices(self, tensors: Sequence[Any]) -> list[Tensor]:
        """The group's, each in its weight's order of memory."""
        return [_dense(tensors[layer.place], layer.channels_last) for layer in self.layers]

    def vectors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensors[layer.place].contiguous() for layer in self.layers]

    def buffer(self, results: Results) -> Tensor:
        return self._like.new_empty(results.size)

    def scratch(self, size: int) -> Tensor:
        return self._like.new_empty(size, dtype=accumulation_dtype(self._like.dtype))


def groups(
    layers: Iterable[int], weights: Sequence[Tensor], dims: Sequence[int], plan: Callable[..., Plan], most: int
) -> Iterator[Group[Plan]]:
    """At most so many layers each as one launch has room for in its arguments."""
    layers = list(layers)
    for start in range(0, len(layers), most):
        yield Group(layers[start : start + most], weights, dims, plan)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_channels_last(weight: Tensor, dim: int) -> bool:
    """Whether the channels lie innermost, and the kernels take that order as it is."""
    return weight.dim() in (4, 5) and dim < 2 and not weight.is_contiguous() and weight.stride(1) == 1


def _dense(tensor: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)
