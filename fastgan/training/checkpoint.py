"""Checkpoints: written whole or not at all, and read without running code from the file."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastgan.training.errors import InputError, writing

FORMAT = "fastgan checkpoint 1"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the place of `path` when the block succeeds, and leaves no trace when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes `state` (tensors, containers and plain values only), replacing the checkpoint that was there."""
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch.save complains of what the failed write left unfinished
                raise error.__context__ from None
            raise


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, with every tensor on the CPU. Raises `InputError` for anything else."""
    expected = "expected one written by `fastgan train`"
    if not os.path.isfile(path):  # which, unlike pathlib's, takes names of any length
        raise InputError(f"{path}: no checkpoint there; {expected}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its guesses about a stray file
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own: a stray file may raise nearly anything
        raise InputError(f"{path}: not a fastgan checkpoint ({type(error).__name__}); {expected}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not a fastgan checkpoint; {expected}")
    return state


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The random number generators that training draws from: torch's on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_state(device: torch.device, state: Mapping[str, torch.Tensor]) -> None:
    """Restores `rng_state`. A generator that the saving machine did not have keeps its seed."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])
