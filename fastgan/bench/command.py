"""`fastgan bench`: measures, prints tables, and writes `<device>.csv` and a page of plots."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from fastgan import backend
from fastgan.bench import page, results, suite
from fastgan.bench.case import Case
from fastgan.bench.changes import Comparison
from fastgan.bench.results import Row
from fastgan.training import keep_freed_memory

MINUTES, QUICK_MINUTES = 12.0, 2.0


def bench(
    op: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Of {', '.join(suite.OPERATORS)}. May be given again.", show_default="all"),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Its training step: of {', '.join(suite.MODELS)}.", show_default="all"),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Headline cases, in few rounds, without torch.compile; of everything one of each operator, and DCGAN.",
        ),
    ] = False,
    text: Annotated[str, typer.Option("-k", metavar="TEXT", help="Only cases with this in their names.")] = "",
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="For everything; the rest is not measured.", show_default="12, with --quick 2"),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An earlier CSV file: show what has changed since.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for <device>.csv, to which rows are added, and <device>.html.")
    ] = Path("runs/bench"),
) -> None:
    """Measure fastgan against stock PyTorch on this machine."""
    parts = _parts(op, model)
    where = _device(device)
    earlier = _earlier(against)
    if quick:
        kinds = {"operators": suite.OPERATORS, "models": suite.MODELS}
        groups = {
            kind: suite.in_turn(suite.quick_cases(part, where, text) for part in known if part in parts)
            for kind, known in kinds.items()
        }
        if not (op or model or text):
            groups = {"operators": suite.one_of_each(groups["operators"]), "models": groups["models"][:1]}
    else:
        groups = {part: suite.cases(part, where, text) for part in parts}
    groups = {name: cases for name, cases in groups.items() if cases}
    if not groups:
        raise typer.BadParameter(f"no case of {', '.join(parts)} has {text!r} in its name", param_hint="-k")
    path = results.results_path(where, out, quick)
    _prepare(path)
    if where.type == "cpu":
        keep_freed_memory()  # or the time of a large tensor is that of its page faults
    seconds = 60 * (minutes if minutes is not None else QUICK_MINUTES if quick else MINUTES)

    console = Console(width=None if Console().is_terminal else 150)
    measured = _measure(groups, where, seconds, path, console, drop=not text and not quick)
    for row in results.slower(measured):
        console.print(f"slower than stock: {row.speedup}x {' '.join(row.key[1:])}", soft_wrap=True, highlight=False)
    comparison = Comparison(earlier, measured) if earlier else None
    if comparison:
        console.print(changes_table(comparison, str(against)))
        console.print(f"{comparison.summary}. {comparison.basis}", soft_wrap=True, highlight=False)
    known = [case.key for cases in groups.values() for case in cases] if quick else suite.keys(where)
    html = page.write(path.with_suffix(".html"), results.read(path), known, comparison)
    rows = "1 row" if len(measured) == 1 else f"{len(measured)} rows"
    console.print(f"{rows} in {path}, and a page of plots, {html}", soft_wrap=True)


def _parts(op: list[str] | None, model: list[str] | None) -> list[str]:
    chosen = []
    for option, names, known in (("--op", op, suite.OPERATORS), ("--model", model, suite.MODELS)):
        for name in names or ():
            if name.replace("-", "_") not in known:
                raise typer.BadParameter(f"there is no {name}; there are {', '.join(known)}", param_hint=option)
            chosen.append(name.replace("-", "_"))
    return list(dict.fromkeys(chosen)) or list(suite.PARTS)


def _device(name: str) -> torch.device:
    """The device of that name. It has kernels to measure, or this is an error."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    known = ["auto", "cpu", *["cuda"] * torch.cuda.is_available()]
    if name not in known:
        raise typer.BadParameter(f"there is no {name} here; there are {', '.join(known)}", param_hint="--device")
    device = torch.device(name)
    if backend.serving(device.type) == "reference":
        why = backend.obstacle("triton" if device.type == "cuda" else "cpp", device.type) or "FASTGAN_BACKEND=reference"
        raise typer.BadParameter(f"no kernels to measure on {device}: {why}", param_hint="--device")
    return device


def _earlier(path: Path | None) -> list[Row]:
    if path is None:
        return []
    if not path.exists():
        raise typer.BadParameter(f"there is no {path}", param_hint="--against")
    rows = _rows_of(path, "--against")
    if not rows:
        raise typer.BadParameter(f"{path} has no rows", param_hint="--against")
    return rows


def _rows_of(path: Path, option: str) -> list[Row]:
    try:
        return results.read(path)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {path} ({error.strerror})", param_hint=option) from error
    except (ValueError, csv.Error) as error:
        raise typer.BadParameter(f"{path} is no CSV file of results: {error}", param_hint=option) from error


def _prepare(path: Path) -> None:
    """Writes what is in the file: minutes are not to be spent on what then cannot be kept."""
    _rows_of(path, "--out")
    try:
        results.merge(path, [])
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path} ({error.strerror})", param_hint="--out") from error


def _measure(
    groups: dict[str, list[Case]], device: torch.device, seconds: float, path: Path, console: Console, drop: bool
) -> list[Row]:
    """Each group has its share of the time. `drop`: its first row takes the place of all that the file had of that part."""
    end = time.perf_counter() + seconds
    measured: list[Row] = []
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(map(len, groups.values())))
        for i, (name, cases) in enumerate(groups.items()):
            rows: list[Row] = []
            share = (end - time.perf_counter()) / (len(groups) - i)
            names = iter([case.name for case in cases] + [""])
            bar.update(task, description=next(names))
            for row in suite.measure(cases, device, share):
                results.merge(path, [row], drop_part=None if rows or not drop else row.part)
                rows.append(row)
                bar.update(task, advance=1, description=next(names))
            if rows:
                console.print(table(name, rows))
            for case in cases[len(rows) :]:
                console.print(f"not measured, the minutes are over: {case.name}", soft_wrap=True)
            bar.advance(task, len(cases) - len(rows))
            measured += rows
    return measured


def table(title: str, rows: Sequence[Row]) -> Table:
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(results.TITLES):
        made.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for line in results.lines(rows):
        made.add_row(*line)
    return made


def changes_table(comparison: Comparison, file: str) -> Table:
    made = Table(title=f"Against {file}", title_justify="left")
    for i, name in enumerate(("", "", "ms then", "ms now", "× stock then", "now", "change")):
        made.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for change in comparison.changes:
        op, shape, *_ = next(iter(results.lines([change.now])))
        ratios = [f"{ratio:.2f}" for ratio in change.ratios] if change.ratios else ["", ""]
        style = "dim" if comparison.is_noise(change) else None
        verdict = comparison.verdict(change)
        made.add_row(op, shape, change.then.fastgan_ms, change.now.fastgan_ms, *ratios, verdict, style=style)
    return made
