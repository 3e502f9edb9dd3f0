"""A CUDA graph's manners on the CPU: what was launched is launched again, on the same memory, and Python does not run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.training.captured import _Recording

WAITING = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
    torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default,
}  # fmt: skip
"""Operators that a GPU would have to be waited for, at which a capture fails."""


class Launches(TorchDispatchMode):
    """Notes every operator that runs. Raises `RuntimeError` at what no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        kwargs = kwargs or {}
        results = op(*args, **kwargs)
        is_view = any(argument.alias_info is not None for argument in op._schema.arguments)
        if is_view and not op._schema.is_mutable:
            return results  # it lies where its base does
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        new = [
            (place, leaf.detach()) for place, leaf in enumerate(pytree.tree_leaves(results))
            if isinstance(leaf, Tensor) and not any(leaf is one for one in given)
        ]  # fmt: skip

        def launch() -> None:
            again = pytree.tree_leaves(op(*args, **kwargs))
            for place, result in new:
                result.copy_(again[place])

        self.calls.append(launch)
        return results

    def replay(self) -> None:
        with torch.no_grad():
            for launch in self.calls:
                launch()


def record(step: Callable[..., Any], inputs: tuple) -> _Recording:
    """Stands for `captured._record`. What it runs while it notes is undone by nobody: so it is the first launch, too."""
    own = pytree.tree_map_only(Tensor, torch.clone, inputs)
    launches = Launches()
    with launches:
        result = step(*own)
    ran = [False]

    def launch() -> None:
        if ran[0]:
            launches.replay()
        ran[0] = True

    return _Recording(launch, [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, Tensor)], result)
