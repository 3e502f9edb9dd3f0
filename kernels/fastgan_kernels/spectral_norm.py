"""Spectral normalisation of all of a model's weights at once: power iteration, σ and W/σ in two launches, each derivative in
two.

A weight counts as a matrix W, whose rows lie along an axis `dim`. Its memory is (A, rows, B), as it also is with its
channels innermost; its columns are numbered in the order of memory, and `turn` leads to their places in v. The rows are
cut into blocks of HEIGHT, of which one program holds a layer's: a grid is all blocks of all layers. An iteration

    u = W v / ‖W v‖,    v = Wᵀu / ‖Wᵀu‖,    σ = uᵀW v

waits for all of W v before it has u. But ‖W v‖ is one number, by which Wᵀ W v can be divided later: the first launch leaves
each block's part of Wᵀ W v, and every program of the second adds up those of its layer, in order. So that the parts neither
vanish nor overflow before u would, each is divided by the norm of its own block's W v.

The tables that tell each program its block hold no addresses: these come as arguments of the launch. A table that was built
once serves every tensor of the same shapes, wherever it moves, and a captured CUDA graph needs no more.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan_kernels._layers import Group, Layer, Matrix, Results, accumulation_dtype, groups

# Elements to a tile (half as many of float64), and its heights, of which each layer has the one that makes the fewest
# steps: for few rows, for most layers, for few columns. A step waits for memory, so a tile is what registers can hold.
_TILE = 8192
_HEIGHTS = (1, 16, 256)
_NUM_WARPS = 16
# What a program adds up at once of what its layer's blocks have left.
_BLOCKS = 256
# A launch's arguments have to fit 4 KiB, with up to five addresses for each layer.
_MAX_LAYERS = 64


# -------------------------------------------------------------------------------------------------------------- layers


@triton.jit
def _program(table, owners):
    """The program's layer, its matrix, its block of the matrix's rows, the shape of its tiles, and where in buffers that all
    layers share it has its own: its block's first program, parts, normalised weight, u, v and σ.

    A matrix is its rows, columns, `inner`, `turn` and blocks: memory is (columns / inner, rows, inner).
    """
    layer = tl.load(owners + tl.program_id(0))
    block = tl.load(owners + tl.num_programs(0) + tl.program_id(0))
    entry = table + layer * 12
    matrix = (tl.load(entry).to(tl.int32), tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32),
              tl.load(entry + 3).to(tl.int32), tl.load(entry + 4).to(tl.int32))  # fmt: skip
    places = (tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9), tl.load(entry + 10),
              tl.load(entry + 11))  # fmt: skip
    return layer, matrix, block, tl.load(entry + 5), places


@triton.jit
def _pointer(addresses, layer, DTYPE: tl.constexpr):
    """The layer's tensor among arguments, which cannot be indexed by what is known at run time only."""
    address = addresses[0]
    for i in tl.static_range(1, len(addresses)):
        address = tl.where(layer == i, addresses[i], address)
    return address.to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def _block_rows(block, matrix, HEIGHT: tl.constexpr):
    row = block * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    return row, row < matrix[0]


@triton.jit
def _columns(start, matrix, WIDTH: tl.constexpr):
    """Columns from start on, and which of them exist."""
    col = start + tl.arange(0, WIDTH)[None, :]
    return col, col < matrix[1]


@triton.jit
def _offsets(row, col, matrix):
    """Of elements in memory."""
    inner = matrix[2]
    return (col // inner * matrix[0] + row) * inner + col % inner


@triton.jit
def _turned(col, matrix):
    """The places in v of columns."""
    turn = matrix[3]
    return col % turn * (matrix[1] // turn) + col // turn


@triton.jit
def _load_row_vector(u, row, row_ok, ACC: tl.constexpr):
    return tl.load(u + row, row_ok, 0.0).to(ACC)


@triton.jit
def _load_column_vector(v, col, col_ok, matrix, ACC: tl.constexpr):
    return tl.load(v + _turned(col, matrix), col_ok, 0.0).to(ACC)


@triton.jit
def _sum_of_blocks(values, blocks, SQUARE: tl.constexpr, BLOCKS: tl.constexpr):
    """Of one value, or its square, that each block has left."""
    total = tl.zeros([BLOCKS], values.dtype.element_ty)
    first = 0
    while first < blocks:
        b = first + tl.arange(0, BLOCKS)
        value = tl.load(values + b, b < blocks, 0.0)
        total += value * value if SQUARE else value
        first += BLOCKS
    return tl.sum(total)


@triton.jit
def _at_least(norm, eps, ACC: tl.constexpr):
    """max(norm, eps), through which a NaN passes."""
    bound = tl.full(norm.shape, eps, ACC)
    return tl.where(norm < bound, bound, norm)


# ------------------------------------------------------------------------------------------------------------- forward
# What a block of an iteration leaves in `parts`, after those of the layers before: the norm of its part of s = W v, this
# part, and the product of Wᵀ with this part over its norm. Without an iteration: its part of uᵀW v, where the norm is.


@triton.jit
def _iterated(parts, scale, col, col_ok, matrix, HEIGHT: tl.constexpr, ACC: tl.constexpr):
    """Those columns of Wᵀu, from all blocks."""
    rows, blocks = matrix[0], matrix[4]
    total = tl.zeros([HEIGHT, col.shape[1]], ACC)
    first = 0
    while first < blocks:
        b = first + tl.arange(0, HEIGHT)[:, None]
        norm = tl.load(parts + b, b < blocks, 0.0)
        part = tl.load(parts + blocks + rows + b * matrix[1] + col, (b < blocks) & col_ok, 0.0)
        total += norm * scale * part
        first += HEIGHT
    return tl.sum(total, 0, keep_dims=True)


@triton.jit
def _norm_of_rows(parts, matrix, eps, BLOCKS: tl.constexpr, ACC: tl.constexpr):
    """max(‖W v‖, eps)."""
    return _at_least(tl.sqrt(_sum_of_blocks(parts, matrix[4], True, BLOCKS)), eps, ACC)


@triton.jit
def _multiply(w, u, v, previous, parts, matrix, block, eps, BLOCKS: tl.constexpr, ACC: tl.constexpr,
              HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    blocks = matrix[4]
    row, row_ok = _block_rows(block, matrix, HEIGHT)
    products = tl.zeros([HEIGHT, WIDTH], ACC)
    squares = tl.zeros([1, WIDTH], ACC)
    if previous is not None:
        scale = 1.0 / _norm_of_rows(previous, matrix, eps, BLOCKS, ACC)
    start = 0
    while start < matrix[1]:
        col, col_ok = _columns(start, matrix, WIDTH)
        if previous is None:
            x = _load_column_vector(v, col, col_ok, matrix, ACC)
        else:
            x = _iterated(previous, scale, col, col_ok, matrix, HEIGHT, ACC)
            squares += x * x
        products += tl.load(w + _offsets(row, col, matrix), row_ok & col_ok, 0.0).to(ACC) * x
        start += WIDTH
    s = tl.sum(products, 1, keep_dims=True)
    if previous is not None:
        s /= _at_least(tl.sqrt(tl.sum(squares)), eps, ACC)
    if u is not None:
        tl.store(parts + block, tl.sum(s * _load_row_vector(u, row, row_ok, ACC)))
    else:
        norm = tl.sqrt(tl.sum(s * s))
        tl.store(parts + block, norm)
        tl.store(parts + blocks + row, s, row_ok)
        s /= tl.where(norm == 0, 1.0, norm)
        start = 0
        while start < matrix[1]:
            col, col_ok = _columns(start, matrix, WIDTH)
            product = tl.load(w + _offsets(row, col, matrix), row_ok & col_ok, 0.0).to(ACC) * s
            at = parts + blocks + matrix[0] + block * matrix[1] + col
            tl.store(at, tl.sum(product, 0, keep_dims=True), col_ok)
            start += WIDTH


@triton.jit(do_not_specialize=["weights", "us", "vs"])
def _multiply_kernel(table, owners, weights, us, vs, previous, parts, eps: tl.float64, SHAPES: tl.constexpr,
                     BLOCKS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """First launch, of which there is one for each iteration: from v, or what the launch before has left, to parts.

    us is given where there is no iteration.
    """
    layer, matrix, block, shape, places = _program(table, owners)
    offset = places[1]
    w = _pointer(weights, layer, DTYPE)
    u = _pointer(us, layer, DTYPE) if us is not None else None
    v = _pointer(vs, layer, DTYPE) if vs is not None else None
    before = previous + offset if previous is not None else None
    for i in tl.static_range(len(SHAPES)):
        if shape == i:
            _multiply(w, u, v, before, parts + offset, matrix, block, eps, BLOCKS, ACC, SHAPES[i][0], SHAPES[i][1])


@triton.jit
def _divide(w, u, v, parts, normalised, new_u, new_v, sigma, matrix, block, eps, BLOCKS: tl.constexpr,
            ACC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    blocks = matrix[4]
    row, row_ok = _block_rows(block, matrix, HEIGHT)
    if u is None:
        norm = _norm_of_rows(parts, matrix, eps, BLOCKS, ACC)
        tl.store(new_u + row, tl.load(parts + blocks + row, row_ok, 0.0) / norm, row_ok)
        squares = tl.zeros([1, WIDTH], ACC)
        start = 0
        while start < matrix[1]:
            col, col_ok = _columns(start, matrix, WIDTH)
            t = _iterated(parts, 1.0 / norm, col, col_ok, matrix, HEIGHT, ACC)
            squares += t * t
            start += WIDTH
        square = tl.sum(squares)
        length = _at_least(tl.sqrt(square), eps, ACC)
        s = square / length
    else:
        tl.store(new_u + row, tl.load(u + row, row_ok, 0.0), row_ok)
        s = _sum_of_blocks(parts, blocks, False, BLOCKS)
    # The blocks of rows share the columns of v.
    start = block * WIDTH
    while start < matrix[1]:
        col, col_ok = _columns(start, matrix, WIDTH)
        if u is None:
            x = _iterated(parts, 1.0 / norm, col, col_ok, matrix, HEIGHT, ACC) / length
        else:
            x = _load_column_vector(v, col, col_ok, matrix, ACC)
        tl.store(new_v + _turned(col, matrix), x, col_ok)
        start += blocks * WIDTH
    if block == 0:
        tl.store(sigma, s)
    start = 0
    while start < matrix[1]:
        col, col_ok = _columns(start, matrix, WIDTH)
        at = _offsets(row, col, matrix)
        ok = row_ok & col_ok
        tl.store(normalised + at, tl.load(w + at, ok, 0.0).to(ACC) / s, ok)
        start += WIDTH


@triton.jit(do_not_specialize=["weights", "us", "vs"])
def _divide_kernel(table, owners, weights, us, vs, parts, normalised, new_us, new_vs, sigma, eps: tl.float64,
                   SHAPES: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr,
                   ACC: tl.constexpr):  # fmt: skip
    """Last launch: σ, W/σ and the new u and v. us and vs are given where there is no iteration."""
    layer, matrix, block, shape, places = _program(table, owners)
    w = _pointer(weights, layer, DTYPE)
    u = _pointer(us, layer, DTYPE) if us is not None else None
    v = _pointer(vs, layer, DTYPE) if vs is not None else None
    parts += places[1]
    normalised += places[2]
    new_us += places[3]
    new_vs += places[4]
    sigma += places[5]
    for i in tl.static_range(len(SHAPES)):
        if shape == i:
            _divide(w, u, v, parts, normalised, new_us, new_vs, sigma, matrix, block, eps, BLOCKS, ACC,
                    SHAPES[i][0], SHAPES[i][1])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- derivatives
# What a block leaves in `sums`, (1 or 3, blocks of all layers): its parts of ⟨G, W⟩, ⟨GG, G⟩ and uᵀGG v.


@triton.jit
def _add(gg, g, w, u, v, sums, matrix, block, ACC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, row_ok = _block_rows(block, matrix, HEIGHT)
    gw = tl.zeros([HEIGHT, WIDTH], ACC)
    ggg = tl.zeros([HEIGHT, WIDTH], ACC)
    projected = tl.zeros([HEIGHT, WIDTH], ACC)
    start = 0
    while start < matrix[1]:
        col, col_ok = _columns(start, matrix, WIDTH)
        at = _offsets(row, col, matrix)
        ok = row_ok & col_ok
        grad = tl.load(g + at, ok, 0.0).to(ACC)
        gw += grad * tl.load(w + at, ok, 0.0).to(ACC)
        if gg is not None:
            seed = tl.load(gg + at, ok, 0.0).to(ACC)
            ggg += seed * grad
            projected += seed * _load_column_vector(v, col, col_ok, matrix, ACC)
        start += WIDTH
    out = sums + tl.program_id(0)
    tl.store(out, tl.sum(gw))
    if gg is not None:
        tl.store(out + tl.num_programs(0), tl.sum(ggg))
        rows = tl.sum(projected, 1, keep_dims=True) * _load_row_vector(u, row, row_ok, ACC)
        tl.store(out + 2 * tl.num_programs(0), tl.sum(rows))


@triton.jit(do_not_specialize=["ggs", "grads", "weights", "us", "vs"])
def _add_kernel(table, owners, ggs, grads, weights, us, vs, sums, SHAPES: tl.constexpr,
                BLOCKS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """First launch of either derivative: each block's sums. ggs, us and vs are given for the second."""
    layer, matrix, block, shape, _ = _program(table, owners)
    g = _pointer(grads, layer, DTYPE)
    w = _pointer(weights, layer, DTYPE)
    gg = _pointer(ggs, layer, DTYPE) if ggs is not None else None
    u = _pointer(us, layer, DTYPE) if us is not None else None
    v = _pointer(vs, layer, DTYPE) if vs is not None else None
    for i in tl.static_range(len(SHAPES)):
        if shape == i:
            # Three sums at once need more registers than one.
            WIDTH: tl.constexpr = SHAPES[i][1] if ggs is None else SHAPES[i][1] // 2
            _add(gg, g, w, u, v, sums, matrix, block, ACC, SHAPES[i][0], WIDTH)


@triton.jit
def _apply(gg, g, w, u, v, from_gg, from_g, from_w, from_uv, g_grad, g_weight, matrix, block, ACC: tl.constexpr,
           HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """g_weight = from_g G + from_uv u vᵀ and, of the second derivative, g_grad = from_gg GG + from_w W."""
    row, row_ok = _block_rows(block, matrix, HEIGHT)
    left = _load_row_vector(u, row, row_ok, ACC) * from_uv
    start = 0
    while start < matrix[1]:
        col, col_ok = _columns(start, matrix, WIDTH)
        at = _offsets(row, col, matrix)
        ok = row_ok & col_ok
        grad = tl.load(g + at, ok, 0.0).to(ACC)
        right = _load_column_vector(v, col, col_ok, matrix, ACC)
        tl.store(g_weight + at, from_g * grad + left * right, ok)
        if gg is not None:
            seed = tl.load(gg + at, ok, 0.0).to(ACC)
            tl.store(g_grad + at, from_gg * seed + from_w * tl.load(w + at, ok, 0.0).to(ACC), ok)
        start += WIDTH


@triton.jit(do_not_specialize=["grads", "us", "vs"])
def _backward_kernel(table, owners, grads, us, vs, sigma, sums, g_weights, SHAPES: tl.constexpr,
                     BLOCKS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    layer, matrix, block, shape, places = _program(table, owners)
    g = _pointer(grads, layer, DTYPE)
    u = _pointer(us, layer, DTYPE)
    v = _pointer(vs, layer, DTYPE)
    r = 1.0 / tl.load(sigma + places[5])
    gw = _sum_of_blocks(sums + places[0], matrix[4], False, BLOCKS)
    g_weights += places[2]
    for i in tl.static_range(len(SHAPES)):
        if shape == i:
            _apply(None, g, None, u, v, None, r, None, -gw * r * r, None, g_weights, matrix, block, ACC,
                   SHAPES[i][0], SHAPES[i][1])  # fmt: skip


@triton.jit(do_not_specialize=["ggs", "grads", "weights", "us", "vs"])
def _double_backward_kernel(table, owners, ggs, grads, weights, us, vs, sigma, sums, g_grads, g_weights,
                            SHAPES: tl.constexpr, BLOCKS: tl.constexpr, DTYPE: tl.constexpr,
                            ACC: tl.constexpr):  # fmt: skip
    layer, matrix, block, shape, places = _program(table, owners)
    gg = _pointer(ggs, layer, DTYPE)
    g = _pointer(grads, layer, DTYPE)
    w = _pointer(weights, layer, DTYPE)
    u = _pointer(us, layer, DTYPE)
    v = _pointer(vs, layer, DTYPE)
    r = 1.0 / tl.load(sigma + places[5])
    sums += places[0]
    gw = _sum_of_blocks(sums, matrix[4], False, BLOCKS)
    ggg = _sum_of_blocks(sums + tl.num_programs(0), matrix[4], False, BLOCKS)
    c = _sum_of_blocks(sums + 2 * tl.num_programs(0), matrix[4], False, BLOCKS)
    from_g = -c * r * r
    from_uv = (2.0 * gw * c * r - ggg) * r * r
    offset = places[2]
    for i in tl.static_range(len(SHAPES)):
        if shape == i:
            _apply(gg, g, w, u, v, r, from_g, from_g, from_uv, g_grads + offset, g_weights + offset, matrix, block,
                   ACC, SHAPES[i][0], SHAPES[i][1])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- launch


class _Plan:
    """How layers are cut into blocks, and where their results lie, as tables on the GPU."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> None:
        tile = _TILE // 2 if dtype == torch.float64 else _TILE
        shapes = tuple((height, tile // height) for height in _HEIGHTS)
        self.weights, self.us, self.vs = Results(dtype), Results(dtype), Results(dtype)
        self.parts = 0
        entries: list[list[int]] = []
        owners: list[tuple[int, int]] = []
        for layer in layers:
            matrix = layer.matrix()
            shape = _quickest(matrix, shapes)
            blocks = triton.cdiv(matrix.rows, shapes[shape][0])
            results = (
                self.weights.add(layer.size, layer.channels_last), self.us.add([matrix.rows]), self.vs.add([matrix.cols]),
            )  # fmt: skip
            owners += [(len(entries), block) for block in range(blocks)]
            entries.append([*matrix, blocks, shape, len(owners) - blocks, self.parts, *results, layer.place])
            self.parts += blocks + matrix.rows + blocks * matrix.cols
        self.programs = len(owners)
        self.table = torch.tensor(entries, dtype=torch.int64, device=device)
        self.owners = torch.tensor(owners, dtype=torch.int32, device=device).t().contiguous()
        self.options: dict[str, Any] = {
            "SHAPES": shapes,
            "BLOCKS": _BLOCKS,
            "DTYPE": _TRITON_DTYPES[dtype],
            "ACC": _TRITON_DTYPES[accumulation_dtype(dtype)],
            "num_warps": _NUM_WARPS,
        }


_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _quickest(matrix: Matrix, shapes: Sequence[tuple[int, int]]) -> int:
    """The shape whose programs read the fewest tiles in turn: their block of W twice, then what all blocks have left."""

    def steps(i: int) -> int:
        height, width = shapes[i]
        return triton.cdiv(matrix.cols, width) * (2 + triton.cdiv(triton.cdiv(matrix.rows, height), height))

    return min(range(len(shapes)), key=steps)


# Tables are never given up: a captured graph may read them.
_cached_plan = cache(_Plan)


def _groups(layers: Iterable[int], weights: Sequence[Tensor], dims: Sequence[int]) -> Iterator[Group[_Plan]]:
    return groups(layers, weights, dims, _cached_plan, _MAX_LAYERS)


def launch(kernel: Any, plan: _Plan, *args: Any) -> None:
    """Run a kernel on every block of a plan's layers. A list of tensors becomes their addresses; the caller holds them."""
    addresses = [tuple(t.data_ptr() for t in arg) if isinstance(arg, list) else arg for arg in args]
    with torch.cuda.device_of(plan.table):
        kernel[(plan.programs,)](plan.table, plan.owners, *addresses, **plan.options)


def spectral_norm_forward(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    n_power_iterations: int,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """(W/σ of each layer, its u and v after the iterations, all σ), in 1 + max(n_power_iterations, 1) launches.

    weights: n tensors of one dtype, float32, float64, bfloat16 or float16, on one device, which are contiguous or have
    their channels innermost, as W/σ then does too; other strides are copied first. u[i]: (weights[i].shape[dims[i]],);
    v[i]: of as many elements as a row has; both in the weights' dtype. An iteration is u = W v / max(‖W v‖, eps),
    v = Wᵀu / max(‖Wᵀu‖, eps); then σ = uᵀW v, (n,), float64 for float64, else float32. The results of a kind share one
    buffer. The first call of new shapes copies tables to the GPU, and cannot be captured.
    """
    sigma = weights[0].new_empty(len(weights), dtype=accumulation_dtype(weights[0].dtype))
    normalised: list[Tensor] = []
    new_u: list[Tensor] = []
    new_v: list[Tensor] = []
    for group in _groups(range(len(weights)), weights, dims):
        plan = group.plan
        matrices, us, vs = group.matrices(weights), group.vectors(u), group.vectors(v)
        fixed = (None, None) if n_power_iterations else (us, vs)
        parts = group.scratch(plan.parts)
        launch(_multiply_kernel, plan, matrices, fixed[0], vs, None, parts, eps)
        for _ in range(1, n_power_iterations):
            previous, parts = parts, group.scratch(plan.parts)
            launch(_multiply_kernel, plan, matrices, None, None, previous, parts, eps)
        buffers = [group.buffer(results) for results in (plan.weights, plan.us, plan.vs)]
        launch(_divide_kernel, plan, matrices, *fixed, parts, *buffers, sigma, eps)
        normalised += plan.weights.of(buffers[0])
        new_u += plan.us.of(buffers[1])
        new_v += plan.vs.of(buffers[2])
    return normalised, new_u, new_v, sigma


def spectral_norm_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
    dims: Sequence[int],
) -> list[Tensor | None]:
    """The gradients of the weights, G/σ - ⟨G, W⟩/σ² u vᵀ, in two launches; u and v are constants.

    grads: of W/σ; u, v, sigma: of the forward. A layer whose grad is None gets None.
    """
    results: list[Tensor | None] = [None] * len(weights)
    for group in _groups((i for i, g in enumerate(grads) if g is not None), weights, dims):
        plan = group.plan
        gs, ws, us, vs = group.matrices(grads), group.matrices(weights), group.vectors(u), group.vectors(v)
        sums, buffer = group.scratch(plan.programs), group.buffer(plan.weights)
        launch(_add_kernel, plan, None, gs, ws, None, None, sums)
        launch(_backward_kernel, plan, gs, us, vs, sigma, sums, buffer)
        for layer, g_weight in zip(group.layers, plan.weights.of(buffer), strict=True):
            results[layer.place] = g_weight
    return results


def spectral_norm_double_backward(
    ggs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
    dims: Sequence[int],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of Σ ⟨GG, grad_weight⟩ in the grads and the weights, in two launches.

    With c = uᵀGG v: g_grad = GG/σ - c/σ² W and g_weight = -c/σ² G + (2⟨G, W⟩c/σ³ - ⟨GG, G⟩/σ²) u vᵀ. A layer whose gg is
    None gets None twice; a grad that is None where gg is not counts as zero.
    """
    g_grads: list[Tensor | None] = [None] * len(weights)
    g_weights: list[Tensor | None] = [None] * len(weights)
    present = [i for i, gg in enumerate(ggs) if gg is not None]
    grads = [
        torch.zeros_like(w) if g is None and i in present else g
        for i, (g, w) in enumerate(zip(grads, weights, strict=True))
    ]
    for group in _groups(present, weights, dims):
        plan = group.plan
        seeds, gs, ws = group.matrices(ggs), group.matrices(grads), group.matrices(weights)
        us, vs = group.vectors(u), group.vectors(v)
        sums, buffers = group.scratch(3 * plan.programs), [group.buffer(plan.weights) for _ in range(2)]
        launch(_add_kernel, plan, seeds, gs, ws, us, vs, sums)
        launch(_double_backward_kernel, plan, seeds, gs, ws, us, vs, sigma, sums, *buffers)
        for results, buffer in zip((g_grads, g_weights), buffers, strict=True):
            for layer, result in zip(group.layers, plan.weights.of(buffer), strict=True):
                results[layer.place] = result
    return g_grads, g_weights
