"""The command line of the benchmarks."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import results, suite
from benchmarks.results import Row
from fastgan import backend
from fastgan.training import keep_freed_memory

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(suite.PARTS)}.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    minutes: Annotated[float, typer.Option(help="For all parts together; the rest is not measured.")] = 12,
    text: Annotated[str, typer.Option("-k", help="Only cases with this in their names.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the CSV files.")] = results.RESULTS,
) -> None:
    """Measure fastgan against stock PyTorch."""
    console = Console(width=None if Console().is_terminal else 150)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    unknown = [part for part in parts or () if part not in suite.PARTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: expected {', '.join(suite.PARTS)}")
    if backend.serving(where.type) == "reference":
        why = backend.obstacle("triton" if where.type == "cuda" else "cpp", where.type) or "FASTGAN_BACKEND=reference"
        raise typer.BadParameter(f"no kernels to measure on {where}: {why}")
    if where.type == "cpu":
        keep_freed_memory()  # whoever allocates after whom decides else who asks the system for pages
    path = results.results_path(where, out)
    end = time.perf_counter() + 60 * minutes
    chosen = list(parts or suite.PARTS)
    measured: list[Row] = []
    for i, part in enumerate(chosen):
        seconds = (end - time.perf_counter()) / (len(chosen) - i)
        rows = _measure(part, where, seconds, text, path, console)
        console.print(table(part, rows))
        measured += rows
    for row in results.slower(measured):
        console.print(f"slower than stock: {row.speedup}x {' '.join(row.key[1:])}", soft_wrap=True, highlight=False)
    console.print(f"{len(measured)} rows in {path}", soft_wrap=True)


def _measure(part: str, device: torch.device, seconds: float, text: str, path: Path, console: Console) -> list[Row]:
    selected = suite.cases(part, device, text)
    rows: list[Row] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(part, total=len(selected))
        for row in suite.measure(part, selected, device, seconds):
            results.merge(path, [row], drop_part=None if text or rows else part)
            rows.append(row)
            bar.advance(task)
    for case in selected[len(rows) :]:
        console.print(f"not measured, the minutes are over: {case.name}", soft_wrap=True)
    return rows


def table(title: str, rows: list[Row]) -> Table:
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(results.TITLES):
        made.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for line in results.lines(rows):
        made.add_row(*line)
    return made
