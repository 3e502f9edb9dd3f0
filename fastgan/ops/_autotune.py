"""Which of several ways to compute the same is the fastest on this GPU: measured once for each shape, and kept on disk.

The winners are in `choices.json` of `$FASTGAN_CACHE_DIR`, else of `fastgan` in the user's cache (`$XDG_CACHE_HOME`, else
`~/.cache`), beside the milliseconds of all candidates, for each GPU and version of torch, Triton and fastgan.
`FASTGAN_AUTOTUNE=0` takes the first candidate everywhere, and neither measures nor reads nor writes.
"""

import functools
import importlib.metadata
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Candidates = Mapping[str, Callable[[], Any]]
"""By name, what computes a tensor, or several of which the first counts. The first candidate is right, and the choice where
nothing is measured."""

_ROUNDS = 5
_MILLISECONDS = 2.0
"""Of all rounds of one candidate, unless a round takes longer."""
_MOST = 512
"""Shapes that a process measures: where they keep changing, measuring would never end."""

_known: dict[tuple, dict[str, float]] = {}
_lock = threading.RLock()
_measured = 0


def choose(operator: str, device: torch.device, key: tuple, candidates: Callable[[], Candidates]) -> str:
    """The name of the fastest candidate. `key`: what of the arguments decides, all that can be printed and compared."""
    place = (operator, device, key)
    known = _known.get(place)
    if known is None:
        with _lock:
            known = _known.get(place) or _find(place, candidates())
    return next(iter(known))


def chosen() -> Iterator[tuple[str, dict[str, float]]]:
    """Everything that has been chosen in this process: the operator, and the milliseconds of its candidates, the choice
    first."""
    for (operator, _, _), times in _known.items():
        yield operator, times


def is_on() -> bool:
    """Whether `FASTGAN_AUTOTUNE` lets candidates be measured."""
    return os.environ.get("FASTGAN_AUTOTUNE", "1") != "0"


def reset() -> None:
    """Forget what has been chosen in this process."""
    global _measured
    _known.clear()
    _measured = 0


def _find(place: tuple, candidates: Candidates) -> dict[str, float]:
    """Milliseconds of the candidates, the fastest first; of none but the first where nothing may be measured now."""
    global _measured
    operator, device, key = place
    fixed = {next(iter(candidates)): math.nan}
    if not is_on():
        return fixed
    path, environment, written = _path(), _environment(device), _written(operator, key)
    times = _sorted(_read(path).get(environment, {}).get(written, {}))
    if next(iter(times), None) not in candidates:
        if _measured >= _MOST or _is_capturing(device):
            return fixed
        _measured += 1
        times = _sorted(_measure(candidates, device))
        _write(path, environment, written, times)
    _known[place] = times
    return times


def _sorted(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: item[1]))


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _measure(candidates: Candidates, device: torch.device) -> dict[str, float]:
    """Milliseconds of each candidate that gives what the first gives; in turn, so that what disturbs the GPU hits all
    alike."""
    calls: dict[str, int] = {}
    expected: Tensor | None = None
    with torch.no_grad():
        for name, run in candidates.items():
            try:
                found = run()  # compiles
                found = found if isinstance(found, Tensor) else found[0]
                if expected is None:
                    expected = found
                elif not _is_close(found, expected):
                    logger.warning("%s computes something else and is not used", name)
                    continue
                once = _milliseconds(run, 1, device)
                calls[name] = max(1, min(100, int(_MILLISECONDS / _ROUNDS / max(once, 1e-3))))
            except Exception as error:  # no memory for it, or a GPU that it is too large for
                if expected is None:
                    raise
                logger.info("%s is not used: %s", name, error)
        expected = found = None  # the rounds need no more memory than the candidates
        rounds = [
            {name: _milliseconds(candidates[name], count, device) for name, count in calls.items()}
            for _ in range(_ROUNDS)
        ]
    return {name: median(of_round[name] for of_round in rounds) for name in calls}


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by the rounding of products at most, of which TF32's is the roughest."""
    difference, size = (found.float() - expected.float()).norm(), expected.float().norm()
    return bool((difference <= 0.02 * size) | ~size.isfinite())


def _milliseconds(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Of one call."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls


# ── The file ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _path() -> Path:
    folder = os.environ.get("FASTGAN_CACHE_DIR")
    if folder:
        return Path(folder) / "choices.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgan" / "choices.json"


@functools.cache
def _environment(device: torch.device) -> str:
    """What has to be the same for a time to hold."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = (f"{package} {_version(package)}" for package in ("triton", "fastgan"))
    return ", ".join((name, f"torch {torch.__version__}", *versions))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout
        return "not installed"


def _written(operator: str, key: tuple) -> str:
    return f"{operator} {json.dumps(key, default=str, separators=(',', ':'))}"


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What the file says, or nothing where it says nothing that can be understood."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            environment: {
                key: {str(name): float(time) for name, time in of_key.items()} for key, of_key in of_environment.items()
            }
            for environment, of_environment in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, environment: str, key: str, measured: dict[str, float]) -> None:
    """Add to what the file says. Another process that does so at the same moment may undo it, which costs a measurement."""
    content = _read(path)
    content.setdefault(environment, {})[key] = measured
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        logger.info("%s cannot be written: %s", path, error)
