"""Registering an operator's gradient, and the zeros that a lean one owes."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastgan.ops._kernels import KERNELS

_has_transforms = getattr(torch._C, "_are_functorch_transforms_active", bool)  # private to torch


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode AD looks into the operators: they know the stock ones only."""
    return not torch.compiler.is_compiling() and (_has_transforms() or forward_ad._current_level >= 0)


_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # private to torch


def is_checkpointed() -> bool:
    """Whether a `torch.utils.checkpoint` runs, which will compute once more and compare what is saved."""
    hooks = _saving_hooks(False) if _saving_hooks else None
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


# ── Calling ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Operators:
    """What `torch.ops.fastgan` is, but that plain tensors in eager mode do not go through PyTorch's dispatcher: it would
    come back to Python twice, which takes longer than a small kernel, and find what is known."""

    def __getattr__(self, name: str) -> Any:  # only of what has not been registered below
        return getattr(torch.ops.fastgan, name)


operators = _Operators()

_PLAIN = (Tensor, nn.Parameter)
# Private to torch, all of them; where one is not there, the dispatcher is asked.
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_pre_dispatch_modes: Any = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", None)
_has_storage: Any = getattr(torch._C, "_has_storage", None)
_is_zeros: Any = getattr(Tensor, "_is_zerotensor", None)


def _kernel_for(kernels: dict[str, Callable], inputs: tuple) -> Callable | None:
    """What computes an operator on the inputs, unless the dispatcher has to be asked."""
    if not kernels or torch.compiler.is_compiling():
        return None
    if None in (_dispatch_modes, _pre_dispatch_modes, _has_storage, _is_zeros):
        return None
    if _dispatch_modes() or _pre_dispatch_modes() or is_transformed() or torch.jit.is_tracing():
        return None
    device = None
    for value in inputs:
        if isinstance(value, Tensor):
            if type(value) not in _PLAIN or not _lies_in_memory(value):
                return None
            device = device or value.device.type
    return kernels.get(device or "")


def _lies_in_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements are what is at its address. Not those of a batch of gradients, nor what PyTorch negates
    or fills with zeros when it is read: the dispatcher does that."""
    return _has_storage(tensor) and not tensor.is_neg() and not _is_zeros(tensor)


# ── Registering ──────────────────────────────────────────────────────────────────────────────────────────────────────


def register_gradient(operator: str, backward: Callable, save: Callable) -> None:
    """What `torch.library.register_autograd` does, without walking the whole schema at every call.

    That walk takes longer than a small layer does. It is what serves where torch has not the private guard used here. Of an
    operator on lists of tensors `backward` and `save` see and return lists, as they would there.
    """
    if not hasattr(torch._C, "_AutoDispatchBelowAutograd"):
        torch.library.register_autograd(f"fastgan::{operator}", backward, setup_context=save)
        return
    call = getattr(torch.ops.fastgan, operator).default

    def call_below(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return call(*inputs)

    def forward(ctx, *inputs):
        output = call_below(*inputs)
        save(ctx, inputs, output)
        return output

    takes_lists = "Tensor[]" in str(call._schema)
    apply = (_function_of_lists if takes_lists else _function)(operator, forward, backward)

    def autograd(*inputs):
        if torch.is_grad_enabled() and any(map(_requires_grad, inputs)):
            return apply(*inputs)
        return call_below(*inputs)

    torch.library.impl(f"fastgan::{operator}", "Autograd", autograd)
    if not takes_lists:
        setattr(operators, operator, _direct(operator, backward, save))


def _direct(operator: str, backward: Callable, save: Callable) -> Callable:
    """The operator as `operators` has it."""
    kernels, packet = KERNELS.setdefault(operator, {}), getattr(torch.ops.fastgan, operator)

    @functools.cache
    def differentiable(kernel: Callable) -> Callable:
        def forward(ctx, *inputs):
            output = kernel(*inputs)
            save(ctx, inputs, output)
            return output

        return _function(operator, forward, backward)

    def call(*inputs):
        kernel = _kernel_for(kernels, inputs)
        if kernel is None:
            return packet(*inputs)
        if torch.is_grad_enabled() and any(map(_requires_grad, inputs)):
            return differentiable(kernel)(*inputs)
        return kernel(*inputs)

    return call


def register_without_gradient(operator: str) -> None:
    """Of an operator that is only called where nobody differentiates: that it is called as directly as the others."""
    kernels, packet = KERNELS.setdefault(operator, {}), getattr(torch.ops.fastgan, operator)

    def call(*inputs):
        return (_kernel_for(kernels, inputs) or packet)(*inputs)

    setattr(operators, operator, call)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(item, Tensor) and item.requires_grad for item in value)
    return isinstance(value, Tensor) and value.requires_grad


def _function(operator: str, forward: Callable, backward: Callable) -> Callable:
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    made: Any = type(operator, (torch.autograd.Function,), methods)
    return made.apply


class _Lists:
    """How long the lists are among an operator's arguments and results; None stands for what is no list of tensors."""

    def __init__(self, arguments: tuple) -> None:
        self.arguments = [_length(value) for value in arguments]
        self.results: list[int | None] = []


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) and isinstance(value[0], Tensor) else None


def _spread(values: Iterable, lengths: list[int | None]) -> Iterator:
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            yield value
        else:
            yield from value


def _gather(spread: Iterable, lengths: list[int | None]) -> tuple:
    values = iter(spread)
    return tuple(next(values) if length is None else [next(values) for _ in range(length)] for length in lengths)


def _function_of_lists(operator: str, forward: Callable, backward: Callable) -> Callable:
    """Autograd finds tensors only that are arguments, so each of a list is one."""

    def forward_of_spread(ctx, lists, *spread):
        output = forward(ctx, *_gather(spread, lists.arguments))
        results = output if isinstance(output, tuple) else (output,)
        ctx.lists, lists.results = lists, [_length(value) for value in results]
        return tuple(_spread(results, lists.results))

    def backward_of_spread(ctx, *spread):
        spread_needs = ctx.needs_input_grad
        ctx.needs_input_grad = _gather(spread_needs[1:], ctx.lists.arguments)
        try:
            grads = backward(ctx, *_gather(spread, ctx.lists.results))
        finally:
            ctx.needs_input_grad = spread_needs
        return None, *_spread(grads, ctx.lists.arguments)

    apply = _function(operator, forward_of_spread, backward_of_spread)

    def apply_to_lists(*arguments):
        lists = _Lists(arguments)
        results = _gather(apply(lists, *_spread(arguments, lists.arguments)), lists.results)
        return results if len(results) > 1 else results[0]

    return apply_to_lists


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
