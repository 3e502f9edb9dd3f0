"""Batch normalisation, residual addition and activation in one operator, exact to the second derivative."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, operators, register_gradient
from fastgan.ops._kernels import register_kernels
from fastgan.ops._norm import (
    NormCall,
    activate,
    activate_,
    check_parameter,
    check_prelu_weight,
    check_residual,
    check_settings,
    empty_statistics,
    in_one_dtype,
    second_derivative,
    third_derivative,
)
from fastgan.ops._tensors import (
    DTYPES,
    accumulation_dtype,
    check_flag,
    check_input,
    check_number,
    dense,
    is_channels_last,
)
from fastgan.ops._types import Act

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    act: Act = "relu",
    negative_slope: float = 0.01,
    prelu_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`batch_norm_act` in plain torch."""
    w, b, mean, var = in_one_dtype(x, weight, bias, running_mean, running_var)
    # In channels_last torch's backward reads these as if they had no gaps.
    w = None if w is None else w.contiguous()
    if not training and mean is not None and var is not None:
        mean, var = mean.contiguous(), var.contiguous()
    y = torch.batch_norm(x, w, b, mean, var, training, float(momentum), eps, torch.backends.cudnn.enabled)
    for own, moved in ((running_mean, mean), (running_var, var)):
        if training and own is not None and moved is not None and moved is not own:
            own.copy_(moved)
    if residual is not None:
        y = y + residual
    return activate_(y, act, negative_slope, prelu_weight)


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# `mean` and `var` are given in evaluation; in training the batch's own are used, and returned unless they are given, as
# whoever computed x may know them. What an operator need not compute it returns as an empty tensor.

torch.library.define(
    "fastgan::batch_norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? prelu_weight, Tensor? mean, Tensor? var, bool "
    "training, float eps, str act, float negative_slope) -> (Tensor y, Tensor mean, Tensor var)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::batch_norm_act_backward",
    "(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? prelu_weight, Tensor mean, "
    "Tensor var, bool training, float eps, str act, float negative_slope, bool needs_x, bool needs_params, "
    "bool needs_residual) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual, Tensor grad_prelu_weight)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::batch_norm_act_double_backward",
    "(Tensor? ggx, Tensor? ggw, Tensor? ggb, Tensor? ggr, Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor? prelu_weight, Tensor mean, Tensor var, bool training, float eps, str act, "
    "float negative_slope) -> (Tensor g_grad_y, Tensor g_x, Tensor g_weight, Tensor g_prelu_weight)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastgan::batch_norm_act")
def _(x, weight, bias, residual, prelu_weight, mean, var, training, eps, act, negative_slope):
    channels = x.shape[1] if mean is None else 0
    y = torch.empty_like(dense(x, is_channels_last(x)))
    return y, empty_statistics(x, channels), empty_statistics(x, channels)


@torch.library.register_fake("fastgan::batch_norm_act_backward")
def _(
    grad_y, x, weight, bias, residual, prelu_weight, mean, var, training, eps, act, slope, needs_x, needs_params,
    needs_residual,
):  # fmt: skip
    param_dtype = accumulation_dtype(x.dtype) if weight is None else weight.dtype

    def like_x(needed):
        return torch.empty_like(dense(x, is_channels_last(x))) if needed else x.new_empty(0)

    def param():
        return x.new_empty(x.shape[1], dtype=param_dtype) if needs_params else x.new_empty(0)

    return like_x(needs_x), param(), param(), like_x(needs_residual), _like_prelu_weight(x, prelu_weight, needs_params)


@torch.library.register_fake("fastgan::batch_norm_act_double_backward")
def _(
    ggx, ggw, ggb, ggr, grad_y, x, weight, bias, residual, prelu_weight, mean, var, training, eps, act, negative_slope
):  # fmt: skip
    like_x = torch.empty_like(dense(x, is_channels_last(x)))
    param_dtype = accumulation_dtype(x.dtype) if weight is None else weight.dtype
    g_weight = x.new_empty(x.shape[1], dtype=param_dtype)
    return like_x, torch.empty_like(like_x), g_weight, _like_prelu_weight(x, prelu_weight)


def _like_prelu_weight(x: Tensor, prelu_weight: Tensor | None, needed: bool = True) -> Tensor:
    return torch.empty_like(prelu_weight) if prelu_weight is not None and needed else x.new_empty(0)


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save_forward(ctx, inputs, output) -> None:
    x, weight, bias, residual, prelu_weight, mean, var, ctx.training, *ctx.settings = inputs
    _, batch_mean, batch_var = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(batch_mean, batch_var)
    statistics = (batch_mean, batch_var) if mean is None else (mean, var)
    ctx.save_for_backward(x, weight, bias, residual, prelu_weight, *statistics)


def _backward(ctx, grad_y, _mean, _var):
    needs_x, needs_weight, needs_bias, needs_residual, needs_prelu_weight, *_ = ctx.needs_input_grad
    act = ctx.settings[1]
    grads: list[Tensor | None] = [None] * 11
    if grad_y is None:
        return tuple(grads)
    # Without an activation the residual's gradient is grad_y itself.
    passes_residual = needs_residual and act == "none"
    found = operators.batch_norm_act_backward(
        grad_y, *ctx.saved_tensors, ctx.training, *ctx.settings,
        needs_x, needs_weight or needs_bias or needs_prelu_weight, needs_residual and not passes_residual,
    )  # fmt: skip
    for i, needed in enumerate((needs_x, needs_weight, needs_bias, needs_residual, needs_prelu_weight)):
        if needed:
            grads[i] = found[i]
    if passes_residual:
        grads[3] = grad_y
    return tuple(grads)


register_gradient("batch_norm_act", _backward, _save_forward)


def _save_backward(ctx, inputs, output) -> None:
    *tensors, ctx.training, eps, act, negative_slope, _, _, _ = inputs
    ctx.settings = (eps, act, negative_slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, ggx, ggw, ggb, ggr, gg_prelu_weight):
    grads: list[Tensor | None] = [None] * 15
    if ggx is ggw is ggb is ggr is gg_prelu_weight is None:
        return tuple(grads)
    if gg_prelu_weight is not None:  # a loss on that gradient, which is rare
        *tensors, mean, var = ctx.saved_tensors
        composed = _composed_like(ctx, mean, var)
        grads[:6] = second_derivative(composed, (ggx, ggw, ggb, ggr, gg_prelu_weight), tensors)
        return tuple(grads)
    bias = ctx.saved_tensors[3]
    found = operators.batch_norm_act_double_backward(
        ggx, ggw, ggb, ggr, *ctx.saved_tensors, ctx.training, *ctx.settings
    )
    depends_on_x = ctx.training or ggw is not None
    for i, depends, grad in zip((0, 1, 2, 5), (True, depends_on_x, True, True), found, strict=True):
        if depends and ctx.needs_input_grad[i]:
            grads[i] = grad
    if ctx.needs_input_grad[3] and ctx.settings[1] != "none":
        grads[3] = torch.zeros_like(bias)  # bias moves only the switching points of the activation
    return tuple(grads)


register_gradient("batch_norm_act_backward", _double_backward, _save_backward)


def _save_double_backward(ctx, inputs, output) -> None:
    *tensors, ctx.training, eps, act, negative_slope = inputs
    ctx.settings = (eps, act, negative_slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _composed(tensors: list[Any], eps: float, act: Act, negative_slope: float) -> Tensor:
    """`reference` in elementary operations: the third derivative of torch's own `batch_norm` is wrong in training."""
    x, weight, bias, residual, prelu_weight, mean, var = tensors
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    if mean is None:
        centred = x - x.mean(axes, keepdim=True)
        var = centred.square().mean(axes)
    else:
        centred = x - mean.view(shape)
    y = centred * (var + eps).rsqrt().view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    pre = y if residual is None else y + residual
    if prelu_weight is None:
        return activate(pre, act, negative_slope)
    return torch.where(pre > 0, pre, pre * (prelu_weight if prelu_weight.numel() == 1 else prelu_weight.view(shape)))


def _composed_like(ctx, mean: Tensor, var: Tensor) -> Callable[[list[Any]], Tensor]:
    """`_composed` of the tensors that have gradients, as ctx has been called."""

    def composed(tensors):
        statistics = [None, None] if ctx.training else [mean.to(tensors[0].dtype), var.to(tensors[0].dtype)]
        return _composed([*tensors, *statistics], *ctx.settings)

    return composed


def _triple_backward(ctx, *cotangents):
    *_, mean, var = ctx.saved_tensors
    return third_derivative(ctx, _composed_like(ctx, mean, var), cotangents, inputs=5, outputs=(0, 1, 2, 5), ggs=4)


register_gradient("batch_norm_act_double_backward", _triple_backward, _save_double_backward)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cpp_forward(x, weight, bias, residual, prelu_weight, mean, var, _training, *settings):
    found_mean, found_var = (empty_statistics(x, x.shape[1] if mean is None else 0) for _ in range(2))
    statistics = (found_mean, found_var, True) if mean is None else (mean, var, False)
    y = NormCall(x, weight, bias, residual, *statistics, *settings, prelu_weight=prelu_weight).forward()
    return y, found_mean, found_var


def _cpp_backward(grad_y, x, weight, bias, residual, prelu_weight, *rest):
    call = NormCall(x, weight, bias, residual, *rest[:-3], prelu_weight=prelu_weight)
    *grads, grad_prelu_weight = call.backward(grad_y, *rest[-3:])
    return *grads, _summed(grad_prelu_weight, prelu_weight)


def _cpp_double_backward(ggx, ggw, ggb, ggr, grad_y, x, weight, bias, residual, prelu_weight, *rest):
    call = NormCall(x, weight, bias, residual, *rest, prelu_weight=prelu_weight)
    *grads, g_prelu_weight = call.double_backward(ggx, ggw, ggb, ggr, grad_y)
    return *grads, _summed(g_prelu_weight, prelu_weight)


def _summed(grad: Tensor, prelu_weight: Tensor | None) -> Tensor:
    """A gradient for each channel as that of `prelu_weight`, where it is needed."""
    if prelu_weight is None or grad.numel() == 0:
        return grad
    return (grad.sum(0, keepdim=True) if prelu_weight.numel() == 1 else grad).to(prelu_weight.dtype)


register_kernels("batch_norm_act", "norm_act", "batch_norm_act_forward", _cpp_forward)
register_kernels("batch_norm_act_backward", "norm_act", "batch_norm_act_backward", _cpp_backward)
register_kernels("batch_norm_act_double_backward", "norm_act", "batch_norm_act_double_backward", _cpp_double_backward)


# ── The function ─────────────────────────────────────────────────────────────────────────────────────────────────────


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    act: Act = "relu",
    negative_slope: float = 0.01,
    prelu_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = act((x − μ) / √(σ² + eps) · weight + bias + residual), per channel (Ioffe & Szegedy 2015).

    With `training`, μ and σ² are the batch's mean and biased variance over all axes but 1, and the running statistics, if
    given, move towards them in place by `momentum` (σ² with n/(n−1)), as in `torch.nn.functional.batch_norm`. Otherwise
    they are `running_mean` and `running_var`.

    Args:
        x: (N, C, \\*), 2 to 5 dimensions; float32, float64, bfloat16 or float16. NCHW and channels_last are both fast, and
            the output keeps the layout; any other strides are copied first.
        running_mean, running_var: (C,), in x's dtype or float32; both or neither.
        weight, bias: (C,), in x's dtype or float32; None stands for 1 and 0.
        momentum: a number, or a 0-d tensor so that a schedule needs no synchronisation.
        act: "none", "relu", "leaky_relu" (max(y, 0) + negative_slope · min(y, 0)) or "prelu" (the same with prelu_weight;
            He et al. 2015).
        prelu_weight: (1,) or (C,), in x's dtype or float32; with "prelu" only.
        residual: of x's shape, dtype and device, added before the activation.

    Statistics and sums are float32 (float64 for float64), and deterministic, for any number of threads. Twice
    differentiable by its own kernels in x, weight, bias, residual and prelu_weight; higher orders, and what differentiates
    the gradient of prelu_weight, go through the definition. Saved for backward: x, the residual, and (C,) vectors.

    Raises:
        TypeError: x is not floating point, or another tensor has a dtype that does not fit it.
        ValueError: shapes, devices or settings that do not fit, one value per channel in training, or no running
            statistics outside it. The message names the argument.
    """
    check_batch_norm(x, residual, running_mean, running_var, weight, bias, training, eps, act, prelu_weight)
    check_other_settings(momentum, negative_slope)
    if training:
        check_batch_size(x.shape)
    return normalise(
        x, running_mean, running_var, weight, bias, training, momentum, eps, act, negative_slope, prelu_weight, residual
    )  # fmt: skip


def normalise(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    act: Act,
    negative_slope: float,
    prelu_weight: Tensor | None = None,
    residual: Tensor | None = None,
    mean_offset: Tensor | None = None,
    lean: bool = False,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`batch_norm_act` on checked arguments. `mean_offset` (C,) is added to the mean that `running_mean` sees: the bias of
    a convolution, which cancels everywhere else. With `lean` the operator serves be stock torch faster in the forward or
    not. `moments`: mean and biased variance of x, where they are known, in training."""
    if (
        x.numel() == 0
        or is_transformed()
        or backend.serving(x.device.type) == "reference"
        or (training and eps == 0)  # where stock takes 1 / √0 for 0
        or (not lean and stock_is_faster(x, training, act))
    ):
        y = reference(
            x, running_mean, running_var, weight, bias, training, momentum, eps,
            act=act, negative_slope=negative_slope, prelu_weight=prelu_weight, residual=residual,
        )  # fmt: skip
        if training and running_mean is not None and mean_offset is not None:
            running_mean.data.add_(mean_offset.detach().to(running_mean.dtype) * momentum)
        return y
    given = (moments or (None, None)) if training else _as_they_are(running_mean, running_var)
    y, *found = operators.batch_norm_act(
        x, weight, bias, residual, prelu_weight, *given, training, eps, act, negative_slope
    )
    if training:
        mean, var = moments or found
        move_statistics(running_mean, running_var, mean, var, momentum, x.numel() // x.shape[1], mean_offset)
    return y


def _as_they_are(*running: Tensor | None) -> tuple[Tensor | None, ...]:
    """Running statistics for a pass that may be differentiated: training may move them before, and autograd is not told."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return running
    return tuple(None if tensor is None else tensor.detach().clone() for tensor in running)


def move_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, momentum: float | Tensor,
    count: int, mean_offset: Tensor | None,
) -> None:  # fmt: skip
    """The running statistics towards the mean of `count` elements, plus `mean_offset`, and their variance; in place."""
    if running_mean is None or running_var is None:
        return
    if mean_offset is not None:
        mean = mean + mean_offset.detach()
    if not _move_at_once(running_mean, running_var, mean, var, momentum, count / (count - 1)):
        move(running_mean, mean, momentum)
        move(running_var, var * (count / (count - 1)), momentum)


# On the CPU stock torch is faster up to so many elements a thread: an operator in Python takes longer to call than a small
# tensor to read. Its training pass is slow enough to be beaten sooner, in float32 first, and in channels_last before NCHW;
# its second order always.
_Small = dict[tuple[bool, bool], tuple[int, int]]  # by (training, float32): in NCHW and channels_last
_SMALL: _Small = {
    (False, True): (1 << 17, 1 << 16),
    (False, False): (1 << 17, 1 << 16),
    (True, True): (1 << 16, 1 << 17),
    (True, False): (1 << 18, 1 << 17),
}
# With AVX2. (In training not with PReLU, of which stock computes the gradient slowly.)
_SMALL_NARROW: _Small = {
    (False, True): (1 << 17, 1 << 16),
    (False, False): (1 << 18, 1 << 17),
    (True, True): (1 << 16, 1 << 18),
    (True, False): (1 << 21, 1 << 19),
}


def stock_is_faster(x: Tensor, training: bool, act: Act) -> bool:
    """Whether `batch_norm_act` leaves x to stock torch."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    is_narrow = not backend.has_wide_lanes() and x.dtype != torch.float64 and not (training and act == "prelu")
    small = (_SMALL_NARROW if is_narrow else _SMALL)[training, x.dtype == torch.float32]
    return x.numel() <= small[is_channels_last(x)] * torch.get_num_threads()


def _move_at_once(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float | Tensor, unbiased: float
) -> bool:
    """Both running statistics, where C++ can: six small operations take longer than a small tensor to normalise."""
    vectors = (running_mean, running_var, mean, var)
    if isinstance(momentum, Tensor) or torch.compiler.is_compiling() or mean.dtype != torch.float64:
        return False
    if any(
        type(t) is not Tensor or t.device.type != "cpu" or t.requires_grad or not t.is_contiguous() for t in vectors
    ):
        return False
    if running_mean.dtype != running_var.dtype or running_mean.dtype not in (torch.float32, torch.float64):
        return False
    from fastgan import _C

    _C.move_statistics(
        DTYPES[running_mean.dtype], len(mean), running_mean.data_ptr(), running_var.data_ptr(), mean.data_ptr(),
        var.data_ptr(), momentum, unbiased,
    )  # fmt: skip
    return True


def move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """A running statistic towards the batch's, in place.

    Autograd counts no change, as it counts none of torch's own batch norm: that has saved the statistics of the batches
    before, whose gradients may still be asked for.
    """
    if isinstance(momentum, Tensor):
        momentum = momentum.to(running.dtype).reshape(())
    running.data.lerp_(batch.to(running.dtype), momentum)


def check_parameters(
    x: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    prelu_weight: Tensor | None = None,
    prefix: str = "",
) -> None:
    """Raise what `batch_norm_act` says it raises of everything but x and the residual; `prefix`: of weight's name."""
    check_settings(eps, act, Act)
    check_flag("training", training)
    check_prelu_weight(prelu_weight, act, x, channels)
    named = {
        "running_mean": running_mean,
        "running_var": running_var,
        f"{prefix}weight": weight,
        f"{prefix}bias": bias,
    }
    for name, tensor in named.items():
        check_parameter(name, tensor, x, (channels,), "one for each channel")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var are needed outside training")


def check_other_settings(momentum: object, negative_slope: object) -> None:
    check_number("negative_slope", negative_slope)
    if not isinstance(momentum, Tensor):
        check_number("momentum", momentum)
    elif momentum.numel() != 1:
        raise ValueError(f"momentum must be a number or one in a tensor, not shape {tuple(momentum.shape)}")


def check_batch_size(shape: Sequence[int]) -> None:
    if math.prod(shape) == shape[1]:
        raise ValueError(f"training needs more than 1 value per channel, not a batch of shape {tuple(shape)}")


def check_batch_norm(x: Tensor, residual: Tensor | None, *parameters) -> None:
    """Raise what `batch_norm_act` says it raises; `parameters` go to `check_parameters`."""
    check_input(x)
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"x must have 2 to 5 dimensions (N, C, *), not shape {tuple(x.shape)}")
    check_parameters(x, x.shape[1], *parameters)
    check_residual(residual, x)
