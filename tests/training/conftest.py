import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fastgan.training import run
from fastgan.training.dcgan import DCGAN, DCGANSettings

TINY = {"image_size": 8, "batch_size": 128, "features": 4, "latent_dim": 5}
"""14 steps an epoch on the digits."""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one state per process; each test is a run of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread) -> None:
    """Networks this small gain nothing from more, and on a busy machine lose much."""


@pytest.fixture(autouse=True)
def quick_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "COMPARE_SECONDS", {False: 0.01, True: 0.1})


@pytest.fixture
def full_disk() -> Callable[..., Any]:
    """While `full_disk(at=size)` is open, no file grows past `size` bytes, as if the disk were full."""

    @contextmanager
    def full_disk(at: int) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return full_disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def make_system(accelerator: Accelerator) -> Callable[..., DCGAN]:
    """Builds a small DCGAN; the same seed gives the same weights."""

    def make(seed: int = 0, **settings: Any) -> DCGAN:
        torch.manual_seed(seed)
        return DCGAN(DCGANSettings(**TINY | settings), channels=1, accelerator=accelerator)

    return make


@pytest.fixture
def train() -> Callable[..., run.Result | None]:
    """`run.train` on the digits, small and stock unless told otherwise."""

    def train(out: Path, settings: dict[str, Any] | None = None, **options: Any) -> run.Result | None:
        given = settings or {} if options.get("resume") else TINY | {"fuse": False} | (settings or {})
        return run.train("dcgan", given, **{"out": out, "device": "cpu"} | options)

    return train
