"""What this repository measures with `fastgan.bench`: its results for each device, and the README's tables of them."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
