"""What mkdocs fills into the pages: figures from benchmarks/results, options of the command line, and links to names.

`<!-- figures: OPERATOR, OPERATOR -->` stands for what was measured of them, `<!-- figures: all -->` for all that was, and
`<!-- options: train dcgan -->` for a table of that command's options, `<!-- predictions: GPU -->` for what operators would
take there at least.
"""

import functools
import importlib
import re
from textwrap import indent
from typing import Any

import typer
from mkdocs.exceptions import PluginError

from benchmarks import RESULTS
from benchmarks.readme import markdown, table
from fastgan.bench.prediction import H200, predictions
from fastgan.bench.results import TITLES, Row, lines, read
from fastgan.cli import app

MARK = re.compile(r"<!-- (figures|options|predictions): (.+) -->")
NAME = re.compile(r"<code>(fastgan(?:\.\w+)+)</code>")


def on_page_markdown(text: str, **_: Any) -> str:
    fill = {"figures": figures, "options": options, "predictions": predicted}
    return MARK.sub(lambda mark: fill[mark[1]](mark[2]), text)


def on_page_content(html: str, **_: Any) -> str:
    """Has a name of the library in the text lead to where it is described."""
    return NAME.sub(lambda found: f'<autoref optional identifier="{path(found[1])}">{found[0]}</autoref>', html)


def predicted(name: str) -> str:
    """What the headline cases would take at least on the GPU of that name, beside what was measured on it."""
    measured = {row.key: row for path in RESULTS.glob("*.csv") for row in read(path) if row.device == name}
    body = []
    for case, moved, flops, ms in predictions(next(gpu for gpu in (H200,) if gpu.name == name)):
        found = measured.get(case.key)
        works = f"{flops / 1e9:.2f}" if flops else ""
        time = found.fastgan_ms if found and found.fastgan_ms else "not measured"
        if not moved:
            continue  # there is nothing that a kernel would have to do
        op, shape, *_ = next(iter(lines([Row(*case.key, headline="yes")])))
        body.append((op, shape, f"{moved / 1e6:.1f}", works, f"{ms:.4f}", time))
    return table(("", "", "MB moved", "GFLOP", "predicted ms", "measured ms"), body)


def figures(names: str) -> str:
    measured = [read(path) for path in sorted(RESULTS.glob("*.csv"))]
    if names == "all":
        return "\n\n".join(markdown(rows) for rows in measured)
    wanted = names.split(", ")
    unknown = set(wanted) - {row.op for rows in measured for row in rows}
    if unknown:
        raise PluginError(f"nothing was measured of {', '.join(sorted(unknown))}")
    chosen = [[row for row in rows if row.op in wanted] for rows in measured]
    return "\n\n".join(_device(rows) for rows in chosen if rows)


def _device(rows: list[Row]) -> str:
    whole = indent(table(TITLES, lines(rows)), "    ")
    return f'{markdown(rows)}\n\n??? note "All {len(rows)} rows"\n\n{whole}'


def options(command: str) -> str:
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    rows = [
        (f"`{' / '.join([*option.opts, *option.secondary_opts])}`", option.help or "", _default(option))
        for option in found.params
        if option.param_type_name == "option"
    ]
    return table(("option", "", "default"), rows)


def _default(option: Any) -> str:
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    return "" if shown is None or shown is False else str(shown)


@functools.cache
def path(name: str) -> str:
    """The name under which a page describes what is called so: `fastgan.ops.adain.adain` for `fastgan.ops.adain`."""
    package, *rest = name.split(".")
    try:
        found: Any = functools.reduce(getattr, rest, importlib.import_module(package))
    except AttributeError:
        return name
    return f"{found.__module__}.{found.__qualname__}" if hasattr(found, "__qualname__") else name
