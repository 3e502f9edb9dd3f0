"""`python -m benchmarks.readme`: the tables and the bars of README.md, and the pages of plots, from the CSV files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import DOCS, RESULTS
from fastgan.bench import page, suite
from fastgan.bench.results import TITLES, Row, lines, read, slower

README = Path(__file__).parent.parent / "README.md"
SHOWN_LOSSES = 12
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    readme: Annotated[Path, typer.Option(help="The file with the marked region.")] = README,
    folder: Annotated[Path, typer.Option(help="Where the CSV files are.")] = RESULTS,
    bars: Annotated[Path, typer.Option(help="The file of the training steps' bars.")] = DOCS / "steps.svg",
    pages: Annotated[Path, typer.Option(help="Where the pages go.")] = Path("runs/benchmarks"),
) -> None:
    """Rewrite README.md's tables, and draw its bars and the page of each device."""
    devices = [rows for path in sorted(folder.glob("*.csv")) if (rows := read(path))]
    rewrite(readme, "\n\n".join(map(markdown, devices)))
    bars.write_text(steps(devices), encoding="utf-8")
    pages.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.csv")):
        rows = read(path)
        device = torch.device("cuda" if any(row.backend == "triton" for row in rows) else "cpu")
        print(page.write(pages / f"{path.stem}.html", rows, suite.keys(device)))


def rewrite(path: Path, text: str) -> None:
    """Puts `text` into the marked region of the file."""
    before = path.read_text(encoding="utf-8")
    region = re.compile(f"{re.escape(START)}.*{re.escape(END)}", re.DOTALL)
    if not region.search(before):
        raise typer.BadParameter(f"{path} has no region {START} … {END}")
    path.write_text(region.sub(lambda _: f"{START}\n{text}\n{END}", before), encoding="utf-8")


def markdown(rows: Sequence[Row]) -> str:
    """One device: its headline rows as a table, and how all rows do."""
    newest = max(rows, key=lambda row: row.date)
    parts = [
        f"### {newest.device}\n\ntorch {newest.torch}, {newest.backend} kernels, {newest.date}.",
        table(TITLES, lines(row for row in rows if row.headline)),
        _summary(rows),
    ]
    return "\n\n".join(parts)


def steps(devices: Sequence[Sequence[Row]]) -> str:
    """The headline training steps of the device that was measured last, as an SVG."""
    newest = max(devices, key=lambda rows: max(row.date for row in rows))
    return page.template(Path(__file__).parent / "steps.svg.jinja").render(
        device=newest[0].device,
        rows=[row for row in newest if row.work == "training step" and row.headline and row.speedup],
    )


def table(titles: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * 2 + ["---:"] * (len(titles) - 2)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (titles, rule, *body))


def _summary(rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row.speedup]
    losing = slower(rows)
    text = f"Of all {len(compared)} rows {len(compared) - len(losing)} are at least as fast as the best stock PyTorch."
    if len(losing) > SHOWN_LOSSES:
        text += f" The worst {SHOWN_LOSSES} of those that are not:"
    listed = [
        f"- {row.speedup}×: {row.op} {row.work}, {row.shape}, {row.dtype}, {row.layout}, {row.cache}"
        for row in losing[:SHOWN_LOSSES]
    ]
    listed += [
        f"- no speed, {row.gate}: {row.op} {row.work}, {row.shape}, {row.dtype}, {row.layout}"
        for row in rows
        if row.gate != "passed"
    ]
    return "\n\n".join(filter(None, [text, "\n".join(listed)]))


if __name__ == "__main__":
    app()
