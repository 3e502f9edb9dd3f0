"""Times of several contenders, taken in turn."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import pairwise
from statistics import median

import torch

from fastgan.bench.case import Run

MIN_ROUNDS, MAX_ROUNDS = 5, 200
PATIENCE_SECONDS = 60.0
"""After which what rounds there are is enough: calls may take minutes."""
BLOCK_SECONDS = 0.03
"""A contender is called for about so long before it is the next one's turn."""


class NotCaptured(Exception):
    """A call that no CUDA graph can hold: it waits for the device, say."""


Sample = Callable[[], list[float]]


def interleave(
    contenders: dict[str, Run],
    seconds: float,
    device: torch.device,
    captured: bool,
    rounds: int = MIN_ROUNDS,
    patience: float = PATIENCE_SECONDS,
) -> dict[str, float]:
    """Median seconds of one call of each contender; none of what cannot be captured.

    There are as many rounds as `seconds` allow, and at least `rounds`, or one of them if `patience` seconds are over then.

    In every round each is called in turn, and every round begins with another one: what disturbs the machine, or slows
    it down, hits all alike.
    """
    samples: dict[str, Sample] = {}
    for name, run in contenders.items():
        with suppress(NotCaptured):
            samples[name] = _sampler(run, device, captured)
    times: dict[str, list[float]] = {name: [] for name in samples}
    names = list(samples)
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS):
        passed = time.perf_counter() - start
        if passed > seconds and (turn >= rounds or (turn and passed > patience)):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name] += samples[name]()
    return {name: median(values) for name, values in times.items()}


def _sampler(run: Run, device: torch.device, captured: bool) -> Sample:
    run()
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    calls = max(1, min(50, math.floor(BLOCK_SECONDS / (time.perf_counter() - start))))
    return _cuda_sampler(run, calls, captured) if device.type == "cuda" else _cpu_sampler(run, calls)


def _cpu_sampler(run: Run, calls: int) -> Sample:
    def sample() -> list[float]:
        for _ in range((calls + 2) // 4):  # brings back what the other contenders have driven out of the caches
            run()
        times = [time.perf_counter()]
        for _ in range(calls):
            run()
            times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]

    return sample


def _cuda_sampler(run: Run, calls: int, captured: bool) -> Sample:
    def launch() -> None:
        for _ in range(calls):
            run()

    if captured:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                launch()
        except RuntimeError as error:
            raise NotCaptured from error
        launch = graph.replay

    def sample() -> list[float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3 / calls]

    return sample


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def matmul_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """The speed of a large matrix product, with TF32 where convolutions use it."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        seconds = interleave({"matmul": lambda: torch.mm(a, b, out=out)}, 0.5, device, captured=False)["matmul"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * size**3 / seconds
