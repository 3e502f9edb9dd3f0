"""`python -m benchmarks [OPTION ...]`: `fastgan bench`, from a checkout and into `benchmarks/results/`."""

import sys

import typer

from benchmarks import RESULTS
from fastgan.bench.command import bench

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(bench)
app(["--out", str(RESULTS), *sys.argv[1:]])
