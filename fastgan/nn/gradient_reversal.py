"""The reversal layers of domain-adversarial networks, and a linear layer that has one before it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import ops
from fastgan.ops._tensors import check_count, check_flag, check_number
from fastgan.ops.gradient_reversal import Coeff, check_coeff


class GradientReversal(nn.Module):
    """y = x, ∂y/∂x = −coeff · I, by `fastgan.ops.gradient_reversal`.

    Args:
        coeff: a finite number, or a 0-d tensor. A schedule of one's own sets the attribute `coeff`, or fills the tensor,
            which is used as it is: no buffer, and not moved with the module.

    Raises:
        TypeError, ValueError: what the operator raises of `coeff`.
    """

    def __init__(self, coeff: Coeff = 1.0):
        super().__init__()
        check_coeff(coeff)
        self.coeff = coeff

    def forward(self, input: Tensor) -> Tensor:
        return ops.gradient_reversal(input, next_coeff(self))

    def extra_repr(self) -> str:
        return f"coeff={self.coeff}"


class WarmStartGradientReversal(nn.Module):
    """`GradientReversal` whose coeff rises from `lo` towards `hi`, after i of N = `max_iters` steps having come to

        2 · (hi − lo) / (1 + exp(−alpha · i / N)) − (hi − lo) + lo

    (Ganin & Lempitsky 2015, section 4, with alpha 10): what is reversed is noise at first.

    Args:
        alpha: how fast.
        auto_step: `step()` after each forward in training. Otherwise whoever trains calls it.

    The count of steps is the buffer `iter_num`, in the state_dict: a resumed run goes on where it was. It is a tensor on the
    module's device, as `coeff` is, so that no step waits for the device, and a CUDA graph may hold the schedule.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: alpha, lo or hi is not finite, or max_iters is not positive.
    """

    iter_num: Tensor

    def __init__(
        self, alpha: float = 1.0, lo: float = 0.0, hi: float = 1.0, max_iters: int = 1000, auto_step: bool = False
    ):
        super().__init__()
        for name, value in (("alpha", alpha), ("lo", lo), ("hi", hi)):
            check_number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, not {value}")
        max_iters = check_count("max_iters", max_iters)
        check_flag("auto_step", auto_step)
        self.alpha, self.lo, self.hi, self.max_iters, self.auto_step = alpha, lo, hi, max_iters, auto_step
        self.register_buffer("iter_num", torch.zeros((), dtype=torch.long))

    @property
    def coeff(self) -> Tensor:
        """What the next forward takes."""
        rise = torch.tanh(self.iter_num * (self.alpha / (2 * self.max_iters)))  # 2 / (1 + exp(−2z)) − 1 = tanh(z)
        return self.lo + (self.hi - self.lo) * rise

    def step(self) -> None:
        self.iter_num += 1

    def forward(self, input: Tensor) -> Tensor:
        return ops.gradient_reversal(input, next_coeff(self))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, lo={self.lo}, hi={self.hi}, max_iters={self.max_iters}, auto_step={self.auto_step}"


class ReversedLinear(nn.Linear):
    """y = linear(x), of which x gets the gradient times −coeff, by `fastgan.ops.reversed_linear`: `GradientReversal` and
    `nn.Linear` in one.

    Takes the arguments of `nn.Linear`, and by keyword:

    Args:
        coeff: as in `GradientReversal`.

    Parameters, their gradients and the state_dict are `nn.Linear`'s.
    """

    def __init__(self, *args: Any, coeff: Coeff = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_coeff(coeff)
        self.coeff = coeff

    def forward(self, input: Tensor) -> Tensor:
        return ops.reversed_linear(input, self.weight, self.bias, self.coeff)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coeff={self.coeff}"


def next_coeff(reversal: GradientReversal | WarmStartGradientReversal) -> Coeff:
    """The coeff of a forward that begins now. A schedule that steps by itself does."""
    coeff = reversal.coeff
    if isinstance(reversal, WarmStartGradientReversal) and reversal.auto_step and reversal.training:
        reversal.step()
    return coeff
