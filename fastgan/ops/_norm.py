"""What the norm operators share: the activation, the call of a C++ kernel, the third derivative, and the checks."""

from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan import backend
from fastgan.ops._tensors import DTYPES, accumulation_dtype, address, check_is_tensor, dense, is_channels_last, planes
from fastgan.ops._types import Act

_ACT_CODES = {act: code for code, act in enumerate(get_args(Act))}


def activate(x: Tensor, act: Act, negative_slope: float) -> Tensor:
    if act == "relu":
        return F.relu(x)
    return F.leaky_relu(x, negative_slope) if act == "leaky_relu" else x


def activate_(x: Tensor, act: Act, negative_slope: float) -> Tensor:
    """`activate` on a tensor that nobody else holds."""
    if act == "none":
        return x
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


# On the CPU stock torch is faster up to so many elements a thread: an operator in Python takes longer to call than a small
# tensor to read. In channels_last stock is slow enough to be beaten sooner; a gradient penalty gains at any size.
_SMALL, _SMALL_CHANNELS_LAST = 1 << 17, 1 << 15


def stock_is_faster(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    small = _SMALL_CHANNELS_LAST if is_channels_last(x) else _SMALL
    return x.numel() <= small * torch.get_num_threads()


class NormCall:
    """What the three orders of a norm pass to C++ alike, as csrc/cpu/kernels.h declares it; holds the tensors that it gives
    addresses of.

    `groups`: of one sample; 0 for batch norm. `per_element`: layer norm, whose parameters have a value for each element.
    """

    def __init__(
        self, x, weight, bias, residual, mean, var, own_stats, eps, act, negative_slope, *, groups=0, per_element=False
    ):
        from fastgan import _C

        self.C = _C
        self.operator = "group_norm_act" if groups else "batch_norm_act"
        self.acc = accumulation_dtype(x.dtype)
        self.channels_last = is_channels_last(x)
        self.per_element = per_element
        self.x = dense(x, self.channels_last)
        n, c, s = planes(x)
        self.residual = self.like_x(residual)
        self.weight, self.bias = self.parameter(weight), self.parameter(bias)
        self.parameter_shape = next((p.shape for p in (weight, bias) if p is not None), x.shape[1:2])
        self.parameter_dtype = self.acc if weight is None else weight.dtype
        self.mean, self.var = (t.to(torch.float64).contiguous() for t in (mean, var))
        self.arguments = _C.NormAct(
            DTYPES[x.dtype], not per_element and (self.channels_last or s == 1),
            (n, 1, c * s) if per_element else (n, c, s),
            self.x.data_ptr(), address(self.residual), address(self.weight), address(self.bias), groups, per_element,
            own_stats, self.mean.data_ptr(), self.var.data_ptr(), eps, _ACT_CODES[act], negative_slope,
        )  # fmt: skip

    def like_x(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else dense(tensor.to(self.x.dtype), self.channels_last)

    def parameter(self, tensor: Tensor | None) -> Tensor | None:
        """In the type of accumulation, and the order of x's memory where there is a value for each element."""
        if tensor is None:
            return None
        tensor = tensor.to(self.acc)
        return dense(tensor[None], self.channels_last) if self.per_element else tensor.contiguous()

    def forward(self) -> Tensor:
        y = torch.empty_like(self.x)
        self._kernel("forward")(self.arguments, y.data_ptr())
        return y

    def backward(
        self, grad_y: Tensor, needs_x: bool, needs_params: bool, needs_residual: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(grad_x, grad_weight, grad_bias, grad_residual); what is not needed is empty."""
        dense_grad_y = self.like_x(grad_y)
        grad_x, grad_residual = (torch.empty_like(self.x) if needed else None for needed in (needs_x, needs_residual))
        grad_weight, grad_bias = (self._empty_parameter() if needs_params else None for _ in range(2))
        self._kernel("backward")(
            self.arguments, *map(address, (dense_grad_y, grad_x, grad_residual, grad_weight, grad_bias))
        )
        nothing = self.x.new_empty(0)
        return (
            nothing if grad_x is None else grad_x,
            nothing if grad_weight is None else self._returned(grad_weight),
            nothing if grad_bias is None else self._returned(grad_bias),
            nothing if grad_residual is None else grad_residual,
        )

    def double_backward(self, ggx, ggw, ggb, ggr, grad_y) -> tuple[Tensor, Tensor, Tensor]:
        """(g_grad_y, g_x, g_weight)."""
        ggx, ggr, grad_y = map(self.like_x, (ggx, ggr, grad_y))
        ggw, ggb = map(self.parameter, (ggw, ggb))
        g_grad_y, g_x, g_weight = torch.empty_like(self.x), torch.empty_like(self.x), self._empty_parameter()
        self._kernel("double_backward")(
            self.arguments, *map(address, (grad_y, ggx, ggr, ggw, ggb, g_grad_y, g_x, g_weight))
        )
        return g_grad_y, g_x, self._returned(g_weight)

    def _kernel(self, order: str) -> Callable:
        return getattr(self.C, f"{self.operator}_{order}")

    def _empty_parameter(self) -> Tensor:
        """What `parameter` makes of a gradient, not yet filled."""
        if self.per_element:
            return torch.empty_like(self.x[:1], dtype=self.acc)
        return self.x.new_empty(self.x.shape[1], dtype=self.acc)

    def _returned(self, grad: Tensor) -> Tensor:
        grad = grad[0].contiguous().view(self.parameter_shape) if self.per_element else grad
        return grad.to(self.parameter_dtype)


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
) -> tuple:
    """Gradients of a norm's double backward, by differentiating `composed`: y of its `inputs` in the type of accumulation,
    in operations whose own derivatives are right to any order.

    ctx has saved the gradients of the backward's outputs, one for each input, grad_y, the inputs (x, weight, bias and
    residual, say) and perhaps more. `outputs`: of what the double backward returns gradients, counted from grad_y.
    """
    keeps_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the derivatives inside stop at the arguments and do not run on into what these were made of.
        given: list[Any] = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors[: 2 * inputs + 1]
        ]
        ggs, grad_y, arguments = given[:inputs], given[inputs], given[inputs + 1 :]
        acc = accumulation_dtype(arguments[0].dtype)
        y = composed([t if t is None else t.to(acc) for t in arguments])
        pairs = [(gg, t) for gg, t in zip(ggs, arguments, strict=True) if gg is not None and t is not None]
        first = torch.autograd.grad(
            y, [t for _, t in pairs], grad_y.to(y.dtype), create_graph=True, materialize_grads=True
        )
        total = torch.stack([(grad * gg).sum() for grad, (gg, _) in zip(first, pairs, strict=True)]).sum()
        targets = [
            (given[inputs + i], c) for i, c in zip(outputs, cotangents, strict=True) if given[inputs + i] is not None
        ]
        second = torch.autograd.grad(total, [t for t, _ in targets], create_graph=True, materialize_grads=True)
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


def check_settings(eps: float, act: str) -> None:
    if act not in _ACT_CODES:
        raise ValueError(f"act must be one of {', '.join(_ACT_CODES)}, not {act!r}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, not {eps}")


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


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    if residual is None:
        return
    check_is_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, not {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} like x, not {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device}, x on {x.device}")
