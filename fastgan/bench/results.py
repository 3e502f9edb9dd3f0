"""Rows of results, the CSV file that keeps them for each device, and tables."""

import csv
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

import torch

from fastgan import backend
from fastgan.bench.case import OURS, Case, Contest, Key
from fastgan.bench.timing import matmul_flops_per_s

QUICK = "quick"
"""The note of rows that were measured in few rounds, and without torch.compile among the peers."""


@dataclass
class Row:
    """One line of the CSV. An empty cell was not measured."""

    part: str
    op: str
    work: str
    shape: str
    dtype: str
    layout: str
    cache: str
    headline: str
    fastgan_ms: str = ""
    best_stock: str = ""
    best_stock_ms: str = ""
    speedup: str = ""  # best_stock_ms / fastgan_ms
    stock_ms: str = ""  # every peer as name=ms
    copy_ms: str = ""
    copies: str = ""  # fastgan_ms / copy_ms
    of_floor: str = ""  # what bytes and FLOPs take at the speed of copy_ and of a matrix product, over fastgan_ms
    saved_mb: str = ""
    stock_saved_mb: str = ""
    peak_mb: str = ""
    stock_peak_mb: str = ""
    gate: str = ""
    note: str = ""
    date: str = ""
    torch: str = ""
    backend: str = ""
    device: str = ""

    @property
    def key(self) -> Key:
        return self.part, self.op, self.work, self.shape, self.dtype, self.layout, self.cache

    @property
    def over_first(self) -> str:
        """The speedup over the first peer: NCHW, or the tutorial's code."""
        return f"{next(iter(self.peers.values())) / float(self.fastgan_ms):.2f}" if self.fastgan_ms else ""

    @property
    def peers(self) -> dict[str, float]:
        """Milliseconds of every peer."""
        return {name: float(ms) for name, ms in (pair.rsplit("=", 1) for pair in self.stock_ms.split("; ") if pair)}


def make_row(case: Case, contest: Contest, seconds: dict[str, float], device: torch.device) -> Row:
    """What a contest has shown: without our time where the gate refuses it, without any where nothing was timed."""
    row = Row(
        *case.key,
        headline="yes" if case.headline else "",
        gate=contest.gate or "passed",
        note="; ".join(contest.notes),
        date=date.today().isoformat(),
        torch=torch.__version__,
        backend=backend.serving(device.type),
        device=device_name(device),
    )  # fmt: skip
    peers = {name: time for name, time in seconds.items() if name in contest.contenders and name != OURS}
    if not peers:
        return row
    row.stock_ms = "; ".join(f"{name}={_number(time * 1e3)}" for name, time in peers.items())
    best = min(peers, key=lambda name: peers[name])
    row.best_stock, row.best_stock_ms = best, _number(peers[best] * 1e3)
    first = next(iter(peers))
    for column, weights in (("saved_mb", contest.saved), ("peak_mb", contest.peak)):
        for name, prefix in ((OURS, ""), (first, "stock_")):
            if name in weights:
                setattr(row, prefix + column, _number(weights[name] / 1e6))
    copy = seconds.get("copy_")
    if copy is not None:
        row.copy_ms = _number(copy * 1e3)
    if contest.gate or OURS not in seconds:
        return row
    ours = seconds[OURS]
    row.fastgan_ms, row.speedup = _number(ours * 1e3), f"{peers[best] / ours:.2f}"
    floor = contest.flops / matmul_flops_per_s(case.dtype, device) if contest.flops else 0.0
    if copy is not None:
        row.copies = f"{ours / copy:.2f}"
        floor = max(floor, contest.bytes_moved * copy / contest.floor_bytes)
    if floor:
        row.of_floor = f"{floor / ours:.2f}"
    return row


def _number(value: float) -> str:
    """Four significant digits, without an exponent."""
    digits = 3 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(digits, 0)}f}"


# ── The file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found.group(1) if found else platform.processor() or platform.machine()
    # Where the model's name says little, as on virtual machines, the instructions tell generations apart.
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def results_path(device: torch.device, folder: Path, quick: bool = False) -> Path:
    """The file of a device. Quick results have one of their own: better ones should not be lost to them."""
    plain = re.sub(r"\((R|TM)\)", "", device_name(device))
    return folder / (re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") + "-quick" * quick + ".csv")


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file. Raises `ValueError` if it holds something else."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != [field.name for field in fields(Row)]:
            raise ValueError("its first line does not name the columns of results")
        return [_row(line, reader.line_num) for line in reader]


def _row(line: dict[str, str], number: int) -> Row:
    if None in line or None in line.values():
        raise ValueError(f"line {number} has not as many cells as there are columns")
    row = Row(**line)
    try:
        for cell in (row.fastgan_ms, row.best_stock_ms, row.speedup, row.of_floor):
            float(cell or 0)
        _ = row.peers
    except ValueError:
        raise ValueError(f"line {number} has something else where numbers should be") from None
    return row


def merge(path: Path, rows: Iterable[Row], drop_part: str | None = None) -> None:
    """Puts `rows` into the file, in the place of rows with the same key; first drops all of `drop_part`."""
    merged = {row.key: row for row in read(path) if row.part != drop_part}
    merged |= {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in sorted(merged.values(), key=lambda row: row.part))
    os.replace(partial, path)


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TITLES = ("", "", "fastgan ms", "best stock ms", "speedup", "× as written", "× copy_", "of floor", "MB saved", "stock")
Line = tuple[str, ...]


def lines(rows: Iterable[Row]) -> list[Line]:
    """Rows as the cells of a table with `TITLES`."""
    return [
        (
            f"{row.op} {row.work}",
            ", ".join(filter(None, [row.shape, row.dtype, row.layout, "cold" if row.cache == "cold" else ""])),
            row.fastgan_ms or (row.note if row.gate == "passed" else f"gate: {row.gate}"),
            f"{row.best_stock_ms} {row.best_stock}",
            row.speedup,
            row.over_first,
            row.copies,
            row.of_floor,
            row.saved_mb,
            row.stock_saved_mb,
        )
        for row in rows
    ]


def slower(rows: Sequence[Row]) -> list[Row]:
    """Those that lose against stock PyTorch, the worst first."""
    return sorted((row for row in rows if row.speedup and float(row.speedup) < 1), key=lambda row: float(row.speedup))
