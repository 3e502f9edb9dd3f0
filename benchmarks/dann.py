"""`python -m benchmarks.dann`: the accuracies of `fastgan train dann` over several seeds, as a table."""

from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer

from fastgan.training import run

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(help="Runs, each of another seed.", min=2)] = 5,
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/benchmarks"),
) -> None:
    """Train with each seed, and print the accuracies, their means and their standard deviations."""
    columns: dict[str, list[float]] = {}
    seconds = []
    for seed in range(seeds):
        result = run.train("dann", {"seed": seed}, out=out / f"dann-{seed}")
        assert result is not None  # only a resumed run has nothing to do
        seconds.append(result.seconds)
        for name, score in result.scores.items():
            columns.setdefault(name, []).append(score.value)
        print(f"seed {seed}: {', '.join(f'{name} {values[-1]:.1%}' for name, values in columns.items())}", flush=True)
    print(f"\n| | mean of {seeds} seeds | standard deviation |\n|---|---:|---:|")
    for name, values in columns.items():
        print(f"| {name} | {mean(values):.1%} | {stdev(values):.1%} |")
    print(f"\n{mean(seconds):.0f} s a run")


if __name__ == "__main__":
    app()
