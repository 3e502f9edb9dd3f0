"""What the norm operators share: the activation, the call of a C++ kernel, the third derivative, and the checks."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._tensors import (
    DTYPES,
    accumulation_dtype,
    address,
    check_eps,
    check_is_tensor,
    check_like,
    dense,
    is_channels_last,
    shown,
)
from fastgan.ops._types import Act, FixedAct

_ACT_CODES = {act: code for code, act in enumerate(get_args(Act))}


def activate(x: Tensor, act: Act, negative_slope: float, prelu_weight: Tensor | None = None) -> Tensor:
    if act == "relu":
        return F.relu(x)
    if prelu_weight is not None:
        return F.prelu(x, prelu_weight.to(x.dtype))
    return F.leaky_relu(x, negative_slope) if act == "leaky_relu" else x


def activate_(x: Tensor, act: Act, negative_slope: float, prelu_weight: Tensor | None = None) -> Tensor:
    """`activate` on a tensor that nobody else holds."""
    if act == "none" or prelu_weight is not None:
        return activate(x, act, negative_slope, prelu_weight)
    if act == "relu":
        return F.relu(x, inplace=True)
    return F.leaky_relu(x, negative_slope, inplace=negative_slope >= 0)  # else the output does not tell the side


def empty_statistics(x: Tensor, *shape: int) -> Tensor:
    """float64 on the CPU, where it costs nothing: rounding the mean is the largest error of a float32 norm."""
    cpp = backend.serving(x.device.type) == "cpp"
    return x.new_empty(shape, dtype=torch.float64 if cpp else accumulation_dtype(x.dtype))


def empty_sample_statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """float64: where a unit is narrow and far from zero, rounding its mean would be the largest error of all."""
    mean, var = (x.new_empty((x.shape[0], num_groups), dtype=torch.float64) for _ in range(2))
    return mean, var


def stock_is_faster(x: Tensor, small: int, small_channels_last: int) -> bool:
    """Whether x has no more elements for each of the CPU's threads. An operator in Python takes longer to call than a small
    tensor to read; in channels_last stock is slow enough to be beaten sooner; a gradient penalty gains at any size."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    return x.numel() <= (small_channels_last if is_channels_last(x) else small) * torch.get_num_threads()


def _as(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """The vector in a dtype, its elements next to each other. Most are so, and asking is quicker than converting."""
    return vector if vector.dtype == dtype and vector.is_contiguous() else vector.to(dtype).contiguous()


@functools.lru_cache(maxsize=4096)
def _facts(shape: torch.Size, dtype: torch.dtype, channels_last: bool, per_element: bool) -> tuple:
    """(dtype of accumulation, and the first three arguments of `_C.NormAct`)."""
    n, c, s = shape[0], shape[1], math.prod(shape[2:])
    sizes = (n, 1, c * s) if per_element else (n, c, s)
    return accumulation_dtype(dtype), DTYPES[dtype], not per_element and (channels_last or s == 1), sizes


class NormCall:
    """What the three orders of a norm pass to C++ alike, as csrc/cpu/kernels.h declares it; holds the tensors that it gives
    addresses of.

    `groups`: of one sample; 0 for batch norm. `per_element`: layer norm, whose parameters have a value for each element.
    """

    def __init__(
        self, x, weight, bias, residual, mean, var, own_stats, eps, act, negative_slope, *, prelu_weight=None, groups=0,
        per_element=False,
    ):  # fmt: skip
        from fastgan import _C

        self.C = _C
        self.operator = "group_norm_act" if groups else "batch_norm_act"
        self.channels_last = is_channels_last(x)
        self.per_element = per_element
        self.acc, dtype, rows, sizes = _facts(x.shape, x.dtype, self.channels_last, per_element)
        self.x = dense(x, self.channels_last)
        self.residual = self.like_x(residual)
        self.given = weight, bias
        self.weight, self.bias = self.parameter(weight), self.parameter(bias)
        # Of one number every channel has that one.
        self.prelu_weight = None if prelu_weight is None else self.parameter(prelu_weight.expand(x.shape[1]))
        self.mean, self.var = _as(mean, torch.float64), _as(var, torch.float64)
        self.arguments = _C.NormAct(
            dtype, rows, sizes, self.x.data_ptr(), address(self.residual), address(self.weight), address(self.bias), groups,
            per_element,
            own_stats, self.mean.data_ptr(), self.var.data_ptr(), eps, _ACT_CODES[act], negative_slope,
            address(self.prelu_weight),
        )  # fmt: skip

    def like_x(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else dense(tensor.to(self.x.dtype), self.channels_last)

    def parameter(self, tensor: Tensor | None) -> Tensor | None:
        """In the type of accumulation, and the order of x's memory where there is a value for each element."""
        if tensor is None:
            return None
        return dense(_as(tensor, self.acc)[None], self.channels_last) if self.per_element else _as(tensor, self.acc)

    def forward(self) -> Tensor:
        y = torch.empty_like(self.x)
        self._kernel("forward")(self.arguments, y.data_ptr())
        return y

    def backward(
        self, grad_y: Tensor, needs_x: bool, needs_params: bool, needs_residual: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(grad_x, grad_weight, grad_bias, grad_residual, grad_prelu_weight); what is not needed is empty."""
        dense_grad_y = self.like_x(grad_y)
        grad_x, grad_residual = (torch.empty_like(self.x) if needed else None for needed in (needs_x, needs_residual))
        grad_weight, grad_bias = (self._empty_parameter() if needs_params else None for _ in range(2))
        grad_prelu_weight = self._empty_prelu_weight() if needs_params else None
        self._kernel("backward")(
            self.arguments,
            *map(address, (dense_grad_y, grad_x, grad_residual, grad_weight, grad_bias, grad_prelu_weight)),
        )
        nothing = self.x.new_empty(0)
        return (
            nothing if grad_x is None else grad_x,
            nothing if grad_weight is None else self._returned(grad_weight),
            nothing if grad_bias is None else self._returned(grad_bias),
            nothing if grad_residual is None else grad_residual,
            nothing if grad_prelu_weight is None else grad_prelu_weight,
        )

    def double_backward(self, ggx, ggw, ggb, ggr, grad_y) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(g_grad_y, g_x, g_weight, g_prelu_weight)."""
        ggx, ggr, grad_y = map(self.like_x, (ggx, ggr, grad_y))
        ggw, ggb = map(self.parameter, (ggw, ggb))
        g_grad_y, g_x, g_weight = torch.empty_like(self.x), torch.empty_like(self.x), self._empty_parameter()
        g_prelu_weight = self._empty_prelu_weight()
        self._kernel("double_backward")(
            self.arguments, *map(address, (grad_y, ggx, ggr, ggw, ggb, g_grad_y, g_x, g_weight, g_prelu_weight))
        )
        return (
            g_grad_y,
            g_x,
            self._returned(g_weight),
            self.x.new_empty(0) if g_prelu_weight is None else g_prelu_weight,
        )

    def _kernel(self, order: str) -> Callable:
        return getattr(self.C, f"{self.operator}_{order}")

    def _empty_parameter(self) -> Tensor:
        """What `parameter` makes of a gradient, not yet filled."""
        if self.per_element:
            return torch.empty_like(self.x[:1], dtype=self.acc)
        return self.x.new_empty(self.x.shape[1], dtype=self.acc)

    def _empty_prelu_weight(self) -> Tensor | None:
        return None if self.prelu_weight is None else torch.empty_like(self.prelu_weight)

    def _returned(self, grad: Tensor) -> Tensor:
        weight, bias = self.given
        if self.per_element:
            shape = next((p.shape for p in (weight, bias) if p is not None), self.x.shape[1:2])
            grad = dense(grad, channels_last=False).view(shape)
        return grad if weight is None else grad.to(weight.dtype)


def with_zero_gradient(norm_bias: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """`norm_bias`, through which the bias of a convolution before the norm gets its gradient: zeros, not None."""
    if bias is None or not (bias.requires_grad and torch.is_grad_enabled()):
        return norm_bias
    zero = bias * 0
    return zero if norm_bias is None else norm_bias + zero.to(norm_bias.dtype)


def third_derivative(
    ctx,
    composed: Callable[[list[Any]], Tensor],
    cotangents: tuple[Tensor | None, ...],
    inputs: int = 4,
    outputs: tuple[int, ...] = (0, 1, 2),
    ggs: int | None = None,
) -> tuple:
    """Gradients of a norm's double backward, by differentiating `composed`: y of its `inputs` in the type of accumulation,
    in operations whose own derivatives are right to any order.

    ctx has saved the gradients of the backward's outputs, one for each input or for the first `ggs`, grad_y, the inputs (x,
    weight, bias and residual, say) and perhaps more. `outputs`: of what the double backward returns gradients, counted from
    grad_y.
    """
    keeps_graph = torch.is_grad_enabled()
    first = inputs if ggs is None else ggs
    with torch.enable_grad():
        given = _without_past(ctx.saved_tensors[: first + 1 + inputs])
        targets = [
            (given[first + i], c) for i, c in zip(outputs, cotangents, strict=True) if given[first + i] is not None
        ]
        second = _second_derivative(composed, given[:first], *given[first:], of=[t for t, _ in targets])
        chosen = [(g, c) for g, (_, c) in zip(second, targets, strict=True) if c is not None and g.requires_grad]
        wanted = [i for i in range(len(given)) if ctx.needs_input_grad[i]]
        third = torch.autograd.grad(
            [g for g, _ in chosen], [given[i] for i in wanted], [c for _, c in chosen],
            create_graph=keeps_graph, materialize_grads=True,
        )  # fmt: skip
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, third, strict=True):
        grads[i] = grad
    return tuple(grads)


def second_derivative(
    composed: Callable[[list[Any]], Tensor], ggs: Sequence[Tensor | None], tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients with respect to `tensors`, which are grad_y and the inputs, of the sum of all products of a gradient of the
    backward with its gg; by differentiating `composed`, as in `third_derivative`."""
    keeps_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        given = _without_past([*ggs, *tensors])
        present = [t for t in given[len(ggs) :] if t is not None]
        found = iter(_second_derivative(composed, given[: len(ggs)], *given[len(ggs) :], of=present))
    grads = [None if t is None else next(found) for t in tensors]
    return grads if keeps_graph else [None if grad is None else grad.detach() for grad in grads]


def _without_past(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Views, so that derivatives stop at the tensors and do not run on into what these were made of."""
    return [t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]


def _second_derivative(composed, ggs: list[Any], grad_y: Tensor, *inputs: Any, of: list[Tensor]) -> tuple[Tensor, ...]:
    acc = accumulation_dtype(inputs[0].dtype)
    y = composed([t if t is None else t.to(acc) for t in inputs])
    pairs = [(gg, t) for gg, t in zip(ggs, inputs, strict=False) if gg is not None and t is not None]
    first = torch.autograd.grad(y, [t for _, t in pairs], grad_y.to(y.dtype), create_graph=True, materialize_grads=True)
    total = torch.stack([(grad * gg).sum() for grad, (gg, _) in zip(first, pairs, strict=True)]).sum()
    return torch.autograd.grad(total, of, create_graph=True, materialize_grads=True)


def check_act(act: str, acts: Any) -> None:
    """`acts`: one of the types of settings."""
    if act not in get_args(acts):
        raise ValueError(f"act must be one of {', '.join(get_args(acts))}, not {shown(act)}")


def check_settings(eps: float, act: str, acts: Any = FixedAct) -> None:
    check_act(act, acts)
    check_eps(eps)


def check_parameter(name: str, tensor: Tensor | None, x: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise what an operator raises of a parameter; `what` the values of `shape` are."""
    if tensor is None:
        return
    check_is_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, {what}, not {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype and tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be {x.dtype} like x, or float32, not {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")


def in_one_dtype(x: Tensor, *parameters: Tensor | None) -> Sequence[Tensor | None]:
    """The parameters as torch's own norms of x take them: as they are, or, where dtypes differ, in that of the sums."""
    dtypes = {parameter.dtype for parameter in parameters if parameter is not None} | ({x.dtype} & {torch.float64})
    if len(dtypes) < 2:
        return parameters
    wide = accumulation_dtype(x.dtype)
    return [None if parameter is None else parameter.to(wide) for parameter in parameters]


def check_prelu_weight(prelu_weight: Tensor | None, act: str, x: Tensor, channels: int) -> None:
    if act != "prelu":
        if prelu_weight is not None:
            raise ValueError(f"prelu_weight is for act 'prelu', not for {act!r}")
        return
    if prelu_weight is None:
        raise ValueError("act 'prelu' needs prelu_weight")
    one = isinstance(prelu_weight, Tensor) and prelu_weight.shape == (1,)
    check_parameter("prelu_weight", prelu_weight, x, (1,) if one else (channels,), "one for each channel, or (1,)")


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    if residual is None:
        return
    check_is_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    check_like("residual", residual, x)
