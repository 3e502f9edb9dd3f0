"""Registering an operator's gradient, and the zeros that a lean one owes."""

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


# ── Zeros ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The second derivative of relu(x) in x is zero. Stock autograd pushes that zero back through all that x was made from: a
# pass through the network, in which each parameter before it gets a gradient of zeros. A lean operator returns None for x.
# But optimisers and DistributedDataParallel tell zeros from None, so it hands the parameters their zeros at once.


def with_zeros(ctx, grad: Tensor, arguments: int = 1) -> Tensor:
    """`grad`, a gradient of the running backward, whose own backward gives zeros to the leaves before the first `arguments`
    tensors of the forward."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grad
    leaves = [leaf for node, _ in ctx.next_functions[:arguments] for leaf in _leaves_before(node)]
    return _WithZeros.apply(grad, *leaves) if leaves else grad


class _WithZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, *leaves):
        ctx.like = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        ctx.set_materialize_grads(False)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, gg):
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(ctx.like, ctx.needs_input_grad[1:], strict=True)
        )
        return gg, *zeros


_FOUND_IN = "fastgan found its leaves in"
_current_task: Callable[[], object] = getattr(torch._C, "_current_graph_task_id", object)  # private to torch


def _leaves_before(node: Any) -> list[Tensor]:
    """The leaves that a node of the graph was made from, less those that this backward pass has found already.

    The nodes themselves note the pass: a list of them would keep the graph alive, after an error for instance.
    """
    task, leaves, ahead = _current_task(), [], [node]
    while ahead:
        node = ahead.pop()
        if node is None or node.metadata.get(_FOUND_IN) == task:
            continue
        node.metadata[_FOUND_IN] = task
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        ahead += [edge[0] for edge in node.next_functions]
    return leaves
