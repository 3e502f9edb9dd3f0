"""The speed of a fused system against the same one in stock PyTorch, in real training steps."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from fastgan.training.system import System

REALS = 4
"""Real batches drawn before timing starts, so that reading them is not timed: as many of each of one or two data sets."""


@dataclass(frozen=True)
class Comparison:
    """Median seconds of a training step, fused and stock, over `pairs` steps of each."""

    fused: float
    stock: float
    pairs: int

    @property
    def speedup(self) -> float:
        return self.stock / self.fused


def compare(fused: System, stock: System, batches: Iterator[Tensor], seconds: float) -> Comparison:
    """Times steps of both in turn for about `seconds`. It trains both: save first."""
    reals = itertools.cycle([next(batches) for _ in range(REALS)])
    for system in (fused, stock):
        _time_step(system, reals)
    pair = _time_step(fused, reals) + _time_step(stock, reals)
    (pairs,) = broadcast_object_list([max(3, round(seconds / pair))])
    times: dict[System, list[float]] = {fused: [], stock: []}
    for turn in range(pairs):
        for system in (fused, stock) if turn % 2 else (stock, fused):
            times[system].append(_time_step(system, reals))
    return Comparison(median(times[fused]), median(times[stock]), pairs)


def _time_step(system: System, reals: Iterator[Tensor]) -> float:
    device = system.accelerator.device
    start = time.perf_counter()
    system.step(reals)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
