"""`python -m benchmarks.gpu`: build, test and measure on a CUDA machine on which nothing can be installed.

Needs a checkout and what runs it: torch, Triton, pybind11, pytest, rich, typer, accelerate. No part that fails or runs
out of time stops the others. Logs and results go to $OUT, else to runs/gpu; the last lines of the output are a table.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import RESULTS
from fastgan.bench import results, suite
from fastgan.bench.command import table

ROOT = Path(__file__).parent.parent
TESTS = ("tests/kernels", "tests/ops", "tests/nn", "tests/test_fuse.py")
PARTS = ("build", "tests", *suite.PARTS)
TESTS_SHARE = 0.5
"""Of the time that building leaves, what the tests may take. The benchmarks share the rest."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}.", show_default="all")] = None,
    minutes: Annotated[float, typer.Option(help="For everything together.")] = 8.5,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try this out.")] = "cuda",
) -> None:
    """Build the kernels, test them and measure them."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device; --device cpu goes through the same motions")
    unknown = set(part or ()) - set(PARTS)
    if unknown:
        raise typer.BadParameter(f"{unknown.pop()}: expected {', '.join(PARTS)}")
    chosen = [name for name in PARTS if not part or name in part]
    out = Path(os.environ.get("OUT", ROOT / "runs" / "gpu")).absolute()
    out.mkdir(parents=True, exist_ok=True)

    end = time.monotonic() + 60 * minutes
    outcomes = {}
    for i, name in enumerate(chosen):
        start = time.monotonic()
        shares = {"build": 1.0, "tests": TESTS_SHARE}
        seconds = (end - start) * shares.get(name, 1 / (len(chosen) - i))
        outcome = run(command(name, device, seconds), out / f"{name}.log", seconds)
        outcomes[name] = f"{outcome}, {time.monotonic() - start:.0f} s"
        print(f"{name}: {outcomes[name]}", flush=True)

    path = results.results_path(where, RESULTS)
    if path.exists():
        shutil.copy(path, out)
    rows = [row for row in results.read(path) if row.headline and row.part in chosen]
    console = Console(width=150)
    console.print(table(results.device_name(where), rows))
    console.print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()), highlight=False)
    raise typer.Exit(not all(outcome.startswith("done") for outcome in outcomes.values()))


def command(part: str, device: str, seconds: float) -> list[str]:
    if part == "build":
        return ["setup.py", "build_ext", "--inplace"]
    if part == "tests":
        parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        return ["-m", "pytest", *parallel, *(test for test in TESTS if (ROOT / test).exists())]
    # Setting up the last case may take longer than its share.
    option = "--model" if part in suite.MODELS else "--op"
    return ["-m", "benchmarks", option, part, "--device", device, "--minutes", f"{0.85 * seconds / 60:.3f}"]


def run(arguments: list[str], log: Path, seconds: float) -> str:
    """Runs Python with `arguments` for at most `seconds`; "done" or what went wrong."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"out of time, see {log}"
    return "done" if status == 0 else f"failed: {_last_line(log)}, see {log}"


def _last_line(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return text.splitlines()[-1].strip("= ") if text else "no output"


if __name__ == "__main__":
    app()
