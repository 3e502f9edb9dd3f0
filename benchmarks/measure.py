"""`python -m benchmarks.measure PART …`: the cases of the suite that a file of results lacks.

`benchmarks.gpu` starts it, and again where a case has killed it; that case is then not tried any more. Needs neither typer
nor rich.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastgan.bench import results, suite
from fastgan.bench.case import Case, Contest

PATIENCE = 150
"""Seconds after which a case is killed."""
RUNNING = "running.txt"
"""Names the case that is being measured."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=suite.PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the file of results")
    given = parser.parse_args()
    device = torch.device(given.device)
    path = results.results_path(device, given.out)
    running = given.out / RUNNING
    end = time.monotonic() + given.seconds
    if running.exists():
        give_up(given.parts, running.read_text(), device, path)
    for case in left(given.parts, device, path):
        if time.monotonic() > end:
            break
        print(f"{case.name}{', quickly' if case.quick else ''}", flush=True)
        running.write_text(case.name)
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
