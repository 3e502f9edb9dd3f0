"""The forward of spectral norm by one cooperative launch of CUDA C++, which waits inside for W v and for Wᵀu.

Signature and results are those of `fastgan_kernels.spectral_norm`. Addresses are arguments of the launch; the table depends
on shapes only, so that one which was built once serves every tensor of them, and a captured CUDA graph.
"""

from collections.abc import Sequence
from functools import cache

import torch
from fastgan_kernels._layers import Layer, Matrix, Results, accumulation_dtype, groups
from torch import Tensor

from fastgan.ops._tensors import DTYPES

# With so many rows there is enough to do for a warp to each; with so many to a column, for a warp beside each other.
_MANY_ROWS, _TALL = 64, 8
_WARP = 32


class _Plan:
    """What the blocks deal out among themselves, and where results lie, as csrc/cuda/spectral_norm.h has it."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> None:
        from fastgan import _cuda

        self.weights, self.us, self.vs = Results(dtype), Results(dtype), Results(dtype)
        self.items, self.scratch = [0, 0, 0], 0
        entries = []
        for layer in layers:
            matrix = layer.matrix()
            row_threads, item_cols = (
                _threads_to_a_row(matrix, _cuda.threads),
                _columns_to_a_block(matrix, _cuda.threads),
            )
            results = (
                self.weights.add(layer.size, layer.channels_last), self.us.add([matrix.rows]), self.vs.add([matrix.cols]),
            )  # fmt: skip
            entries.append([*matrix, row_threads, item_cols, *self.items, self.scratch, *results, layer.place])
            self.items[0] += -(-matrix.rows * row_threads // _cuda.threads)
            self.items[1] += -(-matrix.cols // item_cols)
            self.items[2] += -(-matrix.rows * matrix.cols // _cuda.element_item)
            self.scratch += matrix.rows + matrix.cols
        self.table = torch.tensor(entries, dtype=torch.int64, device=device)


# Tables are never given up: a captured graph may read them.
_cached_plan = cache(_Plan)


def _power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def _threads_to_a_row(matrix: Matrix, threads: int) -> int:
    if matrix.cols <= _WARP:
        return _power_of_two(matrix.cols)
    return _WARP if matrix.rows >= _MANY_ROWS else threads


def _columns_to_a_block(matrix: Matrix, threads: int) -> int:
    if matrix.rows < _TALL:
        return threads // _power_of_two(matrix.rows)
    return min(_power_of_two(matrix.cols), _WARP)


def forward(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """(W/σ of each layer, its u and v after the iterations, all σ): see `spectral_norm_forward`."""
    from fastgan import _cuda

    sigma = weights[0].new_empty(len(weights), dtype=accumulation_dtype(weights[0].dtype))
    normalised: list[Tensor] = []
    new_u: list[Tensor] = []
    new_v: list[Tensor] = []
    for group in groups(range(len(weights)), weights, dims, _cached_plan, _cuda.max_layers):
        plan = group.plan
        inputs = group.matrices(weights), group.vectors(u), group.vectors(v)
        outputs = [group.buffer(results) for results in (plan.weights, plan.us, plan.vs)]
        scratch = group.scratch(plan.scratch)
        with torch.cuda.device_of(sigma):
            _cuda.spectral_norm_forward(
                DTYPES[weights[0].dtype], plan.table.data_ptr(), plan.items,
                *([t.data_ptr() for t in tensors] for tensors in inputs), n_power_iterations, eps,
                *(t.data_ptr() for t in (*outputs, sigma, scratch)), _current_stream(sigma),
            )  # fmt: skip
        normalised += plan.weights.of(outputs[0])
        new_u += plan.us.of(outputs[1])
        new_v += plan.vs.of(outputs[2])
    return normalised, new_u, new_v, sigma


def _current_stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
