"""`python -m benchmarks.readme`: the tables of README.md and the plots, from the CSV files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.results import RESULTS, TITLES, Row, lines, read, slower

README = Path(__file__).parent.parent / "README.md"
SHOWN_LOSSES = 12
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    readme: Annotated[Path, typer.Option(help="The file with the marked region.")] = README,
    folder: Annotated[Path, typer.Option(help="Where the CSV files are.")] = RESULTS,
    plots: Annotated[Path, typer.Option(help="Where the plots go.")] = Path("runs/benchmarks"),
) -> None:
    """Rewrite README.md's tables, and draw the training steps of each device."""
    devices = [read(path) for path in sorted(folder.glob("*.csv"))]
    rewrite(readme, "\n\n".join(markdown(rows) for rows in devices if rows))
    for path in sorted(folder.glob("*.csv")):
        print(plot(read(path), plots / f"{path.stem}.png"))


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


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Bars of the time of a training step: stock PyTorch's variants, and ours."""
    from matplotlib import pyplot as plt

    steps = [row for row in rows if row.part == "training" and row.fastgan_ms]
    figure, axes = plt.subplots(1, max(1, len(steps)), figsize=(5 * max(1, len(steps)), 3), squeeze=False)
    for axis, row in zip(axes[0], steps, strict=False):
        times = {**row.peers, "fastgan": float(row.fastgan_ms)}
        colors = ["tab:orange" if name == "fastgan" else "tab:gray" for name in times]
        axis.bar_label(axis.barh(list(times), list(times.values()), color=colors), fmt="%.0f")
        axis.invert_yaxis()
        axis.set(title=f"{row.op} {row.work}, {row.dtype}", xlabel="ms")
    figure.suptitle(rows[0].device)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    app()
