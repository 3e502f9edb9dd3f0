"""`python -m benchmarks.gpu`: build, test and measure on a CUDA machine on which nothing can be installed.

Needs a checkout, torch with Triton, pytest, and an nvcc with pybind11 for the part in CUDA C++. No part that fails or runs
out of time stops the others, and what was done already is not done again: a second run goes on where the first has ended.
Logs, the CSV file and its page of plots go to $OUT, else to runs/gpu, and the CSV file to benchmarks/results as well; the
last lines of the output are a table.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import RESULTS
from benchmarks.measure import RUNNING
from fastgan.bench import page, results, suite
from fastgan.bench.results import Row

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/kernels",
    "tests/test_captured.py",
    "tests/ops/test_conv_norm_act.py::test_every_form_on_cuda_is_as_exact_as_eager",
)
"""What runs on the GPU where there is one. The operators' other tests are of the CPU; the gates of the benchmarks hold all
operators and training steps against float64."""
PARTS = ("build", "tests", *suite.PARTS)
BUILD_SHARE, TESTS_SHARE, COMPILE_SHARE = 0.3, 0.35, 0.3
"""Of the time that there is, what building may take; of what that leaves, the tests; and of what those leave, compiling what
will be measured."""
GRACE = 20.0
"""Seconds that the last case may take after the end."""
MOST_DEATHS = 10
"""Of the process that measures."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--part", action="append", choices=PARTS, help="may be given again; all without")
    made.add_argument("--minutes", type=float, default=8.5, help="for everything together (8.5)")
    made.add_argument("--device", default="cuda", help="cuda, or cpu to try this out")
    made.add_argument("--again", action="store_true", help="also what has passed or been measured already")
    return made


def main() -> None:
    given = parser().parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; --device cpu goes through the same motions")
    chosen = [name for name in PARTS if not given.part or name in given.part]
    measured = [name for name in chosen if name in suite.PARTS]
    out = Path(os.environ.get("OUT", ROOT / "runs" / "gpu")).absolute()
    out.mkdir(parents=True, exist_ok=True)
    kept, table = results.results_path(device, RESULTS), results.results_path(device, out)
    passed = out / "passed.txt"
    if given.again:
        passed.unlink(missing_ok=True)
        for name in measured:
            results.merge(table, [], drop_part=name)
    elif kept.exists() and not table.exists():
        shutil.copy(kept, table)

    end = time.monotonic() + 60 * given.minutes
    outcomes: dict[str, str] = {}
    if "build" in chosen:
        outcomes["build"] = build(device, out, share_of(BUILD_SHARE, end) if len(chosen) > 1 else end)
    if "tests" in chosen:
        outcomes["tests"] = test(out, passed, share_of(TESTS_SHARE, end) if measured else end)
    if measured:
        outcomes["compiling"] = compile_ahead(measured, given.device, out, share_of(COMPILE_SHARE, end))
        outcomes["benchmarks"] = measure(measured, given.device, out, end)
        page.write(table.with_suffix(".html"), results.read(table), suite.keys(device))
        if device.type == "cuda" and table.exists():
            shutil.copy(table, kept)

    print("\n".join(lines([row for row in results.read(table) if row.part in measured])))
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    sys.exit(not all(outcome.startswith("done") and "FAILED" not in outcome for outcome in outcomes.values()))


# ── The parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def share_of(part: float, end: float) -> float:
    """When that part of the time until `end` is over."""
    now = time.monotonic()
    return now + part * (end - now)


def build(device: torch.device, out: Path, end: float) -> str:
    """For this GPU alone, as each architecture takes its time."""
    if device.type == "cuda":
        os.environ["FASTGAN_CUDA_ARCHITECTURES"] = "{}{}".format(*torch.cuda.get_device_capability(device))
    command = ["setup.py", "build_ext", "--inplace", "--only=fastgan._cuda"]
    return run([command], [out / "build.log"], end)


def test(out: Path, passed: Path, end: float) -> str:
    """Each process has a share of the tests: what takes long is compiling kernels."""
    count = processes()
    shares = [
        ["-m", "pytest", "-p", "benchmarks.share", f"--share={i}/{count}", f"--passed={passed}", "-p", "no:cacheprovider",
         "--tb=short", *TESTS]
        for i in range(count)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{i}.log") for i in range(count)]
        outcome = run(shares, logs, end, fine=(0, 1, 5))  # 1: a test has failed, 5: none was left
        text = "\n".join(log.read_text(errors="replace") for log in logs)
    (out / "tests.log").write_text(text)
    failures = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print("\n".join(failures[:20]), flush=True)
    done = len(set(passed.read_text().splitlines())) if passed.exists() else 0
    return f"{outcome}; {done} passed or skipped" + f", {len(failures)} FAILED" * bool(failures)


def processes() -> int:
    return max(1, min(12, (os.cpu_count() or 1) - 1))


def compile_ahead(parts: Sequence[str], device: str, out: Path, end: float) -> str:
    """What measuring finds in Triton's cache, made by many processes at once. What they choose among forms is forgotten."""
    count = processes()
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "benchmarks.measure", *parts, f"--device={device}", "--seconds=0", f"--out={out}"]
        logs = [Path(folder, f"{i}.log") for i in range(count)]
        shares = [[*command, f"--compile={i}/{count}"] for i in range(count)]
        outcome = run(shares, logs, end, FASTGAN_CACHE_DIR=folder)
    return outcome.replace("out of time", "done as far as time allowed")


def measure(parts: Sequence[str], device: str, out: Path, end: float) -> str:
    """Starts anew where a case has ended the process."""
    log, outcome = out / "benchmarks.log", "out of time"
    log.unlink(missing_ok=True)
    deaths = 0
    while (seconds := end - time.monotonic()) > 0:
        command = ["-m", "benchmarks.measure", *parts, f"--device={device}", f"--seconds={seconds}", f"--out={out}"]
        outcome = run([command], [log], end + GRACE)
        if not outcome.startswith("failed") or deaths == MOST_DEATHS:
            break
        deaths += 1
    (out / RUNNING).unlink(missing_ok=True)  # the time was over: it may be tried again
    return outcome + f"; started anew {deaths} times" * (deaths > 0)


def run(
    commands: Sequence[list[str]], logs: Sequence[Path], end: float, fine: Iterable[int] = (0,), **variables: str
) -> str:
    """Runs Python with each of `commands`, at once, until `end`: "done" or what went wrong, and the seconds. `variables`:
    of their environment."""
    start = time.monotonic()
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "PYTHONUNBUFFERED": "1",
    }
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("ab") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip
    problems = []
    for process, log in zip(processes, logs, strict=True):
        try:
            status = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            problems.append(f"out of time, see {log}")
        else:
            if status not in fine:
                problems.append(f"failed: {_last_line(log)}, see {log}")
    return f"{'; '.join(dict.fromkeys(problems)) or 'done'}, {time.monotonic() - start:.0f} s"


def _last_line(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return text.splitlines()[-1].strip("= ") if text else "no output"


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def lines(rows: Sequence[Row]) -> list[str]:
    """The training steps one by one, what operators and passes come to, and all that has no time."""
    steps = [row for row in rows if row.part in suite.MODELS and row.speedup]
    found = [f"{'':46}{'ms':>9}{'stock ms':>10}{'speedup':>9}{'of floor':>9}"]
    for row in steps:
        name = f"{row.op} {row.work}, {row.shape}, {row.dtype}"
        found.append(
            f"{name:46.46}{row.fastgan_ms:>9}{row.best_stock_ms:>10}{row.speedup:>9}{row.of_floor:>9} {row.best_stock}"
        )
    found.append(f"{'':46}{'rows':>9}{'slowest':>10}{'median':>9}{'of floor':>9}")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.part not in suite.MODELS and row.speedup:
            groups.setdefault(f"{row.op} {row.work}, {row.dtype}", []).append(row)
    for name, group in groups.items():
        ratios = [float(row.speedup) for row in group]
        floors = [float(row.of_floor) for row in group if row.of_floor]
        floor = f"{median(floors):.2f}" if floors else ""
        found.append(f"{name:46.46}{len(group):>9}{min(ratios):>10.2f}{median(ratios):>9.2f}{floor:>9}")
    found += [
        f"no time: {', '.join(row.key[1:])}: gate {row.gate}; {row.note}"[:160] for row in rows if not row.speedup
    ]
    return found


if __name__ == "__main__":
    main()
