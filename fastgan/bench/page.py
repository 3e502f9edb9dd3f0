"""The page of a file of results: plots and tables as one HTML file that needs nothing else, not even a network."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fastgan.bench.case import OURS, Key
from fastgan.bench.changes import Comparison, devices
from fastgan.bench.results import QUICK, Row, slower

BACKENDS = {"cpp": "C++", "triton": "Triton"}


@dataclass(frozen=True)
class Axis:
    """Where values stand, as parts of the width, and at the edge if they are beyond it. Every page has the same axes."""

    low: float
    high: float
    ticks: dict[float, str]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        scale = math.log if self.logarithmic else float
        low, high, here = map(scale, (self.low, self.high, min(max(value, self.low), self.high)))
        return (here - low) / (high - low)


RATIO = Axis(1 / 4, 16, {1 / 4: "¼×", 1 / 2: "½×", 1: "1×", 2: "2×", 4: "4×", 8: "8×", 16: "16×"}, logarithmic=True)
FLOOR = Axis(0, 1.5, {0: "0", 0.5: "0.5", 1: "1"})


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    good: bool
    title: str


@dataclass(frozen=True)
class Strip:
    """One part in the plot of all cases: a dot for each."""

    part: str
    ratios: list[Dot]
    floors: list[Dot]
    median_ratio: float
    half_height: float


DOT, TALLEST = 3.2, 45
"""The radius of a dot, and half of what the dots of a part may stand high; more of them overlap."""
RATIO_WIDTH, FLOOR_WIDTH = 480, 300


def write(path: Path, rows: Sequence[Row], known: Iterable[Key], comparison: Comparison | None = None) -> Path:
    """Draws `rows`. Those of the `known` cases, by key, that are not among them are listed as not measured."""
    measured = {row.key for row in rows}
    unmeasured = [key for key in known if key not in measured]
    compared = [row for row in rows if row.speedup]
    html = template(Path(__file__).parent / "page.html").render(
        device=devices(rows),
        torch=", ".join(sorted({row.torch for row in rows})),
        backend=", ".join(sorted({BACKENDS.get(row.backend, row.backend) for row in rows})),
        dates=sorted({row.date for row in rows}),
        quick=any(QUICK in row.note.split("; ") for row in rows),
        rows=rows,
        compared=compared,
        losing=slower(rows),
        failed=[row for row in rows if row.gate != "passed"],
        untimed=[row for row in rows if row.gate == "passed" and not row.speedup],
        unmeasured={part: list(keys) for part, keys in groupby(unmeasured, key=lambda key: key[0])},
        unmeasured_count=len(unmeasured),
        known_count=len(rows) + len(unmeasured),
        median_ratio=median(float(row.speedup) for row in compared) if compared else None,
        median_floor=median(found) if (found := [float(row.of_floor) for row in rows if row.of_floor]) else None,
        steps=[
            (row, {OURS: float(row.fastgan_ms), **row.peers})
            for row in rows if row.work == "training step" and row.fastgan_ms
        ],
        headlines=[row for row in rows if row.headline],
        strips=strips(compared),
        comparison=comparison,
        ratio=RATIO, floor=FLOOR, ratio_width=RATIO_WIDTH, floor_width=FLOOR_WIDTH, dot=DOT,
        by_op=by_op,
    )  # fmt: skip
    path.write_text(html, encoding="utf-8")
    return path


def template(path: Path) -> Template:
    """That of a picture or a page."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(path.name)


def by_op(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """The rows under the names of what they measure, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.op, []).append(row)
    return list(found.items())


def strips(rows: Sequence[Row]) -> list[Strip]:
    found = []
    for part in dict.fromkeys(row.part for row in rows):
        own = [row for row in rows if row.part == part]
        with_floor = [row for row in own if row.of_floor]
        ratios = swarm([(RATIO.at(float(row.speedup)) * RATIO_WIDTH, row) for row in own])
        floors = swarm([(FLOOR.at(float(row.of_floor)) * FLOOR_WIDTH, row) for row in with_floor])
        height = max(abs(dot.y) for dot in ratios + floors) + DOT
        found.append(Strip(part, ratios, floors, median(float(row.speedup) for row in own), min(height, TALLEST)))
    return found


def swarm(placed: Sequence[tuple[float, Row]]) -> list[Dot]:
    """Dots at their x, moved up and down so that none covers another, as far as there is room."""
    dots: list[Dot] = []
    for x, row in sorted(placed, key=lambda pair: pair[0]):
        lanes = (sign * lane * 2 * DOT for lane in range(len(placed)) for sign in (1, -1))
        near = [dot for dot in dots if x - dot.x < 2 * DOT]
        y = next(y for y in lanes if all(math.hypot(x - dot.x, y - dot.y) >= 1.99 * DOT for dot in near))
        floor = f", {row.of_floor} of the floor" if row.of_floor else ""
        title = f"{', '.join(row.key[1:])}: {row.speedup}× {row.best_stock}{floor}"
        dots.append(Dot(x, y, float(row.speedup) >= 1, title))
    room = TALLEST / max([TALLEST, *(abs(dot.y) for dot in dots)])
    return [replace(dot, y=room * dot.y) for dot in dots]
