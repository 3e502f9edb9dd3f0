"""Batch normalisation over the batches of all processes, residual addition and activation, exact to every order.

What the processes tell each other are the moments of their parts and, in a backward pass, the gradients of these. All else
is `batch_norm_act` about fixed statistics, whose weight and bias carry what depends on the batch.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastgan.ops import norm_act
from fastgan.ops._tensors import accumulation_dtype
from fastgan.ops._types import Act
from fastgan.ops.norm_act import batch_norm_act, check_batch_norm, check_other_settings, move

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(parts: list[Tensor], running_mean, running_var, weight=None, bias=None, **settings) -> list[Tensor]:
    """`sync_batch_norm_act` of what each process has, in plain torch and one process."""
    y = norm_act.reference(torch.cat(parts), running_mean, running_var, weight, bias, training=True, **settings)
    return list(y.split([len(part) for part in parts]))


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _affine(x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x − mean) · weight + bias of each channel, in one pass. Differentiable in all of them."""
    fixed = mean.detach()
    bias = bias + (fixed - mean) * weight
    return batch_norm_act(x, fixed, torch.ones_like(fixed), weight, bias, eps=0, act="none")


class _Moments(torch.autograd.Function):
    """Mean and biased variance of each channel, of float32 sums for 16-bit x; zeros where there is no element."""

    @staticmethod
    def forward(ctx, x):
        wide = x.to(accumulation_dtype(x.dtype))
        if x.numel() == 0:
            mean, var = wide.new_zeros(2, x.shape[1])
        else:
            var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        n = max(x.numel() // x.shape[1], 1)
        return _affine(x, mean, grad_var * (2 / n), grad_mean / n)


class _Gather(torch.autograd.Function):
    """What every process has, one row for each."""

    @staticmethod
    def forward(ctx, mine, group):
        ctx.group = group
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, mine.contiguous(), group)
        return torch.stack(rows)

    @staticmethod
    def backward(ctx, grad):
        return _Scatter.apply(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    """This process's row of the sum over all processes: the adjoint of `_Gather`, whose adjoint it has."""

    @staticmethod
    def forward(ctx, rows, group):
        ctx.group = group
        total = rows.clone()
        dist.all_reduce(total, group=group)
        return total[dist.get_rank(group)]

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.group), None


# ── The function ─────────────────────────────────────────────────────────────────────────────────────────────────────


def sync_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    process_group: "ProcessGroup | None" = None,
    act: Act = "relu",
    negative_slope: float = 0.01,
    prelu_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`batch_norm_act` in training, where μ and σ² are those of the batches of all processes together, which may have
    different sizes, or none: what `torch.nn.SyncBatchNorm` computes in training.

    Args:
        process_group: None stands for all processes. Each of them has to call, forward and backward in the same order.

    All else is as in `batch_norm_act`, on CUDA and the CPU. The moments μᵢ, σᵢ² and numbers nᵢ of the processes are merged
    as in Chan, Golub and LeVeque (1983): σ² = Σ nᵢ·(σᵢ² + (μᵢ − μ)²) / Σ nᵢ.

    Differentiable to every order; deterministic, as torch's sums and the collectives of the processes are. As with
    `torch.nn.SyncBatchNorm`, a gradient is that of the sum of what all processes differentiate; with
    `autograd.grad(..., create_graph=True)` it has a gradient of its own. Each pass is one collective: 2·C + 1 numbers from
    each process forward, and as many for each of them backward.

    Raises:
        TypeError, ValueError: what `batch_norm_act` raises, but for a batch that is too small: others may have more.
    """
    check_batch_norm(x, residual, running_mean, running_var, weight, bias, True, eps, act, prelu_weight)
    check_other_settings(momentum, negative_slope)
    channels = x.shape[1]
    mean, var = _Moments.apply(x)
    rows = _Gather.apply(torch.cat([mean, var, mean.new_full((1,), x.numel() // channels)]), process_group)
    means, variances, counts = rows.split([channels, channels, 1], dim=1)
    total = counts.sum()
    shares = counts / total
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    fixed_mean, fixed_var = mean.detach(), var.detach()
    if running_mean is not None and running_var is not None:
        move(running_mean, fixed_mean, momentum)
        move(running_var, fixed_var * (total / (total - 1)), momentum)
    # (x − μ)·w/σ + b = (x − μ')·(w·σ'/σ)/σ' + (b + (μ' − μ)·w/σ), where μ' and σ' have no gradient.
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    shift = (fixed_mean - mean) * scale
    return batch_norm_act(
        x, fixed_mean, fixed_var, scale * (fixed_var + eps).sqrt(), shift if bias is None else shift + bias,
        eps=eps, act=act, negative_slope=negative_slope, prelu_weight=prelu_weight, residual=residual,
    )  # fmt: skip
