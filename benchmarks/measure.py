"""`python -m benchmarks.measure PART …`: the cases of the suite that a file of results lacks.

`benchmarks.gpu` starts it, and again where a case has killed it; at the second time that case is not tried any more. Needs
neither typer nor rich.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from fastgan.bench import results, suite
from fastgan.bench.case import Case, Contest
from fastgan.ops import _autotune

PATIENCE = 150
"""Seconds after which a case is killed. What it has compiled by then is compiled when it is tried again."""
TRIES = 2
RUNNING = "running.txt"
"""Names the case that is being measured, once for each try."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=suite.PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the file of results")
    parser.add_argument("--compile", metavar="I/N", help="only compile what a share of the headline cases will call")
    given = parser.parse_args()
    device = torch.device(given.device)
    path = results.results_path(device, given.out)
    if given.compile:
        compile_share(left(given.parts, device, path), device, *map(int, given.compile.split("/")))
    else:
        measure(given.parts, device, path, time.monotonic() + given.seconds)


def measure(parts: list[str], device: torch.device, path: Path, end: float) -> None:
    running = path.parent / RUNNING
    tried = running.read_text().splitlines() if running.exists() else []
    if len(tried) == TRIES:
        give_up(parts, tried[0], device, path)
        tried = []
    for case in left(parts, device, path):
        if time.monotonic() > end:
            break
        print(f"{case.name}{', quickly' if case.quick else ''}", flush=True)
        tried = [*(name for name in tried if name == case.name), case.name]
        running.write_text("\n".join(tried))
        signal.alarm(PATIENCE)
        row = suite.measure_case(case, device, time.perf_counter())
        signal.alarm(0)
        results.merge(path, [row])
        running.unlink()
        print(
            f"    {row.fastgan_ms or '-'} ms, {row.speedup or '-'}x {row.best_stock}, gate {row.gate}; {row.note}",
            flush=True,
        )
        if device.type == "cuda" and is_broken(device):
            sys.exit("the device answers no more")


def left(parts: list[str], device: torch.device, path: Path) -> Iterator[Case]:
    """The headline cases of all parts in turn, quickly; then they again and all others, as carefully as `fastgan bench`."""
    rows = {row.key: row for row in results.read(path)}
    quick = suite.in_turn(suite.quick_cases(part, device) for part in parts)
    yield from (case for case in quick if case.key not in rows)
    whole = suite.in_turn(suite.cases(part, device) for part in parts)
    for case in sorted(whole, key=lambda case: not case.headline):
        row = rows.get(case.key)
        if row is None or results.QUICK in row.note.split("; "):
            yield case


def compile_share(cases: Iterator[Case], device: torch.device, index: int, count: int) -> None:
    """Sets up every `count`th quick case. Of a convolution all forms run, and none is timed, as others run beside it."""

    def run_all(candidates: _autotune.Candidates, device: torch.device) -> dict[str, float]:
        for run in candidates.values():
            with suppress(Exception):  # which measuring will meet as well
                run()
        return {next(iter(candidates)): 0.0}

    _autotune._measure = run_all
    for case in islice((case for case in cases if case.quick), index, None, count):
        print(case.name, flush=True)
        with suppress(Exception):
            case.prepare(device)


def give_up(parts: list[str], name: str, device: torch.device, path: Path) -> None:
    """Notes that a case has not returned: in the row that was found quickly, where there is one."""
    rows = {row.key: row for row in results.read(path)}
    for case in (case for part in parts for case in suite.cases(part, device) if case.name == name):
        row = rows.get(case.key) or results.make_row(case, Contest({}), {}, device)
        results.merge(path, [replace(row, note="did not return")])


def is_broken(device: torch.device) -> bool:
    """Whether a kernel has failed so that nothing runs any more in this process."""
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    main()
