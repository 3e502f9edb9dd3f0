"""Runs the cases of every `bench_*.py` beside this file."""

import gc
import importlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

import torch

from fastgan.bench.case import Case, Contest, Key, first_line
from fastgan.bench.results import QUICK, Row, make_row
from fastgan.bench.timing import MIN_ROUNDS, PATIENCE_SECONDS, interleave

PARTS = tuple(sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")))
"""A part is a file `bench_<part>.py`, which has `cases(device) -> Iterator[Case]`, the most important first."""
MODELS = ("dcgan", "wgan_gp", "stylegan", "cyclegan", "srgan")
OPERATORS = tuple(part for part in PARTS if part not in MODELS)

MAX_SECONDS = 4.0
"""Longest that the calls of one case are timed, where minutes are left over, and calls are short."""
QUICK_ROUNDS, QUICK_PATIENCE_SECONDS = 3, 2.0


def cases(part: str, device: torch.device, text: str = "") -> list[Case]:
    """The cases of a part with `text` in their names."""
    module = importlib.import_module(f"fastgan.bench.bench_{part}")
    return [replace(case, part=part) for case in module.cases(device) if text in case.name]


def quick_cases(part: str, device: torch.device, text: str = "") -> list[Case]:
    """The headline cases of a part, to be measured quickly."""
    return [replace(case, quick=True) for case in cases(part, device, text) if case.headline]


def keys(device: torch.device) -> list[Key]:
    """Of all there is to measure."""
    return [case.key for part in PARTS for case in cases(part, device)]


def one_of_each(selected: Iterable[Case]) -> list[Case]:
    """Of each operator the first case with its gradients."""
    found: dict[str, Case] = {}
    for case in selected:
        if case.work not in ("forward", "second order"):
            found.setdefault(case.op, case)
    return list(found.values())


def in_turn(groups: Iterable[list[Case]]) -> list[Case]:
    """The first of each, then the second of each, and so on: when the time is over, something is known of each."""
    return [case for case in chain.from_iterable(zip_longest(*groups)) if case is not None]


def measure(selected: Sequence[Case], device: torch.device, seconds: float) -> Iterator[Row]:
    """A row for each case, until `seconds` are over; every case gets its share of what is left."""
    end = time.perf_counter() + seconds
    for i, case in enumerate(selected):
        now = time.perf_counter()
        if now > end:
            return
        share = (end - now) / (len(selected) - i)
        yield measure_case(case, device, now + share)


def measure_case(case: Case, device: torch.device, end: float) -> Row:
    """One row. Setting up takes what it takes; the timing then lasts until `end`, and some rounds at least."""
    try:
        contest = case.prepare(device)
    except Exception as error:
        return make_row(case, Contest({}, gate=first_line(error)), {}, device)
    runs = dict(contest.contenders)
    if contest.floor:
        runs["copy_"] = contest.floor
    seconds = min(MAX_SECONDS, end - time.perf_counter()) if contest.captured else end - time.perf_counter()
    rounds, patience = MIN_ROUNDS, PATIENCE_SECONDS
    if case.quick:
        contest.notes.append(QUICK)
        seconds, rounds, patience = 0.0, QUICK_ROUNDS, QUICK_PATIENCE_SECONDS
    times = interleave(runs, seconds, device, contest.captured, rounds, patience)
    contest.notes += [f"{name}: not timed, as no CUDA graph can hold it" for name in runs if name not in times]
    row = make_row(case, contest, times, device)
    del contest, runs
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row
