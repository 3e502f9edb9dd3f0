"""`python -m benchmarks.samples RUN`: docs/samples.svg, a run's last samples, drawn as paths: a picture that is text."""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks import DOCS

GRAYS, SCALE = 10, 2
"""How many shades there are, and the size of a pixel."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="The folder of a run of `fastgan train`, on images of one channel.")],
    rows: Annotated[int, typer.Option(help="Of pixels, from the top of the grid.", min=1)] = 104,
    to: Annotated[Path, typer.Option(help="The file.")] = DOCS / "samples.svg",
) -> None:
    """Draw the last grid of a run's samples."""
    with Image.open(run / "samples" / "final.png") as grid:
        to.write_text(drawn(np.asarray(grid.convert("L"))[:rows]), encoding="utf-8")


def drawn(pixels: np.ndarray) -> str:
    """uint8 (H, W) as an SVG, in which each shade is a path of horizontal strokes."""
    height, width = pixels.shape
    shades = np.round(pixels / 255 * (GRAYS - 1)).astype(int)
    strokes: dict[int, list[str]] = {shade: [] for shade in range(1, GRAYS)}
    pens = dict.fromkeys(strokes, (0, 0))
    for y, line in enumerate(shades.tolist()):
        x = 0
        for shade, pixels_of_run in groupby(line):
            end = x + len(list(pixels_of_run))
            if shade:
                from_x, from_y = pens[shade]
                strokes[shade].append(f"m{x - from_x} {y - from_y}h{end - x}")
                pens[shade] = end, y
            x = end
    paths = [
        f'<path stroke="hsl(0 0% {shade / (GRAYS - 1):.0%})" d="{"".join(found)}"/>' for shade, found in strokes.items()
    ]
    size = f'width="{SCALE * width}" height="{SCALE * height}" viewBox="0 -.5 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} shape-rendering="crispEdges" role="img">'
    return "\n".join([head, f'<rect y="-.5" width="{width}" height="{height}"/>', *paths, "</svg>\n"])


if __name__ == "__main__":
    app()
