"""A training step as one CUDA graph: its kernels are launched at once, and Python does not run between them."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from fastgan.training.errors import one_line

Result = TypeVar("Result")

WARMUP = 3
"""Calls before the one that is captured: cuDNN chooses its kernels in them, and optimisers make their state."""

MOST_GRAPHS = 8
"""Of different kinds. Each holds the memory of a step; of more, the one that has not been used for longest gives way."""


class CapturedStep(Generic[Result]):
    """`step(*inputs)`, from the fourth call on by a CUDA graph that holds all that the step does.

        step = CapturedStep(train_on_batch, optimizers=(adam_g, adam_d))
        for real in batches:
            losses = step(real)

    A step may be whole: forwards, gradient penalties, backwards, optimisers, averages of weights. Its inputs are tensors, or
    tuples, lists and dicts of them; before each launch they are copied into those of the graph, in the order of the stream,
    so that no call waits for the device. Random numbers of torch's own CUDA generator go on from call to call. What the step
    returns are copies. For tensors of other shapes or dtypes there is a graph of their own, and for every value of inputs
    that are no tensors, such as a flag. On the CPU, and until a graph is there, the step runs as it is.

    A graph repeats what was launched and not what Python decided: a step must do the same for all tensors of one shape with
    the same flags, wait for no value, and take whatever changes from tensors. That includes the learning rate, which
    therefore becomes a tensor in `optimizers`, to be changed by `group["lr"].fill_(…)`, as PyTorch's schedulers do. Other
    generators than torch's own cannot be used. Where PyTorch refuses to capture a step, a warning says why, and the step
    runs as it is.

    Args:
        step: what to run. Gradients have to begin as None or zero in it. Inputs that are no tensors have to be hashable.
        optimizers: those that it steps. They are made capturable.
    """

    def __init__(self, step: Callable[..., Result], *, optimizers: Sequence[Optimizer] = ()):
        self.step = step
        self.optimizers = tuple(optimizers)
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording[Result]] = {}
        self._is_refused = False

    def __call__(self, *inputs: Any) -> Result:
        leaves, structure = pytree.tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self._is_refused or not _are_on_cuda(tensors):
            return self.step(*inputs)
        key = (structure, *map(_kind_of, leaves))
        recording = self._recordings.pop(key, None)
        if recording is None:
            if self._calls.setdefault(key, 0) < WARMUP:
                self._calls[key] += 1
                for optimizer in self.optimizers:
                    make_capturable(optimizer)
                with _beside():
                    return self.step(*inputs)
            if len(self._recordings) == MOST_GRAPHS:
                oldest = next(iter(self._recordings))
                del self._recordings[oldest], self._calls[oldest]
            try:
                recording = _record(self.step, inputs)
            except RuntimeError as error:
                warnings.warn(f"the step runs uncaptured: {one_line(error)}", stacklevel=2)
                self._is_refused = True
                return self.step(*inputs)
        self._recordings[key] = recording  # behind all that have not been used since
        return recording.replay(tensors)


@dataclass(frozen=True)
class _Recording(Generic[Result]):
    """A step on tensors of its own."""

    launch: Callable[[], None]
    inputs: list[Tensor]
    result: Result

    def replay(self, inputs: Sequence[Tensor]) -> Result:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.launch()
        return pytree.tree_map_only(Tensor, torch.clone, self.result)


def _record(step: Callable[..., Result], inputs: tuple) -> "_Recording[Result]":
    own = pytree.tree_map_only(Tensor, torch.clone, inputs)
    graph = torch.cuda.CUDAGraph()
    # Other threads, which load data, may allocate meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step(*own)
    inputs_of_graph = [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, Tensor)]
    return _Recording(graph.replay, inputs_of_graph, result)


def _kind_of(leaf: Any) -> Hashable:
    """What a graph is fixed to of an input."""
    return (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _are_on_cuda(tensors: Sequence[Tensor]) -> bool:
    """Whether there are any, all of them on a GPU."""
    return bool(tensors) and all(tensor.is_cuda for tensor in tensors)


@contextmanager
def _beside() -> Iterator[None]:
    """On another stream than the default one, as what is captured later has to have run before."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def make_capturable(optimizer: Optimizer) -> None:
    """Has an optimiser of a kind that knows `capturable` keep its counts and its learning rate on the GPU."""
    for group in optimizer.param_groups:
        if "capturable" not in group or group["capturable"]:
            continue
        group["capturable"] = True
        device = group["params"][0].device
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)
