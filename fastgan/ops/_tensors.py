"""What the operators share about tensors: memory layouts, accumulation types, addresses, and what autograd will use."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The order of `enum class DType` in csrc/cpu/kernels.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and statistics: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a 4-d or 5-d tensor lie innermost, and not merely because a dimension is 1."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.stride(1) == 1


def lies_in_both(x: Tensor) -> bool:
    """Whether an image is contiguous and channels_last: of one channel, or of one pixel."""
    return x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch's convolutions take a 4-d tensor for channels_last. Of one that lies in both layouts the strides of what
    is 1 decide, which say how it was made (`c10::is_channels_last_strides_2d`)."""
    if is_channels_last(x):
        return True
    if x.stride(1) != 1 or x.numel() == 0 or torch.compiler.is_compiling():
        return False
    least = 0
    for size, stride in zip([x.shape[i] for i in _ROWS], [x.stride(i) for i in _ROWS], strict=True):
        if stride < least:
            return False
        least = stride * size
    return math.prod(x.shape[1:]) > 1  # else there is no difference


_ROWS = (1, 3, 2, 0)  # the axes in channels_last, from the innermost


def in_layout(x: Tensor, channels_last: bool) -> Tensor:
    """`dense` with the strides that torch's own operations give a 4-d tensor, also of what is 1."""
    x = dense(x, channels_last)
    if torch.compiler.is_compiling() or suggests_channels_last(x) == channels_last:
        return x
    if not channels_last:
        return x.reshape(-1).view(x.shape)
    n, c, h, w = x.shape
    return x.reshape(n, h, w, c).permute(0, 3, 1, 2)


def with_contiguous_gradient(x: Tensor) -> Tensor:
    """x, whose gradient is contiguous as stock's is, if x is to be laid out anew: penalties call .view on it."""
    return x.reshape(-1).view(x.shape) if x.requires_grad and not is_channels_last(x) else x


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """`x` itself where it lies densely in the layout, else a copy that does."""
    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=layout):
        return x
    is_large = x.dim() == 4 and not torch.compiler.is_compiling() and x.numel() >= _LARGE
    if is_large and min(x.shape[1], x.shape[2] * x.shape[3]) >= _WIDE:
        return torch.ops.fastgan.layout(x, channels_last)
    return x.contiguous(memory_format=layout)


# Elements, and channels and pixels, from which the operator gains on `contiguous`. Compiled code is for any number of them.
_LARGE, _WIDE = 1 << 16, 16


def check_is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not {'nested' if value.is_nested else value.layout}")


def check_like(name: str, value: Any, x: Any, of: str = "x") -> None:
    """Raise of another dtype or device than that of x, which the caller knows as `of`."""
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must be {x.dtype} like {of}, not {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, {of} on {x.device}")


def check_number(name: str, value: object, what: str = "a number") -> None:
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be {what}, not {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"{name} must be an integer of 64 bits or a float, not {value}")


def shown(value: object) -> str:
    """Its repr in one line, for a message."""
    return " ".join(repr(value).split())


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {type(value).__name__}")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, not {eps}")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """`value` as Python's integer, for which numpy's may stand; raise of what is none from `least` to MOST."""
    if not isinstance(value, INTEGERS) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if not least <= value <= MOST:
        raise ValueError(f"{name} must be {least} or more{'' if value < least else f', up to {MOST}'}, not {value}")
    return value if isinstance(value, _COUNTS) else int(value)  # numpy's overflow


# Sizes may be symbols in compiled code.
_COUNTS: Any = (int, torch.SymInt)
_NUMBERS = (*_COUNTS, float, torch.SymFloat)
INTEGERS: Any = (*_COUNTS, numbers.Integral)
MOST = 2**31 - 1


def check_addressable(names: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise of an output with more bytes than there are addresses. `names`: of the arguments that decide on its shape."""
    elements = math.prod([size or 1 for size in shape])  # an empty batch has strides, too
    if isinstance(elements, int) and elements * dtype.itemsize >= 2**63:  # symbols multiply to a symbol
        raise ValueError(f"{names} make an output of shape {tuple(shape)}, more than any memory has addresses for")


def check_input(x: Tensor, name: str = "x") -> None:
    """Raise what every operator raises of an x that is no floating-point tensor."""
    check_is_tensor(name, x)
    check_dtype(x.dtype, name)


def check_dtype(dtype: torch.dtype, name: str = "x") -> None:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {dtype}")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def remember_edges(ctx, inputs: tuple) -> None:
    """Note in a `setup_context` which of autograd's edges belongs to which argument: only tensors have one. To a list of
    them belong as many, from the one noted on."""
    ctx.edges, edge = {}, 0
    for argument, value in enumerate(inputs):
        tensors = value if isinstance(value, list) else [value]
        if isinstance(tensors[0], Tensor):
            ctx.edges[argument] = edge
            edge += len(tensors)


def will_use(ctx, index: int) -> bool:
    """Whether the running backward pass will use the gradient of the forward's argument `index` (`remember_edges` first).

    `ctx.needs_input_grad` is True also where `autograd.grad(..., inputs=...)` throws the gradient away. The engine knows,
    but only tells through a private function: without it the gradient counts as used.
    """
    return ctx.needs_input_grad[index] and _will_execute(ctx, ctx.edges[index])


def will_use_of_list(ctx, index: int) -> list[bool]:
    """The same of each tensor in an argument that is a list."""
    first = ctx.edges[index]
    return [needed and _will_execute(ctx, first + i) for i, needed in enumerate(ctx.needs_input_grad[index])]


def _will_execute(ctx, edge: int) -> bool:
    if torch.compiler.is_compiling():  # compiled autograd, which no engine runs
        return True
    will_execute = getattr(torch._C, "_will_engine_execute_node", None)
    if will_execute is None:
        return True
    try:
        node = ctx.next_functions[edge][0]
        return node is None or will_execute(node)
    except RuntimeError:  # the target is a leaf
        return True
