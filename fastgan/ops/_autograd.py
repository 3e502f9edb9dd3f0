"""Registering an operator's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_has_transforms = getattr(torch._C, "_are_functorch_transforms_active", bool)  # private to torch


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode AD looks into the operators: they know the stock ones only."""
    return not torch.compiler.is_compiling() and (_has_transforms() or forward_ad._current_level >= 0)


def register_gradient(operator: str, backward: Callable, save: Callable) -> None:
    """What `torch.library.register_autograd` does, without walking the whole schema at every call.

    That walk takes longer than a small layer does. It is what serves where torch has not the private guard used here.
    """
    if not hasattr(torch._C, "_AutoDispatchBelowAutograd"):
        torch.library.register_autograd(f"fastgan::{operator}", backward, setup_context=save)
        return
    call = getattr(torch.ops.fastgan, operator).default

    def forward(ctx, *inputs):
        output = call_below(*inputs)
        save(ctx, inputs, output)
        return output

    def call_below(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return call(*inputs)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(operator, (torch.autograd.Function,), methods)

    def autograd(*inputs):
        if torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return function.apply(*inputs)
        return call_below(*inputs)

    torch.library.impl(f"fastgan::{operator}", "Autograd", autograd)
