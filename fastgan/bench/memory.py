"""What a call allocates, and what it keeps for backward."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from fastgan.bench.case import Run


def saved_bytes(forward: Run, parameters: Iterable[Tensor]) -> int:
    """What `forward` keeps for backward: every storage once, those of the parameters, which are there anyway, not."""
    there = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result: Any = forward()  # alive until counted, or its memory and address are used again
    del result
    return sum(kept.values())


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most bytes of tensors at once during `run`, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent_stderr(), profile(profile_memory=True) as profiler:
        run()
    now = peak = 0
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """torch's profiler announces itself there, from C++, in some builds."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
