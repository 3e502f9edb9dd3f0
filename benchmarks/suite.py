"""Runs the cases of every `bench_*.py` beside this file."""

import gc
import importlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.case import Case, Contest, first_line
from benchmarks.results import Row, make_row
from benchmarks.timing import interleave

PARTS = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
"""A part is a file `bench_<part>.py`, which has `cases(device) -> Iterator[Case]`, the most important first."""

MAX_SECONDS = 4.0
"""Longest that the calls of one case are timed, where minutes are left over, and calls are short."""


def cases(part: str, device: torch.device, text: str = "") -> list[Case]:
    """The cases of a part with `text` in their names."""
    module = importlib.import_module(f"benchmarks.bench_{part}")
    return [case for case in module.cases(device) if text in case.name]


def measure(part: str, selected: list[Case], device: torch.device, seconds: float) -> Iterator[Row]:
    """A row for each case, until `seconds` are over; every case gets its share of what is left."""
    end = time.perf_counter() + seconds
    for i, case in enumerate(selected):
        now = time.perf_counter()
        if now > end:
            return
        share = (end - now) / (len(selected) - i)
        yield measure_case(part, case, device, now + share)


def measure_case(part: str, case: Case, device: torch.device, end: float) -> Row:
    """One row. Setting up takes what it takes; the timing then lasts until `end`, and some rounds at least."""
    try:
        contest = case.prepare(device)
    except Exception as error:
        return make_row(part, case, Contest({}, gate=first_line(error)), {}, device)
    runs = dict(contest.contenders)
    if contest.floor:
        runs["copy_"] = contest.floor
    seconds = min(MAX_SECONDS, end - time.perf_counter()) if contest.captured else end - time.perf_counter()
    times = interleave(runs, seconds, device, contest.captured)
    contest.notes += [f"{name}: not timed, as no CUDA graph can hold it" for name in runs if name not in times]
    row = make_row(part, case, contest, times, device)
    del contest, runs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row
